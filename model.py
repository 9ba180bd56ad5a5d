"""
The GPT that every stage shares: config, blocks, loss, cache and generation engine, process set-up,
FLOP accounting, safetensors, run directories, Hugging Face import.

    p(x_1 … x_T) = Π_t p(x_t | x_<t),    loss = -1/T Σ_t log p(x_t | x_<t)   (nats per token)

GPT-2 (Radford et al. 2019) and LLaMA (Touvron et al. 2023) are two points of one `GPTConfig`; so is
the `nano` default, which trains fastest of the three at equal size (README, "what each line buys").

    python model.py info out/base            # what a run directory holds
    python model.py info gpt2                # parameters and FLOPs of a preset
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bpe import BadInput, cli, replace_file

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
    norm: str = "layernorm_plain"  # see NORMS
    norm_eps: float = 1e-5
    act: str = "relu2"           # see ACTIVATIONS
    pos: str = "rope"            # learned | rope | none
    rope_theta: float = 10000.0
    qk_norm: bool = True         # normalize queries and keys per head (Henry et al. 2020)
    embd_norm: bool = True       # normalize the token embedding before the first block
    bias: bool = False           # in every Linear and LayerNorm
    tied: bool = False           # head shares the token embedding's matrix
    dropout: float = 0.0
    init: str = "zero"           # see INIT
    scalar_head: bool = False    # adds a Linear C → 1: reward and value models

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, table in (("norm", NORMS), ("act", ACTIVATIONS), ("init", INIT)):
            if getattr(self, name) not in table:
                raise BadInput(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(table)}")
        if self.pos not in ("learned", "rope", "none"):
            raise BadInput(f"pos={self.pos!r} is unknown: choose one of learned, rope, none")
        if not self.head_dim:
            if self.n_embd % self.n_head:
                raise BadInput(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise BadInput(f"--n_head {self.n_head} is not a multiple of --n_kv_head {self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise BadInput(f"rope rotates pairs: a head needs an even width, not {self.head_dim}")
        if not self.n_hidden:
            gated = self.act in GATED
            self.n_hidden = 64 * math.ceil(8 * self.n_embd / 3 / 64) if gated else 4 * self.n_embd

    @property
    def padded_vocab(self):
        return 64 * math.ceil(self.vocab_size / 64)


# What GPT-2 and LLaMA fix beside their sizes.
GPT2 = dict(vocab_size=50257, block_size=1024, norm="layernorm", act="gelu_tanh", pos="learned", qk_norm=False,
            embd_norm=False, bias=True, tied=True, init="gpt2")
LLAMA = dict(norm="rmsnorm", act="swiglu", pos="rope", qk_norm=False, embd_norm=False, init="gpt2")

PRESETS = {
    "nano": dict(),
    "gpt2": dict(GPT2, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "llama-7b": dict(LLAMA, vocab_size=32000, block_size=2048, n_layer=32, n_head=32, n_embd=4096,
                     n_hidden=11008, norm_eps=1e-6),
    "tinyllama-1.1b": dict(LLAMA, vocab_size=32000, block_size=2048, n_layer=22, n_head=32, n_kv_head=4,
                           n_embd=2048, n_hidden=5632),
    "smollm2-135m": dict(LLAMA, vocab_size=49152, block_size=8192, n_layer=30, n_head=9, n_kv_head=3,
                         n_embd=576, n_hidden=1536, rope_theta=1e5, tied=True),
}

# -----------------------------------------------------------------------------
# Blocks


class Linear(nn.Linear):
    """y = x Wᵀ + b. Master weights stay in float32; the product runs in the activations' dtype."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """Normalize the last axis, then scale by a gain and shift by a bias where the kind has them."""

    def __init__(self, kind, width, eps, bias=False):
        super().__init__()
        self.normalize, gain = NORMS[kind]
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if gain and bias else None

    def forward(self, x):
        weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return self.normalize(x, weight, bias, self.eps)


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) · g + b (Ba et al. 2016)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x, weight, bias, eps):
    """x / sqrt(mean(x²) + eps) · g (Zhang & Sennrich 2019); it has no bias."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


# name: (function, has a gain). Without one, the next matrix can learn it (OLMo, Groeneveld et al. 2024).
NORMS = {"layernorm": (layer_norm, True), "layernorm_plain": (layer_norm, False),
         "rmsnorm": (rms_norm, True), "rmsnorm_plain": (rms_norm, False)}

# act(up) for a plain MLP; act(gate) * up for the gated ones (Shazeer 2020).
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),  # GPT-2's
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),                       # Primer, So et al. 2021
    "swiglu": F.silu,
    "geglu": functools.partial(F.gelu, approximate="tanh"),
}
GATED = ("swiglu", "geglu")


def rope_table(head_dim, block_size, theta):
    """
    RoFormer's angles t · theta^(-2i/D) (Su et al. 2021, eq. 15) as the two factors of apply_rope: (cos, cos) and
    (-sin, sin), stacked (2, T, D) float32.
    """
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float32), inv_freq)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def apply_rope(x, rope):
    """Rotate each pair (x_i, x_{i + D/2}) of x (B, T, H, D) by its angle; rope (2, [B,] T, 1, D)."""
    return x * rope[0] + x.roll(x.shape[-1] // 2, -1) * rope[1]


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v per head (Vaswani et al. 2017), grouped keys (GQA, Ainslie et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.q = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.bias)
        self.k = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.v = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.o = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.q_norm = Norm(c.norm, c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.norm, c.head_dim, c.norm_eps) if c.qk_norm else None
        self.dropout = c.dropout

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, Hkv, T, D) twice
        if cache is not None:
            k, v = cache(k, v)  # now every key and value so far: (B, Hkv, S, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.n_head != self.n_kv_head,
            dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c.act]
        self.gate = Linear(c.n_embd, c.n_hidden, bias=c.bias) if c.act in GATED else None
        self.up = Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.down = Linear(c.n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm residual block of GPT-2."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = Norm(c.norm, c.n_embd, c.norm_eps, c.bias), Attention(c)
        self.norm2, self.mlp = Norm(c.norm, c.n_embd, c.norm_eps, c.bias), MLP(c)
        self.dropout = c.dropout

    def forward(self, x, rope, mask=None, cache=None):
        x = x + F.dropout(self.attn(self.norm1(x), rope, mask, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


# -----------------------------------------------------------------------------
# Initialization: the first row whose text occurs in a parameter's name fills it. A float is a constant,
# a function (fan_in, config) the standard deviation of a normal. A name without a row is an error.

GAINS = [("norm.weight", 1.0), ("norm1.weight", 1.0), ("norm2.weight", 1.0), (".bias", 0.0),
         ("scalar_head.weight", 0.0)]

INIT = {
    # GPT-2: N(0, 0.02), and what writes into the residual stream scaled by 1 / sqrt(2 L).
    "gpt2": GAINS + [
        (".o.weight", lambda fan_in, c: 0.02 / math.sqrt(2 * c.n_layer)),
        (".down.weight", lambda fan_in, c: 0.02 / math.sqrt(2 * c.n_layer)),
        (".weight", lambda fan_in, c: 0.02),
    ],
    # nano: every block starts as the identity and the head silent, so the first loss is exactly ln V.
    "zero": GAINS + [
        (".o.weight", 0.0),
        (".down.weight", 0.0),
        (".head.weight", 0.0),
        (".wte.weight", lambda fan_in, c: 0.02 if c.tied else 1.0),  # tied: it is the head as well
        (".wpe.weight", lambda fan_in, c: 0.02),
        (".weight", lambda fan_in, c: fan_in ** -0.5),
    ],
}


@torch.no_grad()
def init_weights(model, seed=0):
    """Fill every parameter by the rows of INIT[config.init]; the same on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        rule = next((rule for part, rule in INIT[model.config.init] if part in "." + name), None)
        if rule is None:
            raise AssertionError(f"no row of INIT[{model.config.init!r}] initializes {name}")
        if isinstance(rule, float):
            p.fill_(rule)
        else:
            p.copy_(torch.randn(p.shape, generator=generator) * rule(p.shape[-1], model.config))


# -----------------------------------------------------------------------------
# Loss: cross-entropy of a linear head, chunk by chunk, so that the (N, V) logits never exist at once


def chunk_cross_entropy(x, weight, targets, vocab_size):
    """-log p(target) of each row (0 where target is -100) and the logits, float32. x (n, C), weight (V', C)."""
    logits = (x @ weight.T).float()
    if weight.shape[0] > vocab_size:  # padding ids do not take part
        logits = logits.masked_fill(torch.arange(weight.shape[0], device=x.device) >= vocab_size, -math.inf)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none"), logits


class LinearCrossEntropy(torch.autograd.Function):
    """
    Summed cross-entropy whose gradients are formed in the forward pass, while a chunk's logits are at hand:
        G = softmax(x Wᵀ) - onehot(target),    dL/dx = G W,    dL/dW = Gᵀ x
    The backward pass only scales them: no (N, V) tensor is stored and no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk):
        w, ids = weight.to(x.dtype), torch.arange(weight.shape[0], device=x.device)
        total, dx, dw = 0.0, [], 0.0
        for xi, ti in zip(x.split(chunk), targets.split(chunk)):
            loss, logits = chunk_cross_entropy(xi, w, ti, vocab_size)
            ti = ti.unsqueeze(1)
            grad = ((logits.softmax(-1) - (ids == ti).float()) * (ti != -100)).to(x.dtype)
            total = total + loss.sum()
            dx.append(grad @ w)
            dw = dw + (grad.T @ xi).to(weight.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(torch.cat(dx), dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, None if dw is None else dw * grad, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size, reduction="mean", chunk=0):
    """
    Cross-entropy of the logits x Wᵀ, in nats. x (N, C), weight (V', C) with V' ≥ vocab_size rows, targets (N,)
    of ids or -100 (ignored). reduction: "mean" over the targets that count, "sum", or "none" -> (N,).
    chunk: rows at a time; 0 chooses about 2^28 logits.
    """
    chunk = chunk or max(1, 2 ** 28 // weight.shape[0])
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if needs_grad and reduction != "none":
        total = LinearCrossEntropy.apply(x, weight, targets, vocab_size, chunk)
    else:  # a gradient per row cannot be scaled afterwards: recompute the chunk's logits in the backward pass
        def rows(xi, ti):
            return chunk_cross_entropy(xi, weight.to(xi.dtype), ti, vocab_size)[0]
        losses = [checkpoint(rows, xi, ti, use_reentrant=False) if needs_grad else rows(xi, ti)
                  for xi, ti in zip(x.split(chunk), targets.split(chunk))]
        if reduction == "none":
            return torch.cat(losses)
        total = sum(loss.sum() for loss in losses)
    return total if reduction == "sum" else total / (targets != -100).sum().clamp(min=1)


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
        self.static = False  # always attend over the whole size: a recorded graph has one shape

    def update(self, layer, positions, k, v):
        """Write k, v (B, Hkv, T, D) at positions (B, T); return all that a query may see, (B, Hkv, S, D)."""
        index = positions[:, None, :, None].expand_as(k)
        self.k[layer].scatter_(2, index, k)
        self.v[layer].scatter_(2, index, v)
        return self.k[layer][:, :, :self.seen()], self.v[layer][:, :, :self.seen()]

    def seen(self):
        return self.size if self.static else self.bound

    def fill(self, layer, k, v):
        """Write the first T entries of an empty cache; attention then needs only the new k and v."""
        self.k[layer][:, :, :k.shape[2]] = k
        self.v[layer][:, :, :v.shape[2]] = v
        return k, v

    def drop(self, r):
        """Forget the last r tokens of each row; r an int or (B,)."""
        self.pos.sub_(r)
        self.bound -= int(torch.as_tensor(r).min())


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.padded_vocab, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.pos == "learned" else None
        self.embd_norm = Norm(c.norm, c.n_embd, c.norm_eps, c.bias) if c.embd_norm else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = Norm(c.norm, c.n_embd, c.norm_eps, c.bias)
        self.head = None if c.tied else Linear(c.n_embd, c.padded_vocab, bias=False)
        self.scalar_head = Linear(c.n_embd, 1, bias=False) if c.scalar_head else None
        table = rope_table(c.head_dim, c.block_size, c.rope_theta) if c.pos == "rope" else None
        self.register_buffer("rope", table, persistent=False)
        self.compute_dtype = torch.float32  # of activations; weights are cast where they are used
        self.loss = linear_cross_entropy
        self._decoder = None

    def compile_parts(self):
        """
        torch.compile, in place, the block (once for all of them) and the loss: names in checkpoints stay, and
        compiling takes a fraction of the time that the whole model does.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self.loss = torch.compile(linear_cross_entropy, dynamic=False)

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def head_weight(self):
        return self.wte.weight if self.head is None else self.head.weight

    def trunk(self, idx, cache=None, positions=None, doc_ids=None):
        """Hidden states (B, T, C) after the last norm. Arguments as in forward."""
        c, T = self.config, idx.shape[1]
        static = cache is not None and cache.static  # then the engine has counted
        room = c.block_size if cache is None else min(c.block_size, cache.size) - cache.bound
        if T > room and not static:
            raise BadInput(f"{T} tokens do not fit into the {room} left of the model's context of {c.block_size}: "
                           f"shorten the input, or train with a larger --block_size")
        prefill = cache is not None and cache.bound == 0 and not static
        arange = torch.arange(T, device=idx.device)
        if positions is None:  # (T,), or (B, T) where each row continues at its own position
            positions = arange if cache is None or prefill else cache.pos[:, None] + arange
        if cache is not None:
            cache.bound = min(cache.bound + T, cache.size)

        mask = None  # None: plain causal, the fast path
        if doc_ids is not None:  # a token sees earlier tokens of its own document
            same = doc_ids[:, :, None] == doc_ids[:, None, :]
            mask = (same & (arange[:, None] >= arange))[:, None]  # (B, 1, T, T)
        elif cache is not None and not prefill:
            keys = torch.arange(cache.seen(), device=idx.device)
            mask = (keys <= positions[:, :, None])[:, None]  # (B, 1, T, S)

        x = self.wte(idx).to(self.compute_dtype)
        rope = None
        if c.pos == "rope":
            rope = self.rope[:, positions].to(x.dtype).unsqueeze(-2)  # (2, [B,] T, 1, D): one for all heads
        elif c.pos == "learned":
            x = x + self.wpe(positions).to(x.dtype)
        if self.embd_norm is not None:
            x = self.embd_norm(x)
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            kv = cache and (functools.partial(cache.fill, i) if prefill else
                            functools.partial(cache.update, i, positions))
            x = block(x, rope, mask) if kv is None else block.forward(x, rope, mask, kv)  # a cache is not compiled
        if cache is not None:
            cache.pos.add_(T)
        return self.norm(x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V), float32."""
        return (x @ self.head_weight.to(x.dtype).T)[..., :self.config.vocab_size].float()

    def forward(self, idx, targets=None, cache=None, positions=None, doc_ids=None, reduction="mean"):
        """
        idx (B, T) ids -> (logits (B, T, V) float32, None), or with targets (B, T) -> (None, loss in nats).
        targets of -100 do not count; reduction "mean" | "sum" | "none" (B, T).
        cache: a KVCache that the tokens continue; positions (T,) or (B, T) override the default 0, 1, 2, …;
        doc_ids (B, T): attention stays inside a document. Raises BadInput where T exceeds block_size.
        """
        x = self.trunk(idx, cache, positions, doc_ids)
        if targets is None:
            return self.logits(x), None
        loss = self.loss(x.flatten(0, 1), self.head_weight, targets.flatten(), self.config.vocab_size, reduction)
        return None, loss.view(targets.shape) if reduction == "none" else loss

    def scalars(self, idx, **kwargs):
        """The scalar head's value at every position, (B, T) float32: rewards, or a critic's values."""
        return self.scalar_head(self.trunk(idx, **kwargs)).squeeze(-1).float()

    @staticmethod
    def from_pretrained(name_or_dir, device="cpu", dtype=torch.float32):
        """A model from a run directory of ours or a Hugging Face directory of GPT-2 or LLaMA type."""
        path = Path(name_or_dir)
        if (path / "run.json").exists():
            return load_run(path, device, dtype)[0]
        if (path / "config.json").exists():
            return load_hf(path, device, dtype)
        raise BadInput(f"--init {name_or_dir}: no run.json and no config.json there; give a run directory such "
                       f"as out/base or a Hugging Face directory")

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens=100, temperature=1.0, top_k=None, top_p=None, seed=0, pick=None,
               compile=False):
        """
        Iterate over (tokens (B,), logprobs (B,)), max_new_tokens times; arguments as in generate. Where a row
        outgrows the context, every row keeps its last block_size / 2 tokens and starts again at position 0.
        """
        check_sampling(temperature, top_k, top_p)
        ids, T = [list(map(int, p)) for p in prompts], self.config.block_size
        longest = max(map(len, ids), default=0)
        if min(map(len, ids), default=0) == 0:
            raise BadInput("the prompt is empty: give at least one token, for example <|endoftext|>")
        if longest > T:
            raise BadInput(f"a prompt of {longest} tokens is longer than the model's context of {T}: shorten it")
        size = min(T, 64 * math.ceil((longest + max_new_tokens) / 64))
        d = self.decoder(len(ids), size, (temperature, top_k, top_p), compile)
        d.seeds.copy_(torch.tensor(seed if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(ids))]))
        d.drawn.zero_()
        recent = []  # tokens on the device that ids does not hold yet

        def history():
            if recent:
                for row, new in zip(ids, torch.stack(recent, 1).tolist()):
                    row.extend(new)
                recent.clear()
            return ids

        training = self.training
        self.eval()
        try:
            for step in range(max_new_tokens):
                full = longest > T
                if step == 0 or full:
                    rows = [row[-(T // 2):] for row in history()] if full else ids
                    longest = max(map(len, rows))
                    d.prefill(rows)
                    d.choose(pick and pick(d.logits, history()))
                elif pick is not None:
                    d.advance()
                    d.choose(pick(d.logits, history()))
                else:
                    d.step()
                recent.append(d.token.clone())
                longest += 1
                yield recent[-1], d.logprob.clone()
        finally:  # also where the caller stops listening
            self.train(training)

    def decoder(self, batch, size, sampling, compile):
        """The Decoder of this shape; on CUDA the last one is kept, because recording its graph takes a while."""
        key = (batch, size, sampling, compile, self.device, self.compute_dtype)
        if self._decoder is None or self._decoder[0] != key or self.device.type != "cuda":
            self._decoder = None  # free the old cache first
            self._decoder = key, Decoder(self, batch, size, sampling, compile)
        return self._decoder[1]

    def generate(self, prompts, max_new_tokens=100, stop=(), **sampling):
        """
        Continue a batch of prompts, a list of id lists of any lengths or a tensor (B, T).

        temperature 0 is argmax; then softmax(logits / temperature) cut to the top_k likeliest ids and to the
        smallest set of mass top_p (Holtzman et al. 2020), in this order. A row ends before an id of `stop`.
        seed: row i draws from stream seed + i, or give one seed a row; a row's draw does not depend on its
        batch. pick(logits (B, V), ids so far) -> (B,) replaces the whole choice.

        Returns (list of lists of new ids, list of lists of their log-probabilities in nats under
        softmax(logits / temperature), before any cut; under softmax(logits) at temperature 0 or with pick).
        """
        stop, tokens, logprobs = set(stop), [], []
        ends = torch.tensor(sorted(stop), device=self.device)
        poll = 16 if self.device.type == "cuda" else 1  # asking whether all rows are done waits for the device
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        for token, logprob in self.stream(prompts, max_new_tokens, **sampling):
            tokens.append(token)
            logprobs.append(logprob)
            done |= torch.isin(token, ends)
            if stop and len(tokens) % poll == 0 and done.all():
                break
        if not tokens:
            return [[] for _ in prompts], [[] for _ in prompts]
        tokens, logprobs = (torch.stack(z, 1).tolist() for z in (tokens, logprobs))
        ends = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in tokens]
        return [r[:e] for r, e in zip(tokens, ends)], [r[:e] for r, e in zip(logprobs, ends)]


# -----------------------------------------------------------------------------
# Generation engine: one prefill, then one token for every row a step


def uniform(seed, pos):
    """A number in [0, 1) that is a pure function of (seed, pos), int64 tensors: two rounds of a 32-bit mixer."""
    x = (seed * 0x1F123BB5 + pos * 0x2C1B3C6D + 0x5BD1E995) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return (x >> 8).float() / 2 ** 24


def truncate_logits(logits, top_k=None, top_p=None):
    """Set to -inf all but the top_k likeliest and the smallest set with mass ≥ top_p; logits (B, V)."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        values, order = logits.sort(descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)  # mass of the likelier ones
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def sample_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """
    Choose an id for each row of logits (B, V) by inverting the cumulative distribution at u (B,) in [0, 1).
    Returns ids (B,) and their log-probabilities under softmax(logits / temperature).
    """
    if temperature == 0:
        logp = logits.log_softmax(-1)
        token = logits.argmax(-1)
    else:
        logits = logits / temperature
        logp = logits.log_softmax(-1)
        cdf = truncate_logits(logits, top_k, top_p).softmax(-1).cumsum(-1)
        token = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


def check_sampling(temperature, top_k, top_p):
    if temperature < 0:
        raise BadInput(f"--temperature {temperature} is negative: use 0 for the likeliest token, 1 for the model's own")
    if top_k is not None and top_k < 1:
        raise BadInput(f"--top_k {top_k} leaves nothing to choose from: use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top_p {top_p} is not a probability mass: use a number above 0, at most 1")


class Decoder:
    """
    Cache, current token and random streams of a batch, and one step over them. On CUDA the step is recorded
    once as a graph over these fixed buffers and replayed: no launches, no copies to the host, no allocation.
    """

    def __init__(self, model, batch, size, sampling, compile):
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=model.device)
        self.model, self.sampling, self.compile, self.graph = model, sampling, compile, None
        self.cache = KVCache(model.config, batch, size, model.device, model.compute_dtype)
        self.token, self.logprob = zeros(batch), zeros(batch, dtype=torch.float32)
        self.logits = zeros(batch, model.config.vocab_size, dtype=torch.float32)
        self.seeds, self.drawn = zeros(batch), zeros(batch)  # stream of each row, tokens drawn from it

    def prefill(self, rows):
        """Run the prompts, padded on the right: what stands after a short row's end is never read."""
        lengths = torch.tensor([len(row) for row in rows], device=self.token.device)
        idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            idx[i, :len(row)] = torch.tensor(row)
        self.cache.bound, self.cache.static = 0, False
        self.cache.pos.zero_()
        x = self.model.trunk(idx.to(self.token.device), cache=self.cache)
        self.cache.pos.copy_(lengths)
        self.logits.copy_(self.model.logits(x[torch.arange(len(rows), device=x.device), lengths - 1]))

    def advance(self):
        """The current token's next logits."""
        x = self.model.trunk(self.token.unsqueeze(1), cache=self.cache)
        self.logits.copy_(self.model.logits(x[:, -1]))

    def choose(self, token=None):
        """Draw the next token from the logits, or take the given one."""
        if token is None:
            token, logprob = sample_token(self.logits, uniform(self.seeds, self.drawn), *self.sampling)
        else:
            logprob = self.logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        self.drawn.add_(1)

    def step(self):
        """advance and choose: one replay of the recorded graph on CUDA."""
        if self.token.device.type != "cuda":
            self.advance()
            self.choose()
            return
        self.cache.static = True
        if self.graph is None:
            self.record()
        self.graph.replay()

    def record(self):
        advance = torch.compile(self.advance) if self.compile else self.advance
        state = self.cache.pos, self.token, self.logprob, self.logits, self.drawn
        saved = [t.clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and library handles come first, outside the graph
                advance()
                self.choose()
                self.cache.pos.copy_(saved[0])
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            advance()
            self.choose()
        for t, value in zip(state, saved):
            t.copy_(value)


# -----------------------------------------------------------------------------
# Accounting: parameters, FLOPs, peaks


def count_parameters(model):
    """(all, those that multiply an activation): the second is the N of 6 N, every Linear once and the head."""
    total = sum(p.numel() for p in model.parameters())
    matmul = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return total, matmul + (model.wte.weight.numel() if model.head is None else 0)


def flops_per_token(model, T):
    """
    Training FLOPs of a token: 6 N_matmul + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B), forward 2,
    backward 4; attention counted in full although causality needs half; the embedding look-up is free.
    """
    c = model.config
    return 6 * count_parameters(model)[1] + 12 * c.n_layer * c.n_head * c.head_dim * T


# Dense bf16 peaks, FLOP/s, from the vendors' data sheets; the first name that occurs in the device's wins.
PEAK_FLOPS = [
    ("B200", 2250e12), ("GB200", 2500e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("A100", 312e12), ("A800", 312e12), ("A6000", 155e12), ("A10G", 70e12), ("L40S", 362e12),
    ("L4", 121e12), ("RTX 5090", 209e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12), ("MI300X", 1307e12),
    ("V100", 125e12), ("T4", 65e12),
]


def peak_flops(device):
    """The device's dense bf16 peak in FLOP/s, or None where it is not known: then no MFU is printed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


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
# Processes: one, or as many as torchrun started

Process = namedtuple("Process", "device rank world")


def setup_process(device="auto"):
    """Join torchrun's group if there is one (NCCL on CUDA, gloo on CPU) and choose this process's device."""
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
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return Process(device, rank, world)


def all_reduce(tensor):
    """Sum over all processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def adamw_groups(model, weight_decay):
    """Decay what multiplies (matrices), not gains, biases and other vectors; each parameter exactly once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]


# -----------------------------------------------------------------------------
# Files: safetensors (8 bytes of header length, JSON header, raw little-endian tensors)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def save_safetensors(tensors, path, metadata=None):
    """Write a dict of name -> tensor; metadata: dict of str -> str."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with replace_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_safetensors(path):
    """
    name -> tensor, mapped from the file: bytes are read when they are used. Every length, shape and offset is
    checked against the file first, so a truncated or forged file is a BadInput and never a wild read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            if size < 8 or n > min(size - 8, 100 << 20):
                raise ValueError(f"its header of {n} bytes does not fit in {size}")
            header = json.loads(f.read(n))
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + n:]
        tensors, covered = {}, 0
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(isinstance(d, int) and d >= 0 for d in (*shape, start, end)):
                raise ValueError(f"{name} has a shape or offset that is not a count")
            if start != covered or end - start != math.prod(shape) * dtype.itemsize or end > len(raw):
                raise ValueError(f"{name} claims bytes {start} to {end} of {len(raw)}")
            covered, data = end, raw[start:end]
            if data.storage_offset() % dtype.itemsize:
                data = data.clone()  # a header of odd length: views need alignment
            tensors[name] = data.view(dtype).view(shape)
        if covered != len(raw):
            raise ValueError(f"{len(raw) - covered} bytes belong to no tensor")
        return tensors
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give --init or --out the folder of a finished run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BadInput(f"{path} is not a sound safetensors file ({error}): copy or save it again") from None


# -----------------------------------------------------------------------------
# Run directories: model.safetensors, run.json, tokenizer.tiktoken, log.jsonl, and optim.pt to resume from


def save_run(out, model, run):
    """
    Weights, then run.json: {"config", "tokenizer", "stage", "step", "metrics", "args", …}. Each file is
    replaced at once and all saves of a run share one config, so any moment leaves a run that loads.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_safetensors(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    with replace_file(out / "run.json", "w") as f:
        json.dump({"config": asdict(model.config), **run}, f, indent=1)


def load_run(path, device="cpu", dtype=torch.float32):
    """The model of a run directory, its weights and activations in dtype, and the contents of run.json."""
    path = Path(path)
    try:
        run = json.loads((path / "run.json").read_text())
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
    return build_model(config, load_safetensors(path / "model.safetensors"), path, device, dtype), run


def build_model(config, tensors, source, device="cpu", dtype=torch.float32):
    """A GPT that holds `tensors`, every one of the right name and shape; nothing is initialized in between."""
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BadInput(f"{source} has no tensor {name}: it is not a model of its config")
        if name not in expected or expected[name] != tensors[name].shape:
            raise BadInput(f"{source} has {name} of shape {list(tensors[name].shape)}, which its config does not")
    model.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
    if config.pos == "rope":
        model.rope = rope_table(config.head_dim, config.block_size, config.rope_theta).to(device)
    model.compute_dtype = dtype
    return model


def newest_run(root="out"):
    """The run directory under `root` that was saved last."""
    runs = sorted(Path(root).glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise BadInput(f"no run under {root}/ yet: train one first with python train.py, or give --init DIR")
    return runs[-1].parent


# -----------------------------------------------------------------------------
# Hugging Face: names of theirs for names of ours

HF_LLAMA = {"wte": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "norm1": "input_layernorm",
            "norm2": "post_attention_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
HF_GPT2 = {"wte": "wte", "wpe": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2", "attn.o": "attn.c_proj",
           "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def hf_config(hf):
    """GPTConfig of a Hugging Face config.json, read as a dict."""
    if hf.get("model_type") == "gpt2":
        return GPTConfig(**{**GPT2, "vocab_size": hf["vocab_size"], "block_size": hf["n_positions"],
                            "n_layer": hf["n_layer"], "n_head": hf["n_head"], "n_embd": hf["n_embd"],
                            "n_hidden": hf.get("n_inner") or 0, "norm_eps": hf["layer_norm_epsilon"],
                            "act": {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}[hf["activation_function"]],
                            "tied": hf.get("tie_word_embeddings", True)})
    if hf.get("model_type") == "llama":
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise BadInput(f"rope scaling {rope} is not supported")
        theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
        return GPTConfig(**{**LLAMA, "vocab_size": hf["vocab_size"], "block_size": hf["max_position_embeddings"],
                            "n_layer": hf["num_hidden_layers"], "n_head": hf["num_attention_heads"],
                            "n_kv_head": hf.get("num_key_value_heads") or 0, "n_embd": hf["hidden_size"],
                            "head_dim": hf.get("head_dim") or 0, "n_hidden": hf["intermediate_size"],
                            "norm_eps": hf["rms_norm_eps"], "rope_theta": theta,
                            "tied": hf.get("tie_word_embeddings", False)})
    raise BadInput(f"model_type {hf.get('model_type')!r} of config.json is not supported: gpt2 and llama are")


def load_hf(path, device="cpu", dtype=torch.float32):
    """The model of a Hugging Face directory that holds config.json and model.safetensors."""
    path = Path(path)
    hf = json.loads((path / "config.json").read_text())
    config = hf_config(hf)
    theirs = load_safetensors(path / "model.safetensors")
    gpt2 = hf["model_type"] == "gpt2"
    table = HF_GPT2 if gpt2 else HF_LLAMA

    def find(name):
        for full in (name, "transformer." + name):
            if full in theirs:
                return theirs[full].float()
        raise BadInput(f"{path} has no tensor {name}")

    tensors = {}
    with torch.device("meta"):
        names = list(GPT(config).state_dict())
    for ours in names:
        layer = ours.split(".")[1] if ours.startswith("blocks.") else None
        part, kind = ours.removeprefix(f"blocks.{layer}.").rsplit(".", 1)
        prefix = "" if layer is None else f"h.{layer}." if gpt2 else f"model.layers.{layer}."
        if gpt2 and part in ("attn.q", "attn.k", "attn.v"):  # one matrix for the three
            third = ("attn.q", "attn.k", "attn.v").index(part)
            t = find(f"{prefix}attn.c_attn.{kind}").chunk(3, dim=-1)[third]
        else:
            t = find(f"{prefix}{table[part]}.{kind}")
        if gpt2 and layer is not None and kind == "weight" and t.dim() == 2:
            t = t.T  # GPT-2 stores (in, out)
        if part in ("wte", "head"):
            t = F.pad(t, (0, 0, 0, config.padded_vocab - t.shape[0]))
        tensors[ours] = t.contiguous()
    return build_model(config, tensors, path, device, dtype)


# -----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["info"])
    parser.add_argument("name", help="a preset, a run directory or a Hugging Face directory")
    args = parser.parse_args()
    if args.name in PRESETS:
        with torch.device("meta"):
            model = GPT(GPTConfig(**PRESETS[args.name]))
    else:
        model = GPT.from_pretrained(args.name)
    total, matmul = count_parameters(model)
    T = model.config.block_size
    for name, value in asdict(model.config).items():
        print(f"{name:14} {value}")
    print(f"{total:,} parameters, {matmul:,} of them in matrix products; "
          f"{flops_per_token(model, T):,} training FLOPs a token at T {T}")


if __name__ == "__main__":
    from model import main
    cli(main)
