"""
The GPT that every stage shares. From top to bottom: config and presets; norms, positions, attention, blocks; initial
weights; loss; the model, its cache and generation engine; parameters, FLOPs and peaks; the plan of memory and time;
processes and parallelism; safetensors and run directories; Hugging Face both ways.

    p(x_1 … x_T) = Π_t p(x_t | x_<t),    loss = -1/T Σ_t log p(x_t | x_<t)   (nats per token)

GPT-2 (Radford et al. 2019) and LLaMA (Touvron et al. 2023) are two points of one `GPTConfig`; so is
the `nano` default, which reaches GPT-2's loss in less time (README, "Time to quality").

    python model.py info gpt2                           # sizes of a preset, a run or a Hugging Face model
    python model.py import HuggingFaceTB/SmolLM2-135M --out out/smollm2
    python model.py export out/base --out hf            # for transformers, vLLM, llama.cpp's converter
    python model.py memory gpt2 --micro_batch 32        # bytes a GPU holds, row by row; --params 7.5e9 --gpus 64: ZeRO
    python model.py flops gpt2 --device H100 --batch 8  # FLOPs, bytes and the least time for them
"""
import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.tensor
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bpe import BEGINS, BadInput, Tokenizer, chat_stops, cli, hub, is_hub_name, read_json, replace_file

try:  # comes with torch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# -----------------------------------------------------------------------------
# Config


@dataclass
class GPTConfig:
    block_size: int = 128        # longest context T
    vocab_size: int = 1024       # real ids; the embedding is padded to a multiple of 64 inside
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0           # 0: n_head (MHA); fewer: GQA; 1: MQA
    n_embd: int = 128            # width C of the residual stream
    head_dim: int = 0            # 0: n_embd / n_head
    n_hidden: int = 0            # MLP width; 0: 4 C, or 8/3 C rounded up to 64 for a gated MLP
    # layers
    norm: str = "layernorm_plain"  # see NORMS
    norm_eps: float = 1e-5
    place: str = "pre"           # of the norms, see Block: pre | post | sandwich | deepnorm | parallel | parallel2
    act: str = "relu2"           # see ACTIVATIONS
    attn: str = "full"           # who sees whom, a layer: full | window | strided, or a cycle such as full,window
    window: int = 0              # of window and strided, see visible
    qk_norm: bool = True         # normalize queries and keys per head (Henry et al. 2020)
    qk_norm_all: bool = False    # or over all heads together (OLMoE)
    attn_scale: float = 0.0      # of q kᵀ; 0: 1 / sqrt(head_dim)
    prefix_lm: bool = False      # the prompt's tokens see each other (UniLM, T5, ChatGLM): see forward's prefix
    share: int = 1               # layers in a row that use one block; n_layer: ALBERT (Lan et al. 2020)
    resid_scale: float = 1.0     # x + resid_scale · f(x)
    resid_mix: bool = False      # before block l: x ← λ_l x + μ_l x_0, λ and μ learned, from 1 and 0
    # positions
    pos: str = "rope"            # learned | sinusoidal | rope | alibi | t5 | none
    rope_theta: float = 10000.0
    rope_dim: int = 0            # leading entries of a head that rotate; 0: all
    rope_scaling: str = "none"   # none | linear | ntk | yarn | llama3: longer contexts, see rope_frequencies
    rope_factor: float = 1.0     # the new context over the old
    rope_original: int = 0       # the old context
    rope_low: float = 1.0        # turns in the old context below which a pair is interpolated (yarn's beta_slow)
    rope_high: float = 0.0       # and above which it is left alone; 0: 32 (yarn's beta_fast), 4 (llama3)
    rope_attn: float = 0.0       # factor on cos and sin; 0: 0.1 ln(rope_factor) + 1 with yarn, else 1
    alibi_scale: float = 1.0     # Falcon divides the bias by sqrt(head_dim) too
    # embedding and head
    embd_norm: bool = True       # normalize the token embedding before the first block
    embd_dim: int = 0            # width of the embedding table; 0: C; less: factorized, matrices to C and back (ALBERT)
    embd_scale: float = 1.0      # of the token embedding; sqrt(C) in Vaswani et al. and Gemma
    tied: bool = False           # head shares the token embedding's matrix
    logit_scale: float = 1.0
    softcap: float = 0.0         # logits ← cap · tanh(logits / cap) (Gemma 2); 0: none
    bias: bool = False           # in every Linear of the blocks and every LayerNorm, unless one of these says otherwise
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    dropout: float = 0.0
    init: str = "zero"           # see INIT
    scalar_head: bool = False    # adds a Linear C → 1: reward and value models
    # mixture of experts, see moe.py
    n_expert: int = 0            # MLPs of a layer, of which a router picks some for each token; 0: one MLP for all
    n_expert_active: int = 2     # so many
    n_expert_shared: int = 0     # so many more widths of an expert, always active
    expert_hidden: int = 0       # width of an expert; 0: n_hidden
    moe_every: int = 1           # layers that have experts: each so-many-th
    moe_first: int = 0           # and none of the first so many
    router: str = "softmax"      # softmax | noisy | switch | gshard | sigmoid | expert_choice
    router_norm: bool = True     # divide a token's weights by their sum
    router_scale: float = 1.0    # factor on the weights (DeepSeek's routed_scaling_factor)
    shared_gate: bool = False    # σ(x w) on the shared experts (Qwen1.5-MoE)
    capacity: float = 0.0        # in training an expert takes at most this times the mean load; 0: all that come
    aux_loss: float = 0.01       # coefficient of the load-balancing loss of a layer, which is 1 when balanced
    router_z_loss: float = 0.001  # coefficient of the router's log²Z
    bias_rate: float = 0.001     # step of a sigmoid router's balancing biases
    n_class: int = 0             # adds a Linear C → n_class: sft.py --task classify

    def __post_init__(self):
        def refuse(problem, *way_out):
            raise BadInput(": ".join((problem, *way_out)))
        for name, table in CHOICES.items():
            for value in getattr(self, name).split(",") if name == "attn" else [getattr(self, name)]:
                if value not in table:
                    refuse(f"{name}={value!r} is unknown", f"choose one of {', '.join(table)}")
        for f in fields(self):
            if f.type is int and (not isinstance(value := getattr(self, f.name), int) or value < 0):
                refuse(f"{f.name}={value!r}", "it must be a whole number that is not negative")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "share"):
            if getattr(self, name) < 1:
                refuse(f"{name}={getattr(self, name)}", "it must be at least 1")
        if not self.head_dim:
            if self.n_embd % self.n_head:
                refuse(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            refuse(f"--n_head {self.n_head} is not a multiple of --n_kv_head {self.n_kv_head}")
        if self.n_layer % self.share:
            refuse(f"--share {self.share} layers a block does not divide --n_layer {self.n_layer}")
        if not self.n_hidden:
            gated = self.act in GATED
            self.n_hidden = 64 * math.ceil(8 * self.n_embd / 3 / 64) if gated else 4 * self.n_embd
        self.embd_dim = self.embd_dim or self.n_embd
        self.rope_dim = self.rope_dim or self.head_dim
        if self.pos == "rope" and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
            refuse(f"rope rotates pairs of a head's {self.head_dim} entries, not {self.rope_dim}: an even number up "
                   f"to the head's width, please")
        if self.pos == "sinusoidal" and self.embd_dim % 2:
            refuse(f"sinusoidal positions come in pairs, the embedding's width {self.embd_dim} is odd")
        if self.rope_scaling != "none" and (self.pos != "rope" or self.rope_factor < 1):
            refuse(f"rope_scaling={self.rope_scaling} needs pos=rope and a rope_factor of at least 1, "
                   f"not pos={self.pos} and {self.rope_factor}")
        if self.rope_scaling in ("yarn", "llama3") and not self.rope_original:
            refuse(f"rope_scaling={self.rope_scaling} needs rope_original, the context before the stretch")
        self.rope_high = self.rope_high or {"yarn": 32.0, "llama3": 4.0}.get(self.rope_scaling, 0.0)
        if self.attn != "full" and self.window < 1:
            refuse(f"attn={self.attn} needs --window, the number of tokens that a window holds")
        if len(self.attn.split(",")) > self.n_layer:
            refuse(f"attn={self.attn} names more layers than n_layer {self.n_layer}")
        if self.place == "deepnorm" and self.init != "deepnorm":
            refuse("place=deepnorm is stable only from its own initial weights", "add --init deepnorm")
        if self.norm_bias and self.norm != "layernorm":
            refuse(f"norm={self.norm} has no bias", "leave norm_bias out, or take norm=layernorm")
        if not 0 <= self.dropout < 1:
            refuse(f"--dropout {self.dropout} is not a probability below 1")
        self.norm_bias = self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.mlp_bias = self.bias if self.mlp_bias is None else self.mlp_bias
        if self.n_expert:
            from moe import check
            check(self)

    @property
    def padded_vocab(self):
        return 64 * math.ceil(self.vocab_size / 64)

    @property
    def attn_kinds(self):
        """The kind of attention of each layer."""
        cycle = self.attn.split(",")
        return [cycle[i % len(cycle)] for i in range(self.n_layer)]

    @property
    def moe_layers(self):
        """Which layers have experts."""
        return [self.n_expert > 0 and i >= self.moe_first and (i + 1) % self.moe_every == 0
                for i in range(self.n_layer)]


# What families fix beside their sizes.
GPT1 = dict(vocab_size=40478, block_size=512, norm="layernorm", place="post", act="gelu_tanh", pos="learned",
            qk_norm=False, embd_norm=False, bias=True, tied=True, init="gpt2")
GPT2 = dict(GPT1, vocab_size=50257, block_size=1024, place="pre")
# Every other layer is sparse (Brown et al. 2020, 2.1). How wide the band is was not published; 128 is the stride of
# Child et al. 2019. XL and 13B: the paper's table has 24 heads of 128 in a width of 2048, and a width of 5140 for
# 40 heads of 128; 16 heads and 5120 give the published totals.
GPT3 = dict(GPT2, block_size=2048, attn="full,strided", window=128)
LLAMA = dict(norm="rmsnorm", act="swiglu", pos="rope", qk_norm=False, embd_norm=False, init="gpt2")
LLAMA1 = dict(LLAMA, vocab_size=32000, block_size=2048, norm_eps=1e-6)
QWEN2 = dict(LLAMA, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6)
FALCON = dict(GPT2, block_size=2048, place="parallel", act="gelu", pos="rope", bias=False, norm_bias=True)
BLOOM = dict(GPT2, pos="alibi", embd_norm=True)

PRESETS = {
    "nano": dict(),
    "speedrun": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=6, n_embd=768),  # nano at GPT-2's size
    "gpt1": dict(GPT1, n_layer=12, n_head=12, n_embd=768),
    "gpt2": dict(GPT2, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "gpt3-small": dict(GPT3, n_layer=12, n_head=12, n_embd=768),
    "gpt3-medium": dict(GPT3, n_layer=24, n_head=16, n_embd=1024),
    "gpt3-large": dict(GPT3, n_layer=24, n_head=16, n_embd=1536),
    "gpt3-xl": dict(GPT3, n_layer=24, n_head=16, n_embd=2048),
    "gpt3-2.7b": dict(GPT3, n_layer=32, n_head=32, n_embd=2560),
    "gpt3-6.7b": dict(GPT3, n_layer=32, n_head=32, n_embd=4096),
    "gpt3-13b": dict(GPT3, n_layer=40, n_head=40, n_embd=5120),
    "gpt3-175b": dict(GPT3, n_layer=96, n_head=96, n_embd=12288),
    "llama-7b": dict(LLAMA1, n_layer=32, n_head=32, n_embd=4096, n_hidden=11008),
    "llama-13b": dict(LLAMA1, n_layer=40, n_head=40, n_embd=5120, n_hidden=13824),
    "llama-30b": dict(LLAMA1, n_layer=60, n_head=52, n_embd=6656, n_hidden=17920),
    "llama-65b": dict(LLAMA1, norm_eps=1e-5, n_layer=80, n_head=64, n_embd=8192, n_hidden=22016),
    "llama3-8b": dict(LLAMA, vocab_size=128256, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                      n_hidden=14336, rope_theta=5e5),
    "tinyllama-1.1b": dict(LLAMA, vocab_size=32000, block_size=2048, n_layer=22, n_head=32, n_kv_head=4,
                           n_embd=2048, n_hidden=5632),
    "smollm2-135m": dict(LLAMA, vocab_size=49152, block_size=8192, n_layer=30, n_head=9, n_kv_head=3,
                         n_embd=576, n_hidden=1536, rope_theta=1e5, tied=True),
    "mistral-7b": dict(LLAMA, vocab_size=32000, block_size=32768, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                       n_hidden=14336, attn="window", window=4096),
    "qwen2.5-0.5b": dict(QWEN2, vocab_size=151936, block_size=32768, n_layer=24, n_head=14, n_kv_head=2, n_embd=896,
                         n_hidden=4864, tied=True),
    "qwen3-0.6b": dict(LLAMA, vocab_size=151936, block_size=40960, n_layer=28, n_head=16, n_kv_head=8, n_embd=1024,
                       head_dim=128, n_hidden=3072, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tied=True),
    "mixtral-8x7b": dict(LLAMA, vocab_size=32000, block_size=32768, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                         n_hidden=14336, rope_theta=1e6, n_expert=8),
    "mixtral-8x22b": dict(LLAMA, vocab_size=32768, block_size=65536, n_layer=56, n_head=48, n_kv_head=8, n_embd=6144,
                          n_hidden=16384, rope_theta=1e6, n_expert=8),
    "olmoe-1b-7b": dict(LLAMA, vocab_size=50304, block_size=4096, n_layer=16, n_head=16, n_embd=2048, n_hidden=1024,
                        qk_norm=True, qk_norm_all=True, n_expert=64, n_expert_active=8, router_norm=False),
    "deepseek-moe-16b": dict(LLAMA, vocab_size=102400, block_size=4096, n_layer=28, n_head=16, n_embd=2048,
                             n_hidden=10944, norm_eps=1e-6, n_expert=64, n_expert_active=6, n_expert_shared=2,
                             expert_hidden=1408, moe_first=1, router_norm=False),
    "qwen1.5-moe-a2.7b": dict(QWEN2, vocab_size=151936, block_size=8192, n_layer=24, n_head=16, n_embd=2048,
                              n_hidden=5632, n_expert=60, n_expert_active=4, n_expert_shared=4, expert_hidden=1408,
                              shared_gate=True, router_norm=False),
    "qwen3-30b-a3b": dict(LLAMA, vocab_size=151936, block_size=40960, n_layer=48, n_head=32, n_kv_head=4, n_embd=2048,
                          head_dim=128, n_hidden=6144, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, n_expert=128,
                          n_expert_active=8, expert_hidden=768),
    "chatglm2-6b": dict(QWEN2, vocab_size=65024, block_size=32768, n_layer=28, n_head=32, n_kv_head=2, n_embd=4096,
                        n_hidden=13696, norm_eps=1e-5, rope_theta=1e4, rope_dim=64),
    "falcon-7b": dict(FALCON, vocab_size=65024, block_size=2048, n_layer=32, n_head=71, n_kv_head=1, n_embd=4544),
    "bloom-176b": dict(BLOOM, vocab_size=250880, block_size=2048, n_layer=70, n_head=112, n_embd=14336),
}

# -----------------------------------------------------------------------------
# Norms and activations


class Linear(nn.Linear):
    """
    y = x Wᵀ + b. Master weights stay in float32; the product runs in the activations' dtype, or with fp8 in 8 bits
    (Hopper and later, training).
    """
    fp8 = False

    def forward(self, x):
        weight, bias = cast_to(x, self.weight, self.bias)
        if self.fp8 and torch.is_grad_enabled():
            y = Float8Product.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        if bias is not None and x.is_cuda and torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
            return F.linear(x, weight) + bias  # the compiler turns a product alone, without a sum, into its own loop
        return product(x, weight, bias)

    def stored(self):
        whole = type(self) is Linear and not isinstance(self.weight, dist.tensor.DTensor)
        return Stored(self.weight) if whole else None


def cast_to(x, weight, bias):
    """A layer's parameters, either may be None, in x's dtype; asking first is a third of the cost of `to` on a CPU."""
    if (weight is None or weight.dtype == x.dtype) and (bias is None or bias.dtype == x.dtype):
        return weight, bias
    return None if weight is None else weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


# How a Linear's weights lie in memory, for the kernels that read them there: floats, or quantize.py's codes of so many
# bits, (codes - zero) scale, each scale for `group` weights of a row; x is multiplied by stretch (K,) first
Stored = namedtuple("Stored", "weight bits group scale zero stretch", defaults=(0, 0, None, None, None))


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x, weight, bias=None):
    """
    x Wᵀ + b. For few rows on a CPU by oneDNN, which reads the weights at memory's speed: one row and 3072 x 768 at 20
    to 23 GB/s on two cores of an EPYC where a sum reads 25; torch's own choice there, MKL, at 11-13, four rows at 5.
    """
    few = x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel() <= 32 * x.shape[-1]
    if few and ONEDNN and weight.numel() >= 2 ** 18 and not torch.is_grad_enabled():
        return few_rows(x, weight, bias) if torch.compiler.is_compiling() else onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


# The same for torch.compile, which takes oneDNN's operator for its own, made of weights that it packed
few_rows = torch.library.custom_op("gpt::few_rows", onednn, mutates_args=(),
                                   schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
few_rows.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


def to_float8(t, dtype):
    """t scaled by its largest entry to fill dtype's range, and the factor that undoes it."""
    scale = torch.finfo(dtype).max / t.abs().amax().float().clamp(min=1e-12)
    return (t * scale).to(dtype), scale.reciprocal()


class Float8Product(torch.autograd.Function):
    """
    x Wᵀ with x, W in e4m3 and the gradient in e5m2, each scaled as a whole by its present maximum (Micikevicius et al.
    2022). x (n, C), W (D, C); the units want both factors' inner axis contiguous, hence the transposed copies.
    """

    @staticmethod
    def forward(ctx, x, weight):
        (x8, sx), (w8, sw) = to_float8(x, torch.float8_e4m3fn), to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, sx, w8, sw)
        return torch._scaled_mm(x8, w8.t(), scale_a=sx, scale_b=sw, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        x8, sx, w8, sw = ctx.saved_tensors
        g8, sg = to_float8(grad, torch.float8_e5m2)
        columns = lambda t: t.t().contiguous().t()
        dx = torch._scaled_mm(g8, columns(w8), scale_a=sg, scale_b=sw, out_dtype=grad.dtype, use_fast_accum=True)
        dw = torch._scaled_mm(g8.t().contiguous(), columns(x8), scale_a=sg, scale_b=sx, out_dtype=grad.dtype)
        return dx, dw


def use_float8(model):
    """
    Multiply in 8 bits, while training, in every Linear of the blocks but experts', whose rows are few and ragged;
    widths must be multiples of 16.
    """
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 9):
        raise BadInput("--fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper): leave it out here")
    for name, m in model.blocks.named_modules():
        if isinstance(m, Linear) and ".experts." not in name:
            m.fp8 = m.in_features % 16 == m.out_features % 16 == 0


def joint(x, *linears):
    """
    Several Linears of one input. Training on a GPU they run as one product over their stacked weights, which saves 5 %
    of GPT-2 124M's step; weights that an adapter wraps or that lie on several devices keep their own.
    """
    if not (x.is_cuda and torch.is_grad_enabled() and all(type(f) is Linear and not f.fp8 for f in linears)) \
            or any(isinstance(f.weight, dist.tensor.DTensor) for f in linears):
        return [f(x) for f in linears]
    weight = torch.cat([f.weight for f in linears]).to(x.dtype)
    bias = None if linears[0].bias is None else torch.cat([f.bias for f in linears]).to(x.dtype)
    return F.linear(x, weight, bias).split([f.weight.shape[0] for f in linears], -1)


class Norm(nn.Module):
    """Normalize the last axis, then scale by a gain and shift by a bias where the kind has them."""

    def __init__(self, c, width=0, bias=True):
        super().__init__()
        self.normalize, gain = NORMS[c.norm]
        self.eps = c.norm_eps
        width = width or c.n_embd
        self.weight = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if c.norm_bias and bias else None

    def forward(self, x):
        return self.normalize(x, *cast_to(x, self.weight, self.bias), self.eps)


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) · g + b (Ba et al. 2016)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x, weight, bias, eps):
    """x / sqrt(mean(x²) + eps) · g (Zhang & Sennrich 2019); it has no bias."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


# name: (function, has a gain). Without one, the next matrix can learn it (OLMo, Groeneveld et al. 2024).
NORMS = {"layernorm": (layer_norm, True), "layernorm_plain": (layer_norm, False),
         "rmsnorm": (rms_norm, True), "rmsnorm_plain": (rms_norm, False)}

gelu_tanh = functools.partial(F.gelu, approximate="tanh")  # GPT's: x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))
ACTIVATIONS = {  # act(up)
    "relu": F.relu,
    "gelu": F.gelu,                         # x Φ(x)
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,                         # x σ(x), Swish
    "relu2": lambda x: F.relu(x).square(),  # Primer, So et al. 2021
}
GATED = {  # act(gate) * up (Shazeer 2020)
    "glu": torch.sigmoid,
    "bilinear": nn.Identity(),
    "reglu": F.relu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "swiglu": F.silu,
}

# -----------------------------------------------------------------------------
# Positions


def rope_theta(c):
    """The base of the angles; stretching by ntk is another base."""
    return c.rope_theta * (c.rope_factor ** (c.rope_dim / (c.rope_dim - 2)) if c.rope_scaling == "ntk" else 1.0)


def rope_frequencies(c):
    """
    RoFormer's angle a token turns, theta^(-2i/D) for pair i (Su et al. 2021, eq. 15), (D/2,) float32; and
    the stretches of a trained context to rope_factor times its length, with r = turns in the old context:
    linear: every angle / factor (Chen et al. 2023). ntk: theta · factor^(D/(D-2)), so that the slowest pair turns
    1 / factor as fast and the fastest almost as before. yarn, llama3: / factor where r < low, unchanged where r > high,
    and in between a mixture linear in the pair's number (Peng et al. 2023, 3.2) or in r (Llama 3.1).
    """
    D, theta, low, high = c.rope_dim, rope_theta(c), c.rope_low, c.rope_high
    freq = theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    if c.rope_scaling == "linear":
        return freq / c.rope_factor
    if c.rope_scaling == "llama3":
        keep = ((c.rope_original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    elif c.rope_scaling == "yarn":
        first, last = (D * math.log(c.rope_original / (r * 2 * math.pi)) / (2 * math.log(theta)) for r in (high, low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), D - 1)  # pairs that turn `high`, `low` times
        keep = 1 - ((torch.arange(D // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    else:
        return freq
    return freq / c.rope_factor * (1 - keep) + freq * keep


def rope_table(c):
    """The two factors of apply_rope for every position: (cos, cos) and (-sin, sin), stacked (2, T, D) float32."""
    angles = torch.outer(torch.arange(c.block_size, dtype=torch.float32), rope_frequencies(c))
    gain = c.rope_attn or (0.1 * math.log(c.rope_factor) + 1 if c.rope_scaling == "yarn" else 1.0)
    cos, sin = angles.cos() * gain, angles.sin() * gain
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def apply_rope(x, rope):
    """
    Rotate each pair (x_i, x_{i + D/2}) of the first D entries of x (B, T, H, ≥ D) by its angle; rope (2, [B,] T, 1, D).
    """
    D = rope.shape[-1]
    if D < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :D], rope), x[..., D:]), -1)
    return x * rope[0] + x.roll(D // 2, -1) * rope[1]


def sinusoid_table(c):
    """sin(t / 10000^(2i/C)) at even entries, cos at odd ones (Vaswani et al. 2017, 3.5), (T, C) float32."""
    freq = 10000 ** (-torch.arange(0, c.embd_dim, 2, dtype=torch.float32) / c.embd_dim)
    angles = torch.outer(torch.arange(c.block_size, dtype=torch.float32), freq)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


def alibi_slopes(n_head):
    """
    m_h of the bias -m_h (i - j) (Press et al. 2022): 2^(-8h/H), h = 1 … H; where H is no power of two, those of the
    power below and then every other one of the power above. (H,) float32.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (n_head - power), 2)])


def t5_bucket(distance, buckets=32, limit=128):
    """T5's bucket of i - j ≥ 0 (Raffel et al. 2020): one for each up to half the buckets, then logarithmic to limit."""
    exact = buckets // 2
    far = (distance.clamp(min=1).float() / exact).log() / math.log(limit / exact) * (buckets - exact)
    return torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1)).clamp(min=0)


# -----------------------------------------------------------------------------
# Attention


def visible(kind, window, i, j):
    """
    May the query at place i see the key at place j? i and j broadcast. full: j ≤ i. window: the last `window` tokens,
    itself among them (Mistral). strided: those and each `window`-th before (Child et al. 2019, 4.2).
    """
    if kind == "full":
        return j <= i
    near = i - j < window
    return (j <= i) & (near if kind == "window" else near | ((i - j) % window == 0))


def flash_attention(q, k, v, block=64):
    """
    softmax(q kᵀ / sqrt(D)) v with a causal mask, never holding more than block x block scores: FlashAttention's
    forward pass (Dao 2023, algorithm 1), to read beside the kernel that does it on a GPU's fast memory. A running
    maximum m and a running sum l make the softmax of a row exact over blocks of keys: when a block brings a larger
    maximum, what has been summed so far is scaled down by exp(old - new). q, k, v (B, H, T, D).
    """
    T, scale = q.shape[2], q.shape[3] ** -0.5
    rows = []
    for a in range(0, T, block):
        qi, i = q[:, :, a:a + block] * scale, torch.arange(a, min(a + block, T))
        out, total = torch.zeros_like(qi), torch.zeros_like(qi[..., :1])
        top = torch.full_like(total, -math.inf)
        for b in range(0, a + block, block):  # later keys are masked for all of these queries
            kj, vj, j = k[:, :, b:b + block], v[:, :, b:b + block], torch.arange(b, min(b + block, T))
            scores = (qi @ kj.transpose(-1, -2)).masked_fill(j > i[:, None], -math.inf)
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            p, old = (scores - new).exp(), (top - new).exp()
            out, total, top = out * old + p @ vj, total * old + p.sum(-1, keepdim=True), new
        rows.append(out / total)
    return torch.cat(rows, 2)


FLEX = []  # what flex made; a compiled caller would look through functools.cache, with a warning


def flex():
    """flex_attention and its block mask, compiled: masks and biases on a GPU without a (T, T) tensor."""
    if not FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        FLEX.extend(torch.compile(f, dynamic=False) for f in (flex_attention, create_block_mask))
    return FLEX


# Keys and values (1, Hkv, P, D) that every query sees before the others, and its view of all P + S
Before = namedtuple("Before", "k v view")


def attend(q, k, v, view, scale, dropout):
    """
    softmax(scale · q kᵀ + bias) v; q (B, H, T, D), k and v (B, Hkv, S, D). view: None for the plain causal mask, a
    tensor that broadcasts to (B, H, T, S), bool or additive, flex_attention's (score_mod, block_mask), "all", or a
    Before.
    """
    if isinstance(view, Before):
        first = (t.expand(len(k), -1, -1, -1) for t in (view.k, view.v))
        k, v = (torch.cat(pair, 2) for pair in zip(first, (k, v)))
        view = view.view
    gqa = q.shape[1] != k.shape[1]
    if isinstance(view, tuple):
        return flex()[0](q, k, v, score_mod=view[0], block_mask=view[1], scale=scale, enable_gqa=gqa)
    mask = view if torch.is_tensor(view) else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=view is None, dropout_p=dropout,
                                          scale=scale, enable_gqa=gqa)


# What one layer's decoding reads: its keys and values (B, Hkv, S, D), how many of them each row holds (B,), the new
# tokens' depth below that (T,), which of them sees which (T, T), ALiBi's slopes (H,) or None, attention's kind, window
Slots = namedtuple("Slots", "k v pos depth tree slopes kind window")


def decode_attention(q, k, v, slots, scale, dropout):
    """
    attend for a few new tokens a row: writes their k, v (B, Hkv, T, D) behind the row's others and attends to what it
    holds and no more, whatever the size of the cache; keys are read once for all the heads that share them. Long rows
    are cut into parts that run side by side, whose sums are then added (Flash-Decoding, Dao et al. 2023).
    """
    (B, H, T, D), (_, heads, size, _) = q.shape, slots.k.shape
    q, k, v = (z.transpose(1, 2).contiguous() for z in (q, k, v))  # (B, T, heads, D)
    M = max(16, triton.next_power_of_2(T * H // heads))
    parts = max(1, min(264 // (B * heads), size // 512))  # 132 multiprocessors, and each part worth its start
    y, width = torch.empty_like(q), triton.next_power_of_2(D)
    sums = torch.empty(B, heads, parts, M, width + 2, device=q.device) if parts > 1 else y
    slopes = slots.pos if slots.slopes is None else slots.slopes
    triton_decode[(B, heads, parts)](
        q, k, v, slots.k, slots.v, slots.pos, slots.depth, slots.tree, slopes, y, sums, slots.window, size, SCALE=scale,
        T=T, G=H // heads, D=D, WIDTH=width, M=M, N=64, NEW=max(16, triton.next_power_of_2(T)),
        PARTS=parts, KIND=slots.kind, ALIBI=slots.slopes is not None, **early())
    if parts > 1:
        triton_decode_sum[(B, heads)](sums, y, T=T, G=H // heads, D=D, WIDTH=width, M=M, PARTS=parts, **early())
    return y.transpose(1, 2)


if triton is not None:
    @triton.jit
    def triton_decode(q, k_new, v_new, k, v, pos, depth, tree, slopes, y, sums, window, size, SCALE: tl.constexpr,
                      T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
                      N: tl.constexpr, NEW: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, ALIBI: tl.constexpr,
                      PDL: tl.constexpr):
        """decode_attention of one row, one head of keys, one part of its keys. m counts (token, query head) pairs."""
        if PDL:  # see early
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        b, h, part, heads = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
        m, d = tl.arange(0, M), tl.arange(0, WIDTH)
        t, head, real, wide = m // G, h * G + m % G, m < T * G, d < D
        mine = ((b * T + t) * heads * G + head)[:, None] * D + d[None, :]
        queries = tl.load(q + mine, mask=real[:, None] & wide[None, :], other=0.0)
        held = tl.load(pos + b).to(tl.int32)
        at = held + tl.load(depth + t, mask=real, other=0).to(tl.int32)  # places of the queries
        slope = tl.load(slopes + head, mask=real, other=0.0) if ALIBI else tl.zeros([M], tl.float32)
        slot = (b * heads + h).to(tl.int64) * size * D
        top, total, out = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, WIDTH], tl.float32)

        first = tl.maximum(held - window + 1, 0) if KIND == "window" else 0
        share = tl.cdiv(tl.cdiv(held - first, PARTS), N) * N
        start, stop = first + part * share, tl.minimum(first + (part + 1) * share, held)
        for at_key in range(start, stop, N):
            j = at_key + tl.arange(0, N)
            there = (j < stop)[:, None] & wide[None, :]
            keys = tl.load(k + slot + j[:, None] * D + d[None, :], mask=there, other=0.0)
            values = tl.load(v + slot + j[:, None] * D + d[None, :], mask=there, other=0.0)
            apart = at[:, None] - j[None, :]
            z = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
            z = z - slope[:, None] * apart if ALIBI else z
            see = (j < stop)[None, :]
            if KIND == "window":
                see = see & (apart < window)
            if KIND == "strided":
                see = see & ((apart < window) | (apart % window == 0))
            z = tl.where(see, z, -float("inf"))
            new = tl.maximum(top, tl.max(z, 1))
            p, old = tl.exp(z - new[:, None]), tl.exp(top - new)
            total, top = total * old + tl.sum(p, 1), new
            out = out * old[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")

        if part == 0:  # the new tokens: each sees itself and its ancestors among them
            u = tl.arange(0, NEW)
            there = (u < T)[:, None] & wide[None, :]
            theirs = ((b * T + u) * heads + h)[:, None] * D + d[None, :]
            keys = tl.load(k_new + theirs, mask=there, other=0.0)
            values = tl.load(v_new + theirs, mask=there, other=0.0)
            room = there & (held + u < size)[:, None]
            tl.store(k + slot + (held + u)[:, None] * D + d[None, :], keys, mask=room)
            tl.store(v + slot + (held + u)[:, None] * D + d[None, :], values, mask=room)
            places = held + tl.load(depth + u, mask=u < T, other=0).to(tl.int32)
            apart = at[:, None] - places[None, :]
            z = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
            z = z - slope[:, None] * apart if ALIBI else z
            pairs = real[:, None] & (u < T)[None, :]
            see = tl.load(tree + t[:, None] * T + u[None, :], mask=pairs, other=0) != 0
            if KIND == "window":
                see = see & (apart < window)
            if KIND == "strided":
                see = see & ((apart < window) | (apart % window == 0))
            z = tl.where(see, z, -float("inf"))
            new = tl.maximum(top, tl.max(z, 1))
            p, old = tl.exp(z - new[:, None]), tl.exp(top - new)
            total, top = total * old + tl.sum(p, 1), new
            out = out * old[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")

        if PARTS == 1:
            tl.store(y + mine, (out / total[:, None]).to(y.dtype.element_ty), mask=real[:, None] & wide[None, :])
        else:
            at_sum = ((b * heads + h) * PARTS + part) * M + m
            tl.store(sums + at_sum[:, None] * (WIDTH + 2) + d[None, :], out)
            tl.store(sums + at_sum * (WIDTH + 2) + WIDTH, top)
            tl.store(sums + at_sum * (WIDTH + 2) + WIDTH + 1, total)

    @triton.jit
    def triton_decode_sum(sums, y, T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                          M: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
        """Joins the parts: each is worth exp(its maximum) times its sums."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        b, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        m, d = tl.arange(0, M), tl.arange(0, WIDTH)
        top, total, out = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, WIDTH], tl.float32)
        for part in range(PARTS):
            at_sum = ((b * heads + h) * PARTS + part) * M + m
            theirs = tl.load(sums + at_sum * (WIDTH + 2) + WIDTH)
            new = tl.maximum(top, theirs)
            old, more = tl.exp(top - new), tl.exp(theirs - new)
            total = total * old + tl.load(sums + at_sum * (WIDTH + 2) + WIDTH + 1) * more
            out = out * old[:, None] + tl.load(sums + at_sum[:, None] * (WIDTH + 2) + d[None, :]) * more[:, None]
            top = new
        mine = ((b * T + m // G) * heads * G + h * G + m % G)[:, None] * D + d[None, :]
        tl.store(y + mine, (out / total[:, None]).to(y.dtype.element_ty), mask=(m < T * G)[:, None] & (d < D)[None, :])


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v per head (Vaswani et al. 2017), grouped keys (GQA, Ainslie et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.head_dim, self.scale, self.dropout = c.head_dim, c.attn_scale or c.head_dim ** -0.5, c.dropout
        self.q = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        many = c.qk_norm_all  # entries that are normalized together: of all heads, or of each
        self.q_norm = Norm(c, (c.n_head if many else 1) * c.head_dim, bias=False) if c.qk_norm else None
        self.k_norm = Norm(c, (c.n_kv_head if many else 1) * c.head_dim, bias=False) if c.qk_norm else None
        self.qk_norm_all = many

    def forward(self, x, rope, view, attention):
        B, T, _ = x.shape
        q, k, v = joint(x, self.q, self.k, self.v)
        if self.qk_norm_all and self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.view(B, T, -1, self.head_dim) for z in (q, k, v))
        if self.q_norm is not None and not self.qk_norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, Hkv, T, D) twice
        y = attention(q, k, v, view, self.scale, self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c, width=0):
        super().__init__()
        width = width or c.n_hidden
        self.kind, self.act = c.act, (ACTIVATIONS | GATED)[c.act]
        self.gate = Linear(c.n_embd, width, bias=c.mlp_bias) if c.act in GATED else None
        self.up = Linear(c.n_embd, width, bias=c.mlp_bias)
        self.down = Linear(width, c.n_embd, bias=c.mlp_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


def feed_forward(c, layer):
    if not c.moe_layers[layer]:
        return MLP(c)
    from moe import MoE
    return MoE(c, MLP)


class Block(nn.Module):
    """
    Attention, then MLP, each a branch f of the residual stream x:
        pre        x + f(norm(x))             GPT-2, LLaMA
        post       norm(x + f(x))             Vaswani et al., GPT-1
        sandwich   x + norm'(f(norm(x)))      CogView
        deepnorm   norm(α x + f(x)), α = (2 L)^(1/4), with INIT's β = (8 L)^(-1/4)   Wang et al. 2022, GLM-130B
        parallel   x + attention(norm(x)) + mlp(norm(x))     GPT-J, Falcon-7B; parallel2: a norm each, GPT-NeoX
    f is scaled by resid_scale, x + f by 1.
    """

    def __init__(self, c, layer=0):
        super().__init__()
        self.norm1, self.attn = Norm(c), Attention(c)
        self.norm2, self.mlp = Norm(c) if c.place != "parallel" else None, feed_forward(c, layer)
        self.norm1_out, self.norm2_out = (Norm(c), Norm(c)) if c.place == "sandwich" else (None, None)
        self.place, self.dropout, self.scale = c.place, c.dropout, c.resid_scale
        self.alpha = (2 * c.n_layer) ** 0.25 if c.place == "deepnorm" else 1.0

    def forward(self, x, rope, view=None, attention=attend):
        if self.place.startswith("parallel"):
            h = self.norm1(x)
            return x + self.branch(self.attn(h, rope, view, attention)) \
                     + self.branch(self.mlp(h if self.norm2 is None else self.norm2(x)))
        if self.place in ("post", "deepnorm"):
            x = self.norm1(self.alpha * x + self.branch(self.attn(x, rope, view, attention)))
            return self.norm2(self.alpha * x + self.branch(self.mlp(x)))
        x = x + self.branch(self.attn(self.norm1(x), rope, view, attention), self.norm1_out)
        return x + self.branch(self.mlp(self.norm2(x)), self.norm2_out)

    def branch(self, y, norm=None):
        y = y if norm is None else norm(y)
        y = y if self.scale == 1 else self.scale * y
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def update_and_attend(held_k, held_v, places, seen, q, k, v, view, scale, dropout):
    """
    Write k, v (B, Hkv, T, D) into a layer's cache (B, Hkv, S, D) at places (B, T), or for None as the last of the
    first `seen` entries, and attend to those.
    """
    if places is None:
        start = seen - k.shape[2]
        held_k[:, :, start:seen], held_v[:, :, start:seen] = k, v
    else:
        index = places[:, None, :, None].expand_as(k)
        held_k.scatter_(2, index, k)
        held_v.scatter_(2, index, v)
    return attend(q, held_k[:, :, :seen], held_v[:, :, :seen], view, scale, dropout)


def cached_block(block, x, rope, view, *room):
    """A block over a few new tokens a row, x (B, T, C), anywhere; room: what update_and_attend takes first."""
    return block.forward(x, rope, view, functools.partial(update_and_attend, *room))


def decode_block(block, x, rope, slots):
    """A block over a few new tokens a row, x (B, T, C), on a GPU."""
    return block.forward(x, rope, slots, decode_attention)


@functools.cache
def compiled(function, dynamic=None, vector=False):
    """One of these two, compiled once for all layers. vector: one token on a GPU, whose products become loops."""
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of rows, tokens and size of cache
    return torch.compile(function, dynamic=dynamic, options={"coordinate_descent_tuning": True} if vector else None)


# -----------------------------------------------------------------------------
# Decoding a few rows on a GPU takes as long as reading the weights, if nothing else waits: so a product and all that
# stands around it is one kernel, and the next kernel fetches its weights while this one ends (programmatic launch)


VECTORS = 8  # rows up to which
# bits: weights of a tile, programs at once on a processor, that walk over tiles (None: a program for each tile), warps
PROGRAMS = {0: (16384, None, 4), 8: (16384, 4, 4), 4: (65536, 2, 8)}


def early():
    """How to launch a kernel that may start before its forerunner ends; it waits by itself, see gdc_wait."""
    able = not torch.compiler.is_compiling() and torch.cuda.is_available() and hasattr(tl.extra.cuda, "gdc_wait") \
        and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def vector_product(x, *linears, norm=None, act="", residual=None):
    """
    Up to three Linears of the same few rows x (M, K), side by side: (M, ΣN). norm is applied to x before, act (a name
    of ACTIVATIONS) to y after; of GATED's, to the first of two, which then multiplies the other. residual (M, N) is
    added in the end.
    """
    M, K = x.shape
    gated, stored = act in GATED, [f.stored() for f in linears]
    widths, bits, group = [f.out_features for f in linears], stored[0].bits, stored[0].group
    y = x.new_empty(M, widths[0] if gated else sum(widths))
    wide = triton.next_power_of_2(K)
    weights, resident, warps = PROGRAMS[bits]
    rows, parts = max(2 if bits else 1, weights // wide // (1 + gated)), 1 if gated else len(linears)
    # codes are few bytes: smaller tiles, until each processor has one
    while bits and rows > 1 and parts * max(widths) // rows < processors(x.device):
        rows //= 2
    steps = 1
    if resident and M == 1:  # x is normalized once for all the rows of a program
        steps = math.ceil(parts * max(widths) / rows / resident / processors(x.device))
    three = lambda values: (list(values) + [values[0]] * 2)[:3]  # absent ones are never read
    given = lambda t, other: other if t is None else t
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    grid = triton.cdiv(max(widths), rows * steps), parts
    triton_vector[grid](
        x, y, given(gain, x), given(shift, x), given(stored[0].stretch, x), given(residual, x),
        *three([s.weight for s in stored]), *three([given(f.bias, x) for f in linears]),
        *three([given(s.scale, x) for s in stored]), *three([given(s.zero, x) for s in stored]), *three(widths),
        y.shape[1], 0x7F8000 if bits == 8 else 0x780000, 0.0 if norm is None else norm.eps, K=K, M=M, ROWS=rows,
        STEPS=steps, WIDE=wide, BITS=bits, GROUP=group or wide, NORM="" if norm is None else norm.normalize.__name__,
        GAIN=gain is not None, SHIFT=shift is not None, STRETCH=stored[0].stretch is not None,
        BIAS=linears[0].bias is not None, ZERO=stored[0].zero is not None, ACT=act, GATED=gated,
        RESIDUAL=residual is not None, num_warps=warps, **early())
    return y


def vector_block(block, x, rope, slots):
    """decode_block, x (B, T, C) of few rows in all: five kernels, six with rope or q and k normalized."""
    (B, T, C), a, f = x.shape, block.attn, block.mlp
    x = x.reshape(B * T, C)
    qkv = vector_product(x, a.q, a.k, a.v, norm=block.norm1)
    heads = [g.out_features // a.head_dim for g in (a.q, a.k, a.v)]
    if rope is not None or a.q_norm is not None:
        gains = [x if n is None or n.weight is None else n.weight for n in (a.q_norm, a.k_norm)]
        norm, width = a.q_norm, 0 if rope is None else rope.shape[-1]
        table = x if rope is None else rope if rope.dim() == 5 else rope.unsqueeze(1)
        table = x if rope is None else table.expand(2, B, T, 1, width).contiguous()
        triton_rotate[(B * T, heads[0] + heads[1])](
            qkv, table, *gains, B * T * width, 0.0 if norm is None else norm.eps, Q=heads[0], ROW=qkv.shape[1],
            D=a.head_dim, WIDE=triton.next_power_of_2(a.head_dim), TURNS=width,
            NORM="" if norm is None else norm.normalize.__name__, GAIN=norm is not None and norm.weight is not None,
            num_warps=1, **early())
    q, k, v = (z.view(B, T, -1, a.head_dim).transpose(1, 2) for z in
               qkv.split([n * a.head_dim for n in heads], -1))
    y = decode_attention(q, k, v, slots, a.scale, 0.0)
    x = vector_product(y.transpose(1, 2).reshape(B * T, -1), a.o, residual=x)
    h = vector_product(x, *([f.up] if f.gate is None else [f.gate, f.up]), norm=block.norm2, act=f.kind)
    return vector_product(h, f.down, residual=x).view(B, T, C)


def vectorizes(block):
    """Can vector_block run this block, its Linears as they were made, or quantized on an even grid?"""
    a, f = block.attn, block.mlp
    if (type(block), type(a), type(f)) != (Block, Attention, MLP) or block.place != "pre" or block.scale != 1 \
            or a.q_norm is not None and a.qk_norm_all:
        return False
    for together in ((a.q, a.k, a.v), (a.o,), (f.up,) if f.gate is None else (f.gate, f.up), (f.down,)):
        stored = [g.stored() if hasattr(g, "stored") else None for g in together]
        if None in stored or together[0].in_features > 16384 or len(together) > 1 and stored[0].stretch is not None:
            return False
        kinds = {(s.weight.dtype, s.bits, s.group, s.zero is None, g.bias is None) for s, g in zip(stored, together)}
        if len(kinds) > 1:
            return False
    return True


if triton is not None:
    @triton.jit
    def one_of(which, a, b, c):
        return tl.where(which == 0, a, tl.where(which == 1, b, c))

    @triton.jit
    def vector_weights(w, scale, zero, bias, n, N, K: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
                       BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr):
        """Rows n: weights (n, WIDE), or words of 4 or 8 codes; scales and zeros (n, WIDE / GROUP); biases (n,)."""
        many: tl.constexpr = 32 // BITS if BITS else 1
        k, at = tl.arange(0, WIDE // many), n.to(tl.int64)
        words = w.to(tl.pointer_type(tl.int32)) if BITS else w
        tile = tl.load(words + at[:, None] * (K // many) + k[None, :], mask=(n < N)[:, None] & (k < K // many)[None, :],
                       other=0)
        g, groups = tl.arange(0, WIDE // GROUP), tl.cdiv(K, GROUP)
        there, place = (n < N)[:, None] & (g < groups)[None, :], at[:, None] * groups + g[None, :]
        if BITS:
            s = tl.load(scale + place, mask=there, other=0)
        else:
            s = tl.full([ROWS, 1], 1.0, tl.float32)
        if ZERO:
            z = tl.load(zero + place, mask=there, other=0)
        else:
            z = tl.full([ROWS, 1], 2.0 ** (BITS - 1) if BITS else 0.0, tl.float32)
        if BIAS:
            b = tl.load(bias + n, mask=n < N, other=0)
        else:
            b = tl.full([ROWS], 0.0, tl.float32)
        return tile, s, z, b

    @triton.jit
    def vector_input(x, stretch, g, h, eps, K: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr,
                     STRETCH: tl.constexpr):
        """A row of x, normalized and stretched: (WIDE,) float32."""
        k = tl.arange(0, WIDE)
        v = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        if NORM == "layer_norm":
            v = tl.where(k < K, v - tl.sum(v, 0) / K, 0.0)
        if NORM != "":
            v = v * tl.rsqrt(tl.sum(v * v, 0) / K + eps) * g + h
            v = v.to(x.dtype.element_ty).to(tl.float32)
        if STRETCH:
            v *= tl.load(stretch + k, mask=k < K, other=0).to(tl.float32)
        return v

    @triton.jit
    def add_codes(sums, words, v, mask, at: tl.constexpr, BITS: tl.constexpr):
        """
        sums + v (1 + c / 2^BITS), c the code whose bits begin at bit `at`: they become the first bits of a float's
        mantissa by a shift and one logical instruction, where the conversion of an integer takes a slow one and more.
        That instruction has room for one constant, the exponent; so mask, where those bits lie, is none. Codes of 8
        bits are stored less 128, that is with the first bit turned.
        """
        shift: tl.constexpr = 23 - BITS - at
        turn: tl.constexpr = 0x3FC00000 if BITS == 8 else 0x3F800000
        bits = ((words << shift if shift >= 0 else words >> -shift) & mask) ^ turn
        return tl.fma(bits.to(tl.float32, bitcast=True), tl.broadcast_to(v[None, :], words.shape), sums)

    @triton.jit
    def vector_parts(v, WIDE: tl.constexpr, BITS: tl.constexpr):
        """v (WIDE,) as vector_dot needs it: what the first, second … code of each word is multiplied by; their sums."""
        if BITS == 4:  # entry 4 a + 2 b + c of a word's eight
            u0, u1 = tl.split(tl.reshape(v, (WIDE // 8, 2, 2, 2)))
            u00, u10 = tl.split(u0)
            u01, u11 = tl.split(u1)
            v0, v4 = tl.split(u00)
            v2, v6 = tl.split(u10)
            v1, v5 = tl.split(u01)
            v3, v7 = tl.split(u11)
            return v0, v1, v2, v3, v4, v5, v6, v7, v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7
        elif BITS == 8:
            u0, u1 = tl.split(tl.reshape(v, (WIDE // 4, 2, 2)))
            v0, v2 = tl.split(u0)
            v1, v3 = tl.split(u1)
            return v0, v1, v2, v3, v0 + v1 + v2 + v3
        else:
            return (v,)

    @triton.jit
    def vector_dot(tile, s, z, v, mask, ROWS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
                   GROUP: tl.constexpr):
        """Those rows times vector_parts: (n,)."""
        if BITS == 0:
            return tl.sum(tile.to(tl.float32) * v[0][None, :], 1)
        else:
            many: tl.constexpr = 32 // BITS
            one: tl.constexpr = 2.0 ** BITS
            sums = tl.zeros(tile.shape, tl.float32)
            if BITS == 4:  # the first code of a byte is its high half
                for i in tl.static_range(8):
                    sums = add_codes(sums, tile, v[i], mask, 4 * (i ^ 1), 4)
            else:
                for i in tl.static_range(4):
                    sums = add_codes(sums, tile, v[i], mask, 8 * i, 8)
            if WIDE == GROUP:
                return (one * tl.sum(sums, 1) - (one + tl.sum(z.to(tl.float32), 1)) * tl.sum(v[many], 0)) \
                    * tl.sum(s.to(tl.float32), 1)
            else:
                sums = tl.sum(tl.reshape(sums, (ROWS, WIDE // GROUP, GROUP // many)), 2)
                whole = tl.sum(tl.reshape(v[many], (WIDE // GROUP, GROUP // many)), 1)
                return tl.sum((one * sums - (one + z.to(tl.float32)) * whole[None, :]) * s.to(tl.float32), 1)

    @triton.jit
    def activated(z, ACT: tl.constexpr):
        if ACT == "gelu_tanh" or ACT == "geglu_tanh":  # (1 + tanh(u)) / 2 = σ(2 u)
            return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        elif ACT == "gelu" or ACT == "geglu":
            return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
        elif ACT == "relu" or ACT == "reglu":
            return tl.maximum(z, 0.0)
        elif ACT == "relu2":
            return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
        elif ACT == "silu" or ACT == "swiglu":
            return z * tl.sigmoid(z)
        elif ACT == "glu":
            return tl.sigmoid(z)
        else:
            return z

    @triton.jit
    def triton_vector(x, y, gain, shift, stretch, residual, w0, w1, w2, b0, b1, b2, s0, s1, s2, z0, z1, z2, N0, N1, N2,
                      total, mask, eps, K: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
                      WIDE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
                      GAIN: tl.constexpr, SHIFT: tl.constexpr, STRETCH: tl.constexpr, BIAS: tl.constexpr,
                      ZERO: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
                      PDL: tl.constexpr):
        """
        vector_product: STEPS times ROWS rows of one of the matrices, or of gate and up. Weights are fetched a step
        ahead, the first ones before x is there.
        """
        which, n, k = tl.program_id(1), tl.program_id(0) * ROWS * STEPS + tl.arange(0, ROWS), tl.arange(0, WIDE)
        N, column = one_of(which, N0, N1, N2), one_of(which, 0, N0, N0 + N1)
        w, scale, zero = one_of(which, w0, w1, w2), one_of(which, s0, s1, s2), one_of(which, z0, z1, z2)
        b = one_of(which, b0, b1, b2)
        rows = vector_weights(w, scale, zero, b, n, N, K, ROWS, WIDE, BITS, GROUP, ZERO, BIAS)
        if GATED:
            ups = vector_weights(w1, s1, z1, b1, n, N, K, ROWS, WIDE, BITS, GROUP, ZERO, BIAS)
        g = tl.load(gain + k, mask=k < K, other=0).to(tl.float32) if GAIN else 1.0
        h = tl.load(shift + k, mask=k < K, other=0).to(tl.float32) if SHIFT else 0.0
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for m in tl.static_range(M):
            v = vector_parts(vector_input(x + m * K, stretch, g, h, eps, K, WIDE, NORM, STRETCH), WIDE, BITS)
            for step in range(STEPS):
                at, there = m * total + column + n, n < N
                if RESIDUAL:
                    more = tl.load(residual + at, mask=there, other=0).to(tl.float32)
                if STEPS > 1:
                    n += ROWS
                    last = tl.where(step + 1 < STEPS, N, 0)
                    new = vector_weights(w, scale, zero, b, n, last, K, ROWS, WIDE, BITS, GROUP, ZERO, BIAS)
                    if GATED:
                        new_up = vector_weights(w1, s1, z1, b1, n, last, K, ROWS, WIDE, BITS, GROUP, ZERO, BIAS)
                out = vector_dot(rows[0], rows[1], rows[2], v, mask, ROWS, WIDE, BITS, GROUP) + rows[3].to(tl.float32)
                out = activated(out, ACT)
                if GATED:
                    out *= vector_dot(ups[0], ups[1], ups[2], v, mask, ROWS, WIDE, BITS, GROUP) + ups[3].to(tl.float32)
                if RESIDUAL:
                    out += more
                tl.store(y + at, out.to(y.dtype.element_ty), mask=there)
                if STEPS > 1:
                    rows = new
                    if GATED:
                        ups = new_up

    @triton.jit
    def triton_rotate(qkv, table, q_gain, k_gain, sines, eps, Q: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr,
                      WIDE: tl.constexpr, TURNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr,
                      PDL: tl.constexpr):
        """In place, one head of q or k of one row: its norm, then apply_rope on its first TURNS entries."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        m, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE)
        half: tl.constexpr = TURNS // 2
        mine = qkv + m * ROW + head * D
        gain = tl.where(head < Q, q_gain, k_gain)
        other = tl.where(d < half, d + half, tl.where(d < TURNS, d - half, d))  # the partner of a turn
        u = tl.load(mine + d, mask=d < D, other=0).to(tl.float32)
        w = tl.load(mine + other, mask=d < D, other=0).to(tl.float32)
        if NORM == "layer_norm":
            mean = tl.sum(u, 0) / D
            u, w = tl.where(d < D, u - mean, 0.0), tl.where(d < D, w - mean, 0.0)
        if NORM != "":
            scale = tl.rsqrt(tl.sum(u * u, 0) / D + eps)
            u, w = u * scale, w * scale
            if GAIN:
                u *= tl.load(gain + d, mask=d < D, other=0).to(tl.float32)
                w *= tl.load(gain + other, mask=d < D, other=0).to(tl.float32)
        if TURNS:
            cos = tl.load(table + m * TURNS + d, mask=d < TURNS, other=1).to(tl.float32)
            sin = tl.load(table + sines + m * TURNS + d, mask=d < TURNS, other=0).to(tl.float32)
            u = u * cos + w * sin
        tl.debug_barrier()  # all have read before one writes
        tl.store(mine + d, u.to(qkv.dtype.element_ty), mask=d < D)


# -----------------------------------------------------------------------------
# Initialization: the first row whose text occurs in a parameter's name fills it. A float is a constant,
# a function (shape, config) the standard deviation of a normal. A name without a row is an error.


def depth_scaled(shape, c):
    """GPT-2: what writes into the residual stream is scaled by 1 / sqrt(number of writers)."""
    return 0.02 / math.sqrt(2 * c.n_layer)


def xavier(gain):
    """Glorot & Bengio 2010: variance 2 / (fan_in + fan_out)."""
    return lambda shape, c: gain(c) * math.sqrt(2 / sum(shape))


def fan_in(shape, c):
    return shape[-1] ** -0.5


GAINS = [("norm.weight", 1.0), ("norm1.weight", 1.0), ("norm2.weight", 1.0), ("norm1_out.weight", 1.0),
         ("norm2_out.weight", 1.0), (".bias", 0.0), ("scalar_head.weight", 0.0), ("rel_bias.weight", 0.0),
         ("mix_x.", 1.0), ("mix_x0.", 0.0), ("router.noise", 0.0)]

INIT = {
    "gpt2": GAINS + [
        (".o.weight", depth_scaled),
        (".down.weight", depth_scaled),
        (".weight", lambda shape, c: 0.02),
    ],
    # nano: every block starts as the identity and the head silent, so the first loss is exactly ln V.
    "zero": GAINS + [
        (".o.weight", 0.0),
        (".down.weight", 0.0),
        (".head.weight", 0.0),
        (".wte.weight", lambda shape, c: 0.02 if c.tied else 1.0),  # tied: it is the head as well
        (".wpe.weight", lambda shape, c: 0.02),
        (".weight", fan_in),
    ],
    # DeepNet's, for the bound on a step's change that place=deepnorm promises.
    "deepnorm": GAINS + [
        (".q.weight", xavier(lambda c: 1.0)),
        (".k.weight", xavier(lambda c: 1.0)),
        ("blocks.", xavier(lambda c: (8 * c.n_layer) ** -0.25)),
        (".weight", lambda shape, c: 0.02),
    ],
}

CHOICES = {"norm": NORMS, "act": ACTIVATIONS | GATED, "init": INIT, "attn": ("full", "window", "strided"),
           "place": ("pre", "post", "sandwich", "deepnorm", "parallel", "parallel2"),
           "pos": ("learned", "sinusoidal", "rope", "alibi", "t5", "none"),
           "rope_scaling": ("none", "linear", "ntk", "yarn", "llama3")}


@torch.no_grad()
def init_weights(model, seed=0, scale=1.0):
    """Fill every parameter by the rows of INIT[config.init], deviations times scale; the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        rule = next((rule for part, rule in INIT[model.config.init] if part in f".{name}."), None)
        if rule is None:
            raise AssertionError(f"no row of INIT[{model.config.init!r}] initializes {name}")
        if isinstance(rule, float):
            p.fill_(rule)
        else:
            p.copy_(torch.randn(p.shape, generator=generator) * (rule(p.shape, model.config) * scale))


@torch.no_grad()
def init_roughly(model, seed=0, scale=1.0):
    """Any weights of about the right size, made where they lie, for timing: 7B take seconds instead of minutes."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.normal_(0, 0.02 * scale) if p.dim() > 1 else p.fill_(1.0)


# -----------------------------------------------------------------------------
# Loss: cross-entropy of a linear head, chunk by chunk, so that the (N, V) logits never exist at once


def loss_chunk(width, fused):
    """Rows whose logits exist at once: 4 GB of them and their softmax in float32, or 2 GB in place."""
    return max(1, (2 ** 30 if fused else 2 ** 28) // width)


def fused_loss(x, softcap):
    return triton is not None and x.is_cuda and x.dtype != torch.float32 and not softcap


def cap(logits, softcap):
    return softcap * (logits / softcap).tanh() if softcap else logits


def chunk_cross_entropy(x, weight, targets, vocab_size, softcap, z_loss=0.0):
    """
    -log p(target) + z_loss · log²Z of each row (0 where target is -100), the logits and log Z (None without z_loss),
    float32. x (n, C), weight (V', C).
    """
    logits = cap((x @ weight.T).float(), softcap)
    if logits.shape[1] > vocab_size:  # padding ids do not take part
        logits = logits.masked_fill(torch.arange(logits.shape[1], device=x.device) >= vocab_size, -math.inf)
    loss, log_z = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none"), None
    if z_loss:
        log_z = logits.logsumexp(-1)
        loss = loss + z_loss * log_z.square() * (targets != -100)
    return loss, logits, log_z


def loss_gradient(x, weight, targets, vocab_size, softcap, z_loss):
    """Loss of each row of the logits x Wᵀ and its gradient by them, softmax - onehot, (n, V') in x's dtype."""
    if fused_loss(x, softcap):
        logits = x @ weight.T
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        triton_loss_gradient[(len(logits),)](logits, targets, losses, z_loss, vocab_size, logits.shape[1],
                                             BLOCK=2048)
        return losses, logits
    losses, z, log_z = chunk_cross_entropy(x, weight, targets, vocab_size, softcap, z_loss)
    targets, p = targets.unsqueeze(1), z.softmax(-1)
    if z_loss:
        p = p * (1 + 2 * z_loss * log_z.unsqueeze(1))
    grad = (p - (torch.arange(z.shape[1], device=z.device) == targets).float()) * (targets != -100)
    if softcap:  # padding logits are -inf, their gradient 0
        grad = grad * (1 - (z / softcap).clamp(min=-1).square())
    return losses, grad.to(x.dtype)


if triton is not None:
    @triton.jit
    def triton_loss_gradient(logits, targets, losses, z_loss, vocab_size, width, BLOCK: tl.constexpr):
        """loss_gradient of a row in place: one pass for its log-sum-exp, one for the gradient; 2 bytes a logit."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target = tl.load(targets + row)
        counts = target >= 0
        own = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        ids, top, total = tl.arange(0, BLOCK), -float("inf"), 0.0
        for start in range(0, vocab_size, BLOCK):
            z = tl.load(logits + start + ids, mask=start + ids < vocab_size, other=-float("inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
            top = new
        lse = top + tl.log(total)
        tl.store(losses + row, tl.where(counts, lse - own + z_loss * lse * lse, 0.0))
        tl.debug_barrier()  # own is read before it is overwritten
        for start in range(0, width, BLOCK):
            z = tl.load(logits + start + ids, mask=start + ids < vocab_size, other=-float("inf")).to(tl.float32)
            grad = tl.exp(z - lse) * (1 + 2 * z_loss * lse) - tl.where(start + ids == target, 1.0, 0.0)
            tl.store(logits + start + ids, tl.where(counts, grad, 0.0).to(logits.dtype.element_ty),
                     mask=start + ids < width)


class LinearCrossEntropy(torch.autograd.Function):
    """
    Summed cross-entropy whose gradients are formed in the forward pass, while a chunk's logits are at hand:
        G = softmax(x Wᵀ) - onehot(target),    dL/dx = G W,    dL/dW = Gᵀ x
    (softmax times 1 + 2 z log Z with a z-loss; G times 1 - (logits / cap)² where the logits are capped). The backward
    pass only scales them: no (N, V) tensor is stored and no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, chunk, z_loss):
        w, total, dx, dw = weight.to(x.dtype), 0.0, [], None
        for xi, ti in zip(x.split(chunk), targets.split(chunk)):
            losses, grad = loss_gradient(xi, w, ti, vocab_size, softcap, z_loss)
            total = total + losses.sum()
            dx.append(grad @ w)
            if ctx.needs_input_grad[1]:
                wide = grad.is_cuda and x.dtype != torch.float32 and not torch.compiler.is_compiling()
                # on a GPU, the product's own float32 sums
                d = torch.mm(grad.T, xi, out_dtype=torch.float32) if wide else (grad.T @ xi).float()
                dw = d if dw is None else dw.add_(d)
            del grad  # before the next chunk's
        ctx.save_for_backward(torch.cat(dx), dw if dw is None else dw.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, None if dw is None else dw * grad, None, None, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size, reduction="mean", softcap=0.0, chunk=0, z_loss=0.0):
    """
    Cross-entropy of the logits x Wᵀ, in nats. x (N, C), weight (V', C) with V' ≥ vocab_size rows, targets (N,)
    of ids or -100 (ignored). reduction: "mean" over the targets that count, "sum", or "none" -> (N,).
    softcap: see GPTConfig. chunk: rows at a time; 0: see loss_chunk. z_loss adds z_loss · log²Z for each
    target, Z the softmax's denominator: it keeps logits from drifting (PaLM, Chowdhery et al. 2022, 5).
    """
    chunk = chunk or loss_chunk(weight.shape[0], fused_loss(x, softcap))
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if needs_grad and reduction != "none":
        total = LinearCrossEntropy.apply(x, weight, targets, vocab_size, softcap, chunk, z_loss)
    else:  # a gradient per row cannot be scaled afterwards: recompute the chunk's logits in the backward pass
        def rows(xi, ti):
            return chunk_cross_entropy(xi, weight.to(xi.dtype), ti, vocab_size, softcap, z_loss)[0]
        losses = [checkpoint(rows, xi, ti, use_reentrant=False) if needs_grad else rows(xi, ti)
                  for xi, ti in zip(x.split(chunk), targets.split(chunk))]
        if reduction == "none":
            return torch.cat(losses)
        total = sum(loss.sum() for loss in losses)
    return total if reduction == "sum" else total / (targets != -100).sum().clamp(min=1)


# -----------------------------------------------------------------------------
# Log-probabilities of given tokens: what preference and reinforcement learning train on


def token_logprobs(model, x, targets, temperature=1.0, entropy=False, chunk=0):
    """
    log softmax(logits / temperature)[target], float32 and 0 where the target is -100, from the hidden states x (B, T,
    C) and targets (B, T): (B, T), or with entropy a pair, the second -Σ p log p, both 0 where nothing is asked. The
    head multiplies only positions with a target, a chunk at a time, whose logits the backward pass computes again.
    """
    asked = targets != -100
    x, ids, c = model.features(x[asked]), targets[asked], model.config
    weight, chunk = model.head_weight, chunk or loss_chunk(model.head_weight.shape[0], False)

    def rows(x, ids):
        logits = (x @ weight.to(x.dtype).T)[:, :c.vocab_size].float()
        logp = (cap(logits, c.softcap) / temperature).log_softmax(-1)
        own = logp.gather(1, ids.unsqueeze(1))
        return torch.cat((own, -(logp.exp() * logp).sum(-1, keepdim=True)), 1) if entropy else own

    if entropy or temperature != 1:
        keep = torch.is_grad_enabled() and x.requires_grad
        found = [checkpoint(rows, xi, ti, use_reentrant=False) if keep else rows(xi, ti)
                 for xi, ti in zip(x.split(chunk), ids.split(chunk))]
        found = torch.cat(found) if found else rows(x, ids)
    else:
        found = -linear_cross_entropy(x, weight, ids, c.vocab_size, "none", c.softcap, chunk).unsqueeze(1)
    out = found.new_zeros((*targets.shape, found.shape[1]))
    out[asked] = found
    return tuple(out.unbind(-1)) if entropy else out.squeeze(-1)


def add_up(values, segments, n):
    """Sums of values (…) over each segment number 0 … n - 1; segments (…), negative: left out. Returns (n,)."""
    at = segments.flatten()
    sums = values.new_zeros(n + 1).index_add(0, torch.where(at < 0, n, at), values.flatten())
    return sums[:n]


def sequence_logprobs(model, idx, targets, segments, n, positions=None, doc_ids=None, temperature=1.0):
    """
    Σ log p(target) over each of n sequences that lie, packed or padded, in rows idx (R, T), in nats, (n,) float32.

    targets (R, T): the id that each position predicts, -100 where none is asked; segments (R, T): the number of the
    sequence that the target belongs to, -1 for none; positions (R, T) and doc_ids as in GPT.forward. Logits exist only
    in chunks and only where a target is: see token_logprobs. data.pack_branches makes the arguments.
    """
    def sums(model, x):
        return add_up(token_logprobs(model, x, targets, temperature), segments, n)
    return model(idx, positions=positions, doc_ids=doc_ids, outcome=sums)


def shares_prompts(config):
    """May packed responses share a prompt? Behind one, windows, ALiBi and T5 would count distances in the row."""
    return config.pos not in ("alibi", "t5") and set(config.attn_kinds) == {"full"}


def step_forward(sharded, last=True, **inputs):
    """
    A Sharded's forward pass in training, with any input of GPT.forward; ranks talk about gradients only at the step's
    last one.
    """
    if sharded.sharded:
        sharded.model.set_requires_all_reduce(last)
    with contextlib.nullcontext() if last or sharded.forward is sharded.model else sharded.forward.no_sync():
        return sharded.forward(**inputs)


def same_count(parts, sharded):
    """Micro-batches of this rank, at least one; where parameters are gathered for each, as many on every rank."""
    parts = list(parts)
    if sharded.sharded:
        most = torch.tensor(len(parts), device=sharded.process.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        parts += [[]] * (most.item() - len(parts))
    return parts or [[]]


@torch.no_grad()
def gather_into(copy, model):
    """The parameters of a model, whole where they are sharded, into a plain one of the same config that generates."""
    for m in model.modules():
        if hasattr(m, "reshard"):  # what the last forward pass left gathered
            m.reshard()
    for p, q in zip(copy.parameters(), model.parameters()):
        p.copy_(q.full_tensor() if hasattr(q, "full_tensor") else q)
    return copy


def by_response(values, segments, n):
    """
    Per-token values (R, T) of packed rows -> (n, L), a row for each of n responses, 0 behind its end; segments (R, T)
    as in data.pack_branches, whose responses lie in one piece. Differentiable.
    """
    order = (segments.flatten() >= 0).nonzero().squeeze(1)
    owner = segments.flatten()[order]
    count = torch.bincount(owner, minlength=n)[:n]
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    run = torch.arange(len(owner), device=owner.device)
    offset = run - torch.where(first, run, 0).cummax(0).values
    out = values.new_zeros(n, int(count.max()) if n else 0)
    return out.index_put((owner, offset), values.flatten()[order])


@torch.inference_mode()
def token_scores(model, hidden, targets):
    """Hidden states (N, C), ids (N,) -> their log-probabilities in nats (N,), and which are the likeliest (N,)."""
    logp, likeliest = [], []
    rows = max(1, 2 ** 25 // model.config.padded_vocab)
    for x, t in zip(hidden.split(rows), targets.split(rows)):
        logits = model.logits(x)
        logp.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
        likeliest.append(logits.argmax(1) == t)
    return torch.cat(logp).cpu(), torch.cat(likeliest).cpu()


def pad(rows, device):
    """Lists of ids -> (rows, longest), zeros on the right, where no query before them looks."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = torch.tensor(row, dtype=torch.long)
    return idx.to(device)


@torch.inference_mode()
def continuations(model, groups):
    """
    groups: lists [context ids, [continuation ids, …]] -> for each group a list of [log-probability in nats,
    tokens, 1 if greedy decoding would say it]. A context is computed once; its continuations share the cache.
    """
    contexts, rows = [g[0] for g in groups], [row for g in groups for row in g[1]]
    counts, T = [*map(len, rows)], max(map(len, contexts))
    if len(groups) > 1 and T + max(counts) - 1 > model.context:  # one's context, another's continuation
        return [continuations(model, [g])[0] for g in groups]
    owner = torch.tensor([i for i, g in enumerate(groups) for _ in g[1]], device=model.device)
    lengths = torch.tensor([*map(len, contexts)], device=model.device)
    cache = KVCache(model.config, len(groups), T + max(counts) - 1, model.device, model.compute_dtype)
    x = model.trunk(pad(contexts, model.device), cache=cache, prefix=lengths if model.config.prefix_lm else None)
    hidden = x[torch.arange(len(groups), device=x.device), lengths - 1][owner, None]  # predicts the first token
    if max(counts) > 1:
        cache.k, cache.v, cache.pos = cache.k[:, owner], cache.v[:, owner], lengths[owner]
        cache.even = cache.fused = False  # every batch has another length
        hidden = torch.cat([hidden, model.trunk(pad([row[:-1] for row in rows], model.device), cache=cache)], 1)
    there = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(x.device)
    logp, greedy = token_scores(model, hidden[there], torch.tensor([*itertools.chain(*rows)], device=x.device))
    row, none = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)), torch.zeros(len(rows))
    sums, others = none.index_add(0, row, logp), none.index_add(0, row, 1.0 - greedy.float())
    scores = zip(sums.tolist(), counts, (others == 0).int().tolist())
    return [[[*next(scores)] for _ in g[1]] for g in groups]


@torch.no_grad()
def end_scores(model, groups, tokens=8192):
    """
    The scalar head's value at the last token of each response, [[float, …], …], groups as in data.pack_branches: what a
    reward model says. About `tokens` tokens at a time, padding-free.
    """
    import data
    c, found = model.config, {}
    share, T = shares_prompts(c), min(model.context, 2048)
    groups = [(p, [[*r, 0] for r in responses]) for p, responses in groups]  # the end token is read too
    T = max([T, *(len(p) - 1 + len(r) for p, responses in groups for r in responses)])
    for batch in data.micro_batches(groups, T, max(1, tokens // T), share):
        packed = data.pack_branches([groups[g] for g in batch], T, share, steady=model.device.type == "cuda")
        idx, targets, positions, doc_ids, segments = (torch.from_numpy(a).to(model.device) for a in packed[:5])
        values = model.scalars(idx, positions=positions, doc_ids=doc_ids)
        last = segments >= 0
        last[:, :-1] &= segments[:, 1:] != segments[:, :-1]
        scores = values.new_zeros(packed.n).index_copy(0, segments[last], values[last]).tolist()
        for g in batch:
            found[g], scores = scores[:len(groups[g][1])], scores[len(groups[g][1]):]
    return [found[g] for g in range(len(groups))]


class RewardModel:
    """
    A run of rlhf.py --stage rm as a function (prompts, answers) -> scores, all texts: the value at the end token, in
    its own tokenizer and template, shifted and scaled as run.json says, or with logits as it is.
    """

    def __init__(self, folder, device="cpu", logits=False):
        self.model, self.tokenizer = GPT.from_pretrained(folder, device).eval(), Tokenizer.from_pretrained(folder)
        if not self.model.config.scalar_head:
            raise BadInput(f"reward={folder} has no scalar head: it is no reward model: train one with python rlhf.py "
                           f"--stage rm --out {folder}")
        path = Path(folder) / "run.json"
        scale = json.loads(path.read_text()).get("reward", {}) if path.exists() and not logits else {}
        self.mean, self.std = scale.get("mean", 0.0), scale.get("std", 1.0)

    def __call__(self, prompts, answers):
        import data
        T, groups = self.model.context, []
        for prompt, answer in zip(prompts, answers):
            p, r = data.prompt_and_response(self.tokenizer, [{"role": "user", "content": prompt}], answer)
            groups.append((p[-max(1, T - len(r)):], [r[:T - 1]]))
        return [(score - self.mean) / self.std for score, in end_scores(self.model, groups)]


def rollouts(model, prompts, n, end, max_new_tokens, temperature=1.0, seed=0, batch=256, start=0):
    """
    n responses to each prompt (ids): [[ids, …], …], each with the id `end` where it ended by itself within
    max_new_tokens, `batch` at a time: one that has ended makes room for the next. What a response draws depends on
    the seed and its number alone, of which the first is `start`: processes may share the prompts as they like.
    """
    first = seed * 0x9E3779B1 + start  # streams are numbered in 32 bits: this spreads the seeds over them
    rows = [list(p) for p in prompts for _ in range(n)]
    tokens, _ = model.generate(rows, max_new_tokens, [end], temperature=temperature, slots=min(batch, len(rows)),
                               seed=[(first + i) & 0xFFFFFFFF for i in range(len(rows))])
    found = [ids + [end] * (len(ids) < max_new_tokens) for ids in tokens]
    return [found[i:i + n] for i in range(0, len(found), n)]


# -----------------------------------------------------------------------------
# The model


class KVCache:
    """
    Keys and values of every layer, (L, B, Hkv, S, D), and how many of them each row holds, pos (B,).
    A row's entries at or after its pos are never read: moving pos back drops tokens.
    """

    def __init__(self, config, batch, size, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = torch.zeros(batch, dtype=torch.long, device=device)
        self.size = size
        self.bound = 0  # no pos exceeds it; known without asking the device
        self.even = True  # all rows hold as many
        self.static = False  # always attend over the whole size: a recorded graph has one shape
        self.compiled = False  # decode with compiled blocks
        self.fused = True  # attend by decode_attention's kernel, which is compiled for each number of new tokens
        # who sees whom among T new tokens: depth (T,) and (T, T) bool; a sequence unless `tree` says another
        self.tree, self.sequences = None, {}

    def branches(self, T):
        if self.tree is not None:
            return self.tree
        if T not in self.sequences:
            ones = torch.ones(T, T, dtype=torch.bool, device=self.pos.device)
            self.sequences[T] = torch.arange(T, device=self.pos.device), ones.tril()
        return self.sequences[T]

    def seen(self):
        return self.size if self.static else self.bound

    def room(self, places):
        """Where entries for places (B, T) go, and how many are seen then: for update_and_attend."""
        return None if self.even and not self.static else places, self.seen()

    def fill(self, layer, q, k, v, view, scale, dropout):
        """Write the first T entries of an empty cache; attention needs only the new k and v."""
        self.k[layer][:, :, :k.shape[2]] = k
        self.v[layer][:, :, :v.shape[2]] = v
        return attend(q, k, v, view, scale, dropout)

    def drop(self, r):
        """Forget the last r tokens of each row; r an int or (B,)."""
        self.pos.sub_(r)
        self.even = self.even and not torch.is_tensor(r)
        self.bound -= int(torch.as_tensor(r).min())

    def copy_rows(self, rows, other, index):
        """Rows of this cache become the rows `index` of another that is no longer: its beginning, or all of it."""
        self.k[:, rows, :, :other.size] = other.k[:, index]
        self.v[:, rows, :, :other.size] = other.v[:, index]
        self.pos[rows] = other.pos[index]

    def move(self, places, count):
        """
        Of the entries behind pos (B,), keep those at pos + places (B, n) as the next n, and count (B,) of them: what
        a tree's accepted branch leaves.
        """
        come = (self.pos[:, None] + places)[None, :, None, :, None].expand(*self.k.shape[:1], -1, self.k.shape[2], -1,
                                                                         self.k.shape[4])
        go = self.pos[:, None] + torch.arange(places.shape[1], device=places.device)
        go = go[None, :, None, :, None].expand_as(come)
        for t in (self.k, self.v):
            t.scatter_(3, go, t.gather(3, come))
        self.pos.add_(count)


def position_tables(c):
    """The buffers that a config's positions need, none of them saved."""
    if c.pos == "rope":
        return {"rope": rope_table(c)}
    if c.pos == "sinusoidal":
        return {"sinusoids": sinusoid_table(c)}
    return {"slopes": alibi_slopes(c.n_head)} if c.pos == "alibi" else {}


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        factorized = c.embd_dim != c.n_embd
        self.wte = nn.Embedding(c.padded_vocab, c.embd_dim)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.pos == "learned" else None
        self.embd_in = Linear(c.embd_dim, c.n_embd, bias=False) if factorized else None
        self.embd_norm = Norm(c) if c.embd_norm else None
        self.rel_bias = nn.Embedding(32, c.n_head) if c.pos == "t5" else None  # of a distance's bucket, for all layers
        self.blocks = nn.ModuleList(Block(c, l) for l in range(c.n_layer // c.share))
        self.mix_x = nn.Parameter(torch.empty(c.n_layer)) if c.resid_mix else None
        self.mix_x0 = nn.Parameter(torch.empty(c.n_layer)) if c.resid_mix else None
        self.norm = None if c.place in ("post", "deepnorm") else Norm(c)  # there each block ends with one
        self.embd_out = Linear(c.n_embd, c.embd_dim, bias=False) if factorized else None
        self.head = None if c.tied else Linear(c.embd_dim, c.padded_vocab, bias=False)
        self.scalar_head = Linear(c.n_embd, 1, bias=False) if c.scalar_head else None
        self.class_head = Linear(c.n_embd, c.n_class) if c.n_class else None
        for name, table in position_tables(c).items():
            self.register_buffer(name, table, persistent=False)
        self.compute_dtype = torch.float32  # of activations; weights are cast where they are used
        self.loss = linear_cross_entropy
        self.z_loss = 0.0  # of linear_cross_entropy, while training
        # of lora.py: what was applied to which weights, and its tokens before everybody's own
        self.adapter = self.base_print = self.virtual = None
        self._decoder = None
        # what a rank of a larger machine holds, see shard
        self.layers = range(c.n_layer)  # of its pipeline stage
        self.heads = slice(None)        # of its tensor-parallel rank
        self.tp = self.cp = None        # process groups
        self.places = self.in_order = None  # (T / cp,) places of its tokens, (T,) of everybody's keys back in order

    def compile_parts(self, whole=False):
        """
        torch.compile, in place, the block (once for all of them) and the loss: names in checkpoints stay, and
        compiling takes a fraction of the time that the whole model does, for a step 2 % slower.
        """
        if whole:
            self.trunk = torch.compile(self.trunk, dynamic=False)
        for block in () if whole else self.blocks:
            block.compile(dynamic=False)
        if triton is None or self.config.softcap or self.compute_dtype == torch.float32 or self.tp is not None:
            self.loss = torch.compile(self.loss, dynamic=False)

    @property
    def device(self):
        return next(itertools.chain(self.parameters(), self.buffers())).device  # quantized weights are buffers

    @property
    def context(self):
        """Tokens of text that fit: virtual ones stand before them."""
        return self.config.block_size - (0 if self.virtual is None else self.virtual.tokens)

    @property
    def head_weight(self):
        head = self.wte if self.head is None else self.head
        return head.effective() if hasattr(head, "effective") else head.weight  # lora.py's

    def views(self, B, T, i, keys, doc_ids, prefix, cache, flexible):
        """
        Who sees whom, for each kind of attention in the config: what attend takes as its view. i (T,) or (B, T)
        places of the queries, keys the number of places with a key. Doubles as flex_attention's mask and score_mod.
        cache: None, or the one that the queries continue, where it holds something.
        """
        c, device, views = self.config, i.device, {}
        slopes = c.alibi_scale * self.slopes[self.heads] if c.pos == "alibi" else None
        n_head = len(range(c.n_head)[self.heads])
        single = cache is not None and cache.even and not cache.static and T == 1  # sees all there is
        if doc_ids is not None:  # own (B, T), and a second document that a token sees besides its own
            own, also = doc_ids.unbind(-1) if doc_ids.dim() == 3 else (doc_ids, doc_ids)

        def seer(kind):  # the kind is of the closure: torch.compile would not notice another default argument
            def sees(b, h, i, j):
                see = visible(kind, c.window, i, j)
                if doc_ids is not None:
                    see = see & ((own[b, i] == own[b, j]) | (also[b, i] == own[b, j]))
                if prefix is not None:  # the first `prefix` tokens see each other
                    see = see | ((i < prefix[b]) & (j < prefix[b]))
                return see
            return sees

        def at_places(sees, i):
            return lambda b, h, n, j: sees(b, h, i[n], j)

        def bent(score, b, h, i, j):
            return score - slopes[h] * (i - j).abs()  # a prefix also looks ahead

        for kind in sorted(set(c.attn_kinds)):
            base = "full" if kind == "window" and keys <= c.window else kind
            sees = seer(base)
            plain = base == "full" and doc_ids is None and prefix is None and c.pos not in ("alibi", "t5")
            if plain and (single or cache is None and self.cp is None):
                views[kind] = "all" if single else None
                continue
            if flexible and c.pos != "t5":  # T5's bias needs a gradient
                per_row = None if doc_ids is None and prefix is None else B
                mask, score = sees, bent
                if self.cp is not None:  # flex_attention counts this rank's queries, n; i holds their places
                    mask, score = at_places(sees, i), lambda s, b, h, n, j: bent(s, b, h, i[n], j)
                views[kind] = (score if c.pos == "alibi" else None), flex()[1](mask, per_row, None, T, keys, device)
                continue
            b = torch.arange(B, device=device)[:, None, None, None]
            h = torch.arange(n_head, device=device)[:, None, None]
            rows, columns = (i[:, None] if cache is not None else i)[..., None], torch.arange(keys, device=device)
            if cache is not None and cache.tree is not None:  # behind pos lie the tree's nodes, each at its depth
                depth, sees_node = cache.tree
                node = columns - cache.pos[:, None]  # (B, S)
                old, node = (node < 0)[:, None, None], node.clamp(0, T - 1)
                known = sees_node[:, node].movedim(1, 0)[:, None] & (columns < (cache.pos + T)[:, None, None, None])
                columns = torch.where(old, columns, (cache.pos[:, None] + depth[node])[:, None, None])
                mask = sees(b, h, rows, columns) & (old | known)
            else:
                mask = sees(b, h, rows, columns)
            bias = None
            if c.pos == "alibi":
                bias = bent(torch.zeros((), device=device), b, h, rows, columns)
            elif c.pos == "t5":
                bias = self.rel_bias(t5_bucket(rows - columns))[..., self.heads].movedim(-1, -3)
                bias = bias.flatten(0, 1) if bias.dim() == 5 else bias
            if bias is not None:
                mask = bias.masked_fill(~mask, -math.inf).to(self.compute_dtype)
            views[kind] = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        return views

    def embed(self, idx, positions, embeds=None):
        """What the first block reads, (B, T, C)."""
        c = self.config
        if self.tp is not None:
            positions = positions.chunk(dist.get_world_size(self.tp), -1)[dist.get_rank(self.tp)]
        x = (self.wte(idx) if embeds is None else embeds).to(self.compute_dtype)
        if c.embd_scale != 1:
            x = x * c.embd_scale
        if c.pos == "sinusoidal":
            x = x + self.sinusoids[positions].to(x.dtype)
        if self.embd_in is not None:
            x = self.embd_in(x)
        if c.pos == "learned":
            x = x + self.wpe(positions).to(x.dtype)
        if self.embd_norm is not None:
            x = self.embd_norm(x)
        return F.dropout(x, c.dropout, self.training)

    def trunk(self, idx, cache=None, positions=None, doc_ids=None, prefix=None, embeds=None):
        """
        Hidden states (B, T, C) after the last norm. Arguments as in forward. With tensor parallelism the residual
        stream is each rank's part of the sequence, (B, T / tp, C); idx of a later pipeline stage is that stream.
        """
        c = self.config
        B, T = (idx if embeds is None else embeds).shape[:2]
        T = T if self.layers.start == 0 or self.tp is None else T * dist.get_world_size(self.tp)
        device = self.device
        if cache is not None and c.n_expert and c.router == "expert_choice":
            raise BadInput("a model with --router expert_choice cannot generate: its experts choose among all the "
                           "tokens of a text, later ones too; train it with another router for that")
        static = cache is not None and cache.static  # then the engine has counted
        first = 0 if self.virtual is None else self.virtual.tokens
        room = self.context if cache is None else min(self.context, cache.size) - cache.bound
        if T > room and not static:
            raise BadInput(f"{T} tokens do not fit into the {room} left of the model's context of {c.block_size}: "
                           f"shorten the input, or train with a larger --block_size")
        prefill = cache is None or cache.bound == 0 and not static
        places = torch.arange(T, device=device) if self.cp is None else self.places
        if cache is not None:
            if not prefill:  # (B, T): each row goes on at its own place
                depth, tree = cache.branches(T)
                places, slots = cache.pos[:, None] + depth, cache.pos[:, None] + places
            cache.bound = min(cache.bound + T, cache.size)
        positions = (places if positions is None else positions) + first
        keys = T if prefill else cache.seen()
        keys = keys if self.cp is None else len(self.in_order)
        flexible = device.type == "cuda" and cache is None and not (self.training and c.dropout) and not first
        flexible = flexible and c.head_dim >= 16  # the least that flex_attention takes
        fused = not prefill and cache.fused and self.fuses(T) and not first
        vectors = fused and B * T <= VECTORS and not (self.training and c.dropout) and all(map(vectorizes, self.blocks))
        views = {} if fused else self.views(B, T, places, keys, doc_ids, prefix, None if prefill else cache, flexible)

        if first:  # keys and values of virtual tokens stand before everybody's own
            kv = self.virtual(self)
            wider = {kind: self.virtual.widen(view, T, device) for kind, view in views.items()}

        rope = None
        if c.pos == "rope":
            rope = self.rope[:, positions].to(self.compute_dtype).unsqueeze(-2)  # (2, [B,] T, 1, D): one for all heads
        x = x0 = self.embed(idx, positions, embeds) if self.layers.start == 0 else idx
        kinds = c.attn_kinds
        for l in self.layers:
            block, kind = self.blocks[l // c.share], kinds[l]
            if self.mix_x is not None:
                x = self.mix_x[l].to(x.dtype) * x + self.mix_x0[l].to(x.dtype) * x0
            view = None if fused else Before(*kv[l], wider[kind]) if first else views[kind]
            if self.cp is not None:
                x = block(x, rope, view, self.everyones)
            elif cache is None:
                x = block(x, rope, view)
            elif fused:
                decode = vector_block if vectors else decode_block if not cache.compiled else \
                    compiled(decode_block, False, B * T == 1)
                slopes = c.alibi_scale * self.slopes if c.pos == "alibi" else None
                x = decode(block, x, rope, Slots(cache.k[l], cache.v[l], cache.pos, depth, tree, slopes, kind,
                                                 c.window))
            elif prefill:  # a block with a cache is compiled for decoding only
                x = block.forward(x, rope, view, functools.partial(cache.fill, l))
            else:
                decode = compiled(cached_block) if cache.compiled else cached_block
                x = decode(block, x, rope, view, cache.k[l], cache.v[l], *cache.room(slots))
        if cache is not None and cache.tree is None:
            cache.pos.add_(T)
        return x if self.norm is None else self.norm(x)

    def fuses(self, T):
        """Does decode_attention's kernel know this model, for T new tokens a row?"""
        c = self.config
        return triton is not None and self.device.type == "cuda" and c.pos != "t5" and c.head_dim >= 16 \
            and T * c.n_head // c.n_kv_head <= 256

    def everyones(self, q, k, v, view, scale, dropout):
        """attend with the keys and values of all T tokens, in order, from each rank's (B, Hkv, T / cp, D)."""
        kv = AllGather.apply(torch.stack((k, v)), 3, self.cp)
        return attend(q, *kv[:, :, :, self.in_order].unbind(), view, scale, dropout)

    def features(self, x):
        """What the head's matrix multiplies, (..., E), from hidden states (..., C)."""
        x = x if self.embd_out is None else self.embd_out(x)
        return x if self.config.logit_scale == 1 else x * self.config.logit_scale

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V), float32."""
        x, head = self.features(x), self.wte if self.head is None else self.head
        if hasattr(head, "product") and not hasattr(head, "effective"):  # quantize.py's reads the codes
            logits = head.product(x)
        else:
            logits = product(x, self.head_weight.to(x.dtype))
        return cap(logits[..., :self.config.vocab_size].float(), self.config.softcap)

    def forward(self, idx, targets=None, cache=None, positions=None, doc_ids=None, prefix=None, embeds=None,
                reduction="mean", outcome=None):
        """
        idx (B, T) ids -> (logits (B, T, V) float32, None), or with targets (B, T) -> (None, loss in nats).
        targets of -100 do not count; reduction "mean" | "sum" | "none" (B, T).
        cache: a KVCache that the tokens continue; positions (T,) or (B, T) override the default 0, 1, 2, …;
        doc_ids (B, T): attention stays inside a document; (B, T, 2): [..., 1] is another one that the token sees as
        well, such as the prompt that several responses share; prefix (B,): so many first tokens of a row see each
        other; embeds (B, T, E) replaces the embedding of idx, which may be None; outcome(model, hidden states (B, T,
        C)) is returned in place of (logits, loss): what is computed here, DDP and FSDP know of. Raises BadInput where
        T exceeds block_size.
        """
        x = self.trunk(idx, cache, positions, doc_ids, prefix, embeds)
        if outcome is not None:
            return outcome(self, x)
        if self.layers.stop < self.config.n_layer:
            return x  # the next stage's idx
        if targets is None:
            return self.logits(x), None
        x = self.features(x)
        x = x if self.tp is None else AllGather.apply(x, 1, self.tp)
        extra = {"z_loss": self.z_loss} if self.z_loss and self.training else {}
        loss = self.loss(x.flatten(0, 1), self.head_weight, targets.flatten(), self.config.vocab_size, reduction,
                         self.config.softcap, **extra)
        if self.config.n_expert and self.training and reduction != "none" and torch.is_grad_enabled():
            from moe import with_penalty
            loss = with_penalty(loss, self, 1.0 if reduction == "mean" else (targets != -100).sum())
        if self.layers.start > 0:
            return loss.view(1)  # a pipeline passes tensors
        return None, loss.view(targets.shape) if reduction == "none" else loss

    def scalars(self, idx, **kwargs):
        """The scalar head's value at every position, (B, T) float32: rewards, or a critic's values."""
        return self.scalar_head(self.trunk(idx, **kwargs)).squeeze(-1).float()

    @staticmethod
    def from_pretrained(name_or_dir, device="cpu", dtype=torch.float32):
        """A model from a run directory of ours, a Hugging Face directory or hub name, or a llama2.c file."""
        path = Path(name_or_dir)
        if (path / "run.json").exists():
            return load_run(path, device, dtype)[0]
        if path.is_file() and path.suffix == ".bin":
            return load_llama2c(path, device, dtype)
        if not path.exists() and is_hub_name(str(name_or_dir)):
            path = hub(str(name_or_dir))
        if (path / "config.json").exists():
            return load_hf(path, device, dtype)
        if (path / "adapter_config.json").exists():  # PEFT's
            import lora
            return lora.load(path, device, dtype)
        raise BadInput(f"--init {name_or_dir}: no run.json and no config.json there; give a run directory such "
                       f"as out/base, a Hugging Face directory or a hub name such as gpt2")

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens=100, stop=(), slots=None, poll=1, seed=0, pick=None, compile=False,
               **sampling):
        """
        Continue prompts, `slots` of them at a time (default: all at once): when a row ends, the next prompt takes its
        slot. Iterates over lists of (number of the prompt, new ids, their log-probabilities), each of up to `poll`
        steps: on a GPU, looking at tokens means to wait for them. A row ends with an id of `stop`. Where one outgrows
        the context it keeps its last block_size / 2 tokens and starts again at position 0. Arguments as in generate.
        """
        sampling = Sampling(**sampling)
        sampling.check()
        ids, T, stop = [list(map(int, p)) for p in prompts], self.context, set(stop)
        if min(map(len, ids), default=1) == 0:
            raise BadInput("the prompt is empty: give at least one token, for example <|endoftext|>")
        longest = max(map(len, ids), default=0)
        if longest > T:
            raise BadInput(f"a prompt of {longest} tokens is longer than the model's context of {T}: shorten it")
        if not ids or max_new_tokens < 1:
            return
        n, poll = min(slots or len(ids), len(ids)), poll if pick is None else 1
        d = self.decoder(n, min(T, 64 * math.ceil((longest + max_new_tokens) / 64)), sampling, compile)
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(ids))]
        left, next_prompt = [max_new_tokens] * len(ids), n
        owner, held = list(range(n)), [0] * n  # of each slot: its prompt, or None; its tokens in the cache
        training = self.training
        self.eval()
        try:
            while busy := [s for s in range(n) if owner[s] is not None]:
                fresh = [s for s in busy if held[s] in (0, T)]  # a new prompt, or a row that is full
                if fresh:
                    rows = [ids[owner[s]][-max(1, T // 2):] if held[s] else ids[owner[s]] for s in fresh]
                    new = [s for s in fresh if not held[s]]
                    if new:
                        d.seeds[new] = torch.tensor([seeds[owner[s]] for s in new], device=self.device)
                        d.drawn[new] = 0
                    which = slice(None) if len(fresh) == n else torch.tensor(fresh, device=self.device)
                    full = [s for s in fresh if held[s]]  # penalties count what no longer fits, too
                    seen = d.seen[full] if full and d.seen is not None else None
                    d.prefill(rows, None if len(fresh) == n else which)
                    if seen is not None:
                        d.seen[full] = seen
                    d.choose(which, pick and pick(d.logits[which], [ids[owner[s]] for s in fresh]))
                    for s, row in zip(fresh, rows):
                        held[s] = len(row)
                if len(busy) < n:
                    d.cache.pos[[s for s in range(n) if owner[s] is None]] = 0  # and run on there, unread
                d.cache.bound = max(held[s] for s in busy)
                steps = min(poll - bool(fresh), *(min(left[owner[s]] - (s in fresh), T - held[s]) for s in busy))
                columns = [(d.token.clone(), d.logprob.clone())] if fresh else []
                for _ in range(steps):
                    if pick is None:
                        d.step()
                    else:
                        d.advance()
                        d.choose(token=pick(d.logits, [ids[i] if i is not None else [0] for i in owner]))
                    columns.append((d.token.clone(), d.logprob.clone()))
                tokens, logprobs = (torch.stack(z, 1).tolist() for z in zip(*columns))
                news = []
                for s in busy:
                    i, start = owner[s], int(bool(fresh) and s not in fresh)
                    row, logp = tokens[s][start:], logprobs[s][start:]
                    end = next((k + 1 for k, token in enumerate(row) if token in stop), len(row))
                    news.append((i, row[:end], logp[:end]))
                    ids[i] += row[:end]
                    left[i] -= end
                    held[s] += steps
                    if not left[i] or end and ids[i][-1] in stop:
                        owner[s], held[s] = (next_prompt, 0) if next_prompt < len(ids) else (None, 0)
                        next_prompt += owner[s] is not None
                yield news
        finally:  # also where the caller stops listening
            self.train(training)

    def wiring(self):
        """What a recorded graph has kept of the model: where its tensors lie, and which adapters are switched on."""
        return (*(t.data_ptr() for t in itertools.chain(self.parameters(), self.buffers())),
                *(m.on for m in self.modules() if hasattr(m, "on")))

    def decoder(self, batch, size, sampling, compile):
        """The Decoder of this shape; on CUDA the last one is kept, because recording its graph takes a while."""
        key = (batch, size, sampling, compile, self.device, self.compute_dtype, self.wiring())
        if self._decoder is None or self._decoder[0] != key or self.device.type != "cuda":
            self._decoder = None  # free the old cache first
            self._decoder = key, Decoder(self, batch, size, sampling, compile)
        return self._decoder[1]

    def generate(self, prompts, max_new_tokens=100, stop=(), **arguments):
        """
        Continue a batch of prompts, a list of id lists of any lengths or a tensor (B, T).

        Fields of Sampling say how a token is drawn; a row ends before an id of `stop`. seed: row i draws from stream
        seed + i, or give one seed a row; a row's draw does not depend on its batch. slots: so many rows at once, a row
        that has ended making room for the next. pick(logits (B, V), ids so far) -> (B,) replaces the whole choice.
        compile: a step's blocks come from torch.compile, and on CUDA what stands behind them.

        Returns (list of lists of new ids, list of lists of their log-probabilities in nats under
        softmax(logits / temperature), before any cut; under softmax(logits) at temperature 0 or with pick).
        """
        tokens, logprobs, stop = [[] for _ in prompts], [[] for _ in prompts], set(stop)
        arguments.setdefault("poll", 16 if self.device.type == "cuda" else 1)
        for news in self.stream(prompts, max_new_tokens, stop, **arguments):
            for i, row, logp in news:
                ends = bool(row) and row[-1] in stop
                tokens[i] += row[:len(row) - ends]
                logprobs[i] += logp[:len(row) - ends]
        return tokens, logprobs


# -----------------------------------------------------------------------------
# Generation engine: each prompt once through the model, then one token for every row a step


def uniform(seed, pos):
    """A number in [0, 1) that is a pure function of (seed, pos), int64 tensors: two rounds of a 32-bit mixer."""
    x = (seed * 0x1F123BB5 + pos * 0x2C1B3C6D + 0x5BD1E995) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return (x >> 8).float() / 2 ** 24


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits; process_logits says in which order."""
    temperature: float = 1.0  # 0: the likeliest
    top_k: int | None = None  # of so many likeliest; those as likely as the last of them stay too
    top_p: float | None = None  # of the fewest likeliest that hold this much probability (Holtzman et al. 2020)
    min_p: float | None = None  # of those with at least this share of the likeliest's probability (Nguyen et al. 2024)
    typical_p: float | None = None  # of the fewest, nearest to the entropy, that hold so much (Meister et al. 2022)
    repetition_penalty: float = 1.0  # divides positive logits of ids in the text so far, multiplies negative (CTRL)
    presence_penalty: float = 0.0  # is subtracted from the logits of ids in the text so far

    def check(self):
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise BadInput(f"--temperature {self.temperature}: use 0 for the likeliest token, 1 for the model's own "
                           f"distribution, or another number above 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"--top_k {self.top_k} leaves nothing to choose from: use 1 or more")
        for name in ("top_p", "min_p", "typical_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise BadInput(f"--{name} {p} is not a probability: use a number above 0, at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"--repetition_penalty {self.repetition_penalty} must be above 0: 1 changes nothing")
        if not abs(self.presence_penalty) < math.inf:
            raise BadInput(f"--presence_penalty {self.presence_penalty} is no number to subtract: 0 changes nothing")

    @property
    def penalized(self):
        return self.repetition_penalty != 1 or self.presence_penalty != 0


def process_logits(logits, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None,
                   repetition_penalty=1.0, presence_penalty=0.0):
    """
    Logits (B, V) whose softmax is the distribution that is sampled, in this order: repetition penalty, presence
    penalty, temperature, top-k, top-p, min-p, typical; an id that is cut has -inf. seen (B, V) counts each id in the
    row so far, its prompt included. At temperature 0 only the penalties apply. Fields of Sampling; at least one id
    stays, and the likeliest but under typical_p.
    """
    if repetition_penalty != 1:
        bent = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen > 0, bent, logits)
    if presence_penalty:
        logits = logits - presence_penalty * (seen > 0)
    if temperature == 0:
        return logits
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None and top_p < 1:
        logits = keep_mass(logits, -logits, top_p)
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    if typical_p is not None and typical_p < 1:
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).nansum(-1, keepdim=True)  # nan: 0 log 0
        logits = keep_mass(logits, (logp + entropy).abs(), typical_p)
    return logits


def keep_mass(logits, rank, mass):
    """-inf for all but the first ids by rank (B, V), least first, whose probabilities reach mass."""
    order = rank.argsort(dim=-1, stable=True)
    p = logits.softmax(-1).gather(-1, order)
    drop = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= mass)
    return logits.masked_fill(drop, -math.inf)


def invert(p, u):
    """
    The id at which the cumulative sum of p (B, V), of any total, passes the share u (B,) in [0, 1) of it: first which
    256 ids, then which of them.
    """
    parts = F.pad(p, (0, -p.shape[-1] % 256)).unflatten(-1, (-1, 256))
    sums = parts.sum(-1).cumsum(-1)
    goal = u.unsqueeze(1) * sums[:, -1:]
    part = (sums <= goal).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    inside = parts.gather(1, part.unsqueeze(-1).expand(-1, -1, 256)).squeeze(1)
    cdf = inside.cumsum(-1)
    goal = (goal - (sums.gather(1, part) - cdf[:, -1:])).clamp(min=0)  # less, by rounding, would pass nothing
    last = (torch.arange(256, device=p.device) * (inside > 0)).amax(-1)  # rounding may not pass what is possible
    return part.squeeze(1) * 256 + torch.minimum((cdf <= goal).sum(-1), last)


def sample_token(logits, u, temperature=1.0, seen=None, **cuts):
    """
    Choose an id for each row of logits (B, V) by inverting the cumulative distribution of process_logits at u (B,).
    Returns ids (B,) and their log-probabilities under softmax(logits / temperature), before penalties and cuts.
    """
    processed = process_logits(logits, seen, temperature, **cuts)
    token = processed.argmax(-1) if temperature == 0 else invert(processed.softmax(-1), u)
    logits = logits / temperature if temperature not in (0, 1) else logits
    return token, logits.gather(1, token.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


class Decoder:
    """
    Cache, current token and random streams of a batch of slots, and one step over them. On CUDA the step is recorded
    once as a graph over these fixed buffers and replayed: no launches, no copies to the host, no allocation.
    """

    def __init__(self, model, batch, size, sampling, compile):
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=model.device)
        self.model, self.sampling, self.compile, self.graph = model, sampling, compile, None
        self.cache = KVCache(model.config, batch, size, model.device, model.compute_dtype)
        self.cache.compiled = compile and model.device.type == "cpu"  # on a GPU when the graph is recorded
        self.token, self.logprob = zeros(batch), zeros(batch, dtype=torch.float32)
        self.logits = zeros(batch, model.config.vocab_size, dtype=torch.float32)
        self.seeds, self.drawn = zeros(batch), zeros(batch)  # stream of each slot, tokens drawn from it
        self.seen = zeros(batch, model.config.vocab_size, dtype=torch.int32) if sampling.penalized else None

    def prefill(self, rows, slots=None):
        """
        Put rows of ids into slots (default: all), with the logits of what follows each. Equal rows go through the model
        once; shorter ones are padded on the right: what stands behind a row's end is never read. Returns the rows' last
        hidden states, (B, C).
        """
        device, cache = self.token.device, self.cache
        slots = torch.arange(len(rows), device=device) if slots is None else slots
        place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        whose = torch.tensor([place[tuple(row)] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in place])
        idx = torch.zeros(len(place), int(lengths.max()), dtype=torch.long)
        for row, i in place.items():
            idx[i, :len(row)] = torch.tensor(row)
        idx, lengths = idx.to(device), lengths.to(device)
        new = KVCache(self.model.config, *idx.shape, device, self.model.compute_dtype)
        x = self.model.trunk(idx, cache=new, prefix=lengths if self.model.config.prefix_lm else None)
        new.pos.copy_(lengths)
        cache.copy_rows(slots, new, whose)
        cache.even = len(slots) == len(cache.pos) and len({len(row) for row in place}) == 1
        last = x[torch.arange(len(idx), device=device), lengths - 1]
        logits = self.model.logits(last)
        self.logits[slots] = logits[whose]
        if self.seen is not None:
            there = torch.arange(idx.shape[1], device=device) < lengths[:, None]
            counts = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, idx, there.int())
            self.seen[slots] = counts[whose]
        return last[whose]

    def hidden(self):
        """The current token's last hidden state (B, C), from which the head makes the next one's logits."""
        return self.model.trunk(self.token.unsqueeze(1), cache=self.cache)[:, -1]

    def advance(self):
        """The current token's next logits, for a pick."""
        self.logits.copy_(self.model.logits(self.hidden()))

    def draw(self, logits, seeds, drawn, seen):
        u = uniform(seeds, drawn) if self.sampling.temperature else None
        return sample_token(logits, u, seen=seen, **vars(self.sampling))

    def draw_hidden(self, x, seeds, drawn, seen):
        return self.draw(self.model.logits(x), seeds, drawn, seen)

    def choose(self, slots=slice(None), token=None):
        """Draw the next token of some slots from their logits, or take the given one."""
        logits = self.logits[slots]
        if token is None:
            seen = None if self.seen is None else self.seen[slots]
            drawn = self.draw(logits, self.seeds[slots], self.drawn[slots], seen)
        else:
            drawn = token, logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
        self.take(*drawn, slots)

    def take(self, token, logprob, slots=slice(None)):
        self.token[slots], self.logprob[slots] = token, logprob
        self.drawn[slots] += 1
        if self.seen is not None:
            self.seen[slots] += F.one_hot(token, self.seen.shape[1]).int()

    def step(self):
        """The next token of every slot: one replay of the recorded graph on CUDA."""
        if self.token.device.type != "cuda":
            self.take(*self.draw_hidden(self.hidden(), self.seeds, self.drawn, self.seen))
            return
        if self.graph is None:
            self.record()
        self.cache.bound = min(self.cache.bound + 1, self.cache.size)
        self.graph.replay()

    def record(self):
        # compiled: the blocks, one at a time, and everything behind them
        self.cache.compiled, self.cache.static = self.compile and self.model.fuses(1), True
        draw = torch.compile(self.draw_hidden, dynamic=False) if self.compile else self.draw_hidden
        state = [self.cache.pos, self.token, self.logprob, self.drawn, self.seen]
        saved, bound = [None if t is None else t.clone() for t in state], self.cache.bound
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and library handles come first, outside the graph
                self.take(*draw(self.hidden(), self.seeds, self.drawn, self.seen))
                self.cache.pos.copy_(saved[0])
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.take(*draw(self.hidden(), self.seeds, self.drawn, self.seen))
        for t, value in zip(state, saved):
            if t is not None:
                t.copy_(value)
        self.cache.bound, self.cache.static = bound, False


# -----------------------------------------------------------------------------
# Accounting: parameters, FLOPs, peaks


def count_parameters(model):
    """
    (all, those that multiply an activation): the second is the N of 6 N, every Linear as often as a token passes it, of
    experts the active ones, and the head.
    """
    total = sum(p.numel() for p in model.parameters())
    matmul = sum(m.weight.numel() * (model.config.share if name.startswith("blocks.") else 1)
                 for name, m in model.named_modules() if isinstance(m, nn.Linear))
    if model.config.n_expert:  # a token meets some of the experts
        from moe import idle_parameters, layers
        matmul += sum(m.router.weight.numel() for m in layers(model)) - idle_parameters(model)
    return total, matmul + (model.wte.weight.numel() if model.head is None else 0)


def flops_per_token(model, T):
    """
    Training FLOPs of a token: 6 N_matmul + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B), forward 2,
    backward 4; attention counted in full although causality needs half; the embedding look-up is free.
    """
    c = model.config
    return 6 * count_parameters(model)[1] + 12 * c.n_layer * c.n_head * c.head_dim * T


# Dense bf16 peaks, FLOP/s, from the vendors' data sheets; the first name that stands in the device's wins.
PEAK_FLOPS = [
    ("GB200", 2500e12), ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("A100", 312e12), ("A800", 312e12), ("A6000", 155e12), ("A10G", 70e12), ("L40S", 362e12),
    ("L4", 121e12), ("RTX 5090", 209e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12), ("MI300X", 1307e12),
    ("V100", 125e12), ("T4", 65e12),
]


def peak_flops(device):
    """The device's dense bf16 peak in FLOP/s, or None where it is not known: then no MFU is printed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for part, peak in PEAK_FLOPS if re.search(rf"\b{part}\b(?! Ti| D\b)", name) and "Laptop" not in name)
    return next(known, None)


def peak_memory(device):
    """The most bytes this process has held: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -----------------------------------------------------------------------------
# Memory of a run. GB are 10^9 bytes; Φ parameters, N data-parallel GPUs, B rows of T tokens in a micro-batch.

# Bytes a parameter: weight, gradient, further float32 copies, a moment of the optimizer; bytes an activation.
PRECISIONS = {
    "fp32": (4, 4, 0, 4, 4),
    "mixed": (2, 2, 4, 4, 2),            # and a float32 master (Micikevicius et al. 2018)
    "mixed_fp32_grad": (2, 2, 8, 4, 2),  # and a float32 gradient
    "bf16": (2, 2, 0, 2, 2),
    "ours": (4, 4, 0, 4, 2),             # train.py: a 16-bit copy is made where a weight is used
}
# Bytes a parameter for moments of s bytes; None: the shapes decide. adam8bit (Dettmers et al. 2022) has a
# float32 scale for each block of 256.
OPTIMIZERS = {"sgd": lambda s: 0, "momentum": lambda s: s, "adam": lambda s: 2 * s,
              "adam8bit": lambda s: 2 * (1 + 4 / 256), "adafactor": None, "muon": None}
# (models that train, models that only run). PPO: actor and critic; reference and reward.
USES = {"train": (1, 0), "sft": (1, 0), "lora": (1, 1), "qlora": (1, 1), "infer": (0, 1), "dpo": (1, 1),
         "ppo": (2, 2), "grpo": (1, 1), "grpo_reward": (1, 2)}
# Does ZeRO divide weights, gradients, optimizer state by N? FSDP is zero3.
SHARDED = {"none": (0, 0, 0), "ddp": (0, 0, 0), "zero1": (0, 0, 1), "zero2": (0, 1, 1), "zero3": (1, 1, 1)}
NF4 = 4 / 8 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a scale for 64, its own scale for 256
# Vectors of width n_hidden that act's backward pass and the down projection read.
ACT_SAVED = {"relu": 1, "relu2": 2, "gelu": 2, "gelu_tanh": 2, "silu": 2, "glu": 3, "bilinear": 3, "reglu": 3,
             "geglu": 4, "geglu_tanh": 4, "swiglu": 4}
# Norms of a block; vectors of width C that they and the matrices read, each stored once.
PLACE_SAVED = {"pre": (2, 4), "post": (2, 4), "deepnorm": (2, 4), "sandwich": (4, 6), "parallel": (1, 2),
               "parallel2": (2, 3)}


def count(shapes):
    return sum(map(math.prod, shapes.values()))


def state_bytes(shapes, optimizer="adam", precision="mixed", parallel="none", gpus=1):
    """
    Bytes a GPU of (weights, gradients, optimizer state); shapes {name: shape}, or a number of parameters Φ.
    Adam in mixed precision is 2 Φ, 2 Φ, K Φ with K = 12: ddp 16 Φ, zero1 4 Φ + 12 Φ/N, zero2 2 Φ + 14 Φ/N,
    zero3 16 Φ/N (Rajbhandari et al. 2020, 3.1; the layer that zero3 gathers for its product is not counted).
    Adafactor without momentum (Shazeer & Stern 2018): r + c float32 for a matrix (r, c). Muon: a momentum for
    the blocks' matrices, Adam elsewhere.
    """
    weight, gradient, copies, moment, _ = PRECISIONS[precision]
    if not isinstance(shapes, dict):
        if OPTIMIZERS[optimizer] is None:
            raise BadInput(f"--optimizer {optimizer} keeps a state by shape: give a preset, not --params")
        shapes = {"": (shapes,)}

    def moments(name, shape):
        n, matrix = math.prod(shape), len(shape) == 2
        if optimizer == "adafactor":
            return 4 * (sum(shape) if matrix else n)
        if optimizer == "muon":
            return moment * n * (1 if matrix and name.startswith("blocks.") else 2)
        return OPTIMIZERS[optimizer](moment) * n
    n = count(shapes)
    full = weight * n, gradient * n, copies * n + sum(moments(*item) for item in shapes.items())
    return tuple(b / gpus if shard else b for b, shard in zip(full, SHARDED[parallel]))


def communication(n, parallel, weight=2, gradient=2):
    """
    (elements, bytes) a GPU sends a step for n trained parameters; a ring's reduce-scatter or all-gather of Φ
    elements sends (N - 1)/N Φ, here Φ. ddp 2 Φ: an all-reduce is both. zero1, zero2 2 Φ: gradients scatter,
    new weights gather. zero3 3 Φ: weights gather for the forward pass and for the backward (Rajbhandari et
    al. 2020, 7).
    """
    scatters, gathers = int(parallel != "none"), {"none": 0, "zero3": 2}.get(parallel, 1)
    gathered = gradient if parallel == "ddp" else weight
    return (scatters + gathers) * n, (scatters * gradient + gathers * gathered) * n


def block_activations(c, size):
    """
    What autograd keeps of one eager block from forward to backward, `size` bytes an activation: rows (what,
    bytes a token, how many of them with --recompute selective, does tensor parallelism split them?). Adds,
    rotations and products with constants keep nothing, FlashAttention (Dao 2023) the log-sum-exp of a row of
    scores; masks and T5's bias are not counted. GPT-2's block is 32 C + 4 H + 16 bytes; Korthikanti et al.
    2023 count 34 C + 5 H T with scores and dropout masks.
    """
    C, A, K, gated = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.act in GATED
    (norms, vectors), stats = PLACE_SAVED[c.place], norm_stats(c)
    outer = (vectors + c.resid_mix) * C * size + norms * stats
    dense, experts = 1 - sum(c.moe_layers) / c.n_layer, []  # the mean over layers with experts and without
    if dense < 1:
        from moe import activations
        experts = [(what, full * (1 - dense), thin * (1 - dense), cut) for what, full, thin, cut in
                   activations(c, size, ACT_SAVED[c.act], 1 + gated)]
    rows = [("norms, residual", outer, outer, False),
            ("q k v", (A + 2 * K) * size, 0, True),
            ("attention out", A * size + 4 * c.n_head, 0, True),
            ("q k before norm", c.qk_norm * ((A + K) * size + stats * (c.n_head + c.n_kv_head)), 0, True),
            (f"mlp, {c.act}", *(n * c.n_hidden * size * dense for n in (ACT_SAVED[c.act], 1 + gated)), True),
            *experts, ("dropout masks", bool(c.dropout) * 2 * C, bool(c.dropout) * 2 * C, False)]
    return [row for row in rows if row[1]]


def norm_stats(c):
    """Bytes a norm keeps of a row: float32 mean and 1/deviation, or the latter alone."""
    return 4 if c.norm.startswith("rms") else 8


def outer_activations(c, size):
    """Bytes a token kept (before the blocks, after them): ids, embedding, dropout's mask; last norm."""
    C, E = c.n_embd, (c.embd_dim != c.n_embd) * c.embd_dim  # E: factorized
    first = 8 + c.embd_norm * (C * size + norm_stats(c)) + E * size + bool(c.dropout) * C
    return first, (c.place not in ("post", "deepnorm")) * (C * size + norm_stats(c)) + bool(E) * C * size


def loss_bytes(c, tokens, size, weight=4, trained=True, tp=1, chunk=0, fused=None):
    """
    (most bytes while LinearCrossEntropy runs, bytes it keeps: the gradients of x (tokens, E) and W (V', E), of size and
    weight bytes). fused, as in 16 bits on a GPU: a chunk's logits become their gradient in place. Else its logits,
    softmax, one-hot and difference are float32 at once, 16 bytes a logit.
    """
    fused = size == 2 and not c.softcap if fused is None else fused
    V, E, chunk = c.padded_vocab / tp, c.embd_dim, chunk or loss_chunk(c.padded_vocab, fused)
    n, later = min(chunk, tokens), max(0, min(chunk, tokens - chunk))
    x, dw, cast = tokens * E * size, trained * weight * V * E, (size != weight) * size * V * E
    if fused:
        return cast + 2 * x + size * V * n + (2 if later else 1) * dw, x + dw
    logits = 16 * V * n + (dw if later else 0)
    adding = size * V * n + trained * cast + (3 if later else 1) * dw
    return cast + 2 * x + max(logits, adding), x + dw


def kv_cache_bytes(c, batch, tokens, size=2):
    """2 L H_kv D T B size: keys and values of every layer."""
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * tokens * batch * size


def meta_model(config):
    """The model without storage: parameters to count."""
    with torch.device("meta"):
        return GPT(config)


def lora_shapes(model, rank, targets="q,v"):
    """Shapes of A (r, in) and B (out, r) for each Linear of the blocks that targets names, Hu et al. 2021."""
    linears = {name: m.weight.shape for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    wanted = known if targets == "all" else targets.split(",")
    if rank < 1:
        raise BadInput(f"--lora_rank {rank}: modes lora and qlora need the adapters' rank, for example 8")
    if not set(wanted) <= set(known):
        raise BadInput(f"--lora_targets {targets}: this model has {', '.join(known)}; or say all")
    chosen = {name: shape for name, shape in linears.items() if name.rsplit(".", 1)[-1] in wanted}
    return ({f"{name}.A": (rank, into) for name, (_, into) in chosen.items()} |
            {f"{name}.B": (out, rank) for name, (out, _) in chosen.items()})


def stage_shapes(model, tp=1, pp=1, stage=0):
    """
    {name: shape} that a GPU of pipeline stage 0 … pp - 1 holds; tp splits each matrix of blocks, embedding
    and head (Megatron-LM, Shoeybi et al. 2019), not vectors and positions. A tied embedding stands at both
    ends.
    """
    shapes = {}
    for name, p in model.named_parameters():
        block = int(name.split(".")[1]) * pp // len(model.blocks) if name.startswith("blocks.") else 0
        late = name.startswith(("norm.", "head.", "embd_out.", "scalar_head."))
        copy = name == "wte.weight" and model.head is None and stage == pp - 1
        if stage == (pp - 1 if late else block) or copy:
            split = p.dim() == 2 and name.startswith(("blocks.", "wte.", "head."))
            shapes[name] = (p.shape[0] / tp if split and tp > 1 else p.shape[0], *p.shape[1:])
    return shapes


def memory_plan(args, c=None, parallel="none", stage=0):
    """
    Rows (what, bytes on one GPU, when, formula); args as of add_memory_flags, c a GPTConfig, None with
    --params. `when` has l for the loss (every activation; gradients only of earlier micro-batches), b for the
    start of the backward pass, s for its end and the optimizer's step; cpu: not on the GPU. moment_bytes adds
    them up. A coarser rule in use is 16 Φ + 2 · batch · activations.
    """
    check_plan(args, c)
    precision = args.precision or ("mixed" if c is None else "ours")
    weight, gradient, _, _, size = PRECISIONS[precision]
    lora, (trains, runs) = "lora" in args.mode, USES[args.mode]
    shared = args.tp * args.pp
    if c is None:
        base = trained = {"": (args.params / shared,)}
    else:
        model = meta_model(c)
        base = trained = stage_shapes(model, args.tp, args.pp, stage)
    if lora:
        adapters = lora_shapes(model, args.lora_rank, args.lora_targets)
        trained = {name: (out / shared, into) for name, (out, into) in adapters.items()}
    n, phi = count(base), "adapters" if lora else "Φ"
    matrices = {name: s for name, s in base.items() if len(s) == 2 and name.startswith("blocks.")}
    states = trained if c else args.params / shared
    W, G, O = (trains * b for b in state_bytes(states, args.optimizer, precision, parallel, args.gpus))
    update = "cpu" if args.offload else "lbs"
    K = state_bytes(states, args.optimizer, precision)[2] / count(trained)
    frozen, bits = runs * size * n, f"{runs} x {size} Φ; zero3: / N"
    if args.mode == "qlora":
        frozen, bits = NF4 * count(matrices) + size * (n - count(matrices)), f"{8 * NF4:.3f} bits in blocks"
    gradients = "cpu" if args.offload else "lbs" if args.accumulate > 1 else "s"
    rows = [("weights", W, "lbs", f"{trains} x {weight} {phi}; zero3: / N"),
            ("gradients", G, gradients, f"{trains} x {gradient} {phi}; zero2, zero3: / N"),
            ("optimizer state", O, update, f"{trains} x {K:.3g} {phi}; zero1-3: / N"),
            ("frozen weights", frozen / (args.gpus if parallel == "zero3" else 1), "lbs", bits)]
    if args.mode == "qlora":
        largest = max(map(math.prod, matrices.values()))
        rows.append(("dequantized matrix", size * largest, "lb", f"{size} bytes of the largest"))
    if c is None:
        return rows

    T, layers, last = args.block_size or c.block_size, c.n_layer // args.pp, stage == args.pp - 1
    tokens = trains * args.micro_batch * T * (2 if args.mode == "dpo" else 1)  # dpo: chosen and rejected
    if args.cache_tokens or not trains:
        cache = kv_cache_bytes(c, args.batch or args.micro_batch, args.cache_tokens or T, size)
        rows.append(("KV cache", cache / args.pp / min(args.tp, c.n_kv_head), "lbs",
                     f"2 · {c.n_layer} layers · {c.n_kv_head} heads · {c.head_dim} · tokens · rows · {size}"))
    if not trains:
        logits = last * args.micro_batch * c.padded_vocab * (4 + size) / args.tp
        return rows + [("logits", logits, "l", "of a step, 16-bit and float32")]
    if precision == "ours" and not lora:
        casts = trains * size * c.share * count(matrices) / (layers if args.recompute == "block" else 1)
        rows.append(("cast copies", casts, "lb", f"{size} bytes a block's matrix weight, for the backward"))
    terms = block_activations(c, size)
    if lora:  # the input of each B
        width = size * args.lora_rank * sum(name.endswith(".A") for name in adapters) // len(model.blocks)
        terms.append(("adapters", width, width, False))
    outside, again = args.tp if args.sequence_parallel else 1, 0
    flight = min(args.pp - stage, args.micro_batches or args.pp)  # 1F1B (Narayanan et al. 2019)
    for what, full, thin, inside in terms:
        keep = {"none": full, "selective": thin, "block": 0}[args.recompute]
        part = args.tp if inside else outside
        rows.append((f"  {what}", keep * tokens * layers * flight / part, "lb",
                     f"{keep:,} bytes · {layers} layers · {tokens:,} tokens · {flight} in flight"))
        again += (full - keep) * tokens / part
    if args.recompute == "block":
        inputs = c.n_embd * size * tokens * layers * flight / outside
        rows.append(("  block inputs", inputs, "lb", f"{size} C a layer and token"))
    first, final = outer_activations(c, size)
    rows.append(("  outside blocks", tokens * (first * flight * (stage == 0) + final * last) / outside, "lb",
                 "ids, embedding, last norm"))
    peak, kept = loss_bytes(c, tokens / trains, size, size if lora else weight, not lora, args.tp)
    peak, kept = peak * last, kept * last
    wide = 3 if c.act in GATED or c.act == "relu2" else 1  # vectors the MLP's gradients take, less the freed
    mlp = tokens * (wide * size * c.n_hidden / args.tp - last * final)
    return rows + [("recomputed", again, "b", "one block"),
                   ("head and loss", peak, "l", "logits of a chunk, gradients of x and W"),
                   ("gradients on the way", max(2 * kept, kept + mlp), "b", "head, then last MLP")]


def moment_bytes(rows):
    """{moment: bytes} of memory_plan's rows; the largest is what the GPU needs."""
    if not rows[1][1]:  # no gradients
        return {"decoding": sum(row[1] for row in rows)}
    names = {"l": "loss", "b": "backward pass", "s": "step"}
    return {name: sum(b for _, b, when, _ in rows if letter in when) for letter, name in names.items()}


def check_plan(args, c):
    """Refuse what no cluster can do; c is None with --params."""
    for name in ("gpus", "tp", "pp", "micro_batch", "batch", "block_size", "accumulate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)} is not a positive number: use 1 or more")
    for name in ("micro_batches", "cache_tokens"):
        if getattr(args, name) < 0:
            raise BadInput(f"--{name} {getattr(args, name)} is negative: use 0 or more")
    if c is not None and args.params:
        raise BadInput(f"--params {args.params:g} beside a preset: give one of the two")
    if c is None:
        if not args.params or not 0 < args.params < math.inf:
            raise BadInput("nothing to plan: give a preset's name, or --params 7e9")
        if "lora" in args.mode:
            raise BadInput(f"--mode {args.mode} counts adapters by shape: give a preset, not --params")
    elif c.n_head % args.tp:
        raise BadInput(f"--tp {args.tp} does not divide the {c.n_head} heads, by which attention is split")
    elif (c.n_layer // c.share) % args.pp:
        raise BadInput(f"--pp {args.pp} does not divide the {c.n_layer // c.share} layers of the model")


def preset(name):
    if name not in PRESETS:
        raise BadInput(f"{name!r} is no preset: choose one of {', '.join(PRESETS)}")
    return GPTConfig(**PRESETS[name])


def add_memory_flags(parser):
    add = parser.add_argument
    add("name", nargs="?", help=f"a preset: {', '.join(PRESETS)}")
    add("--params", type=float, help="instead, a bare number of parameters such as 7.5e9: no activations")
    add("--mode", default="train", choices=list(USES))
    add("--precision", choices=list(PRECISIONS), help="(default: ours; mixed with --params)")
    add("--optimizer", default="adam", choices=list(OPTIMIZERS))
    add("--micro_batch", type=int, default=8, help="rows of a forward pass (dpo: pairs)")
    add("--accumulate", type=int, default=1, help="micro-batches a step; from 2 on, gradients wait meanwhile")
    add("--block_size", type=int, help="T (default: the preset's)")
    add("--recompute", default="none", choices=["none", "selective", "block"],
        help="in the backward pass: attention and the MLP's activation, or all but the blocks' inputs")
    add("--parallel", choices=[*SHARDED, "fsdp"], help="(default: with --gpus, all side by side)")
    add("--gpus", type=int, default=1, help="N that share the batch")
    add("--tp", type=int, default=1, help="GPUs that share each matrix")
    add("--sequence_parallel", action="store_true", help="and norms and residuals")
    add("--pp", type=int, default=1, help="GPUs that share the layers, 1F1B")
    add("--micro_batches", type=int, default=0, help="of a pipeline (default: at least pp)")
    add("--offload", action="store_true", help="gradients, optimizer state in main memory (Ren et al. 2021)")
    add("--lora_rank", type=int, default=0)
    add("--lora_targets", default="q,v", help="of q, k, v, o, gate, up, down; or all")
    add("--cache_tokens", type=int, default=0, help="places of the KV cache (default: T with --mode infer)")
    add("--batch", type=int, help="rows of the cache (default: micro_batch)")


def memory(args):
    """Print the plan: a row for what is held, a column for each way to share it among --gpus."""
    c = preset(args.name) if args.name else None
    given = "zero3" if args.parallel == "fsdp" else args.parallel
    columns = [given] if given else list(SHARDED)[1:] if args.gpus > 1 else ["none"]
    plans = []
    for column in columns:  # of a pipeline, the fuller of its ends
        ends = [memory_plan(args, c, column, stage) for stage in sorted({0, max(0, args.pp - 1)})]
        plans.append(max(ends, key=lambda rows: max(moment_bytes(rows).values())))
    table = {what: ([b], when, formula) for what, b, when, formula in plans[0]}
    for what, b, *_ in (row for rows in plans[1:] for row in rows):
        table[what][0].append(b)
    moments = [moment_bytes(rows) for rows in plans]
    activations = [sum(b for what, b, *_ in rows if what[0] == " ") for rows in plans]
    table["= activations"] = activations, "", "sum of the indented rows"
    train = "decoding" not in moments[0]
    for name in moments[0]:
        table[f"= {name}"] = [m[name] for m in moments], "", f"sum of the rows with {name[0]}" * train
    largest = [max(m.values()) for m in moments]
    table["TOTAL"] = largest, "", f"the largest: {', '.join(f'{b / 2 ** 30:.2f}' for b in largest)} GiB"
    print(f"{'GB (1e9 bytes) a GPU':22}" + "".join(f"{column:>10}" for column in columns) + "  when formula")
    for what, (sizes, when, formula) in table.items():
        if any(sizes):
            print(f"{what:22}" + "".join(f"{b / 1e9:10.3f}" for b in sizes) + f"  {when:4} {formula}")
    precision = PRECISIONS[args.precision or ("mixed" if c is None else "ours")]
    n = plans[0][0][1] / precision[0] * (args.gpus if columns[0] == "zero3" else 1)
    sent = [communication(n, column, *precision[:2]) for column in columns]
    if any(b for _, b in sent):
        print(f"{'sent a step':22}" + "".join(f"{b / 1e9:10.3f}" for _, b in sent)
              + f"       elements: {', '.join(f'{elements / n:.0f} Φ' for elements, _ in sent)}")
    if c and args.tp * args.pp > 1:
        edge = args.micro_batch * (args.block_size or c.block_size) * c.n_embd * precision[4] / 1e9
        inside, between = 8 * c.n_layer / args.pp * edge * (args.tp > 1), 2 * edge * (args.pp > 1)
        print(f"and a micro-batch {inside:.3f} GB inside its tensor group (4 all-reduces a layer of B T C), "
              f"{between:.3f} GB to and from the next stage")


# -----------------------------------------------------------------------------
# FLOPs, and the time a device needs at best

# Memory, bytes/s, of the devices of PEAK_FLOPS, from the same data sheets; A100 and A800 of 80 GB.
BANDWIDTH = {
    "B200": 8e12, "GB200": 8e12, "H200": 4.8e12, "H100 PCIe": 2e12, "H100 NVL": 3.9e12, "H100": 3.35e12,
    "A100": 2e12, "A800": 2e12, "A6000": 0.768e12, "A10G": 0.6e12, "L40S": 0.864e12, "L4": 0.3e12,
    "RTX 5090": 1.792e12, "RTX 4090": 1.008e12, "RTX 3090": 0.936e12, "MI300X": 5.3e12, "V100": 0.9e12,
    "T4": 0.32e12,
}


def device_rates(name):
    """(dense bf16 FLOP/s, bytes/s) of a device, by its name in PEAK_FLOPS or a part of it: "H100", "4090"."""
    peaks = dict(PEAK_FLOPS)
    named = [known for known in peaks if name.lower() == known.lower()]
    named += [known for known in peaks if name and name.lower() in known.lower()]
    if not named:
        raise BadInput(f"--device {name!r} is unknown: choose one of {', '.join(peaks)}")
    return peaks[named[0]], BANDWIDTH[named[0]]


def least_time(flops, moved, device):
    """(seconds of arithmetic, seconds of traffic, the longer): a roofline (Williams et al. 2009)."""
    peak, bandwidth = device_rates(device)
    return flops / peak, moved / bandwidth, "compute" if flops / peak > moved / bandwidth else "memory"


def roofline(m, k, n, device):
    """(m, k) x (k, n), 16-bit: (2 m k n FLOPs, seconds, 2 (m k + k n + m n) bytes, seconds, the longer)."""
    flops, moved = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    compute, traffic, longer = least_time(flops, moved, device)
    return flops, compute, moved, traffic, longer


def products(c, B, T, keys):
    """
    {name: (FLOPs, bytes)} of a forward pass over B rows of T new tokens that see `keys` places each, in 16
    bits. Every key counts although training's mask needs half; scores stay on the chip: attention moves q, k,
    v and y.
    """
    model, sums = meta_model(c), {}
    linears = [(name, m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, (out, into) in linears + ([("head", model.wte.weight.shape)] if c.tied else []):
        times, kind = c.share if name.startswith("blocks.") else 1, name.rsplit(".", 1)[-1]
        old, rows, read = sums.get(kind, (0, 0)), B * T, 1
        if ".experts." in name:  # each sees its part of the rows, and where there are few rows, some see none
            rows, read = rows * c.n_expert_active / c.n_expert, min(1, rows * c.n_expert_active / c.n_expert)
        sums[kind] = (old[0] + times * 2 * rows * into * out,
                      old[1] + times * 2 * (rows * (into + out) + read * into * out))
    width = 4 * c.n_layer * B * c.head_dim
    return sums | {"attention": (width * c.n_head * T * keys, width * (c.n_head * T + c.n_kv_head * keys))}


def add_flops_flags(parser):
    parser.add_argument("name", help=f"a preset: {', '.join(PRESETS)}")
    parser.add_argument("--device", default="A100", help=f"one of {', '.join(dict(PEAK_FLOPS))}")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--block_size", type=int, help="T, trained on or cached (default: the preset's)")


def flops(args):
    """Print FLOPs, bytes and least time, product by product, of the forward pass and of decoding."""
    c, B = preset(args.name), args.batch
    T, (peak, bandwidth) = args.block_size or c.block_size, device_rates(args.device)
    if B < 1 or T < 1:
        raise BadInput(f"--batch {B} and --block_size {T} must be positive numbers")
    model = meta_model(c)
    (total, matmul), token = count_parameters(model), flops_per_token(model, T)
    print(f"{total:,} parameters, N = {matmul:,} of them in products; FLOPs a token:\n"
          f"{token:,} in training, 6 N + 12 L H D T; {token // 3:,} forward, or decoded after T others\n"
          f"{args.device}: {peak / 1e12:g} TFLOP/s, {bandwidth / 1e12:g} TB/s: memory bounds what has fewer "
          f"than {peak / bandwidth:.0f} FLOPs a byte")
    for title, new in ((f"forward, {B} x {T} tokens", T), (f"decode {B} x 1, cache {T}", 1)):
        rows = products(c, B, new, T)
        rows["sum"] = [sum(column) for column in zip(*rows.values())]
        print(f"\n{title:28}{'FLOPs':>11}{'bytes':>11}{'FLOPs/byte':>12}{'compute ms':>12}{'memory ms':>12}")
        for name, (work, moved) in rows.items():
            compute, traffic, longer = least_time(work, moved, args.device)
            print(f"{name:28}{work:11.4g}{moved:11.4g}{work / moved:12.1f}"
                  f"{compute * 1e3:12.4f}{traffic * 1e3:12.4f}  {longer}")
        classical = c.n_layer * B * new * (24 * c.n_embd ** 2 + 4 * c.n_embd * T)
        print(f"{'24 b s d² + 4 b s d · keys':28}{classical:11.4g}  all blocks, if they are a plain GPT's")


# -----------------------------------------------------------------------------
# Processes: one, or as many as torchrun started

@dataclass
class Process:
    """
    This process: its device, its rank of world, and how the world is laid out, as a mesh of four axes,
        (pp, replicate, shard, tp), the last one fastest:
    pp stages of a pipeline; replicas that hold the same parameters; shards that hold a part of each (FSDP); tp ranks
    that hold a part of each matrix and compute on it. Context parallelism needs no axis of its own: for gradients its
    cp ranks are more data, so they are the fastest part of the shards, or of the replicas where nothing is sharded.
    """
    device: torch.device
    rank: int = 0
    world: int = 1
    mode: str = "ddp"  # see PARALLEL
    pp: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    mesh: object = None
    groups: dict = field(default_factory=dict)  # pp, replicate, shard, tp, cp, stage (shard x tp), patient

    @property
    def replicate(self):
        return self.world // (self.pp * self.shard * self.tp)

    def place(self, rank=None):
        """(pp, replicate, shard, tp) of a rank."""
        rank, place = self.rank if rank is None else rank, []
        for size in (self.tp, self.shard, self.replicate):
            rank, r = divmod(rank, size)
            place.append(r)
        return rank, *reversed(place)

    @property
    def dp_world(self):
        """How many different micro-batches are computed at once."""
        return self.world // (self.pp * self.cp * self.tp)

    @property
    def dp_rank(self):
        return self.rank // (self.cp * self.tp) % self.dp_world

    def wait(self):
        """Until all are here, for as long as it takes: rank 0 prepares data, writes files, generates alone."""
        if self.world > 1:
            dist.barrier(group=self.groups.get("patient"))

    def close(self):
        if self.world > 1:
            self.wait()
            dist.destroy_process_group()


PARALLEL = {  # who holds parameters, gradients, optimizer state (Rajbhandari et al. 2020)
    "ddp": "everybody all of them",
    "zero1": "each the optimizer state of its own whole parameters, which it steps and sends to the others",
    "zero2": "a shard of gradients, state and masters each; gathered parameters stay until the backward pass is over",
    "fsdp": "a shard of all three each; a block's parameters are gathered when it runs (ZeRO-3)",
    "hsdp": "fsdp within groups of --hsdp_shard, ddp between them",
}


def setup_process(device="auto", args=None):
    """
    Join torchrun's group if there is one (NCCL on CUDA, gloo on CPU) and choose this process's device. args may hold
    the flags parallel, hsdp_shard, pp, cp, tp and timeout (seconds that a collective waits for a lost rank).
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device} cannot be used here ({str(error).splitlines()[0]}): "
                       f"try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # tf32 for what stays in float32
    elif sys.platform == "linux":
        # Activations of a few MB are returned to the kernel and faulted in again every step: up to half of a
        # small model's time. glibc: raise M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
        with contextlib.suppress(OSError, AttributeError):
            for option, value in ((-3, 32 << 20), (-1, 2 ** 31 - 1), (-2, 64 << 20)):
                ctypes.CDLL(None).mallopt(option, value)
    layout = {"parallel": "ddp", "hsdp_shard": 0, "pp": 1, "cp": 1, "tp": 1}
    flags = layout | {"timeout": 120} | (vars(args) if args else {})
    process = lay_out(Process(device, rank, world), **{name: flags[name] for name in layout})
    if world > 1 and not dist.is_initialized():
        backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=flags["timeout"])
        dist.init_process_group(backend, timeout=patience,
                                device_id=device if device.type == "cuda" else None)
    if world > 1:
        make_groups(process)
    return process


def lay_out(process, parallel="ddp", hsdp_shard=0, pp=1, cp=1, tp=1):
    """Fill in the sizes of the axes; BadInput where the world is not their product."""
    if parallel not in PARALLEL:
        raise BadInput(f"--parallel {parallel} is unknown: choose one of {', '.join(PARALLEL)}")
    if min(pp, cp, tp) < 1 or process.world % (pp * cp * tp):
        raise BadInput(f"--pp {pp} x --cp {cp} x --tp {tp} does not divide the {process.world} process(es) that "
                       f"torchrun started: start a multiple of {max(1, pp * cp * tp)}")
    data = process.world // (pp * cp * tp)
    shard = {"fsdp": data, "zero2": data}.get(parallel, 1)
    if parallel == "hsdp":
        node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // (cp * tp)
        shard = hsdp_shard or (node if node and data % node == 0 else data)
        if data % shard:
            raise BadInput(f"--hsdp_shard {shard} does not divide the {data} data-parallel processes")
    process.mode, process.pp, process.cp, process.tp = parallel, pp, cp, tp
    process.shard = shard * cp if parallel in ("fsdp", "zero2", "hsdp") else 1
    return process


def make_groups(process):
    """The mesh and the process groups that the layout needs."""
    def mesh(**axes):
        return dist.device_mesh.init_device_mesh(process.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    p, groups = process, process.groups
    groups["patient"] = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    p.mesh = mesh(pp=p.pp, replicate=p.replicate, shard=p.shard, tp=p.tp)
    groups |= {name: p.mesh[name].get_group() for name in ("pp", "replicate", "shard", "tp")}
    stage = p.shard * p.tp  # ranks that together hold one copy of a pipeline stage
    groups["stage"] = mesh(rest=p.world // stage, stage=stage)["stage"].get_group()
    if p.cp > 1:
        groups["cp"] = mesh(rest=p.world // (p.cp * p.tp), cp=p.cp, inner=p.tp)["cp"].get_group()


def all_reduce(tensor, op="sum"):
    """Sum (or "max", …) over all processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
    return tensor


def ring_all_reduce(x, group=None):
    """
    Sum x (n · k,) over the n ranks of a group, in place, as NCCL and gloo do it for large tensors: n - 1 steps of a
    reduce-scatter, then n - 1 of an all-gather, in each of which every rank sends one n-th to its right-hand neighbour
    and receives one from its left. Each sends 2 (n - 1) / n of the tensor in all, however many they are: the least
    possible. To read; `all_reduce` is the one that is used.
    """
    n, r = dist.get_world_size(group), dist.get_rank(group)
    if n == 1:
        return x
    right, left = ((dist.get_global_rank(group, q % n) if group else q % n) for q in (r + 1, r - 1))
    parts, new = x.view(n, -1), torch.empty_like(x.view(n, -1)[0])
    for step in range(2 * n - 2):
        send = parts[(r - step) % n]
        place = parts[(r - step - 1) % n]
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, send, right, group),
                                            dist.P2POp(dist.irecv, new, left, group)]):
            work.wait()
        # first the running sum of the part moves on and grows; after n - 1 steps rank r holds all of part r + 1
        place.copy_(place + new if step < n - 1 else new)
    return x


def adamw_groups(model, weight_decay):
    """Decay what multiplies (matrices), not gains, biases and other vectors; each parameter exactly once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]


class AdamW8bit(torch.optim.Optimizer):
    """
    AdamW whose moments lie in memory as one byte a number (Dettmers et al. 2022): blocks of 256 are divided by their
    largest magnitude and rounded to quantize.dynamic_code. The second moment's root is stored, as its range is the
    first's. Small tensors keep 32 bits.
    """
    BLOCK, SMALL = 256, 4096

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.codes = {}

    def load(self, state, name, p):
        if f"{name}_scale" not in state:
            return state[name]
        x = self.code(name, p.device)[state[name].int()] * state[f"{name}_scale"]
        return x.flatten()[:p.numel()].view_as(p)

    def store(self, state, name, x):
        if x.numel() >= self.SMALL:
            x = F.pad(x.flatten(), (0, -x.numel() % self.BLOCK)).view(-1, self.BLOCK)
            scale, code = x.abs().amax(1, keepdim=True), self.code(name, x.device)
            x = torch.bucketize(x / scale.clamp(min=1e-30), (code[1:] + code[:-1]) / 2).to(torch.uint8)
            self.keep(state, f"{name}_scale", scale)
        self.keep(state, name, x)

    def keep(self, state, name, x):  # always the same memory: a recorded step writes there
        state[name].copy_(x) if name in state else state.update({name: x.clone()})

    def code(self, name, device):
        from quantize import dynamic_code
        if (name, device) not in self.codes:
            self.codes[name, device] = dynamic_code(signed=name == "m").to(device)
        return self.codes[name, device]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad.float(), self.state[p]
                if not state:
                    state["t"] = torch.zeros((), device=p.device)
                    for name in ("m", "root_v"):
                        self.store(state, name, torch.zeros_like(g))
                state["t"] += 1
                m = self.load(state, "m", p).lerp(g, 1 - beta1)
                v = self.load(state, "root_v", p).square().lerp(g.square(), 1 - beta2)
                self.store(state, "m", m)
                self.store(state, "root_v", v.sqrt())
                m, v = m / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(m / (v.sqrt() + group["eps"]) * lr)

    def load_state_dict(self, saved):
        super().load_state_dict(saved)  # gives every state its parameter's dtype
        for state in self.state.values():
            state.update({name: state[name].to(torch.uint8) for name in ("m", "root_v") if f"{name}_scale" in state})


# -----------------------------------------------------------------------------
# Parallelism: one model over many processes. `shard` is the wrapper that all stages share.

# torch 2.13 renames both
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x, dim, group):
    """The ranks' x one behind the other along dim."""
    n = dist.get_world_size(group)
    out = x.new_empty(n * x.numel())
    _all_gather(out, x.contiguous().view(-1), group=group)
    return out.view(n, *x.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x, dim, group):
    """This rank's part, along dim, of the sum of the ranks' x."""
    parts = x.unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    out = parts.new_empty(parts[0].numel())
    _reduce_scatter(out, parts.view(-1), group=group)
    return out.view(parts.shape[1:])


class AllGather(torch.autograd.Function):
    """all_gather, whose gradient is a reduce_scatter: every rank used every part."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad, ctx.dim, ctx.group), None, None


class ReduceScatter(torch.autograd.Function):
    """reduce_scatter, whose gradient is an all_gather."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.dim, ctx.group), None, None


# Tensor parallelism (Shoeybi et al. 2019) with the sequence spread where there is no matrix (Korthikanti et al. 2022):
#     residual stream and norms     (B, T / tp, C)       each rank its part of the sequence
#     all_gather                    (B, T, C)
#     q, k, v, gate, up             (B, T, heads / tp)   each rank some of the outputs: rows of the weight
#     o, down                       (B, T, C)            each rank a part of the sum: columns of the weight
#     reduce_scatter                (B, T / tp, C)
# so a parameter that is not cut sees a part of the tokens or heads: its gradient is summed over tp.

CUT_ROWS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "wte", "head")
CUT_COLUMNS = ("attn.o", "mlp.down")


def tp_dim(name):
    """The dimension along which tensor parallelism cuts a parameter, or None."""
    part, _, kind = name.rpartition(".")
    if part.endswith(CUT_COLUMNS):
        return 1 if kind == "weight" else None
    return 0 if part.endswith(CUT_ROWS) and not part.endswith("scalar_head") else None


class RowLinear(Linear):
    """y = Σ_ranks x_r W_rᵀ + b, of which each rank keeps its part of the sequence."""

    def forward(self, x):
        y = ReduceScatter.apply(F.linear(x, self.weight.to(x.dtype)), 1, self.group)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class VocabularyEmbedding(nn.Embedding):
    """Each rank looks up the ids whose rows it has; of the sum, which has all, it keeps its part of the sequence."""

    def forward(self, idx):
        rows = self.weight.shape[0]
        idx = idx - dist.get_rank(self.group) * rows
        here = (idx >= 0) & (idx < rows)
        x = F.embedding(idx.clamp(0, rows - 1), self.weight) * here.unsqueeze(-1)
        return ReduceScatter.apply(x, 1, self.group)


class VocabularyCrossEntropy(torch.autograd.Function):
    """
    LinearCrossEntropy where each rank has some rows of the head: of each row of logits the maximum, the sum of
    exponentials and the target's logit are reduced over the group, never the logits. dL/dx is this rank's part of
    the sum over the vocabulary: the AllGather that made x adds them up.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, chunk, group, z_loss):
        w, rows = weight.to(x.dtype), weight.shape[0]
        ids = torch.arange(rows, device=x.device) + dist.get_rank(group) * rows
        losses, dx, dw = [], [], 0.0
        for xi, ti in zip(x.split(chunk), targets.split(chunk)):
            logits = cap((xi @ w.T).float(), softcap)
            logits = logits.masked_fill(ids >= vocab_size, -math.inf)
            top = logits.amax(-1)
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            hit, counts = ids == ti.unsqueeze(1), ti != -100
            exp = (logits - top.unsqueeze(1)).exp()
            sums = torch.stack((exp.sum(-1), logits.masked_fill(~hit, 0).sum(-1)))
            dist.all_reduce(sums, group=group)
            total, target = sums
            log_z = total.log() + top
            losses.append((log_z - target + z_loss * log_z.square()) * counts)
            if any(ctx.needs_input_grad[:2]):
                p = exp * ((1 + 2 * z_loss * log_z) / total).unsqueeze(1)
                grad = (p - hit.float()) * counts.unsqueeze(1)
                if softcap:
                    grad = grad * (1 - (logits / softcap).clamp(min=-1).square())
                grad = grad.to(x.dtype)
                dx.append(grad @ w)
                dw = dw + (grad.T @ xi).float()
        if dx:
            ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None, None, None, None


def vocabulary_cross_entropy(x, weight, targets, vocab_size, reduction="mean", softcap=0.0, chunk=0, group=None,
                             z_loss=0.0):
    """linear_cross_entropy of a head whose rows are spread over a group; reduction "none" has no gradient."""
    chunk = chunk or max(1, 2 ** 28 // weight.shape[0])
    total, losses = VocabularyCrossEntropy.apply(x, weight, targets, vocab_size, softcap, chunk, group, z_loss)
    if reduction == "none":
        return losses
    return total if reduction == "sum" else total / (targets != -100).sum().clamp(min=1)


def check_layout(c, process, T):
    """BadInput, in one sentence that names the flag, where a model of config c cannot be laid out so."""
    tp, pp, cp = process.tp, process.pp, process.cp
    for size, what in ((c.n_kv_head, "heads of keys"), (c.n_hidden, "hidden units"),
                       (c.padded_vocab, "rows of vocabulary"), (T // cp, "tokens of a rank's part of the sequence")):
        if size % tp:
            raise BadInput(f"--tp {tp} does not divide the model's {size} {what}: use one that does, or --parallel "
                           f"fsdp")
    if c.prefix_lm and (pp > 1 or cp > 1):
        raise BadInput("a prefix-LM's rows have masks of their own, which --pp and --cp do not pass on: use --tp or "
                       "fsdp")
    if cp > 1 and T % (2 * cp):
        raise BadInput(f"--cp {cp} cuts the sequence into {2 * cp} chunks: use a --block_size that is a multiple of "
                       f"that, which {T} is not")
    if pp > c.n_layer:
        raise BadInput(f"--pp {pp} is more stages than the model's {c.n_layer} layers")
    if pp > 1 and (c.resid_mix or c.share > 1 or c.pos == "t5"):
        what = "resid_mix" if c.resid_mix else "share" if c.share > 1 else "pos t5"
        raise BadInput(f"--pp {pp} cannot cut a model with {what}, whose parts later layers need again: use --tp or "
                       f"fsdp")


def split_layers(n_layer, pp, stage):
    """The layers of a stage, as even as they go: the first n_layer mod pp stages have one more."""
    few, more = divmod(n_layer, pp)
    start = stage * few + min(stage, more)
    return range(start, start + few + (stage < more))


def keep_matmuls():
    """Selective recomputation: what a matrix product or attention returned is kept, all else computed again."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts
    ops = torch.ops.aten
    return create_selective_checkpoint_contexts([
        ops.mm.default, ops.addmm.default, ops.bmm.default, ops._scaled_dot_product_flash_attention.default,
        ops._scaled_dot_product_efficient_attention.default, ops._scaled_dot_product_cudnn_attention.default,
        ops._scaled_dot_product_flash_attention_for_cpu.default])


def cut_tensors(model, process):
    """Tensor parallelism, in place: this rank's rows and columns, and the layers that know of the others."""
    group, (_, _, _, rank) = process.groups["tp"], process.place()
    model.tp = group
    heads = model.config.n_head // process.tp
    model.heads = slice(rank * heads, (rank + 1) * heads)
    for name, p in list(model.named_parameters()):
        if tp_dim(name) is not None:
            part, _, kind = name.rpartition(".")
            piece = p.detach().chunk(process.tp, tp_dim(name))[rank].clone()
            setattr(model.get_submodule(part), kind, nn.Parameter(piece))
    model.wte.__class__ = VocabularyEmbedding
    model.wte.group = group
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            part.register_forward_pre_hook(lambda module, inputs: (AllGather.apply(inputs[0], 1, group), *inputs[1:]))
        for row in (block.attn.o, block.mlp.down):
            row.__class__ = RowLinear
            row.group = group
    model.loss = functools.partial(vocabulary_cross_entropy, group=group)


def shard(model, process, args=None, whole=lambda name, shape: False):
    """
    Spread an initialized model over the processes, in place, and return the Sharded that trains it. args may hold the
    flags recompute (none | block | selective), offload, and pp_schedule (gpipe | 1f1b). whole(name, shape) says which
    parameters an optimizer must see whole (Muon's matrices); it may see a part of the others at a time (AdamW).
    """
    c, p = model.config, process
    flags = {"recompute": "none", "offload": False, "pp_schedule": "1f1b", "ep": 1} | (vars(args) if args else {})
    check_layout(c, p, c.block_size)
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    model.own_experts, model.expert_copies = [], None  # names of parameters that other ranks lack, who has them too
    if c.n_expert or flags["ep"] > 1:
        from moe import spread_experts
        model.own_experts, model.expert_copies = spread_experts(model, p, flags["ep"])
    if p.cp > 1:  # chunks r and 2 cp - 1 - r: all ranks see as many keys
        chunks = torch.arange(c.block_size, device=p.device).chunk(2 * p.cp)
        parts = [torch.cat((chunks[r], chunks[2 * p.cp - 1 - r])) for r in range(p.cp)]
        model.cp, model.places = p.groups["cp"], parts[p.rank // p.tp % p.cp]
        model.in_order = torch.cat(parts).argsort()
    if p.tp > 1:
        cut_tensors(model, p)
    if p.pp > 1:
        stage = p.place()[0]
        model.layers = split_layers(c.n_layer, p.pp, stage)
        for l in set(range(c.n_layer)) - set(model.layers):
            model.blocks[l] = nn.Identity()
        if stage > 0:
            model.wpe = model.embd_in = model.embd_norm = None
            model.wte = model.wte if c.tied and stage == p.pp - 1 else None
        if stage < p.pp - 1:
            model.norm = model.embd_out = model.head = model.scalar_head = None
    if flags["recompute"] != "none":
        context = {"context_fn": keep_matmuls} if flags["recompute"] == "selective" else {}
        for block in (model.blocks[l // c.share] for l in model.layers[::c.share]):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **context)
    if p.world == 1 or p.mode not in ("zero2", "fsdp", "hsdp"):
        model.to(p.device)
    else:  # which moves what it shards, block by block
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        options = dict(mesh=p.mesh["replicate", "shard"] if p.mode == "hsdp" else p.mesh["shard"],
                       mp_policy=MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32),
                       offload_policy=CPUOffloadPolicy(p.device.type == "cuda") if flags["offload"]
                       else OffloadPolicy())
        keep = {"reshard_after_forward": False} if p.mode == "zero2" else {}
        for block in model.blocks:
            if not isinstance(block, nn.Identity):
                if hasattr(block.mlp, "router"):  # whose weights no gathering rounds
                    fully_shard(block.mlp.router, **options | {"mp_policy": MixedPrecisionPolicy()})
                fully_shard(block, **options, **keep)
        fully_shard(model, **options, **keep)
    return Sharded(model, p, shapes, whole, flags)


def local(t):
    """A DTensor's part on this rank; a tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def all_to_all(outgoing, shapes, group, device):
    """Send outgoing[r] (a list of tensors) to each rank r of a group; what came, shapes[r] from r, in lists as well."""
    flat = [torch.cat([t.reshape(-1) for t in to] or [torch.empty(0)]).to(device) for to in outgoing]
    sizes = [sum(map(math.prod, of)) for of in shapes]
    new = torch.empty(sum(sizes), device=device, dtype=flat[0].dtype)
    dist.all_to_all_single(new, torch.cat(flat), sizes, [len(t) for t in flat], group=group)
    return [[t.view(shape) for t, shape in zip(part.split([math.prod(s) for s in of]), of)] if of else []
            for part, of in zip(new.split(sizes), shapes)]


def spread(sizes, n):
    """name -> which of n ranks takes it: the largest first, each to the rank with the least so far."""
    load, owner = [0] * n, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = min(range(n), key=load.__getitem__)
        load[owner[name]] += sizes[name]
    return owner


class Sharded:
    """
    A model over many processes. One training step:

        loss = sharded(x, y, last=…)[1]; (loss / accumulate).backward()     for each micro-batch
        norm = sharded.reduce(max_norm)     gradients summed over all, clipped, and where the optimizers look for them
        optimizer.step(); sharded.publish()

    The optimizers hold the parameters of `stand_in`, a GPT with the model's names. Each of its parameters is
        this rank's part, sharing memory with the model's (a copy in main memory with offload), or
        all of it on one rank, its owner, and empty on the others (zero1; what an optimizer must see whole),
    so that no optimizer knows about processes. With one process, or plain ddp, it is the model itself.
    """

    def __init__(self, model, process, shapes, whole, flags):
        self.model, self.config, self.process, self.shapes = model, model.config, process, shapes
        p, self.offload = process, bool(flags["offload"])
        self.sharded = p.world > 1 and p.mode in ("zero2", "fsdp", "hsdp")
        self.plain = not self.offload and (p.world == 1 or p.mode == "ddp" and p.tp == p.pp == p.cp == 1)
        self.plain = self.plain and not model.own_experts
        self.pipeline = Pipeline(model, process, flags["pp_schedule"]) if p.pp > 1 else None
        self.forward = model
        if p.replicate > 1 and not self.sharded and p.pp == 1:
            DDP = nn.parallel.DistributedDataParallel
            DDP._set_params_and_buffers_to_ignore_for_model(model, model.own_experts)
            self.forward = DDP(model, process_group=p.groups["replicate"], broadcast_buffers=False,  # tables and counts
                               gradient_as_bucket_view=True)  # without a second copy of the gradients
        self.parts = {name: local(t.detach()) for name, t in model.named_parameters()}
        self.owner, self.keeper = {}, {}  # name -> its rank in the group "stage" (whole), "replicate" (zero1)
        self.stand_in = model if self.plain else self.make_stand_in(whole)
        # in the sum of squares every part counts once
        self.once = torch.tensor([1 / self.copies(name) for name in self.parts], device=p.device)

    def piece(self, name, rank=None):
        """The part of a parameter that a rank holds, as slices of the whole."""
        p, (_, _, s, t), shape = self.process, self.process.place(rank), self.shapes[name]
        cut = [slice(0, n) for n in shape]
        if p.tp > 1 and tp_dim(name) is not None:
            n = shape[tp_dim(name)] // p.tp
            cut[tp_dim(name)] = slice(t * n, (t + 1) * n)
        if self.sharded:  # fully_shard cuts rows as torch.chunk does: the last ranks may have fewer, or none
            first, n = cut[0].start, cut[0].stop - cut[0].start
            rows = math.ceil(n / p.shard)
            cut[0] = slice(first + min(s * rows, n), first + min((s + 1) * rows, n))
        return tuple(cut)

    def piece_shape(self, name, rank=None):
        return tuple(cut.stop - cut.start for cut in self.piece(name, rank))

    def copies(self, name):
        """How many ranks hold the same part of a parameter."""
        p = self.process
        twice = name == "wte.weight" and self.model.config.tied and p.pp > 1
        replicate = dist.get_world_size(self.model.expert_copies) if name in self.model.own_experts else p.replicate
        return replicate * (1 if tp_dim(name) is not None else p.tp) * (2 if twice else 1)

    # the optimizers' side

    def make_stand_in(self, whole):
        p = self.process
        cut = [n for n in self.parts if whole(n, self.shapes[n]) and (self.sharded and p.shard > 1 or p.tp > 1)]
        self.owner = spread({n: math.prod(self.shapes[n]) for n in cut}, p.shard * p.tp)
        if p.mode == "zero1":
            rest = {n: t.numel() for n, t in self.parts.items() if n not in self.owner}
            self.keeper = spread(rest, p.replicate)
        with torch.device("meta"):
            stand_in = GPT(self.model.config)
        wholes = self.to_owners(self.parts)
        _, replica, _, _ = p.place()
        for name in self.shapes:
            empty = torch.empty([0] * len(self.shapes[name]), device=p.device)
            if name in self.owner:
                mine = wholes.get(name, empty)
            elif self.keeper.get(name, replica) == replica:
                mine = self.parts.get(name, empty)
            else:
                mine = empty
            part, _, kind = name.rpartition(".")
            setattr(stand_in.get_submodule(part), kind, nn.Parameter(mine.cpu() if self.offload else mine))
        return stand_in

    def to_owners(self, parts):
        """name -> this rank's part of what has an owner -> name -> the whole, of what this rank owns."""
        if not self.owner:
            return {}
        group = self.process.groups["stage"]
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        mine = [n for n in self.owner if self.owner[n] == me]
        came = all_to_all([[parts[n] for n in self.owner if self.owner[n] == r] for r in range(len(ranks))],
                          [[self.piece_shape(n, rank) for n in mine] for rank in ranks], group, self.process.device)
        wholes = {n: torch.empty(self.shapes[n], device=self.process.device) for n in mine}
        for rank, of in zip(ranks, came):
            for n, t in zip(mine, of):
                wholes[n][self.piece(n, rank)] = t
        return wholes

    def from_owners(self, wholes):
        """The way back: name -> this rank's part."""
        group = self.process.groups["stage"]
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        names = [[n for n in self.owner if self.owner[n] == r] for r in range(len(ranks))]
        came = all_to_all([[wholes[n][self.piece(n, rank)] for n in names[me]] for rank in ranks],
                          [[self.piece_shape(n) for n in of] for of in names], group, self.process.device)
        return {n: t for of, ts in zip(names, came) for n, t in zip(of, ts)}

    def __call__(self, x, y, reduction="mean", last=True, prefix=None):
        """
        (None, loss) of rows x, y (B, T), the same on all ranks of one dp_rank. In training: the mean over the tokens
        this rank computed; last: its gradient completes the step's. In evaluation, with reduction "sum": over them all.
        """
        model, p = self.model, self.process
        if model.cp is not None:
            x, y = x[:, model.places], y[:, model.places]
        if not model.training:
            if self.pipeline is not None:
                loss = self.pipeline.evaluate(x, y, reduction)
            else:
                loss = model(x, y, reduction=reduction, prefix=prefix)[1]
            if model.cp is not None:
                dist.all_reduce(loss, group=p.groups["cp"])
            return None, loss
        if self.sharded:  # gradients of every micro-batch go to their shards, hsdp's groups meet at the last
            model.set_requires_all_reduce(last)
        with contextlib.nullcontext() if last or self.forward is model else self.forward.no_sync():
            return self.forward(x, y, reduction=reduction, prefix=prefix)

    def train(self, mode=True):
        self.model.train(mode)

    def eval(self):
        self.model.eval()

    def reduce(self, max_norm=math.inf):
        """
        After the last backward pass: what is still to be summed over ranks, the norm of the whole gradient (a scalar,
        the same on all ranks), clipping to max_norm, and the gradients into the stand-in's parameters.
        """
        if self.plain:
            return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        p, groups = self.process, self.process.groups
        grads = {n: local(t.grad) for n, t in self.model.named_parameters() if t.grad is not None}
        if p.pp > 1 and p.replicate > 1 and not self.sharded:
            self.add(grads.values(), groups["replicate"])
            torch._foreach_div_(list(grads.values()), p.replicate)
        # the others' tokens are in these already
        if experts := [grads[n] for n in self.model.own_experts if n in grads]:
            self.add(experts, self.model.expert_copies)
            torch._foreach_div_(experts, p.world)
        if p.tp > 1:
            self.add([g for n, g in grads.items() if tp_dim(n) is None], groups["tp"])
        if self.pipeline is not None and self.model.config.tied:
            self.pipeline.tie(grads)
        norms = dict(zip(grads, torch._foreach_norm(list(grads.values()))))
        squares = torch.stack([norms.get(name, self.once.new_zeros(())).to(p.device) for name in self.parts]).square()
        norm = all_reduce((squares * self.once).sum()).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(list(grads.values()), scale.to(next(iter(grads.values())).device))
        wholes = self.to_owners(grads)
        for name, q in self.stand_in.named_parameters():
            grad = wholes.get(name) if name in self.owner else grads.get(name)
            q.grad = None if grad is None or grad.shape != q.shape else grad.to(q.device)
        return norm

    @staticmethod
    def add(grads, group):
        """One all-reduce for many small tensors."""
        grads = list(grads)
        if grads:
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat, group=group)
            for g, new in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(new.view_as(g))

    @torch.no_grad()
    def publish(self):
        """After the optimizers' step: the new parameters to all who compute with them."""
        if self.plain:
            return
        new = dict(self.stand_in.named_parameters())
        if self.owner:
            for name, t in self.from_owners({n: q.detach() for n, q in new.items() if n in self.owner}).items():
                self.parts[name].copy_(t)
        group, replica, works = self.process.groups.get("replicate"), self.process.place()[1], []
        for name, part in self.parts.items():
            if name in self.owner:
                continue
            if self.offload and self.keeper.get(name, replica) == replica:
                part.copy_(new[name])
            if name in self.keeper:
                source = dist.get_global_rank(group, self.keeper[name])
                works.append(dist.broadcast(part, source, group=group, async_op=True))
        for work in works:
            work.wait()
        for t in self.model.parameters():
            t.grad = None

    # checkpoints: the same whatever the layout, so that a run goes on with another

    def held(self, optimizers=()):
        """(kind, name, key) -> tensor of all that this rank knows: kind "model", or an optimizer's number."""
        tensors = {("model", name, ""): t for name, t in self.parts.items()}
        names = {id(q): name for name, q in self.stand_in.named_parameters()}
        for i, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                for q in group["params"]:
                    for key, value in optimizer.state.get(q, {}).items():
                        tensors[str(i), names[id(q)], key] = torch.as_tensor(value)
        return tensors

    def shares(self, tensors):
        """
        For each different part of each tensor, once: (its key, rank that has it, slices of the whole or None for all
        of it, shape, dtype), in the same order on all ranks.
        """
        table = [{key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}]
        if self.process.world > 1:
            mine, table = table[0], [None] * self.process.world
            dist.all_gather_object(table, mine, group=self.process.groups["patient"])
        order = {name: i for i, name in enumerate(self.shapes)}
        seen = set()
        for key in sorted({key for keys in table for key in keys}, key=lambda key: (key[0], order[key[1]], key[2])):
            name = key[1]
            for rank, keys in enumerate(table):
                shape, dtype = keys.get(key, (None, None))
                if shape is None:
                    continue
                whole = key[0] != "model" and name in self.owner or shape != self.piece_shape(name, rank)
                cut = None if whole or shape == self.shapes[name] else self.piece(name, rank)
                if (key, str(cut)) not in seen and 0 not in shape:
                    seen.add((key, str(cut)))
                    yield key, rank, cut, shape, dtype

    def gather(self, tensors):
        """The whole tensors in main memory of rank 0, which the others send their parts; {} elsewhere."""
        me, device, wholes = self.process.rank, self.process.device, {}
        for key, rank, cut, shape, dtype in self.shares(tensors):
            t = tensors.get(key)
            if rank and me == rank:
                dist.send(t.detach().to(device).contiguous(), 0)
            elif rank and me == 0:
                t = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(t, rank)
            if me == 0 and cut is None:
                wholes[key] = t.detach().cpu()
            elif me == 0:
                wholes.setdefault(key, torch.empty(self.shapes[key[1]], dtype=dtype))[cut] = t.cpu()
        return wholes

    def state_dict(self, optimizers, sharded=False):
        """
        {"model": name -> tensor, "optimizers": [torch's state dicts]} of whole tensors, on rank 0, {} elsewhere.
        sharded: on every rank, and instead of a tensor [(slices as (start, stop) pairs or None, its part)], [] of
        others' parts.
        """
        tensors = self.held(optimizers)
        if sharded:
            wholes = {}
            for key, rank, cut, *_ in self.shares(tensors):
                parts = wholes.setdefault(key, [])
                if rank == self.process.rank:
                    parts.append((cut and [(c.start, c.stop) for c in cut], tensors[key].detach().cpu()))
        else:
            wholes = self.gather(tensors)
        if not wholes:
            return {}
        state = {"model": {name: t for (kind, name, _), t in wholes.items() if kind == "model"}, "optimizers": []}
        names = {id(q): name for name, q in self.stand_in.named_parameters()}
        for i, optimizer in enumerate(optimizers):
            saved = optimizer.state_dict()
            order = [names[id(q)] for group in optimizer.param_groups for q in group["params"]]
            number = {name: n for n, name in enumerate(order)}
            saved["state"] = {}
            for (kind, name, key), t in wholes.items():
                if kind == str(i):
                    saved["state"].setdefault(number[name], {})[key] = t
            state["optimizers"].append(saved)
        return state

    @torch.no_grad()
    def load_state_dict(self, state, optimizers):
        """From a state_dict, whole or the joined parts of a sharded one."""
        names = {id(q): name for name, q in self.stand_in.named_parameters()}
        new = dict(self.stand_in.named_parameters())
        for name, part in self.parts.items():
            whole = assemble(state["model"][name], self.shapes[name])
            part.copy_(whole[self.piece(name)])
            if new[name].numel() and not self.plain:
                new[name].copy_(whole if name in self.owner else part)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            mine = {}
            params = [q for group in optimizer.param_groups for q in group["params"]]
            for n, q in enumerate(params):
                name = names[id(q)]
                if q.numel() and n in saved["state"]:
                    mine[n] = {key: assemble(t, self.shapes[name]) for key, t in saved["state"][n].items()}
                    cut = () if name in self.owner else self.piece(name)
                    mine[n] = {key: t[cut].clone() if tuple(t.shape) == self.shapes[name] else t.clone()
                               for key, t in mine[n].items()}
            groups = [{**ours, "params": theirs["params"]} for ours, theirs in
                      zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)]
            optimizer.load_state_dict({"state": mine, "param_groups": groups})  # rates are this run's


def assemble(t, shape):
    """A tensor, or a list of (slices, part) of one of this shape."""
    if torch.is_tensor(t):
        return t
    if t[0][0] is None:
        return t[0][1]
    whole = torch.empty(shape, dtype=t[0][1].dtype)
    for cut, part in t:
        whole[tuple(slice(*c) for c in cut)] = part
    return whole


class Pipeline:
    """
    A model's layers in K stages, one a process (GPipe, Huang et al. 2019; 1F1B, Narayanan et al. 2019): micro-batches
    follow each other through the stages, and (K - 1) / (K - 1 + M) of the time a stage waits, with M of them a step.
    gpipe: all forward passes, then all backward. 1f1b: backward as soon as can be, so that a stage keeps the
    activations of at most K micro-batches instead of M.
    """

    def __init__(self, model, process, schedule):
        self.model, self.process, self.kind, self.schedule = model, process, schedule, None
        self.stage, self.batch = process.place()[0], []
        self.first, self.last = self.stage == 0, self.stage == process.pp - 1
        self.ends = None
        if model.config.tied:  # first and last stage hold the same matrix
            for ranks in self.columns():
                group = dist.new_group([ranks[0], ranks[-1]])
                self.ends = group if process.rank in (ranks[0], ranks[-1]) else self.ends

    def columns(self):
        """The ranks of every pipeline of the world, first stage first."""
        size = self.process.world // self.process.pp
        return [list(range(start, self.process.world, size)) for start in range(size)]

    def bubble(self, micro_batches):
        return (self.process.pp - 1) / (self.process.pp - 1 + micro_batches)

    def hidden(self, B, T):
        """What one stage hands the next."""
        m = self.model
        return torch.empty(B, T // self.process.tp, m.config.n_embd, dtype=m.compute_dtype, device=self.process.device)

    def step(self, x, y, count):
        """
        Forward and backward of a step's micro-batches, x and y (count · B, T): the mean loss on the last stage, else 0.
        """
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
        p = self.process
        if self.model.cp is not None:
            x, y = x[:, self.model.places], y[:, self.model.places]
        if self.schedule is None or self.count != count:  # a growing batch
            self.count = count
            B, T = len(x) // count, x.shape[1]
            h = self.hidden(B, T)
            stage = PipelineStage(self.model, self.stage, p.pp, p.device, group=p.groups["pp"],
                                  input_args=x[:B] if self.first else h.requires_grad_(),
                                  output_args=torch.zeros(1, device=p.device) if self.last else h.requires_grad_())
            self.schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[self.kind](
                stage, n_microbatches=count, loss_fn=lambda loss, _: loss.sum())
        losses = []
        inputs, targets = [x] if self.first else [], dict(target=y, losses=losses, targets=y) if self.last else {}
        self.schedule.step(*inputs, **targets)
        return torch.stack(losses).detach().mean() if self.last else torch.zeros((), device=p.device)

    @torch.no_grad()
    def evaluate(self, x, y, reduction):
        """One batch through all stages; the loss on every rank."""
        p, ranks = self.process, dist.get_process_group_ranks(self.process.groups["pp"])
        if not self.first:
            x = self.hidden(*x.shape)
            dist.recv(x, ranks[self.stage - 1])
        out = self.model(x, y, reduction=reduction)
        if not self.last:
            dist.send(out.contiguous(), ranks[self.stage + 1])
        loss = out.float().view(()) if self.last else torch.zeros((), device=p.device)
        dist.broadcast(loss, ranks[-1], group=p.groups["pp"])
        return loss

    def tie(self, grads):
        """The embedding's gradient is the sum of what the first stage and the head computed."""
        if self.ends is not None:
            dist.all_reduce(grads["wte.weight"], group=self.ends)


# -----------------------------------------------------------------------------
# Files: safetensors (8 bytes of header length, JSON header, raw little-endian tensors)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def write_safetensors(path, entries, pieces, metadata=None):
    """
    Write tensors as they are made. entries {name: (dtype, shape)}; pieces: tensors that, one behind the other, are
    those of the entries, in order and of their dtypes; metadata: dict of str -> str.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with replace_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in pieces:
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def save_safetensors(tensors, path, metadata=None):
    """Write a dict of name -> tensor; metadata: dict of str -> str."""
    write_safetensors(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.values(), metadata)


def scan_safetensors(path):
    """
    {name: (dtype, shape, first byte)} in the file's order. Every length, shape and offset is checked against the file,
    so a truncated or forged file is a BadInput and never a wild read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            if size < 8 or n > min(size - 8, 100 << 20):
                raise ValueError(f"its header of {n} bytes does not fit in {size}")
            header = json.loads(f.read(n))
        entries, covered, room = {}, 0, size - 8 - n
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(isinstance(d, int) and d >= 0 for d in (*shape, start, end)):
                raise ValueError(f"{name} has a shape or offset that is not a count")
            if start != covered or end - start != math.prod(shape) * dtype.itemsize or end > room:
                raise ValueError(f"{name} claims bytes {start} to {end} of {room}")
            covered, entries[name] = end, (dtype, tuple(shape), 8 + n + start)
        if covered != room:
            raise ValueError(f"{room - covered} bytes belong to no tensor")
        return entries
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give --init or --out the folder of a finished run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BadInput(f"{path} is not a sound safetensors file ({error}): copy or save it again") from None


def load_safetensors(path):
    """name -> tensor, mapped from the file: bytes are read when they are used. BadInput as of scan_safetensors."""
    entries, tensors = scan_safetensors(path), {}
    try:
        raw = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        raise BadInput(f"{path} cannot be mapped ({error}): copy or save it again") from None
    for name, (dtype, shape, start) in entries.items():
        data = raw[start:start + math.prod(shape) * dtype.itemsize]
        if start % dtype.itemsize:
            data = data.clone()  # a header of odd length: views need alignment
        tensors[name] = data.view(dtype).view(shape)
    return tensors


# -----------------------------------------------------------------------------
# Run directories: model.safetensors, run.json, tokenizer.tiktoken, log.jsonl, and optim.pt to resume from


def save_run(out, model, run, weights=None):
    """
    Weights (the model's own unless given), then run.json: {"config", "tokenizer", "stage", "step", "metrics",
    "args", …}. Each file is replaced at once and all saves of a run share one config, so any moment leaves a run
    that loads.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_safetensors(weights or model.state_dict(), out / "model.safetensors", {"format": "pt"})
    with replace_file(out / "run.json", "w") as f:
        json.dump({"config": asdict(model.config), **run}, f, indent=1)


def check_out(out, needed=None):
    """
    What start_run does with what is there: "move" a finished run, "remove" one that ended before its first save, or
    None. Raises BadInput where other files would be lost, or `needed`, a folder that this run reads.
    """
    out = Path(out).resolve()
    old = out.with_name(out.name + ".old")
    if needed and Path(needed).exists() and {out, old} & {Path(needed).resolve(), *Path(needed).resolve().parents}:
        raise BadInput(f"--out {out} would take the place of {needed}, which is read: give another folder")
    names = [p.name for p in out.iterdir()] if out.is_dir() else []
    if {"run.json", "config.json", "model.safetensors"} & {*names}:
        return "move"
    begun = (".", "log.", "optim", "pairs", "reference", "tokenizer.")
    if out.is_file() or not all(name.startswith(begun) for name in names):
        raise BadInput(f"--out {out} is there and is no run: give another folder, or move that one away")
    return "remove" if names else None


def start_run(out, needed=None):
    """An empty run directory; a finished run that was there moves to OUT.old."""
    fate, out = check_out(out, needed), Path(out).resolve()
    old = out.with_name(out.name + ".old")
    if fate == "move":
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif fate == "remove":
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def load_run(path, device="cpu", dtype=torch.float32):
    """The model of a run directory, its weights and activations in dtype, and the contents of run.json."""
    path = Path(path)
    try:
        run = json.loads((path / "run.json").read_text())
        if "base" in run:  # an adapter
            import lora
            return lora.load(path, device, dtype), run
        known = {f.name for f in fields(GPTConfig)}
        unknown = sorted(set(run["config"]) - known)
        if unknown:
            raise BadInput(f"{path}/run.json has settings this version does not know: {', '.join(unknown)}")
        config = GPTConfig(**run["config"])
    except FileNotFoundError:
        raise BadInput(f"{path} holds no run.json: train first (python train.py) or give --init another run") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}/run.json cannot be read ({error}): save the run again") from None
    tensors = load_safetensors(path / "model.safetensors")
    return build_model(config, tensors, path, device, dtype, run.get("quantize")), run


def build_model(config, tensors, source, device="cpu", dtype=torch.float32, quantized=None):
    """
    A GPT that holds `tensors`, every one of the right name and shape; nothing is initialized in between.
    dtype None: as the tensors are. quantized: what quantize.describe says of a quantized model.
    """
    with torch.device("meta"):
        model = GPT(config)
    kept = ()  # tensors whose dtype stays
    if quantized:
        from quantize import install
        kept = install(model, quantized, tensors, source)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BadInput(f"{source} has no tensor {name}: it is not a model of its config")
        if name not in expected or expected[name] != tensors[name].shape:
            raise BadInput(f"{source} has {name} of shape {list(tensors[name].shape)}, which its config does not")
    dtype = dtype or next((t.dtype for name, t in tensors.items() if name == "wte.weight"), torch.float32)
    model.load_state_dict({name: t.to(device, t.dtype if name in kept else dtype) for name, t in tensors.items()},
                          assign=True)
    for name, table in position_tables(config).items():  # meta until now
        setattr(model, name, table.to(device))
    if config.n_expert:
        from moe import fill_buffers
        fill_buffers(model, tensors, device)
    model.compute_dtype = dtype
    return model


def newest_run(root="out", fits=lambda run: True):
    """The run directory under `root` that was saved last, of those whose run.json `fits`."""
    runs = sorted(Path(root).glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    runs = [path for path in runs if fits(read_json(path))]
    if not runs:
        raise BadInput(f"no run under {root}/ yet: train one first with python train.py, or give --init DIR")
    return runs[-1].parent


# -----------------------------------------------------------------------------
# Hugging Face: config.json and names of tensors, both ways

# fields that only have another name, ours: theirs
LLAMA_FIELDS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
                    head_dim="head_dim", n_hidden="intermediate_size", norm_eps="rms_norm_eps",
                    tied="tie_word_embeddings")
GPT2_FIELDS = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
                   n_embd="n_embd", n_hidden="n_inner", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings")
GPT1_FIELDS = {ours: theirs for ours, theirs in GPT2_FIELDS.items() if ours != "n_hidden"}
OPT_FIELDS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                  n_head="num_attention_heads", n_embd="hidden_size", n_hidden="ffn_dim", bias="enable_bias",
                  embd_dim="word_embed_proj_dim", tied="tie_word_embeddings")
FALCON_FIELDS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                     n_head="num_attention_heads", n_embd="hidden_size", n_hidden="ffn_hidden_size", bias="bias",
                     norm_eps="layer_norm_epsilon", tied="tie_word_embeddings")
MIXTRAL_FIELDS = LLAMA_FIELDS | dict(n_expert="num_local_experts", n_expert_active="num_experts_per_tok")
QWEN_MOE_FIELDS = LLAMA_FIELDS | dict(n_expert="num_experts", n_expert_active="num_experts_per_tok",
                                      expert_hidden="moe_intermediate_size", router_norm="norm_topk_prob")
OLMOE_FIELDS = {ours: theirs for ours, theirs in QWEN_MOE_FIELDS.items() if ours != "expert_hidden"}
BLOOM_FIELDS = dict(vocab_size="vocab_size", block_size="seq_length", n_layer="n_layer", n_head="n_head",
                    n_embd="hidden_size", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings")

# what config.json calls an activation
HF_ACT = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "relu2": "relu2"}
HF_GATE = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}
TO_HF = {ours: theirs for table in (HF_GATE, HF_ACT) for theirs, ours in table.items() if theirs != "swish"}


def lookup(table, value, what):
    if value not in table:
        raise BadInput(f"{what} {value!r} of config.json is not supported: {', '.join(map(str, table))} are")
    return table[value]


def read_rope(hf):
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = lookup({"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}, kind, "rope_type")
    if rope.get("mscale") or rope.get("truncate") is False or rope.get("partial_rotary_factor", 1) != 1:
        raise BadInput(f"rope parameters {rope} of config.json are not supported: plain linear, yarn and llama3 are")
    low, high = ("beta_slow", "beta_fast") if kind == "yarn" else ("low_freq_factor", "high_freq_factor")
    original = rope.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or 0
    factor = rope.get("factor") or (hf["max_position_embeddings"] / original if kind == "yarn" and original else 1)
    return dict(rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))), rope_scaling=scaling,
                rope_factor=float(factor), rope_low=float(rope.get(low) or 1),
                rope_high=float(rope.get(high) or 0),
                rope_attn=float(kind == "yarn" and rope.get("attention_factor") or 0),
                rope_original=original)


def write_rope(c):
    if c.rope_scaling in ("none", "ntk"):
        return {"rope_theta": rope_theta(c), "rope_scaling": None}
    rope = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_original:
        rope["original_max_position_embeddings"] = c.rope_original
    if c.rope_scaling == "yarn":
        rope |= {"beta_slow": c.rope_low, "beta_fast": c.rope_high} | \
            ({"attention_factor": c.rope_attn} if c.rope_attn else {})
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": c.rope_low, "high_freq_factor": c.rope_high}
    return {"rope_theta": c.rope_theta, "rope_scaling": rope}


def read_llama(hf):
    attention = bool(hf.get("attention_bias", False))
    return read_rope(hf) | dict(act=lookup(HF_GATE, hf.get("hidden_act", "silu"), "hidden_act"), bias=attention,
                                mlp_bias=bool(hf.get("mlp_bias", False)))


def write_llama(c):
    return write_rope(c) | {"hidden_act": TO_HF.get(c.act), "attention_bias": c.bias, "mlp_bias": c.mlp_bias}


def read_mistral(hf):
    window = hf.get("sliding_window", 4096)
    return read_llama(hf) | (dict(attn="window", window=window) if window else {}) \
        | dict(n_kv_head=hf.get("num_key_value_heads", 8), bias=False, mlp_bias=False)


def write_mistral(c):
    return write_llama(c) | {"sliding_window": c.window if c.attn == "window" else None}


def read_qwen2(hf):
    window, n = hf.get("sliding_window"), hf["num_hidden_layers"]
    if not (window and hf.get("use_sliding_window")):
        return read_llama(hf) | dict(bias=False, qkv_bias=True, mlp_bias=False)
    full = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["full_attention"] * min(full, n) + ["sliding_attention"] * max(0, n - full)
    kinds = ["window" if kind == "sliding_attention" else "full" for kind in kinds]
    attn = kinds[0] if len(set(kinds)) == 1 else ",".join(kinds)
    return read_llama(hf) | dict(attn=attn, window=window, bias=False, qkv_bias=True, mlp_bias=False)


def write_qwen2(c):
    kinds = c.attn_kinds
    return write_llama(c) | {"use_sliding_window": "window" in kinds, "sliding_window": c.window or None,
                             "max_window_layers": next((i for i, k in enumerate(kinds) if k == "window"), c.n_layer),
                             "layer_types": ["sliding_attention" if k == "window" else "full_attention" for k in kinds]}


def read_qwen3(hf):
    return read_qwen2(hf) | dict(bias=bool(hf.get("attention_bias")), qkv_bias=None, head_dim=hf.get("head_dim", 128))


def read_router(hf, norm):
    """Their coefficient is of a loss that is k when balanced, ours of one that is 1. norm: do the weights sum to 1?"""
    k = hf.get("num_experts_per_tok") or 2
    if norm and k == 1:
        raise BadInput("config.json divides the weight of one expert by itself, which is not supported")
    return dict(aux_loss=k * hf.get("router_aux_loss_coef", 0.001), router_norm=norm)


def write_router(c, norm=True):
    """Of Qwen's and OLMoE's; Mixtral has no choice of norm."""
    return {"router_aux_loss_coef": c.aux_loss / c.n_expert_active} | (
        {"norm_topk_prob": c.router_norm and c.n_expert_active > 1} if norm else {})


def read_mixtral(hf):
    return read_mistral({"sliding_window": None, "rope_theta": 1e6, **hf}) | read_router(hf, True)


def write_mixtral(c):
    return write_mistral(c) | write_router(c, False) | {"intermediate_size": c.expert_hidden}


def read_qwen_moe(hf):
    two = hf["model_type"] == "qwen2_moe"
    dense, width = sorted(hf.get("mlp_only_layers") or []), hf.get("moe_intermediate_size", 1408 if two else 768)
    shared = hf.get("shared_expert_intermediate_size", 5632) if two else 0
    if dense != list(range(len(dense))) or shared % width:
        raise BadInput(f"config.json has dense layers {dense} and shared experts of width {shared}: only leading "
                       f"layers, and a multiple of an expert's {width}, are supported")
    if hf.get("use_sliding_window"):
        raise BadInput("config.json of a Qwen mixture of experts with a sliding window is not supported")
    own = dict(bias=False, qkv_bias=hf.get("qkv_bias", True)) if two else {}
    own |= dict(shared_gate=True) if shared else {}
    own |= {"n_expert": hf["num_local_experts"]} if hf.get("num_local_experts") else {}  # transformers 5's name
    return read_llama(hf) | read_router(hf, hf.get("norm_topk_prob", False)) | own | dict(
        n_expert_shared=shared // width, moe_first=len(dense), moe_every=hf.get("decoder_sparse_step", 1),
        mlp_bias=False)


def write_qwen_moe(c):
    return write_llama(c) | write_router(c) | {
        "shared_expert_intermediate_size": c.n_expert_shared * c.expert_hidden,
        "mlp_only_layers": list(range(c.moe_first)),
        "decoder_sparse_step": c.moe_every, "qkv_bias": c.qkv_bias, "use_sliding_window": False}


def read_olmoe(hf):
    if hf.get("clip_qkv"):
        raise BadInput("config.json clips queries, keys and values, which is not supported")
    return read_llama(hf) | read_router(hf, hf.get("norm_topk_prob", False)) | dict(mlp_bias=False)


def write_olmoe(c):
    return write_llama(c) | write_router(c) | {"intermediate_size": c.expert_hidden}


def read_gpt2(hf):
    if hf.get("scale_attn_by_inverse_layer_idx") or not hf.get("scale_attn_weights", True):
        raise BadInput("config.json scales attention by layer, which is not supported")
    return dict(act=lookup(HF_ACT, hf.get("activation_function", "gelu_new"), "activation_function"))


def read_gpt1(hf):  # its "gelu" is the tanh formula
    return dict(act=lookup({"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}, hf.get("afn", "gelu"), "afn"))


def read_opt(hf):
    if hf.get("_remove_final_layer_norm") or not hf.get("layer_norm_elementwise_affine", True):
        raise BadInput("config.json leaves norms or their gains out, which is not supported")
    return dict(act=lookup(HF_ACT, hf.get("activation_function", "relu"), "activation_function"),
                place="pre" if hf.get("do_layer_norm_before", True) else "post", norm_eps=1e-5, norm_bias=True)


def read_falcon(hf):
    new, heads = hf.get("new_decoder_architecture", False), hf["num_attention_heads"]
    parallel = new or hf.get("parallel_attn", True)
    two = new and (hf.get("num_ln_in_parallel_attn") or 2) == 2
    kv = (hf.get("num_kv_heads") or heads) if new else 1 if hf.get("multi_query", True) else heads
    alibi = dict(pos="alibi", alibi_scale=(hf["hidden_size"] / heads) ** -0.5) if hf.get("alibi") else read_rope(hf)
    return alibi | dict(act=lookup(HF_ACT, hf.get("activation", "gelu"), "activation"), n_kv_head=kv, norm_bias=True,
                        place="parallel2" if two else "parallel" if parallel else "pre")


def write_falcon(c):
    new = c.place == "parallel2" or c.n_kv_head not in (1, c.n_head)
    return write_rope(c) | {
        "activation": TO_HF.get(c.act), "alibi": c.pos == "alibi", "parallel_attn": c.place.startswith("parallel"),
        "multi_query": c.n_kv_head == 1, "new_decoder_architecture": new, "num_kv_heads": c.n_kv_head,
        "num_ln_in_parallel_attn": (2 if c.place == "parallel2" else 1) if new else None}


def read_bloom(hf):
    if hf.get("apply_residual_connection_post_layernorm"):
        raise BadInput("config.json puts the residual behind the norm, which is not supported")
    return dict(block_size=hf.get("seq_length", 2048))


LLAMA_NAMES = {"wte": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.",
               "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
               "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
               "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
               "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
MIXTRAL_NAMES = LLAMA_NAMES | {
    "mlp.router": "block_sparse_moe.gate", "mlp.experts.*.gate": "block_sparse_moe.experts.*.w1",
    "mlp.experts.*.up": "block_sparse_moe.experts.*.w3", "mlp.experts.*.down": "block_sparse_moe.experts.*.w2"}
QWEN_MOE_NAMES = LLAMA_NAMES | {"mlp.router": "mlp.gate", "mlp.shared_gate": "mlp.shared_expert_gate"} | {
    f"mlp.{ours}.{part}": f"mlp.{theirs}.{part}_proj" for part in ("gate", "up", "down")
    for ours, theirs in (("experts.*", "experts.*"), ("shared", "shared_expert"))}
GPT2_NAMES = {"wte": "transformer.wte", "wpe": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
              "layer": "transformer.h.", "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn",
              "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
OPT_NAMES = {"wte": "model.decoder.embed_tokens", "wpe": "model.decoder.embed_positions", "head": "lm_head",
             "embd_in": "model.decoder.project_in", "embd_out": "model.decoder.project_out",
             "norm": "model.decoder.final_layer_norm", "layer": "model.decoder.layers.",
             "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "attn.q": "self_attn.q_proj",
             "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj",
             "mlp.up": "fc1", "mlp.down": "fc2"}
BLOOM_NAMES = {"wte": "transformer.word_embeddings", "embd_norm": "transformer.word_embeddings_layernorm",
               "norm": "transformer.ln_f", "head": "lm_head", "layer": "transformer.h.", "norm1": "input_layernorm",
               "norm2": "post_attention_layernorm", "attn.qkv": "self_attention.query_key_value",
               "attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}

# model_type: class of transformers, what the family fixes and what a config.json may leave out, its field and tensor
# names, how the rest is read and written. The order is that in which an export looks for the first family that can say
# what a config says.
Family = namedtuple("Family", "cls base fields names read write")
QWEN_BASE = dict(LLAMA1, block_size=32768, n_hidden=22016)
FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", GPT2, GPT2_FIELDS, GPT2_NAMES, read_gpt2,
                   lambda c: {"activation_function": TO_HF.get(c.act)}),
    "llama": Family("LlamaForCausalLM", dict(LLAMA1, n_hidden=11008), LLAMA_FIELDS, LLAMA_NAMES, read_llama,
                    write_llama),
    "mistral": Family("MistralForCausalLM", dict(LLAMA1, block_size=131072, n_hidden=14336), LLAMA_FIELDS, LLAMA_NAMES,
                      read_mistral, write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", QWEN_BASE, LLAMA_FIELDS, LLAMA_NAMES, read_qwen2, write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", dict(QWEN_BASE, qk_norm=True), LLAMA_FIELDS, LLAMA_NAMES, read_qwen3,
                    write_qwen2),
    "mixtral": Family("MixtralForCausalLM", dict(LLAMA, block_size=131072, n_hidden=14336, n_expert=8),
                      MIXTRAL_FIELDS, MIXTRAL_NAMES, read_mixtral, write_mixtral),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", dict(QWEN_BASE, n_hidden=5632, n_expert=60, n_expert_active=4,
                                                    expert_hidden=1408), QWEN_MOE_FIELDS, QWEN_MOE_NAMES,
                        read_qwen_moe, write_qwen_moe),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", dict(QWEN_BASE, n_hidden=6144, n_kv_head=4, qk_norm=True, n_expert=128,
                                                    n_expert_active=8, expert_hidden=768), QWEN_MOE_FIELDS,
                        QWEN_MOE_NAMES, read_qwen_moe, write_qwen_moe),
    "olmoe": Family("OlmoeForCausalLM", dict(LLAMA, block_size=4096, n_hidden=2048, qk_norm=True, qk_norm_all=True,
                                             n_expert=64, n_expert_active=8),
                    OLMOE_FIELDS, QWEN_MOE_NAMES, read_olmoe, write_olmoe),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", GPT1, GPT1_FIELDS,
                         GPT2_NAMES | {"wte": "transformer.tokens_embed", "wpe": "transformer.positions_embed"},
                         read_gpt1, lambda c: {"afn": "gelu" if c.act == "gelu_tanh" else TO_HF.get(c.act)}),
    "opt": Family("OPTForCausalLM", dict(GPT2, block_size=2048), OPT_FIELDS, OPT_NAMES, read_opt,
                  lambda c: {"activation_function": TO_HF.get(c.act), "do_layer_norm_before": c.place == "pre"}),
    "bloom": Family("BloomForCausalLM", BLOOM, BLOOM_FIELDS, BLOOM_NAMES, read_bloom, lambda c: {}),
    "falcon": Family("FalconForCausalLM", FALCON, FALCON_FIELDS, BLOOM_NAMES, read_falcon, write_falcon),
}


def from_hf_config(hf):
    """GPTConfig of a config.json, read as a dict."""
    family = lookup(FAMILIES, hf.get("model_type"), "model_type")
    try:
        if hf["model_type"] == "bloom":  # transformers reads these names too
            hf = {new: hf[old] for old, new in (("n_embed", "hidden_size"), ("num_attention_heads", "n_head"))
                  if old in hf} | hf
        same = {ours: hf[theirs] for ours, theirs in family.fields.items()
                if ours in ("vocab_size", "n_layer", "n_head", "n_embd") or hf.get(theirs) is not None}
        return GPTConfig(**{**family.base, **same, **family.read(hf)})
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise BadInput(f"config.json of a {hf['model_type']} model lacks or garbles a field ({error!r})") from None


def canonical(c):
    """What of a config decides its logits, as a dict: two ways to say one thing look the same."""
    d = asdict(c)
    for name in ("dropout", "init", "attn") + (() if c.attn != "full" else ("window",)):
        del d[name]
    if c.rope_scaling == "ntk":
        d |= {"rope_theta": rope_theta(c), "rope_scaling": "none"}
    used = {"none": 0, "ntk": 0, "linear": 1}.get(d["rope_scaling"], 6) if c.pos == "rope" else -1
    for name in ("rope_theta", "rope_factor", "rope_original", "rope_low", "rope_high")[used + 1:]:
        del d[name]
    if c.pos != "rope":
        del d["rope_dim"], d["rope_scaling"], d["rope_attn"]
    if not c.qk_norm or c.n_head == c.n_kv_head == 1:
        del d["qk_norm_all"]
    return canonical_experts(c, d) | {"attn_kinds": c.attn_kinds}


def canonical_experts(c, d):
    """d without what says how experts are trained, or nothing."""
    for name in ("aux_loss", "router_z_loss", "bias_rate", "capacity", "moe_every", "moe_first"):
        del d[name]
    if not c.n_expert:
        names = ("n_expert_active", "n_expert_shared", "expert_hidden", "router", "router_norm", "router_scale",
                 "shared_gate")
        return {name: value for name, value in d.items() if name not in names}
    d |= {"moe_layers": c.moe_layers, "router_norm": c.router_norm and c.n_expert_active > 1}
    if c.router in ("switch", "gshard"):  # alike when nothing is drawn
        d |= {"router": "softmax", "router_norm": c.router == "gshard"}
    if all(c.moe_layers):
        del d["n_hidden"]
    return d


def to_hf_config(c):
    """
    (model_type, config.json as a dict) of the first family that says what c says: what is written is read again and
    compared. BadInput where none does, with what keeps the nearest family from it.
    """
    wrong = []
    for kind, family in FAMILIES.items():
        hf = {theirs: getattr(c, ours) for ours, theirs in family.fields.items()}
        hf |= {"model_type": kind, "architectures": [family.cls]} | family.write(c)
        ours = canonical(c)
        try:
            theirs = canonical(from_hf_config(hf))
        except BadInput:
            continue
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if not differ:
            return kind, hf
        wrong.append((len(differ), kind, ", ".join(f"{name}={ours.get(name)}" for name in differ)))
    _, kind, differ = min(wrong)
    raise BadInput(f"transformers has no architecture for this model: {kind}, the nearest, has no {differ}; train with "
                   f"--preset gpt2, llama or another family's to export")


def split_qkv(t, c, stacked):
    """
    q, k, v rows of a fused matrix or bias: one third after the other (GPT-2), or for each key head its query heads,
    then its key and its value (BLOOM, Falcon).
    """
    if stacked:
        return t.chunk(3)
    t = t.view(c.n_kv_head, c.n_head // c.n_kv_head + 2, c.head_dim, *t.shape[1:])
    return tuple(z.reshape(-1, *t.shape[3:]) for z in (t[:, :-2], t[:, -2:-1], t[:, -1:]))


def fuse_qkv(parts, c, stacked):
    if stacked:
        return torch.cat(parts)
    parts = [t.view(c.n_kv_head, -1, c.head_dim, *t.shape[1:]) for t in parts]
    return torch.cat(parts, 1).reshape(-1, *parts[0].shape[3:])


def hf_places(kind, c):
    """For each tensor of ours: (layer prefix of theirs, its name there, its part of a layer or of the whole)."""
    names = dict(FAMILIES[kind].names)
    if kind == "falcon" and c.place == "parallel2":
        names |= {"norm1": "ln_attn", "norm2": "ln_mlp"}
    with torch.device("meta"):
        ours = list(GPT(c).state_dict())
    for name in ours:
        (part, tensor), prefix, number = name.rsplit(".", 1), "", ""
        if part.startswith("blocks."):
            _, layer, part = part.split(".", 2)
            prefix = f"{names['layer']}{layer}."
        if part.startswith("mlp.experts."):
            _, _, number, kind_of = part.split(".")
            part = f"mlp.experts.*.{kind_of}"
        fused = part in ("attn.q", "attn.k", "attn.v") and "attn.qkv" in names
        there = names["attn.qkv" if fused else part].replace("*", number)
        yield name, f"{prefix}{there}.{tensor}", part, fused


IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "position_ids")  # buffers of older files


def from_hf_tensors(theirs, kind, c, source):
    """Our state dict from theirs, name -> tensor; every tensor of theirs is used or refused."""
    def find(name):  # a headless model's file leaves the first word out
        full = name if name in theirs else name.partition(".")[2]
        if full not in theirs:
            raise BadInput(f"{source} has no tensor {name}: it is not the {kind} model of its config.json")
        unused.discard(full)
        return theirs[full]

    stacked, unused, tensors = kind in ("gpt2", "openai-gpt"), set(theirs), {}
    for ours, name, part, fused in hf_places(kind, c):
        t = find(name)
        if stacked and part.startswith(("attn.", "mlp.")) and t.dim() == 2:
            t = t.T  # its Conv1D keeps (in, out)
        if fused:
            if t.shape[0] != (c.n_head + 2 * c.n_kv_head) * c.head_dim:
                raise BadInput(f"{source} has {name} of shape {list(t.shape)}, which its config does not")
            t = split_qkv(t, c, stacked)["qkv".index(part[-1])]
        if part == "wpe" and kind == "opt":
            t = t[2:]  # two rows for padding
        if part in ("wte", "head") and t.dim() == 2:
            if t.shape[0] != c.vocab_size:
                raise BadInput(f"{source} has {name} of {t.shape[0]} rows, its config {c.vocab_size} ids")
            t = F.pad(t, (0, 0, 0, c.padded_vocab - t.shape[0])) if c.padded_vocab > t.shape[0] else t
        tensors[ours] = t
    if c.tied:
        unused.discard("lm_head.weight")
    unused = sorted(name for name in unused if not name.endswith(IGNORED))
    if unused:
        raise BadInput(f"{source} has tensors that its config does not explain: {', '.join(unused[:3])}"
                       + (f" and {len(unused) - 3} more" if len(unused) > 3 else ""))
    return tensors


def to_hf_tensors(model, kind):
    """Their state dict from ours."""
    c, state, theirs, parts = model.config, model.state_dict(), {}, []
    stacked = kind in ("gpt2", "openai-gpt")
    for ours, name, part, fused in hf_places(kind, c):
        t = state[ours]
        if part in ("wte", "head"):
            t = t[:c.vocab_size]
        if part == "wpe" and kind == "opt":
            t = F.pad(t, (0, 0, 2, 0))
        if fused:  # q, k, v of one name follow each other once sorted by kind
            parts.append((name, t))
            if sum(n == name for n, _ in parts) < 3:
                continue
            t = fuse_qkv([p for n, p in parts if n == name], c, stacked)
            parts = [p for p in parts if p[0] != name]
        if stacked and part.startswith(("attn.", "mlp.")) and t.dim() == 2:
            t = t.T
        theirs[name] = t
    return theirs


def shard_files(path):
    """{safetensors file of a folder: tensors that its index says are there}. Pickles are never read."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        if not (path / "model.safetensors").exists() and (old := [*path.glob("*.bin"), *path.glob("*.pt*")]):
            raise BadInput(f"{path} holds {old[0].name}, a pickle, which can run code and is never read: convert it to "
                           f"safetensors first")
        return {path / "model.safetensors": []}
    try:
        files = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(file, []).append(name)
        files = {file: files[file] for file in sorted(files)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} cannot be read ({error!r}): download it again") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (path / file).exists():
            raise BadInput(f"{path} lacks {file}, a shard that its index names: download it again")
    return {path / file: names for file, names in files.items()}


def load_shards(path, load=load_safetensors):
    """What load returns for each tensor of a folder's files, by name: the tensor, or what scan_safetensors says."""
    tensors = {}
    for file, names in shard_files(path).items():
        tensors |= load(file)
        missing = sorted(set(names) - tensors.keys())
        if missing:
            raise BadInput(f"{path} lacks tensor {missing[0]}, which its index names: download it again")
    return tensors


def load_hf(path, device="cpu", dtype=torch.float32):
    """The model of a Hugging Face directory: config.json and one or more safetensors files."""
    path = Path(path)
    try:
        hf = json.loads((path / "config.json").read_text())
        config = from_hf_config(hf)
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, BadInput):
            raise BadInput(f"{path}: {error}") from None
        raise BadInput(f"{path}/config.json cannot be read ({error}): download it again") from None
    tensors = from_hf_tensors(load_shards(path), hf["model_type"], config, path)
    return build_model(config, tensors, path, device, dtype)


def save_hf(out, model, tokenizer=None, dtype=None, shard_bytes=5e9):
    """Write config.json, safetensors (an index beside them above shard_bytes) and tokenizer.json for transformers."""
    kind, hf = to_hf_config(model.config)
    tensors = {name: t if dtype is None else t.to(dtype) for name, t in to_hf_tensors(model, kind).items()}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:  # before anything is replaced: there are tokenizers that transformers cannot have
        tokenizer.export(out)
    sizes, shards = {name: t.numel() * t.element_size() for name, t in tensors.items()}, [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        save_safetensors({name: tensors[name] for name in names}, out / file, {"format": "pt"})
    earlier = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # an export before this one
    for old in out.iterdir():
        if earlier.fullmatch(old.name) and old.name not in files:
            old.unlink()
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        with replace_file(out / "model.safetensors.index.json", "w") as f:
            json.dump({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, f, indent=1)
    if tokenizer is not None:
        begins = [tokenizer.special[name] for name in BEGINS if name in tokenizer.special]
        ends = sorted(chat_stops(tokenizer)) if tokenizer.chat else [] if tokenizer.eot is None else [tokenizer.eot]
        hf |= {"bos_token_id": begins[0]} if begins else {}
        hf |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    hf["dtype"] = hf["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with replace_file(out / "config.json", "w") as f:
        json.dump(hf, f, indent=1)


def load_llama2c(path, device="cpu", dtype=torch.float32):
    """A model in llama2.c's version 0 format: seven int32 of sizes, then float32 tensors, kind by kind."""
    data = torch.from_file(str(path), shared=False, size=os.path.getsize(path) // 4, dtype=torch.float32)
    if len(data) < 7:
        raise BadInput(f"{path} is too short for a llama2.c model: copy it again")
    n_embd, n_hidden, n_layer, n_head, n_kv_head, vocab_size, block_size = data[:7].view(torch.int32).tolist()
    try:
        config = GPTConfig(**LLAMA, vocab_size=abs(vocab_size), block_size=block_size, n_layer=n_layer, n_head=n_head,
                           n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden, tied=vocab_size > 0)
    except BadInput as error:
        raise BadInput(f"{path} is no llama2.c model ({error}): copy it again") from None
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(config).state_dict().items()}
    start, tensors = 7, {}

    def take(name):
        nonlocal start
        shape = list(shapes[name])
        shape[0] = min(shape[0], config.vocab_size) if name in ("wte.weight", "head.weight") else shape[0]
        n = math.prod(shape)
        t, start = data[start:start + n].view(shape), start + n
        if name.endswith(("q.weight", "k.weight")):  # its rotary pairs are neighbours, ours half a head apart
            t = t.view(-1, config.head_dim // 2, 2, n_embd).transpose(1, 2).reshape(shape)
        tensors[name] = F.pad(t, (0, 0, 0, shapes[name][0] - shape[0])) if t.dim() == 2 else t

    try:
        take("wte.weight")
        for part in ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "mlp.gate", "mlp.down", "mlp.up"):
            for layer in range(n_layer):
                take(f"blocks.{layer}.{part}.weight")
        take("norm.weight")
        start += block_size * config.head_dim  # tables of cosines and sines
        if not config.tied:
            take("head.weight")
    except RuntimeError:
        raise BadInput(f"{path} is too short for the sizes in its header: copy it again") from None
    if start != len(data):
        raise BadInput(f"{path} is not a llama2.c model: its header asks for {4 * start} bytes of {4 * len(data)}")
    return build_model(config, tensors, path, device, dtype)


# -----------------------------------------------------------------------------


def blank(name):
    """The model of a preset on the meta device (sizes, no numbers), or that of a directory or hub name."""
    return meta_model(preset(name)) if name in PRESETS else GPT.from_pretrained(name, dtype=None)


def info(args):
    model = blank(args.name)
    default = {f.name: f.default for f in fields(GPTConfig)}
    for name, value in asdict(model.config).items():
        print(f"{name:14} {value}" + ("" if value == default[name] else "  *"))
    if quantized(model):  # the float model's sizes
        model = meta_model(model.config)
    total, matmul = count_parameters(model)
    T = model.config.block_size
    active = ""
    if model.config.n_expert:
        from moe import idle_parameters
        active = f"{total - idle_parameters(model):,} of them active for a token, "
    print(f"{total:,} parameters, {active}{matmul:,} {'' if active else 'of them '}in matrix products; "
          f"{flops_per_token(model, T):,} training FLOPs a token at T {T}; * not nano's")


def quantized(model):
    return any(name.endswith(".codes") for name, _ in model.named_buffers())


def params(args):
    model = blank(args.name)
    listed = [*(model.state_dict().items() if quantized(model) else model.named_parameters())]
    total = sum(p.numel() for _, p in listed)
    for name, p in listed:
        print(f"{name:34} {str(tuple(p.shape)):>20} {p.numel():>15,} {p.numel() / total:7.2%} {str(p.dtype)[6:]}")
    print(f"{'total':34} {'':>20} {total:>15,}")


def convert(args):
    """import: into a run directory of ours; export: into a Hugging Face directory."""
    from lora import plain  # an adapter goes into the weights, or says why it cannot
    path, out = Path(args.name) / "run.json", Path(args.out)
    if path.exists() and read_json(path).get("quantize"):
        raise BadInput(f"{args.name} is quantized: {args.command} the run that it was made from")
    if args.command == "export" and (out / "run.json").exists():
        raise BadInput(f"--out {out} is a run, which an export would overwrite: give another folder")
    model = plain(args.name, dtype=None if args.dtype == "auto" else getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_pretrained(args.name)
    if args.command == "export":
        save_hf(args.out, model, tokenizer)
    else:
        start_run(out, args.name)
        save_run(args.out, model, {"stage": "import", "step": 0, "metrics": {}, "args": vars(args) | {"run": None},
                                   "tokenizer": tokenizer.spec()})
        tokenizer.save(args.out)
    print(f"{args.out}: {count_parameters(model)[0]:,} parameters in {str(model.wte.weight.dtype)[6:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("name", help="preset, run directory, Hugging Face directory or hub name")
        sub.set_defaults(run=run)
        return sub

    command("info", info, "the config, parameters and FLOPs")
    command("params", params, "every parameter with its shape and share")
    for name, help in (("import", "a Hugging Face model into a run directory that every stage reads"),
                       ("export", "a run directory into one that transformers, vLLM and llama.cpp's converter read")):
        sub = command(name, convert, help)
        sub.add_argument("--out", required=True)
        sub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                         help="of the weights (default: as they are)")
    for run, add_flags in ((memory, add_memory_flags), (flops, add_flops_flags)):
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        add_flags(sub)
        sub.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    from model import main
    cli(main)
