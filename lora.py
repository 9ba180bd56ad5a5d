"""
Parameter-efficient tuning: a frozen model and a few trained numbers in it, kept apart in a file of megabytes.

    lora        y = W x + (α/r) B A x, A Gaussian, B zero                      Hu et al. 2021; α/√r: Kalajdzievski 2023
    qlora       the same over 4-bit weights (--quantize nf4)                   Dettmers et al. 2023
    dora        y = m ∘ V x / |V|, V = W + (α/r) B A, m a length for each row  Liu et al. 2024
    adalora     (α/r) B diag(E) A, the least important triplets pruned         Zhang et al. 2023
    prompt      vectors before the embedded text                               Lester et al. 2021
    ptuning     the same, written by an LSTM while training                    Liu et al. 2021
    prefix      keys and values of each layer, written by an MLP               Li & Liang 2021
    ptuning2    keys and values of each layer, trained as they are             Liu et al. 2022
    serial      f(x) + U relu(D f(x)) after attention and MLP                  Houlsby et al. 2019
    parallel    f(x) + U relu(D x) beside them                                 He et al. 2022
    zeroinit    attention + g · attention over learned prompts, g from 0       LLaMA-Adapter, Zhang et al. 2023
    bitfit      the biases                                                     Ben Zaken et al. 2022

What is added lies in the modules it changes under names of its own, so the base's tensors keep theirs. A saved adapter
is the two files of PEFT's format and a run.json that names its base; every --init reads it.

    python lora.py                                          # how many numbers each method trains
    python lora.py count llama-7b --lora_targets all,head
    python lora.py merge out/sft --out out/merged           # one plain model
    python lora.py bench --preset gpt2-xl --device cuda     # memory and speed: full, LoRA, QLoRA
    python lora.py table --init out/sft --jobs 2            # every method learns a new task: right answers, time
"""
import argparse
import contextlib
import copy
import functools
import gc
import hashlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import BadInput, Tokenizer, cli, read_json, replace_file
from model import (GPT, PRESETS, Attention, GPTConfig, KVCache, Linear, MLP, add_memory_flags, attend, check_out,
                   fuse_qkv, hf_places, load_safetensors, memory_plan, meta_model, moment_bytes, newest_run,
                   peak_memory, position_tables, preset, save_run, save_safetensors, setup_process, split_qkv,
                   start_run, to_hf_config)


@dataclass
class Adapter:
    """What is added to a model; every field is a flag of the stages that tune, see add_flags."""
    tune: str = "lora"
    lora_rank: int = 8
    lora_alpha: float = 0.0   # 0: twice the rank
    lora_targets: str = "q,v"
    lora_dropout: float = 0.0
    rslora: bool = False
    virtual_tokens: int = 20
    virtual_init: str = "vocab"
    adapter_width: int = 0    # 0: n_embd / 16
    train_embeddings: bool = False
    quantize: str = "none"

    def __post_init__(self):
        if self.tune not in METHODS:
            raise BadInput(f"--tune {self.tune} is unknown: choose one of full, {', '.join(METHODS)}")
        if self.lora_rank < 1:
            raise BadInput(f"--lora_rank {self.lora_rank}: an adapter needs a rank of at least 1, for example 8")
        if not 0 <= self.lora_dropout < 1:
            raise BadInput(f"--lora_dropout {self.lora_dropout} is not a probability below 1")
        if self.virtual_tokens < 1:
            raise BadInput(f"--virtual_tokens {self.virtual_tokens}: give at least one, for example 20")

    @property
    def alpha(self):
        return self.lora_alpha or 2.0 * self.lora_rank


def add_flags(parser):
    """The flags that sft.py, dpo.py and rlhf.py share; from_args reads them."""
    add, d = parser.add_argument, {f.name: f.default for f in fields(Adapter)}
    add("--tune", default=None, choices=["full", *METHODS],
        help="what is trained, see python lora.py --help (default: lora with --lora_rank or --quantize, else full)")
    add("--lora_rank", type=int, default=0, help=f"r (default: {d['lora_rank']} where a rank is needed)")
    add("--lora_alpha", type=float, default=d["lora_alpha"], help="α (0: twice the rank)")
    add("--lora_targets", default=d["lora_targets"],
        help="of q, k, v, o, gate, up, down, head, wte; all: the blocks'; or patterns of full names, comma-separated")
    add("--lora_dropout", type=float, default=d["lora_dropout"], help="of what enters A")
    add("--rslora", action="store_true", help="scale by α / sqrt(r)")
    add("--virtual_tokens", type=int, default=d["virtual_tokens"], help="of prompt, prefix, ptuning and zeroinit")
    add("--virtual_init", default=d["virtual_init"],
        help="of prompt: random, vocab (embeddings of frequent tokens), or a text such as the classes' names")
    add("--adapter_width", type=int, default=d["adapter_width"], help="of serial and parallel (0: n_embd / 16)")
    add("--train_embeddings", action="store_true", help="token embedding and head too, as new tokens need")
    add("--quantize", default=d["quantize"], help="the frozen base: none, nf4, or another method of quantize.py")


def from_args(args):
    """The Adapter that the flags ask for, or None for full tuning."""
    tune = args.tune or ("lora" if args.lora_rank or args.quantize != "none" else "full")
    if tune == "full":
        if args.quantize != "none":
            raise BadInput(f"--quantize {args.quantize}: whole numbers take no gradient, so --tune full needs none: "
                           f"choose --tune lora, or leave --quantize out")
        return None
    given = {f.name: getattr(args, f.name) for f in fields(Adapter)}
    return Adapter(**given | {"tune": tune, "lora_rank": args.lora_rank or Adapter.lora_rank})


# -----------------------------------------------------------------------------
# Low rank: mixed into a module's own class, so that it stays where and what it is


def packed(module):
    """Is its weight a QTensor, from which `weight` is made anew at each look?"""
    return "weight" not in module._parameters


class LowRank:
    """
    y = W x + b + s B (E ∘ A) drop(x), with lora_A (r, in), lora_B (out, r), in float32 whatever W is; lora_E (r, 1)
    only with AdaLoRA. lora_m (out,) makes it DoRA's: g (y - b) + b, g = m / |W + s B A| by rows, the length held
    constant in the backward pass (Liu et al. 2024, 4.3).
    """
    on = True

    def graft(self, rank, scale, drop, tune, generator):
        into, out = self.in_features, self.out_features
        self.lora_scale, self.drop = scale, drop
        device = next(itertools.chain(self.parameters(), self.buffers())).device

        def normal(*shape, std):
            return nn.Parameter((torch.randn(shape, generator=generator) * std).to(device))
        self.lora_A = normal(rank, into, std=0.02 if tune == "adalora" else into ** -0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))
        self.register_parameter("lora_E", None)
        self.register_parameter("lora_m", None)
        if tune == "adalora":
            self.lora_B = normal(out, rank, std=0.02)
            self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=device))
        if tune == "dora":
            self.lora_m = nn.Parameter(self.weight.detach().float().norm(dim=1))

    def low_rank(self):
        """A, with E in it, and B."""
        return (self.lora_A if self.lora_E is None else self.lora_A * self.lora_E), self.lora_B

    def gain(self, weight):
        A, B = self.low_rank()
        return self.lora_m / (weight.float() + self.lora_scale * (B @ A)).norm(dim=1).detach().clamp(min=1e-12)

    def effective(self):
        """The one matrix (out, in) that does the same, with dropout off; differentiable, in float32."""
        weight = self.weight.float()
        if not self.on:
            return weight
        A, B = self.low_rank()
        new = weight + self.lora_scale * (B @ A)
        return new if self.lora_m is None else new * self.gain(weight).unsqueeze(1)

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        A, B = self.low_rank()
        h = F.linear(F.dropout(x, self.drop, self.training), A.to(x.dtype))
        delta = F.linear(h, B.to(x.dtype)) * self.lora_scale
        if self.lora_m is None:
            return y + delta
        bias = 0 if self.bias is None else self.bias.to(x.dtype)
        return (y - bias + delta) * self.gain(self.weight).to(x.dtype) + bias


class LowRankEmbedding:
    """wte(i) + s B A_i, with lora_A (r, V) zero and lora_B (C, r) Gaussian."""
    on = True

    def graft(self, rank, scale, drop, tune, generator):
        self.lora_scale, device = scale, self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.num_embeddings, device=device))
        self.lora_B = nn.Parameter(torch.randn(self.embedding_dim, rank, generator=generator).to(device))

    def effective(self):
        weight = self.weight.float()
        return weight + self.lora_scale * (self.lora_B @ self.lora_A).T if self.on else weight

    def forward(self, idx):
        x = super().forward(idx)
        return x + self.lora_scale * F.embedding(idx, self.lora_A.T) @ self.lora_B.T if self.on else x


@functools.cache
def crossed(kind, base):
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})


def mix_in(module, kind):
    module.__class__ = crossed(kind, type(module))


def find_linears(model):
    """name -> module of everything that lora_targets can name."""
    chosen = {name: m for name, m in model.named_modules() if name.startswith("blocks.") and hasattr(m, "in_features")}
    chosen |= {"wte": model.wte} | ({} if model.head is None else {"head": model.head})
    return chosen


def find_targets(model, targets):
    """The names of find_linears that a comma-separated list of short names or patterns of full names selects."""
    linears, chosen = find_linears(model), []
    for target in targets.split(","):
        if target == "all":
            found = [name for name in linears if name.startswith("blocks.")]
        else:
            try:
                found = [n for n in linears if re.fullmatch(target, n) or re.fullmatch(target, n.rsplit(".", 1)[-1])]
            except re.error as error:
                raise BadInput(f"--lora_targets {target} is no pattern ({error})") from None
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise BadInput(f"--lora_targets {target} matches nothing: this model has {', '.join(known)}; or say all")
        chosen += [name for name in found if name not in chosen]
    return chosen


def add_low_rank(model, adapter, generator, tokenizer=None, ranks=None):
    """ranks: {name: (rank, alpha)} in place of the targets' common ones."""
    r = math.ceil(ADALORA_START * adapter.lora_rank) if adapter.tune == "adalora" else adapter.lora_rank
    ranks = ranks or dict.fromkeys(find_targets(model, adapter.lora_targets), (r, adapter.alpha))
    for name, (r, alpha) in ranks.items():
        module = model.get_submodule(name)
        embedding = isinstance(module, nn.Embedding)
        if embedding and adapter.tune != "lora":
            raise BadInput(f"--lora_targets wte: an embedding takes --tune lora, not {adapter.tune}")
        mix_in(module, LowRankEmbedding if embedding else LowRank)
        module.graft(r, alpha / rank_unit(adapter, r), adapter.lora_dropout, adapter.tune, generator)


def rank_unit(adapter, r):
    """What α is divided by."""
    return math.sqrt(r) if adapter.rslora else r + 1e-5 if adapter.tune == "adalora" else r


# -----------------------------------------------------------------------------
# AdaLoRA: where the rank goes


def orthogonality(model):
    """Mean over all A and B of |A Aᵀ - I| and |Bᵀ B - I| (Frobenius): P and Q of an SVD (Zhang et al. 2023, eq. 4)."""
    parts = [g for m in model.modules() if isinstance(m, LowRank)
             for g in (m.lora_A @ m.lora_A.T, m.lora_B.T @ m.lora_B)]
    return sum((g - torch.eye(len(g), device=g.device)).norm() for g in parts) / len(parts)


class RankAllocator:
    """
    Prunes triplets (row of A, E, column of B) over the steps to `average` a matrix (Zhang et al. 2023, 3.2). After a
    step's update, while its gradients are there:
        I = |w ∂L/∂w|,  Ī ← β Ī + (1 - β) I,  U ← β U + (1 - β) |I - Ī|,  s = Ī U for each number w,
        S = s(E) + mean s(A row) + mean s(B column);   E ← 0 outside the budget's largest S.
    The budget falls with the cube of what is left of the steps between warm and steps - final.
    """

    def __init__(self, model, average, steps, warm, final, every=1, beta=0.85):
        self.parts = [m for m in model.modules() if isinstance(m, LowRank)]
        self.steps, self.warm, self.final, self.every, self.beta = steps, warm, final, every, beta
        self.first = sum(len(m.lora_A) for m in self.parts)
        self.last = average * len(self.parts)
        self.state = [{n: torch.zeros(2, *getattr(m, n).shape, device=m.lora_A.device)
                       for n in ("lora_A", "lora_B", "lora_E")} for m in self.parts]
        self.keep = None
        if self.last >= self.first:
            raise BadInput(f"--lora_rank {average} is not below the {self.first // len(self.parts)} that adalora "
                           f"starts from: there is nothing to prune")

    def budget(self, step):
        left = 1 - (step - self.warm) / (self.steps - self.final - self.warm)
        return int((self.first - self.last) * left ** 3 + self.last)

    @torch.no_grad()
    def step(self, step):
        end = self.steps - self.final
        if step < end:
            for m, state in zip(self.parts, self.state):
                for name, (mean, unsure) in state.items():
                    p = getattr(m, name)
                    importance = (p * p.grad).abs()
                    mean.lerp_(importance, 1 - self.beta)
                    unsure.lerp_((importance - mean).abs(), 1 - self.beta)
        if step == end or self.warm < step < end and step % self.every == 0:
            self.choose(self.last if step == end else self.budget(step))
        elif step > end and self.keep is not None:
            self.prune()

    def choose(self, budget):
        scores = []
        for state in self.state:
            a, b, e = (state[name].prod(0) for name in ("lora_A", "lora_B", "lora_E"))
            scores.append(e.view(-1) + a.mean(1) + b.mean(0))
        threshold = torch.cat(scores).kthvalue(self.first - budget).values if budget < self.first else -1.0
        self.keep = [s > threshold for s in scores]
        self.prune()

    def prune(self):
        for m, keep in zip(self.parts, self.keep):
            m.lora_E.masked_fill_(~keep[:, None], 0.0)


# -----------------------------------------------------------------------------
# Virtual tokens: keys and values that every token of every document sees before its own


class Virtual(nn.Module):
    """
    P keys and values a layer, before everybody's own; the text's positions begin at P. prefix and ptuning2 train them,
    (P, 2 L, Hkv, D) in PEFT's order; prompt and ptuning train P embeddings, and since the text comes after them, all
    that it sees of them is their keys and values, computed once for a batch. Packed documents share them.
    """

    def __init__(self, model, adapter, generator, tokenizer=None):
        super().__init__()
        c, P = model.config, adapter.virtual_tokens
        self.tokens, self.kind = P, adapter.tune
        width = c.n_kv_head * c.head_dim
        shape = (P, 2 * c.n_layer * width) if self.kind == "ptuning2" else \
            (P, width) if self.kind == "prefix" else (P, c.embd_dim)
        start = torch.randn(shape, generator=generator)
        if self.kind in ("prompt", "ptuning"):
            start = initial_prompt(model, adapter, start, tokenizer)
        self.table = nn.Parameter(start)
        self.encoder = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2 ** 31, (), generator=generator)))
            if self.kind == "prefix":
                self.encoder = nn.Sequential(nn.Linear(width, c.n_embd), nn.Tanh(),
                                             nn.Linear(c.n_embd, 2 * c.n_layer * width))
            elif self.kind == "ptuning":
                self.encoder = PromptEncoder(c.embd_dim)
        self.kept, self.fresh = None, False  # while nothing trains: the keys and values, and whether they hold
        self.to(model.device)

    def train(self, mode=True):
        self.fresh = self.fresh and not mode
        return super().train(mode)

    def written(self):
        """What is kept after training, without its encoder: (P, E) or (P, 2 L Hkv D)."""
        return self.table if self.encoder is None else self.encoder(self.table)

    def keys_values(self, model):
        """(L, 2, 1, Hkv, P, D)"""
        c = model.config
        if self.kind in ("prefix", "ptuning2"):
            kv = self.written().view(self.tokens, c.n_layer, 2, c.n_kv_head, c.head_dim).permute(1, 2, 3, 0, 4)
            return kv.to(model.compute_dtype).unsqueeze(2)
        cache = KVCache(c, 1, self.tokens, model.device, model.compute_dtype)
        model.virtual = None
        try:
            model.trunk(None, embeds=self.written()[None], cache=cache)
        finally:
            model.virtual = self
        return torch.stack((cache.k, cache.v), 1)[..., :self.tokens, :]

    def forward(self, model):
        """keys_values; computed once while nothing trains."""
        if torch.is_grad_enabled() and self.table.requires_grad or self.training:
            return self.keys_values(model)
        held = self.kept is not None and self.kept.device == model.device and self.kept.dtype == model.compute_dtype
        if not (self.fresh and held):
            with torch.inference_mode(False), torch.no_grad():
                kv = self.keys_values(model)
                same = held and self.kept.shape == kv.shape
                self.kept = self.kept.copy_(kv) if same else kv  # the same memory: a recorded step reads there
            self.fresh = True
        return self.kept

    def widen(self, view, T, device):
        """A mask of attend's for the keys that there are now."""
        if view is None or view == "all":  # "all": one query that sees everything
            return "all" if view else torch.ones(T, self.tokens + T, dtype=torch.bool, device=device).tril(self.tokens)
        return F.pad(view, (self.tokens, 0), value=True if view.dtype == torch.bool else 0.0)


class PromptEncoder(nn.Module):
    """A two-layer LSTM in both directions and an MLP over the prompt's vectors (P, E) (Liu et al. 2021, 3.2)."""

    def __init__(self, width):
        super().__init__()
        self.lstm_head = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return self.mlp_head(self.lstm_head(x[None])[0])[0]


def initial_prompt(model, adapter, start, tokenizer):
    """Lester et al. 2021, 3.2: random < embeddings of frequent tokens < those of the classes' names."""
    if model.device.type == "meta":  # to count
        return start
    table, P = model.wte.weight.detach().float().cpu(), adapter.virtual_tokens
    if adapter.virtual_init == "random":
        return start * table[:model.config.vocab_size].std()
    if adapter.virtual_init == "vocab":  # merges are numbered by frequency: the first 5,000
        n = min(5000, model.config.vocab_size)
        ids = (torch.arange(P) * max(1, n // P) + n // (2 * P)) % n
    else:
        if tokenizer is None:
            raise BadInput(f"--virtual_init {adapter.virtual_init!r} is a text and needs a tokenizer: use random or "
                           f"vocab")
        ids = torch.tensor(tokenizer.encode(adapter.virtual_init))
        ids = ids.repeat(math.ceil(P / max(1, len(ids))))[:P]
    return table[ids].clone()


def add_virtual(model, adapter, generator, tokenizer=None):
    c = model.config
    if c.attn != "full" or c.pos in ("alibi", "t5") or c.share > 1 or c.prefix_lm:
        raise BadInput(f"--tune {adapter.tune}: virtual tokens need full causal attention, blocks of their own and "
                       f"positions by rope, table or sine, not attn={c.attn}, pos={c.pos}, share={c.share}")
    if adapter.virtual_tokens >= c.block_size:
        raise BadInput(f"--virtual_tokens {adapter.virtual_tokens} leave nothing of the context of {c.block_size}")
    model.virtual = Virtual(model, adapter, generator, tokenizer)


# -----------------------------------------------------------------------------
# Bottlenecks, zero-init attention, biases


class Bottleneck:
    """f(x) + U relu(D z + d) + u, with z = f(x) (serial) or x (parallel); U and u start at zero, so nothing changes."""
    on = True

    def graft(self, width, parallel, c, generator):
        self.beside, device = parallel, next(self.parameters()).device
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape, device=device))
        down = torch.randn(width, c.n_embd, generator=generator) * c.n_embd ** -0.5
        self.adapter_down, self.adapter_down_bias = nn.Parameter(down.to(device)), zeros(width)
        self.adapter_up, self.adapter_up_bias = zeros(c.n_embd, width), zeros(c.n_embd)

    def forward(self, x, *rest):
        y = super().forward(x, *rest)
        if not self.on:
            return y
        down, d, up, u = (p.to(x.dtype) for p in (self.adapter_down, self.adapter_down_bias, self.adapter_up,
                                                  self.adapter_up_bias))
        return y + F.linear(F.relu(F.linear(x if self.beside else y, down, d)), up, u)


def add_bottlenecks(model, adapter, generator, tokenizer=None):
    width = adapter.adapter_width or max(1, model.config.n_embd // 16)
    for m in [m for m in model.modules() if isinstance(m, (Attention, MLP))]:
        mix_in(m, Bottleneck)
        m.graft(width, adapter.tune == "parallel", model.config, generator)


class ZeroInit:
    """
    Attention that adds g · softmax(q Kᵀ / sqrt(D)) V over the keys and values of P learned vectors, g from zero. The
    vectors have no position.
    """
    on = True

    def graft(self, P, c, generator):
        device = next(self.parameters()).device
        self.adapter_prompt = nn.Parameter(torch.randn(P, c.n_embd, generator=generator).to(device))
        self.adapter_gate = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, x, rope, view=None, attention=attend):
        if not self.on:
            return super().forward(x, rope, view, attention)
        prompt = self.adapter_prompt.to(x.dtype)[None]
        k, v = (f(prompt).view(1, prompt.shape[1], -1, self.head_dim) for f in (self.k, self.v))
        k = k if self.k_norm is None else self.k_norm(k)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (1, Hkv, P, D)

        def more(q, *rest):
            B = len(q)
            extra = attend(q, k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1), "all", self.scale, 0.0)
            return attention(q, *rest) + self.adapter_gate.to(q.dtype) * extra
        return super().forward(x, rope, view, more)


def add_zero_init(model, adapter, generator, tokenizer=None):
    for block in model.blocks:
        mix_in(block.attn, ZeroInit)
        block.attn.graft(adapter.virtual_tokens, model.config, generator)


def add_biases(model, adapter, generator, tokenizer=None):
    if not any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise BadInput("--tune bitfit trains biases, and this model has none: choose --tune lora, or a model with "
                       "biases such as gpt2")


# name: what it adds to a model
METHODS = {"lora": add_low_rank, "dora": add_low_rank, "adalora": add_low_rank,
           "prompt": add_virtual, "ptuning": add_virtual, "prefix": add_virtual, "ptuning2": add_virtual,
           "serial": add_bottlenecks, "parallel": add_bottlenecks, "zeroinit": add_zero_init, "bitfit": add_biases}
GRAFTS = (LowRank, LowRankEmbedding, Bottleneck, ZeroInit)
WRITTEN = {"prefix": "ptuning2", "ptuning": "prompt"}  # what is left of them once their encoder is dropped
ADALORA_START = 1.5  # AdaLoRA begins with so many times the rank that it ends with

# -----------------------------------------------------------------------------
# Apply, switch off, merge


def apply(model, adapter, tokenizer=None, seed=0, ranks=None):
    """
    Freeze the model and add the adapter, in place; only what is named by trained_names takes a gradient then. Its first
    output is the base's (but for virtual tokens, which nothing starts silent). The base is quantized before, where
    adapter.quantize says so. ranks: see add_low_rank.
    """
    if model.adapter is not None:
        raise BadInput("this model has an adapter already: merge it first (python lora.py merge RUN --out DIR)")
    if model.base_print is None and model.device.type != "meta":
        model.base_print = fingerprint(model)
    if adapter.quantize != "none":
        quantize_base(model, adapter.quantize)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    extra = {"ranks": ranks} if ranks else {}
    METHODS[adapter.tune](model, adapter, generator, tokenizer, **extra)
    model.adapter, model.initial = adapter, {}
    params = dict(model.named_parameters())
    for name in trained_names(model):
        params[name].requires_grad_(True)
        if not added(name):  # the base's own, which `disabled` puts back; trained in float32, as what is added
            params[name].data = params[name].data.float()
            model.initial[name] = params[name].detach().clone()


def added(name):
    """Is this the name of a parameter that no base has?"""
    return name.startswith("virtual.") or name.rsplit(".", 1)[-1].startswith(("lora_", "adapter_"))


NEW_HEADS = "scalar_head.", "class_head."  # no language model has them, so they are always trained


def trained_names(model):
    """Names of the parameters that the model's adapter consists of."""
    def mine(name):
        if model.adapter.train_embeddings and name in ("wte.weight", "head.weight"):
            return True
        return added(name) or name.startswith(NEW_HEADS) or model.adapter.tune == "bitfit" and name.endswith("bias")
    return [name for name, _ in model.named_parameters() if mine(name)]


def trained_share(model):
    """(numbers that are trained, all of them), those of a quantized base counted as what they stand for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    coded = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features") and packed(m))
    return trained, sum(p.numel() for p in model.parameters()) + coded


def grafts(model):
    return [m for m in model.modules() if isinstance(m, GRAFTS)]


@contextlib.contextmanager
def disabled(model):
    """The base again, for as long as the context lasts: a reference model that costs no memory."""
    if any(hasattr(m, "base_weight") for m in grafts(model)):
        raise RuntimeError("a merged adapter cannot be switched off: unmerge(model) first")
    parts, virtual, params = grafts(model), model.virtual, dict(model.named_parameters())
    trained = {name: params[name].detach().clone() for name in model.initial} if model.adapter else {}
    try:
        for m in parts:
            m.on = False
        model.virtual = None
        with torch.no_grad():
            for name in trained:
                params[name].copy_(model.initial[name])
        yield model
    finally:
        for m in parts:
            m.on = True
        model.virtual = virtual
        with torch.no_grad():
            for name, t in trained.items():
                params[name].copy_(t)


@torch.no_grad()
def merge(model):
    """Put the adapter into the weights, W + (α/r) B A: no cost at inference. Weights keep their dtype."""
    parts = grafts(model)
    if model.virtual is not None or any(isinstance(m, (Bottleneck, ZeroInit)) for m in parts):
        raise BadInput(f"--tune {model.adapter.tune} adds what no weight of the model can do: it cannot be merged; "
                       f"keep it beside its base")
    for m in parts:
        if hasattr(m, "base_weight"):
            raise BadInput("the adapter is in the weights already: unmerge it first")
        if packed(m):
            raise BadInput("this base is quantized: merge into the one that it was made from (python lora.py merge)")
        m.base_weight = m.weight.data
        m.weight.data = m.effective().to(m.weight.dtype)
        m.on = False


@torch.no_grad()
def unmerge(model):
    """Take it out again, bit for bit: the base's weights were kept."""
    for m in grafts(model):
        m.weight.data = m.base_weight
        del m.base_weight
        m.on = True


def detach(model):
    """
    Remove the adapter, and put back what it changed of the base -> (Adapter, {name: tensor}, {module: α}), for attach:
    several adapters can take turns on one base.
    """
    adapter, tensors, alphas = model.adapter, adapter_tensors(model), module_alphas(model)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, t in model.initial.items():
            tensors[name] = tensors[name].clone()
            params[name].copy_(t)
    for m in grafts(model):
        m.__class__ = m.__class__.__bases__[1]
        for name in [n for n in m._parameters if n.startswith(("lora_", "adapter_"))]:
            delattr(m, name)
    model.virtual = model.adapter = None
    return adapter, tensors, alphas


def adapter_tensors(model):
    """{name: tensor} of the adapter; virtual tokens without the encoder that wrote them."""
    names = set(trained_names(model))
    tensors = {n: p.detach() for n, p in model.named_parameters() if n in names and not n.startswith("virtual.")}
    if model.virtual is not None:
        tensors["virtual.table"] = model.virtual.written().detach()
    return tensors


def module_alphas(model):
    return {name: m.lora_scale * rank_unit(model.adapter, len(m.lora_A)) for name, m in model.named_modules()
            if isinstance(m, (LowRank, LowRankEmbedding))}


@torch.no_grad()
def attach(model, adapter, tensors, alphas):
    """An adapter from detach or from a file onto its base."""
    ranks = {name: (len(tensors[f"{name}.lora_A"]), alpha) for name, alpha in alphas.items()}
    kind = WRITTEN.get(adapter.tune, adapter.tune)
    many = {"virtual_tokens": len(tensors["virtual.table"])} if "virtual.table" in tensors else {}
    apply(model, replace(adapter, tune=kind, virtual_init="random", **many), ranks=ranks)
    params = dict(model.named_parameters())
    odd = sorted(set(trained_names(model)) ^ tensors.keys())
    if odd:
        raise BadInput(f"the adapter is for another base: only one of the two has {odd[0]}")
    for name, t in tensors.items():
        if params[name].shape != t.shape:
            raise BadInput(f"the adapter is for another base: its {name} has the shape {list(t.shape)}, here it would "
                           f"be {list(params[name].shape)}")
        params[name].copy_(t)


def weighted(adapters, weights):
    """
    One LoRA that does Σ w_i of what several do, exactly: their A under each other, their B side by side. adapters: a
    list of detach's results with rank and targets of their own.
    """
    parts = sorted({name for _, _, alphas in adapters for name in alphas})
    if any(a.tune != "lora" for a, _, _ in adapters) or any(
            not name.rpartition(".")[2].startswith("lora_") for _, tensors, _ in adapters for name in tensors):
        raise BadInput("only adapters of --tune lora, without trained embeddings, can be added up")
    tensors, alphas = {}, {}
    for part in parts:
        mine = [(a, t, al[part], w) for (a, t, al), w in zip(adapters, weights) if part in al]
        ranks = [len(t[f"{part}.lora_A"]) for _, t, _, _ in mine]
        tensors[f"{part}.lora_A"] = torch.cat([t[f"{part}.lora_A"] for _, t, _, _ in mine])
        tensors[f"{part}.lora_B"] = torch.cat([t[f"{part}.lora_B"] * (w * alpha / rank_unit(a, r))
                                               for (a, t, alpha, w), r in zip(mine, ranks)], 1)
        alphas[part] = float(sum(ranks))  # scale 1
    return replace(adapters[0][0], rslora=False), tensors, alphas


@torch.no_grad()
def restart(model, seed):
    """ReLoRA (Lialin et al. 2023): what was learned goes into the weights; a fresh A and a zero B go on from there."""
    merge(model)
    generator = torch.Generator().manual_seed(seed)
    for m in grafts(model):
        del m.base_weight
        m.on = True
        if isinstance(m, LowRankEmbedding):
            m.lora_A.zero_()
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=generator))
            continue
        m.lora_A.copy_(torch.randn(m.lora_A.shape, generator=generator) * m.in_features ** -0.5)
        m.lora_B.zero_()


# -----------------------------------------------------------------------------
# Files: PEFT's adapter_config.json and adapter_model.safetensors, and a run.json that names the base

PEFT_TYPES = {"lora": "LORA", "dora": "LORA", "adalora": "ADALORA", "prompt": "PROMPT_TUNING", "ptuning": "P_TUNING",
              "prefix": "PREFIX_TUNING", "ptuning2": "PREFIX_TUNING", "zeroinit": "ADAPTION_PROMPT"}
LORA_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_m": "lora_magnitude_vector",
              "adapter_prompt": "adaption_prompt", "adapter_gate": "adaption_gate"}


def peft_places(model):
    """
    our module -> (its name in transformers, its part q, k or v of a fused one, or ""): where the architecture has one
    there, PEFT puts the same adapter onto the exported model; else the names are ours.
    """
    places = {name: (name, "") for name, _ in model.named_modules()}
    with contextlib.suppress(BadInput):
        kind, _ = to_hf_config(model.config)
        for ours, theirs, part, fused in hf_places(kind, model.config):
            places[ours.rpartition(".")[0]] = theirs.rpartition(".")[0], part[-1] if fused else ""
        places |= {f"blocks.{l}.attn": (places[f"blocks.{l}.attn.o"][0].rpartition(".")[0], "")
                   for l in range(len(model.blocks))}
    return places


def rows_of_vocabulary(name, t, n):
    """The tensor of embedding or head with n ids, cut or padded with zeros: transformers has no rows to spare."""
    axis = {"wte.lora_A": 1, "wte.weight": 0, "head.weight": 0, "head.lora_B": 0, "head.lora_m": 0}.get(name)
    if axis is None or t.shape[axis] == n:
        return t
    if t.shape[axis] > n:
        return t.narrow(axis, 0, n)
    return torch.cat((t, t.new_zeros([n - t.shape[axis] if i == axis else s for i, s in enumerate(t.shape)])), axis)


def to_peft(model, weights=None):
    """
    (adapter_config.json, {PEFT's name: tensor}). GPT-2's fused q, k, v are one module there: their A stand under each
    other, and their B, times the scale, as blocks. weights: whole tensors, where the model's own are parts.
    """
    adapter, c, places = model.adapter, model.config, peft_places(model)
    config = {"peft_type": PEFT_TYPES.get(adapter.tune, adapter.tune.upper()), "task_type": "CAUSAL_LM",
              "inference_mode": True}
    tensors = adapter_tensors(model) if weights is None else {n: weights[n] for n in trained_names(model)}
    if model.virtual is not None:
        width = c.embd_dim if model.virtual.kind in ("prompt", "ptuning") else c.n_kv_head * c.head_dim
        return config | {"num_virtual_tokens": adapter.virtual_tokens, "token_dim": width, "num_layers": c.n_layer,
                         "num_attention_heads": c.n_kv_head, "num_transformer_submodules": 1} | (
            {"prompt_tuning_init": "RANDOM"} if config["peft_type"] == "PROMPT_TUNING" else
            {"encoder_hidden_size": width} if config["peft_type"] == "P_TUNING" else {"prefix_projection": False}), \
            {"prompt_embeddings": tensors["virtual.table"]}
    theirs, fused, alphas = {}, {}, {}
    for name, t in tensors.items():
        part, _, kind = name.rpartition(".")
        t, (place, letter) = rows_of_vocabulary(name, t, c.vocab_size), places[part]
        if letter and adapter.tune == "lora":
            whole = kind == "lora_B"  # which takes the scale in
            fused.setdefault(place, {})[letter, kind] = t * model.get_submodule(part).lora_scale if whole else t
            continue
        place = part if letter else place  # PEFT's DoRA or AdaLoRA of a fused module is another method: our names
        if kind.startswith("lora_") and part == "wte":
            kind = kind.replace("lora_", "lora_embedding_")
        elif adapter.tune != "adalora":
            kind = LORA_NAMES.get(kind, kind)
        theirs[f"base_model.model.{place}.{kind}"] = t[None] if kind == "adaption_prompt" else t
    for part, alpha in module_alphas(model).items():
        alphas[places[part][0]] = len(tensors[f"{part}.lora_A"]), alpha
    for place, parts in fused.items():
        letters = [a for a in "qkv" if (a, "lora_A") in parts]
        R, blocks = sum(len(parts[a, "lora_A"]) for a in letters), []
        for a in "qkv":
            out = (c.n_head if a == "q" else c.n_kv_head) * c.head_dim
            blocks.append(torch.cat([B if a == b else B.new_zeros(out, B.shape[1])
                                     for b in letters for B in [parts[b, "lora_B"]]], 1))
        theirs[f"base_model.model.{place}.lora_A.weight"] = torch.cat([parts[a, "lora_A"] for a in letters])
        theirs[f"base_model.model.{place}.lora_B.weight"] = fuse_qkv(blocks, c, conv1d(c))
        alphas[place] = R, float(rank_unit(adapter, R))
    if config["peft_type"] == "ADAPTION_PROMPT":
        config |= {"adapter_len": adapter.virtual_tokens, "adapter_layers": c.n_layer,
                   "target_modules": places["blocks.0.attn"][0].rpartition(".")[2]}
    if alphas:
        (r, alpha), common = next(iter(alphas.values())), {}
        ranks = {place: r_ for place, (r_, _) in alphas.items() if r_ != r}
        others = {place: a for place, (_, a) in alphas.items() if a != alpha}
        saved = [places[n.rpartition(".")[0]][0] for n in tensors if not added(n)]
        if adapter.tune == "adalora":
            common = {"target_r": adapter.lora_rank, "init_r": r}
        config |= {"r": r, "lora_alpha": alpha, "lora_dropout": adapter.lora_dropout, "use_rslora": adapter.rslora,
                   "use_dora": adapter.tune == "dora", "bias": "none", "target_modules": sorted(alphas),
                   "rank_pattern": ranks, "alpha_pattern": others, "modules_to_save": saved or None,
                   "fan_in_fan_out": conv1d(c)} | common
    return config, theirs


def conv1d(c):
    """Does transformers keep this architecture's matrices as (in, out)?"""
    with contextlib.suppress(BadInput):
        return to_hf_config(c)[0] in ("gpt2", "openai-gpt")
    return False


def from_peft(model, path):
    """(Adapter, tensors, alphas) for attach, from a folder of PEFT's; model is the base."""
    path, c, places = Path(path), model.config, {}
    config, theirs = read_json(path / "adapter_config.json"), load_safetensors(path / "adapter_model.safetensors")
    for ours, (place, letter) in peft_places(model).items():
        places.setdefault(place, []).append((ours, letter))
        places.setdefault(ours, [(ours, "")])
    kind = config.get("peft_type", "")
    tune = {theirs: ours for ours, theirs in PEFT_TYPES.items()} | {
        "LORA": "dora" if config.get("use_dora") else "lora", "P_TUNING": "prompt", "PREFIX_TUNING": "ptuning2"}
    tune = tune.get(kind, kind.lower())
    if tune not in METHODS:
        raise BadInput(f"{path}/adapter_config.json is of type {kind!r}, which is not known here: use one of LORA, "
                       f"{', '.join(sorted(set(PEFT_TYPES.values()) - {'LORA'}))}")
    if "prompt_embeddings" in theirs:
        t = theirs["prompt_embeddings"]
        return Adapter(tune, virtual_tokens=len(t)), {"virtual.table": t}, {}
    first = config.get("init_r") if tune == "adalora" else None
    adapter = Adapter(tune, lora_rank=config.get("target_r" if first else "r") or 8,
                      lora_alpha=config.get("lora_alpha") or 0.0, lora_dropout=config.get("lora_dropout") or 0.0,
                      rslora=bool(config.get("use_rslora")), virtual_tokens=config.get("adapter_len") or 20)
    kinds = {theirs: ours for ours, theirs in LORA_NAMES.items()} | {"lora_magnitude_vector.weight": "lora_m"}
    tensors, alphas = {}, {}
    for key, t in theirs.items():
        name = key.removeprefix("base_model.model.")
        place = max((p for p in places if name.startswith(p + ".")), key=len, default=None)
        if place is None or place == "":
            raise BadInput(f"the adapter in {path} is for another base: there is no {name} here")
        suffix = name[len(place) + 1:].replace("lora_embedding_", "lora_")
        suffix = kinds.get(suffix, suffix)
        fused = [letter for _, letter in places[place]]
        for ours, letter in places[place]:
            part = t
            if letter and suffix == "lora_B":
                part = split_qkv(t, c, conv1d(c))[fused.index(letter)]
            part = t[0] if suffix == "adapter_prompt" else part
            tensors[f"{ours}.{suffix}"] = rows_of_vocabulary(f"{ours}.{suffix}", part, c.padded_vocab)
            if suffix == "lora_A":
                alpha = next((a for p, a in (config.get("alpha_pattern") or {}).items()
                              if re.fullmatch(rf"(.*\.)?({p})", place)), adapter.alpha)
                unit = rank_unit(adapter, first or len(t))
                alphas[ours] = alpha / unit * rank_unit(adapter, len(t))
    if tune == "zeroinit":  # its first layers may be without: a gate of zero is the same
        for l in range(len(model.blocks)):
            tensors.setdefault(f"blocks.{l}.attn.adapter_gate", torch.zeros(1))
            tensors.setdefault(f"blocks.{l}.attn.adapter_prompt", torch.zeros(adapter.virtual_tokens, c.n_embd))
    embeddings = any(name in ("wte.weight", "head.weight") for name in tensors)
    return replace(adapter, train_embeddings=embeddings), tensors, alphas


def fingerprint(model):
    """A digest of 64 numbers of each weight, the same in float32 and bf16: is this the base that an adapter is for?"""
    sha = hashlib.sha256()
    for name, p in sorted((n, p) for n, p in model.named_parameters() if not n.startswith(NEW_HEADS)):
        at = torch.arange(min(64, p.numel()), device=p.device) * (p.numel() - 1) // 63
        picked = p.detach().flatten()[at]
        sha.update(name.encode() + str(tuple(p.shape)).encode())
        sha.update(picked.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return sha.hexdigest()


def save(out, model, run, base, weights=None):
    """
    The adapter alone: PEFT's two files, and run.json with the path of its base. weights: see to_peft. run as in
    model.save_run.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config, tensors = to_peft(model, weights)
    tensors = {name: t.float() for name, t in tensors.items()}
    save_safetensors(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    base = str(base) if not Path(base).exists() else str(Path(base).resolve())
    for name, content in (("adapter_config.json", {**config, "base_model_name_or_path": base}),
                          ("run.json", {"config": asdict(model.config), "base": base, "base_print": model.base_print,
                                        "adapter": asdict(model.adapter), **run})):
        with replace_file(out / name, "w") as f:
            json.dump(content, f, indent=1)


def load(path, device="cpu", dtype=torch.float32, base=None, quantized=True, train=False):
    """
    The model of an adapter's folder, ours or PEFT's: its base from where the folder says, or from `base`, frozen, and
    the adapter in float32. quantized False: on the base as it was before --quantize.
    """
    path = Path(path)
    run = read_json(path / "run.json") if (path / "run.json").exists() else {}
    where = base or run.get("base") or read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not where:
        raise BadInput(f"{path}/adapter_config.json names no base: give it to python lora.py import with --init")
    try:
        model = plain(where, device, dtype)
    except BadInput as error:
        raise BadInput(f"{path} is an adapter for {where}, which cannot be read: {error}") from None
    if run.get("base_print", fingerprint(model)) != fingerprint(model) and dtype != torch.float16:
        raise BadInput(f"{path} is an adapter for another base: {where} has changed since; train the adapter again, or "
                       f"put its base back")
    grow(model, run.get("config", {}).get("vocab_size", 0))
    if run.get("config", {}).get("n_class"):
        add_class_head(model, run["config"]["n_class"])
    if run.get("config", {}).get("scalar_head") and model.scalar_head is None:
        model.config.scalar_head, model.scalar_head = True, Linear(model.config.n_embd, 1, bias=False).to(model.device)
    adapter, tensors, alphas = from_peft(model, path)
    if "adapter" in run:
        adapter = Adapter(**run["adapter"])
    attach(model, adapter if quantized else replace(adapter, quantize="none"), tensors, alphas)
    params = dict(model.named_parameters())
    for name in () if train else model.initial:  # float32 is for training
        params[name].data, model.initial[name] = params[name].data.to(dtype), model.initial[name].to(dtype)
    return model.eval()


def plain(name_or_dir, device="cpu", dtype=torch.float32):
    """A model without an adapter: what an adapter's folder holds is put into the weights."""
    path = Path(name_or_dir)
    if (path / "adapter_config.json").exists():
        model = load(path, device, dtype, quantized=False)
        fold(model)
        return model
    return GPT.from_pretrained(name_or_dir, device, dtype)


def start(init, adapter, device="cpu", dtype=torch.float32, tokenizer=None, seed=0, n_class=0):
    """
    (a model to tune, the base that its adapter will name; None where all weights are tuned). An adapter's folder goes
    on where the method is the same; another method, or full tuning, finds it put into the weights. The vocabulary grows
    to the tokenizer's; n_class adds a classifier's head.
    """
    path, more = Path(init), tokenizer.n_vocab if tokenizer is not None else 0
    if adapter is None:
        model = plain(init, device)
        if any(packed(m) for m in model.modules() if isinstance(m, nn.Module) and hasattr(m, "in_features")):
            raise BadInput(f"--init {init} is quantized, and codes take no gradient: choose --lora_rank, or the run "
                           f"that it was made from")
        grow(model, more)
        if n_class:
            add_class_head(model, n_class)
        return model, None
    if (path / "adapter_config.json").exists():
        model = load(path, device, dtype, train=True)
        fits = more <= model.config.vocab_size and n_class in (0, model.config.n_class)  # else it goes into the weights
        if fits and model.adapter.tune == WRITTEN.get(adapter.tune, adapter.tune):
            return model, read_json(path / "adapter_config.json")["base_model_name_or_path"]
    model = plain(init, device, dtype)
    if more > model.config.vocab_size and not adapter.train_embeddings:
        raise BadInput(f"{more - model.config.vocab_size} new token(s) need rows of the embedding that can learn: add "
                       f"--train_embeddings")
    grow(model, more)
    if n_class:
        add_class_head(model, n_class)
    apply(model, adapter, tokenizer, seed)
    return model, init


def grow(model, vocab_size):
    """Room for new ids at the end of the vocabulary, each starting as the mean of the others (Hewitt 2021)."""
    c = model.config
    if vocab_size <= c.vocab_size:
        return
    if model.base_print is None:
        model.base_print = fingerprint(model)
    old, c.vocab_size = c.vocab_size, vocab_size
    for module in [model.wte] + [model.head] * (model.head is not None):
        weight = module.weight.data
        rows = max(c.padded_vocab, len(weight))
        new = torch.cat((weight[:old], weight[:old].mean(0, keepdim=True).expand(rows - old, -1)))
        module.weight = nn.Parameter(new.contiguous())
    model.wte.num_embeddings = len(model.wte.weight)
    if model.head is not None:
        model.head.out_features = len(model.head.weight)


def add_class_head(model, n):
    """A classifier's Linear C → n over the last hidden state, N(0, 0.02) and zero (Radford et al. 2018)."""
    model.config.n_class = n
    model.class_head = Linear(model.config.n_embd, n).to(model.device)
    nn.init.normal_(model.class_head.weight, std=0.02)
    nn.init.zeros_(model.class_head.bias)


def save_merged(out, model, run):
    """The whole model with its adapter in the weights; the adapter stays apart here."""
    merge(model)
    save_run(out, model, run, {name: t for name, t in model.state_dict().items() if not added(name)})
    unmerge(model)


def fold(model):
    """Merge for good: the model forgets that it had an adapter."""
    merge(model)
    for m in grafts(model):
        del m.base_weight, m.on
        m.__class__ = m.__class__.__bases__[1]
        for name in [n for n in m._parameters if n.startswith("lora_")]:
            delattr(m, name)
    model.adapter = model.base_print = None
    model.requires_grad_(True)


def quantize_base(model, method):
    """The blocks' matrices by quantize.py's method, in its own number of bits and groups; all else keeps its dtype."""
    from quantize import NEEDS, OWN, QuantLinear, quantize
    if method in NEEDS:
        raise BadInput(f"--quantize {method} needs texts to calibrate with: give --init a run that python quantize.py "
                       f"--method {method} made")
    for name, m in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(m, nn.Linear):
            parent, _, kind = name.rpartition(".")
            q = quantize(m.weight.detach(), method, *OWN.get(method, (4, 0)))
            setattr(model.get_submodule(parent), kind, QuantLinear(q, m.bias))


# -----------------------------------------------------------------------------


def count(args):
    """What each method trains: numbers, their share of the model, and bytes of AdamW's two moments and of its file."""
    given = from_args(args) or Adapter()
    config = preset(args.name) if args.name in PRESETS else GPT.from_pretrained(args.name or newest_run()).config
    for tune in METHODS if args.tune is None else [given.tune]:
        model = meta_model(config)
        try:
            apply(model, replace(given, tune=tune))
        except BadInput as error:
            print(f"{tune:10} {str(error).partition(':')[0]}")
            continue
        trained, total = trained_share(model)
        kept = sum(t.numel() for t in adapter_tensors(model).values())
        print(f"{tune:10} {trained:>14,} trained of {total:,}: {trained / total:.3%}; AdamW "
              f"{8 * trained / 1e6:.2f} MB, file {4 * kept / 1e6:.2f} MB")


def bases(name):
    """A model's folder or hub name, the base that it names where it is an adapter, and so on."""
    while name:
        yield name
        config = Path(name) / "adapter_config.json"
        name = read_json(config).get("base_model_name_or_path") if config.exists() else None


def merged(args):
    """An adapter's run as one plain model."""
    if not (Path(args.name) / "adapter_config.json").exists():
        raise BadInput(f"{args.name} holds no adapter_config.json: give the folder of an adapter")
    run = read_json(Path(args.name) / "run.json") if (Path(args.name) / "run.json").exists() else {}
    for needed in bases(args.name):
        check_out(args.out, needed)
    model, tokenizer = plain(args.name), Tokenizer.from_pretrained(args.name)
    kept = {k: v for k, v in run.items() if k not in ("config", "base", "base_print", "adapter")}
    kept = {"stage": "merge", "step": 0, "metrics": {}, "args": {}} | kept | {"tokenizer": tokenizer.spec()}
    start_run(args.out)
    save_run(args.out, model, kept)
    tokenizer.save(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, the adapter among them")


def imported(args):
    """A folder that PEFT wrote becomes a run: with --init as its base, if its own is not here."""
    base = args.init or read_json(Path(args.name) / "adapter_config.json").get("base_model_name_or_path")
    for needed in (args.name, *bases(base)):
        check_out(args.out, needed)
    model, tokenizer = load(args.name, base=base), Tokenizer.from_pretrained(base)
    run = {"stage": "import", "step": 0, "metrics": {}, "args": {}, "tokenizer": tokenizer.spec()}
    start_run(args.out)
    save(args.out, model, run, base)
    tokenizer.save(args.out)
    trained, total = trained_share(model)
    print(f"{args.out}: {model.adapter.tune}, {trained:,} numbers beside the {total - trained:,} of {base}")


def bench(args):
    """
    Bytes and speed of full tuning, LoRA and QLoRA of one preset, with random weights and tokens, beside the plan of
    model.py; AdamW, bf16 activations, masters in float32 where all is trained.
    """
    config = GPTConfig(**PRESETS[args.preset] | {"block_size": args.block_size})
    device = setup_process(args.device).device
    parser = argparse.ArgumentParser()
    add_memory_flags(parser)
    rates = {}
    for tune, quantized in (("train", "none"), ("lora", "none"), ("qlora", "nf4")):
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
        model.compute_dtype = torch.bfloat16
        if tune != "train":
            model.to(torch.bfloat16)
            apply(model, Adapter("lora", lora_rank=args.lora_rank, lora_targets=args.lora_targets, quantize=quantized))
        for name, table in position_tables(config).items():
            setattr(model, name, table.to(device))
        frozen, blocks = (sum(t.numel() * t.element_size() for t in itertools.chain(m.parameters(), m.buffers())
                              if not t.requires_grad) for m in (model, model.blocks))
        if device.type == "cuda" if args.compile is None else args.compile:
            model.compile_parts()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        x = torch.randint(config.vocab_size, (args.micro_batch, config.block_size + 1), device=device)
        model.train()
        for step in range(args.steps):
            if step == args.steps // 2:  # the first half compiles and warms up
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.time()
            model(x[:, :-1], x[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates[tune] = (args.steps - args.steps // 2) * x[:, 1:].numel() / (time.time() - start)
        flags = ["--mode", tune, "--micro_batch", str(args.micro_batch), "--block_size", str(args.block_size),
                 "--lora_rank", str(args.lora_rank), "--lora_targets", args.lora_targets]
        plan = max(moment_bytes(memory_plan(parser.parse_args(flags), config)).values())
        trained, total = trained_share(model)
        print(json.dumps({"tune": tune, "trained": trained, "of": total, "frozen_GB": round(frozen / 1e9, 3),
                          "frozen_blocks_GB": round(blocks / 1e9, 3), "peak_GB": round(peak_memory(device) / 1e9, 3),
                          "plan_GB": round(plan / 1e9, 3), "tokens_per_s": round(rates[tune]),
                          "of_full": round(rates[tune] / rates["train"], 3)}), flush=True)
        del model, optimizer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.compiler.reset()


def launch(script, runs, jobs):
    """{folder: metrics} of runs of a script, {folder: flags}, `jobs` at once; complete ones are not run again."""
    def complete(out):  # the last metric, which a run that was stopped has not
        path = Path(out) / "run.json"
        return path.exists() and "seconds" in read_json(path)["metrics"]
    waiting, running = [out for out in runs if not complete(out)], {}
    line = {out: [sys.executable, str(Path(__file__).with_name(script)), *map(str, flags), "--out", str(out)]
            for out, flags in runs.items()}
    while waiting or running:
        while waiting and len(running) < jobs:
            out = waiting.pop(0)
            running[out] = subprocess.Popen(line[out], stdout=subprocess.DEVNULL)
        for out, process in list(running.items()):
            if process.poll() is not None:
                if running.pop(out).returncode:
                    for other in running.values():
                        other.terminate()
                    raise BadInput(f"the run {out} failed: start it alone to see why ({' '.join(line[out][1:])})")
                print(f"{out} is done", file=sys.stderr, flush=True)
        time.sleep(0.2)
    return {out: read_json(Path(out) / "run.json")["metrics"] for out in runs}


def mean_sd(values, form=".1%"):
    sd = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{sd}"


def table(args):
    """
    Each method learns --data from --init by sft.py: seed 0 at every one of --lrs, --seeds of them at the best by right
    answers. Prints what it trains, speed, and right answers.
    """
    root, shared = Path(args.out), ["--init", args.init, "--data", args.data, "--steps", args.steps, "--mix", "none",
                                    "--eval_answers", args.answers, "--device", args.device, "--eval_every", 0]
    rows = {"full": ["--tune", "full"]} | {tune: ["--tune", tune] for tune in METHODS}
    rows |= {f"{tune}, all": ["--tune", tune, "--lora_targets", "all"] for tune in ("lora", "dora")}
    rows["qlora, all"] = [*rows["lora, all"], "--quantize", "nf4"]
    model = meta_model(preset(args.init) if args.init in PRESETS else GPT.from_pretrained(args.init).config)
    for tune in list(METHODS):
        try:
            apply(copy.deepcopy(model), Adapter(tune))
        except BadInput as error:
            print(f"{tune} is left out: {str(error).partition(':')[0]}", file=sys.stderr)
            del rows[tune]
    folder = lambda name, lr, seed: str(root / f"{name.replace(', ', '-')}-{lr}-{seed}")
    flags = lambda name, lr, seed: [*shared, *rows[name], "--lr", lr, "--seed", seed]
    tried = launch("sft.py", {folder(name, lr, 0): flags(name, lr, 0) for name in rows for lr in args.lrs.split(",")},
                   args.jobs)
    best = {name: max(args.lrs.split(","), key=lambda lr: tried[folder(name, lr, 0)]["accuracy"]) for name in rows}
    found = launch("sft.py", {folder(name, best[name], seed): flags(name, best[name], seed) for name in rows
                              for seed in range(args.seeds)}, args.jobs)
    print("| method | trained | rate | tokens/s | peak memory | right |\n|---|---|---|---|---|---|")
    for name in rows:
        seeds = [found[folder(name, best[name], seed)] for seed in range(args.seeds)]
        speed, memory = (statistics.median(m[key] for m in seeds) for key in ("tokens_per_s", "peak_memory"))
        print(f"| {name} | {int(seeds[0]['trained']):,} | {best[name]} | {speed:,.0f} | {memory / 2 ** 20:,.0f} MiB | "
              f"{mean_sd([m['accuracy'] for m in seeds])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("count", help=count.__doc__)
    sub.add_argument("name", nargs="?", help="a preset, a run or a Hugging Face model (default: the newest run)")
    add_flags(sub)
    sub.set_defaults(run=count)
    for name, run in (("merge", merged), ("import", imported)):
        sub = commands.add_parser(name, help=run.__doc__)
        sub.add_argument("name", help="folder of an adapter")
        sub.add_argument("--out", required=True)
        if name == "import":
            sub.add_argument("--init", help="its base (default: as its config says)")
        sub.set_defaults(run=run)
    sub = commands.add_parser("bench", help=bench.__doc__)
    sub.add_argument("--preset", default="gpt2-xl", choices=sorted(PRESETS))
    sub.add_argument("--block_size", type=int, default=2048)
    sub.add_argument("--micro_batch", type=int, default=4)
    sub.add_argument("--steps", type=int, default=20)
    sub.add_argument("--lora_rank", type=int, default=8)
    sub.add_argument("--lora_targets", default="q,v")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--compile", default=None, action=argparse.BooleanOptionalAction)
    sub.set_defaults(run=bench)
    sub = commands.add_parser("table", help=table.__doc__)
    sub.add_argument("--init", default="out/sft")
    sub.add_argument("--data", default="addition", help="as sft.py's")
    sub.add_argument("--out", default="out/methods", help="folder of the runs; complete ones there are kept")
    sub.add_argument("--lrs", default="1e-3,3e-3,1e-2,3e-2", help="rates that seed 0 tries")
    sub.add_argument("--steps", type=int, default=600)
    sub.add_argument("--answers", type=int, default=300, help="held-out questions")
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--jobs", type=int, default=1, help="runs at once")
    sub.add_argument("--device", default="auto")
    sub.set_defaults(run=table)
    args = parser.parse_args()
    if args.command is None:
        args = parser.parse_args(["count"])
    args.run(args)


if __name__ == "__main__":
    from lora import main
    cli(main)
