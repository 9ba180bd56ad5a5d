"""
Pretraining: next-token prediction on packed windows of T tokens,

    L = -1/(B T) Σ_b Σ_t log p(x_{b,t+1} | x_{b,≤t}),

with Muon (Jordan et al. 2024), AdamW (Loshchilov & Hutter 2019) or another of OPTIMIZERS, one process or many.

    python train.py                                          # the default world: three minutes on a laptop
    python train.py --data shakespeare --tokenizer char --out out/shakespeare
    torchrun --nproc_per_node 8 train.py --preset gpt2 --data text --input books/ --tokenizer gpt2 \\
        --batch_tokens 524288 --lr 0.01
    torchrun --nproc_per_node 8 train.py --preset gpt2-xl --parallel fsdp --tp 2 --recompute selective   # and so on
    torchrun --nproc_per_node 8 train.py --bench 10 --preset gpt2 …      # the speed of all that alone, on random ids
"""
import argparse
import inspect
import json
import math
import os
import re
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import moe
from bpe import BadInput, cli, replace_file
from model import (GPT, GPTConfig, PARALLEL, PRESETS, AdamW8bit, adamw_groups, all_reduce, check_layout, check_out,
                   count_parameters, flops_per_token, init_roughly, init_weights, load_run, load_safetensors,
                   meta_model, peak_flops, peak_memory, save_run, setup_process, shard, start_run, uniform, use_float8)
from quantize import use_qat

# -----------------------------------------------------------------------------
# Optimizers: Muon and Adafactor; AdamW in 8 bits is model.py's, AdamW and SGD are torch's


# Odd quintics a x + b x³ + c x⁵, each the closest to 1 on the interval that the one before left, from [0.01, 1]
# to [0.975, 1.025] (Polar Express, Amsel et al. 2025). Each interval is taken 5 % too wide at the top: there the
# quintics shoot up, and in bf16 a nearly rank-one gradient reaches it by rounding alone; without the margin
# updates of norm 10^7 end the training.
POLAR = [(7.7262, -20.4694, 13.7165), (3.5156, -2.3944, 0.4274), (2.6572, -1.8205, 0.3744), (1.9436, -1.2618, 0.3311)]


def orthogonalize(G):
    """
    The nearest semi-orthogonal matrices U Vᵀ of G = U S Vᵀ (n, r, c), any scale. G is divided by its Frobenius
    norm; then each step is X ← (a + b A + c A²) X with A = X Xᵀ, which maps every singular value by one quintic.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # A is the smaller of the two squares
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if X.shape[-1] >= 2 * X.shape[-2] and not X.is_cuda:
        X = polar_factor(X @ X.mT) @ X
    else:
        for a, b, c in POLAR:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def polar_factor(A):
    """The product P of all steps' polynomials of A = X Xᵀ (n, m, m): P X is orthogonal. Cheaper when X is wide."""
    P = None
    for a, b, c in POLAR:
        Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q.diagonal(dim1=-2, dim2=-1).add_(a)
        P = Q if P is None else Q @ P
        A = Q @ A @ Q
    return P


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalized: m ← μ m + g,  W ← W - lr (λ W + s · orthogonalize(g + μ m)) for matrices W (r, c),
    s = sqrt(max(1, r/c)), so that an update changes every layer's output by about lr whatever its shape.
    Matrices of one shape go through Newton-Schulz together.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (r, c), params in shapes.items():
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(momenta, mu)
                torch._foreach_add_(momenta, grads)
                updates = orthogonalize(torch.stack(grads) + mu * torch.stack(momenta))
                if decay:
                    torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_sub_(params, (updates * (max(1, r / c) ** 0.5 * lr)).unbind())


class Adafactor(torch.optim.Optimizer):
    """
    AdamW's second moment of a matrix (r, c) kept as its rows' means R (r,) and columns' means C (c,) (Shazeer &
    Stern 2018, algorithm 4), so r + c numbers a matrix; no first moment:
        R ← β R + (1 - β) mean_c(g² + ε),   V = R Cᵀ / mean(R),   u = g / sqrt(V),   β = 1 - t^-0.8
        W ← W - lr (λ W + u / max(1, rms(u) / d))
    with the given rate, neither relative to the step nor to the weights. Vectors keep their whole V.
    """

    def __init__(self, params, lr=0.01, decay=0.8, clip=1.0, eps=1e-30, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, decay=decay, clip=clip, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state, axes = p.grad.float(), self.state[p], (-1, -2) if p.dim() > 1 else (None,)
                square = g.square() + group["eps"]
                means = [square if axis is None else square.mean(axis, keepdim=True) for axis in axes]
                if not state:
                    state["t"] = torch.zeros((), device=p.device)
                    state.update((f"v{i}", torch.zeros_like(m)) for i, m in enumerate(means))
                state["t"] += 1
                v = [state[f"v{i}"] for i in range(len(means))]
                for old, new in zip(v, means):
                    old.lerp_(new, state["t"] ** -group["decay"])
                u = g * v[0].rsqrt() if len(v) == 1 else g * (v[0] / v[0].mean(-2, keepdim=True)).rsqrt() * v[1].rsqrt()
                u = u / (u.square().mean().sqrt() / group["clip"]).clamp(min=1)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(u * group["lr"])


# name: (parameter groups, arguments, peak rate, is the step recorded) -> optimizer
OPTIMIZERS = {
    "muon": lambda groups, args, lr, recorded: Muon(groups, lr=lr, momentum=args.momentum),
    "adamw": lambda groups, args, lr, recorded: torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, args.beta2), eps=1e-8, capturable=recorded,
        fused=groups[0]["params"][0].device.type in ("cuda", "cpu")),
    "adam8bit": lambda groups, args, lr, recorded: AdamW8bit(groups, lr=lr, betas=(0.9, args.beta2)),
    "adafactor": lambda groups, args, lr, recorded: Adafactor(groups, lr=lr),
    "sgd": lambda groups, args, lr, recorded: torch.optim.SGD(
        groups, lr=lr, momentum=args.momentum, nesterov=args.nesterov and args.momentum > 0,
        fused=groups[0]["params"][0].device.type in ("cuda", "cpu")),
}


def make_optimizers(model, args, device, capturable=False):
    """
    One of OPTIMIZERS for everything; or Muon for the blocks' matrices and AdamW, at its own rate, for embeddings,
    head and vectors. Every trainable parameter is in exactly one group.
    """
    muon = args.optimizer == "muon"
    matrices = {n: p for n, p in model.blocks.named_parameters() if p.dim() == 2} if muon else {}
    taken = {id(p) for p in matrices.values()}
    groups = [{**g, "params": [p for p in g["params"] if id(p) not in taken]}
              for g in adamw_groups(model, 0.0 if muon else args.weight_decay)]

    def rate(lr):  # a recorded step reads its rate from the device
        return torch.tensor(lr, device=device) if capturable else lr
    optimizers = [OPTIMIZERS["adamw" if muon else args.optimizer]([g for g in groups if g["params"]], args,
                                                                  rate(args.adam_lr if muon else args.lr), capturable)]
    if matrices:
        role = {n: "expert" if moe.is_expert(n) else "router" if ".router." in n else "" for n in matrices}
        groups = [{"params": [p for n, p in matrices.items() if role[n] == which], "lr": rate(args.lr * factor),
                   "weight_decay": args.weight_decay}
                  for which, factor in (("", 1), ("expert", args.expert_lr), ("router", args.router_lr))]
        optimizers.append(OPTIMIZERS["muon"]([g for g in groups if g["params"]], args, rate(args.lr), capturable))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = float(group["lr"])
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "a parameter is missing or held twice"
    return optimizers


def sees_whole(optimizer, name, shape):
    """Must this optimizer see a parameter whole? AdamW and SGD look at an entry at a time, Muon at a block's matrix."""
    if optimizer == "muon":
        return name.startswith("blocks.") and len(shape) == 2
    return optimizer in ("adafactor", "adam8bit")


# -----------------------------------------------------------------------------
# Schedules of the learning rate and of the batch size

# name: (fall from 1 to 0 over progress t in [0, 1) after the warm-up, share of the peak that it falls to by default)
SCHEDULES = {
    "constant": (lambda t: 1.0, 0.0),
    "linear": (lambda t: 1 - t, 0.0),
    "cosine": (lambda t: 0.5 * (1 + math.cos(math.pi * t)), 0.1),  # down to a tenth, as GPT-3 and LLaMA
    "wsd": (lambda t: min(1.0, (1 - t) / 0.4), 0.0),  # warm up, stay, decay over the last 40 %
}


def lr_share(step, steps, warmup, schedule, min_lr=None):
    """Linear warm-up that is above zero at step 0, then the schedule down to min_lr (None: its own)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    fall, floor = SCHEDULES[schedule]
    floor = floor if min_lr is None else min_lr
    return floor + (1 - floor) * fall((step - warmup) / max(1, steps - warmup))


def batch_level(step, levels, length):
    """The batch of a step in units of the first one: 1 for `length` steps, then 2, …, up to levels."""
    return min(levels, 1 + step // length)


def levels_before(step, levels, length):
    """Σ batch_level(s) over s < step, so that where a step's rows begin needs no memory."""
    ramp = min(step, (levels - 1) * length)
    full, rest = divmod(ramp, length)
    return length * full * (full + 1) // 2 + rest * (full + 1) + levels * (step - ramp)


def parse_ramp(args):
    """--batch_ramp START:STEPS -> (tokens of the first batch, levels up to --batch_tokens, steps of a level)."""
    if not args.batch_ramp:
        return args.batch_tokens, 1, 1
    try:
        start, steps = map(int, args.batch_ramp.split(":"))
    except ValueError:
        start = steps = 0
    if start < 1 or args.batch_tokens % start:
        raise BadInput(f"--batch_ramp {args.batch_ramp} is not START:STEPS with a START of tokens that divides "
                       f"--batch_tokens {args.batch_tokens}")
    levels = args.batch_tokens // start
    if steps < levels - 1:
        raise BadInput(f"--batch_ramp {args.batch_ramp} has {levels - 1} batches to grow through: give as many STEPS, "
                       f"or a larger START")
    return start, levels, max(1, math.ceil(steps / max(1, levels - 1)))


# -----------------------------------------------------------------------------
# Loss spikes


def find_spike(history, loss, norm, z_limit, norm_limit, window):
    """
    What is wrong with a step's loss and gradient norm, in words, or "". history: [loss, norm] of earlier steps that
    were applied. Not finite, a norm above norm_limit, or, once `window` steps are there, either more than z_limit
    standard deviations above the window's mean (llm.c); a limit of 0 is none.
    """
    if not math.isfinite(loss) or not math.isfinite(norm):
        return "not finite"
    if norm_limit and norm > norm_limit:
        return f"a norm above {norm_limit:g}"
    if z_limit and len(history) >= window:
        for name, value, past in zip(("loss", "norm"), (loss, norm), zip(*history[-window:])):
            mean = sum(past) / window
            deviation = math.sqrt(sum((x - mean) ** 2 for x in past) / window)
            if value - mean > z_limit * max(deviation, 1e-12):
                return f"a {name} {(value - mean) / max(deviation, 1e-12):.1f} deviations above its mean"
    return ""


# -----------------------------------------------------------------------------
# Prefix-LM: a row's first tokens see each other and are not predicted (Raffel et al. 2020, 3.2)


def prefix_lengths(seed, rows, T):
    """Uniform in 0 … T - 1, a pure function of the seed and the row's number; rows (B,) int64 -> (B,)."""
    return (uniform(torch.full_like(rows, seed), rows) * T).long()


def mask_prefix(targets, prefix):
    """-100 for the targets (B, T) that lie inside the prefix (B,): position t predicts token t + 1."""
    inside = torch.arange(1, targets.shape[1] + 1, device=targets.device) < prefix[:, None]
    return targets.masked_fill(inside, -100)


# -----------------------------------------------------------------------------
# Validation and precision


@torch.no_grad()
def validate(model, sources, T, max_tokens, rows, process, token_bytes):
    """
    Nats per token and bits per byte over the first tokens of each validation file, max_tokens shared by the
    mixture's weights: Σ loss / Σ tokens over all ranks, and Σ loss / (ln 2 · Σ bytes of the predicted tokens).
    A prefix-LM is not asked for the tokens of its prefixes, which are the same for every run.
    """
    model.eval()
    losses, sums = {}, torch.zeros(3, dtype=torch.float64)
    for name, (weight, ids) in sources.items():
        part = torch.zeros(3, dtype=torch.float64)
        limit = max(1, round(max_tokens * weight)) if max_tokens else 0
        for i, (x, y) in enumerate(data.eval_batches(ids, T, limit, rows, process.dp_rank, process.dp_world)):
            x, y, prefix = torch.from_numpy(x).to(process.device), torch.from_numpy(y), None
            if model.config.prefix_lm:
                numbers = process.dp_rank + process.dp_world * torch.arange(i * rows, (i + 1) * rows)
                y, prefix = mask_prefix(y, prefix_lengths(0, numbers, T)), prefix_lengths(0, numbers, T).to(x.device)
            loss = model(x, y.to(process.device), prefix=prefix, reduction="sum")[1]
            y = y[y != -100]
            part += torch.tensor([loss.item(), len(y), token_bytes[y].sum().item()], dtype=torch.float64)
        if process.world > 1:
            part = all_reduce(part.to(process.device)).cpu()
        losses[f"val_loss_{name}"] = round((part[0] / part[1]).item(), 5)
        sums += part
    model.train()
    metrics = {"val_loss": (sums[0] / sums[1]).item(), "val_bpb": (sums[0] / sums[2] / math.log(2)).item()}
    return metrics | (losses if len(losses) > 1 else {})


def choose_dtype(name, device, rows, width):
    """float32, bfloat16 or float16; "auto" takes bf16 on GPUs that have it, and on a CPU where it is faster."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu" or not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):  # an MLP forward and backward, weights cast as in training
        w = torch.randn(4 * width, width, requires_grad=True)
        for i in range(4):
            start = time.perf_counter() if i else 0
            x = torch.randn(rows, width, dtype=dtype)
            ((x @ w.to(dtype).T).relu().square() @ w.to(dtype)).sum().backward()
        seconds[dtype] = time.perf_counter() - start
    slower = all_reduce(torch.tensor(seconds[torch.float32] - seconds[torch.bfloat16]))  # one choice for all ranks
    return torch.bfloat16 if slower > 0 else torch.float32


def calibrate(device, dtype):
    """(FLOP/s of a large matrix product in dtype, bytes/s read and written by a copy): what this very device gives."""
    def seconds(f):
        best = math.inf
        for _ in range(5):
            torch.get_device_module(device).synchronize()
            start = time.perf_counter()
            f()
            torch.get_device_module(device).synchronize()
            best = min(best, time.perf_counter() - start)
        return best
    n, size = (8192, 2 ** 30) if device.type == "cuda" else (1024, 2 ** 26)
    a = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * n ** 3 / seconds(lambda: a @ a), 2 * size / seconds(lambda: target.copy_(source))


# -----------------------------------------------------------------------------
# One optimizer step


def shrink_embedding_gradient(model, alpha):
    """wte · α + detach(wte) · (1 - α) (GLM-130B, Zeng et al. 2022, 3.3): the look-up stays, its gradient is times α."""
    def hook(module, ids, rows):
        if rows.requires_grad:
            rows.register_hook(lambda grad: grad * alpha)
    model.wte.register_forward_hook(hook)


ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Trainer:
    """
    What a step changes: model, optimizers, scaler, average. micro_step adds a micro-batch's gradient and loss, clip
    measures the sum, apply or drop ends the step. With graphs they are recorded as CUDA graphs and replayed, because
    a small model's kernels take longer to launch than to run; then gradients and rates live in fixed tensors.
    """

    def __init__(self, model, args, process, dtype, accumulate, graphs):
        self.model, self.grad_clip, self.accumulate = model, args.grad_clip or math.inf, accumulate
        self.sharded = shard(model, process, args, whole=lambda name, shape: sees_whole(args.optimizer, name, shape))
        self.optimizers = make_optimizers(self.sharded.stand_in, args, process.device, capturable=graphs)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
        self.waiting = []  # micro-batches for a pipeline
        self.loss, self.norm = (torch.zeros((), device=process.device) for _ in range(2))
        self.parts = torch.full((), float(accumulate), device=process.device)  # what a micro-batch's loss is divided by
        self.ema_decay = args.ema  # e ← decay · e + (1 - decay) · w after each step, float32, from the first weights
        self.ema = {name: t.float().clone() for name, t in self.sharded.parts.items()} if args.ema else {}
        self.graphs, self.batch = [] if graphs else None, None
        params = dict(model.named_parameters())  # and what is saved beside them: biases that balance experts
        saved = model.state_dict().keys() - params.keys()
        self.buffers = {name: b for name, b in model.named_buffers() if name in saved}

    def micro_step(self, x, y, last=True, prefix=None):
        """Add the gradient and the loss of x, y (B, T) to the step's; ranks talk only at its last micro-batch."""
        if self.graphs is not None:
            if not self.graphs:
                self.record(x, y)
            for static, new in zip(self.batch, (x, y)):
                static.copy_(new, non_blocking=True)
            self.graphs[0].replay()
        else:
            self._micro_step(x, y, last, prefix)

    def clip(self):
        """Scale the gradient to at most grad_clip; norm is its length before."""
        self._clip() if self.graphs is None else self.graphs[1].replay()

    def apply(self):
        self._apply() if self.graphs is None else self.graphs[2].replay()

    def update(self):
        self.clip()
        self.apply()

    def drop(self):
        """End the step without using its gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.graphs is None)
        if not self.sharded.plain:
            self.model.zero_grad()
        self.scaler.update()
        for layer in moe.layers(self.model):
            layer.load.zero_()

    def _micro_step(self, x, y, last=True, prefix=None):
        if self.sharded.pipeline is not None:  # it takes them all at once
            self.waiting.append((x, y))
            if last:
                x, y = (torch.cat(z) for z in zip(*self.waiting))
                self.loss += self.sharded.pipeline.step(x, y, len(self.waiting)) * self.sharded.process.pp
                self.waiting = []
            return
        # cuDNN's attention is the fastest that torch has on Hopper: 4 % of GPT-2 124M's step
        fast = x.is_cuda and not self.model.config.dropout
        with sdpa_kernel(ATTENTION, set_priority=True) if fast else nullcontext():
            # rows of a prefix-LM have different numbers of targets: parts is then the step's, a process
            reduction = "mean" if prefix is None else "sum"
            loss = self.sharded(x, y, reduction, last, prefix)[1] / self.parts
            self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def _clip(self):
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.norm.copy_(self.sharded.reduce(self.grad_clip))

    def _apply(self):
        finite = not self.scaler.is_enabled() or math.isfinite(self.norm.item())  # the scaler asks each by itself
        for optimizer in self.optimizers:
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=self.graphs is None)
        self.sharded.publish()
        self.scaler.update()
        if self.model.config.n_expert:
            moe.balance(self.model)
        if self.ema:
            weights = [t.float() for t in self.sharded.parts.values()]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.ema_decay)

    def record(self, x, y):
        tensors = lambda: [*self.model.parameters(), *self.buffers.values(), *self.ema.values(),
                           *(t for o in self.optimizers for s in o.state.values() for t in s.values())]
        before = {id(t): t.detach().clone() for t in tensors()}
        self.batch = x.clone(), y.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and optimizer state come first, outside the graphs
                self._micro_step(*self.batch)
                self._clip()
                self._apply()
        torch.cuda.current_stream().wait_stream(side)
        for body in (lambda: self._micro_step(*self.batch), self._clip, self._apply):
            self.graphs.append(torch.cuda.CUDAGraph())
            # the thread that loads batches may pin memory meanwhile
            with torch.cuda.graph(self.graphs[-1], capture_error_mode="thread_local"):
                body()
        with torch.no_grad():  # as if nothing had run
            for t in tensors():
                t.copy_(before[id(t)]) if id(t) in before else t.zero_()
        self.loss.zero_()

    @contextmanager
    def averaged(self):
        """The model with its averaged weights, where there are some."""
        params = self.sharded.parts if self.ema else {}
        kept = {name: t.clone() for name, t in params.items()}
        try:
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(self.ema[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(kept[name])

    def set_lr(self, share):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lr = group["peak_lr"] * share
                group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else group.update(lr=lr)

    def whole_ema(self):
        """name -> averaged weight; where a process has parts, on rank 0 alone."""
        if self.sharded.plain or not self.ema:
            return self.ema
        return {name: t for (_, name, _), t in self.sharded.gather(
            {("model", name, ""): t for name, t in self.ema.items()}).items()}

    def state_dict(self, sharded=False):
        """Whole tensors on rank 0, or the parts of every rank; see model.Sharded. Averages are whole either way."""
        rest = {"scaler": self.scaler.state_dict(), "ema": self.whole_ema(),
                "buffers": {n: b.cpu() for n, b in self.buffers.items()}}
        return self.sharded.state_dict(self.optimizers, sharded) | rest

    def load_state_dict(self, state):
        self.sharded.load_state_dict(state, self.optimizers)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, b in self.buffers.items():
            b.copy_(state["buffers"][name])
        with torch.no_grad():
            for name, t in self.ema.items():
                saved = state["ema"].get(name)
                t.copy_(self.sharded.parts[name] if saved is None else saved[self.sharded.piece(name)])
        if self.graphs is not None:
            self.graphs = []  # they wrote to the optimizers' old tensors


# -----------------------------------------------------------------------------


# what describes the model is a flag; the vocabulary is the tokenizer's, and further heads are for later stages
MODEL_FLAGS = [f for f in fields(GPTConfig) if f.name not in ("vocab_size", "scalar_head", "n_class")]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flag = dict(action=argparse.BooleanOptionalAction)
    # run
    add("--out", default="out/base", help="run directory; a finished run already there is kept as OUT.old")
    add("--resume", action="store_true", help="go on from OUT/optim.pt, with its arguments unless given again")
    add("--seed", type=int, default=0, help="of weights, data order and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of activations")
    add("--compile", default=None, **flag, help="torch.compile the block and the loss (default: on CUDA)")
    add("--compile_whole", action="store_true", help="compile all blocks as one: 20 s and more, for a step 2 %% faster")
    add("--fp8", action="store_true",
        help="the blocks' products in 8 bits, not the experts', from models of 1B on (Hopper and later)")
    add("--graphs", default=None, **flag, help="record a step as CUDA graphs (default: one GPU, < 50M parameters)")
    # data
    add("--data", default="bios:0.6,arithmetic:0.4", help=f"weighted mixture of {', '.join(data.CORPORA)}")
    add("--input", help="a local file or folder instead of the corpus's download; fineweb: or a number of shards")
    add("--tokenizer", help="char, a tiktoken name, a file or a folder (default: train a BPE on the data)")
    add("--vocab_size", type=int, default=1024, help="of a tokenizer trained here, beside its special tokens")
    add("--prefetch", type=int, default=2, help="micro-batches that a thread makes ahead; 0: no thread")
    # model
    add("--preset", default="nano", choices=sorted(PRESETS), help="architecture; the flags below change it")
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(GPTConfig), re.M))
    for f in MODEL_FLAGS:
        kind = flag if f.type in (bool, bool | None) else dict(type=f.type)
        add(f"--{f.name}", default=None, **kind, help=f"{comments.get(f.name, '')} (default: the preset's; nano "
            f"{f.default})".strip().replace("%", "%%"))
    add("--init_scale", type=float, default=1.0, help="factor on every initial standard deviation")
    add("--quantize", help="train with the blocks' weights rounded: qat4 or qat4:GROUP; none: no more (quantize.py)")
    # optimization
    add("--steps", type=int, default=800)
    add("--batch_tokens", type=int, default=2048, help="tokens per optimizer step over all processes")
    add("--micro_batch", type=int, default=0, help="rows per forward pass and process (0: as fits)")
    add("--batch_ramp", help="START:STEPS: batches grow from START tokens to --batch_tokens in about so many steps")
    add("--optimizer", default="muon", choices=sorted(OPTIMIZERS))
    add("--lr", type=float, default=0.02, help="peak, of Muon's matrices or of everything")
    add("--adam_lr", type=float, default=0.01, help="peak, of embeddings, head and vectors beside Muon")
    add("--expert_lr", type=float, default=1.0, help="factor on --lr for the experts' matrices under Muon")
    add("--router_lr", type=float, default=1.0, help="and for the routers'")
    add("--schedule", default="linear", choices=sorted(SCHEDULES))
    add("--min_lr", type=float, help="share of the peak that the schedule ends at (default: cosine 0.1, others 0)")
    add("--warmup", type=int, default=20, help="steps")
    add("--weight_decay", type=float, default=0.0, help="of matrices")
    add("--momentum", type=float, default=0.95, help="of Muon and SGD")
    add("--nesterov", default=True, **flag, help="SGD looks a step ahead, as Muon always does")
    add("--beta2", type=float, default=0.95, help="of AdamW")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    add("--z_loss", type=float, default=0.0, help="adds so much times log²Z to the training loss (PaLM: 1e-4)")
    add("--embed_grad_scale", type=float, default=1.0, help="factor on the token embedding's gradient (GLM-130B: 0.1)")
    add("--ema", type=float, default=0.0, help="decay of an average of the weights, the one that is saved; 0: none")
    add("--spike", default="none", choices=["none", "skip", "rewind"],
        help="at a loss spike leave the update out, or go back to the last save and leave out the rows read since; "
             "either looks at every step's loss, which costs a GPU a wait. none: stop where it is not finite")
    add("--spike_z", type=float, default=6.0, help="a spike: loss or gradient norm so many deviations above the mean")
    add("--spike_window", type=int, default=128, help="of so many steps; before that only --spike_norm counts")
    add("--spike_norm", type=float, default=0.0, help="or a gradient norm above this; 0: none")
    # processes
    add("--parallel", default="ddp", choices=list(PARALLEL), help="; ".join(f"{k}: {v}" for k, v in PARALLEL.items()))
    add("--hsdp_shard", type=int, default=0, help="processes of an hsdp group (0: one machine's)")
    add("--tp", type=int, default=1, help="tensor parallelism: processes that share each matrix")
    add("--pp", type=int, default=1, help="pipeline parallelism: stages of layers")
    add("--pp_schedule", default="1f1b", choices=["gpipe", "1f1b"])
    add("--cp", type=int, default=1, help="context parallelism: processes that share each sequence")
    add("--ep", type=int, default=1, help="expert parallelism: processes that share each layer's experts, see moe.py")
    add("--recompute", default="none", choices=["none", "block", "selective"],
        help="in the backward pass, for memory: whole blocks, or all but matrix products and attention")
    add("--offload", default=False, **flag, help="optimizer state and the weights it steps in main memory")
    add("--ckpt", default="full", choices=["full", "sharded"], help="optim.pt whole, or one file a process")
    add("--timeout", type=float, default=120, help="seconds after which a process that waits for another gives up")
    # looking
    add("--eval_every", type=int, default=250, help="steps; 0: only at the end")
    add("--eval_tokens", type=int, default=65536, help="validation tokens; 0: all")
    add("--save_every", type=int, default=250, help="steps; 0: only at the end")
    add("--keep", default="last", choices=["last", "best", "all"],
        help="whose weights model.safetensors holds; all: the last, and each save in OUT/step-000250 as well")
    add("--log_every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    add("--bench", type=int, default=0, metavar="STEPS",
        help="time so many steps on random ids, and end: no data, no saving, weights of no use")
    add("--calibrate", action="store_true", help="measure this device's own ceiling first and print MFU against it too")
    args = parser.parse_args(argv)
    if args.resume:  # saved arguments become the defaults, so what is given again wins
        parser.set_defaults(**{**load_optim(args.out)["args"], "resume": True})
        args = parser.parse_args(argv)
    return args


def load_optim(out):
    """What --resume needs; tensors are mapped from the file, so that each process reads only its own part."""
    path = Path(out) / "optim.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for file in state.get("files", []):
            part = torch.load(path.with_name(file), map_location="cpu", weights_only=True, mmap=True)
            for name, pieces in part["model"].items():
                state["model"].setdefault(name, []).extend(pieces)
            for mine, theirs in zip(state["optimizers"], part["optimizers"]):
                for i, values in theirs["state"].items():
                    for key, pieces in values.items():
                        mine["state"].setdefault(i, {}).setdefault(key, []).extend(pieces)
        return state
    except FileNotFoundError:
        raise BadInput(f"--resume: there is no {path}; start without --resume, or give the run's --out") from None
    except Exception as error:  # pickle, zip and torch each have their own
        raise BadInput(f"{path} is damaged ({type(error).__name__}): start again without --resume") from None


def make_config(args, n_vocab):
    given = {f.name: getattr(args, f.name) for f in MODEL_FLAGS if getattr(args, f.name) is not None}
    return GPTConfig(**{**PRESETS[args.preset], **given, "vocab_size": n_vocab})


def split_batch(args, T, process):
    """
    (rows of the first step over all processes, rows of a micro-batch, micro-batches); BadInput names a size that works.
    """
    tokens, flag = parse_ramp(args)[0], "--batch_ramp" if args.batch_ramp else "--batch_tokens"
    rows, rest = divmod(tokens, T * process.dp_world)
    if rest or not rows:
        step = T * process.dp_world
        raise BadInput(f"{flag} {tokens} is not a multiple of block_size {T} x {process.dp_world} "
                       f"process(es): use {max(1, rows) * step} or {(rows + 1) * step}")
    limit = 65536 if process.device.type == "cuda" else 16384  # tokens that one forward pass may hold
    most = max(1, min(rows, limit * process.cp // T, rows // (4 * process.pp) if process.pp > 1 else rows))
    micro = args.micro_batch or next(m for m in range(most, 0, -1) if rows % m == 0)
    if micro < 1 or rows % micro:
        fits = [m for m in range(1, rows + 1) if rows % m == 0]
        raise BadInput(f"--micro_batch {micro} does not divide the {rows} rows of a process: use one of {fits}")
    return rows * process.dp_world, micro, rows // micro


def save_optim(out, trainer, process, sharded, **rest):
    """
    OUT/optim.pt, replaced at once. Returns the whole weights on rank 0. sharded: each process writes its parts beside
    it, and then optim.pt names their files, so that it never names one that is not whole.
    """
    path = Path(out) / "optim.pt"
    if not sharded:
        state = trainer.state_dict()
        if process.rank == 0:
            with replace_file(path) as f:
                torch.save({**state, **rest}, f)
    else:
        state = trainer.state_dict(sharded=True)
        names = [f"optim-{rest['step']}-{r}-of-{process.world}.pt" for r in range(process.world)]
        with replace_file(path.with_name(names[process.rank])) as f:
            torch.save({name: state[name] for name in ("model", "optimizers")}, f)
        process.wait()
        if process.rank == 0:
            groups = [{"state": {}, "param_groups": o["param_groups"]} for o in state["optimizers"]]
            with replace_file(path) as f:
                torch.save({"model": {}, "optimizers": groups, "scaler": state["scaler"], "ema": state["ema"],
                            "buffers": state["buffers"], "files": names, **rest}, f)
        state = {"model": {key[1]: t for key, t in trainer.sharded.gather(trainer.sharded.held()).items()}}
    if process.rank == 0:
        for old in path.parent.glob("optim-*-of-*.pt"):
            if not sharded or old.name not in names:
                old.unlink()
    return state.get("model", {}) | {name: b.cpu() for name, b in trainer.buffers.items()}


def report(model, tokenizer, folders, say):
    """Ask the model what its corpora can check, show a few samples, and return the metrics."""
    metrics = {}
    for name, (_, folder) in folders.items():
        for metric, rows in json.loads((folder / "checks.json").read_text()).items():
            rows = [row for row in rows if len(tokenizer.encode(row["prompt"])) < model.config.block_size]
            if not rows:
                say(f"{metric}: no question about {name} fits into the context")
                continue
            metrics[metric], answers = data.exact_match(model, tokenizer, rows)
            say(f"{metric}: {metrics[metric]:.1%} of {len(rows)} questions about {name}, for example")
            for row, answer in list(zip(rows, answers))[:: max(1, len(rows) // 3)][:3]:
                say(f"    {row['prompt']}|{answer.splitlines()[0] if answer.strip() else answer!r}")
    tokens, _ = model.generate([tokenizer.begin] * 3, max_new_tokens=100, temperature=0.8, stop=[tokenizer.eot])
    say("samples:\n" + "\n".join("    " + tokenizer.decode(row).replace("\n", "\n    ") for row in tokens))
    return metrics


def make_trainer(args, config, process, micro, accumulate, init):
    """(model, trainer, dtype of its activations) by the flags; init(model, seed, scale) fills the parameters."""
    device = process.device
    dtype = choose_dtype(args.dtype, device, micro * config.block_size, config.n_embd)
    args.dtype = str(dtype).removeprefix("torch.")
    with device if args.bench else nullcontext():
        model = GPT(config)
    init(model, args.seed, args.init_scale)
    model.compute_dtype, model.z_loss = dtype, args.z_loss
    if args.embed_grad_scale != 1:
        shrink_embedding_gradient(model, args.embed_grad_scale)
    if args.quantize not in (None, "none"):
        if args.tp > 1 or args.fp8:
            raise BadInput(f"--quantize {args.quantize} rounds whole matrices in float: leave --tp and --fp8 out")
        use_qat(model, args.quantize)
    if args.graphs and device.type != "cuda":
        raise BadInput("--graphs records steps as CUDA graphs, and this device has none: leave it out")
    if config.prefix_lm and args.graphs:
        raise BadInput("--graphs records one mask, but with --prefix_lm each row has its own: leave --graphs out")
    graphs = device.type == "cuda" and process.world == 1 and dtype != torch.float16
    graphs = graphs and count_parameters(model)[0] < 50e6 and not config.prefix_lm and not args.offload
    trainer = Trainer(model, args, process, dtype, accumulate, graphs if args.graphs is None else args.graphs)
    if dtype == torch.float16 and not trainer.sharded.plain:
        raise BadInput("--dtype float16 scales the loss, which works with --parallel ddp alone: use bfloat16")
    if args.fp8:
        use_float8(model)
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile_parts(args.compile_whole)
    return model, trainer, dtype


def bench(args, process):
    """
    Tokens/s and MFU of a model and a layout alone: --bench steps on random ids after three that compile. Nothing is
    read, evaluated or saved.
    """
    config, device = make_config(args, PRESETS[args.preset].get("vocab_size", args.vocab_size)), process.device
    if config.prefix_lm:
        raise BadInput("--bench draws rows without a prefix: leave --prefix_lm out")
    T = config.block_size
    check_layout(config, process, T)
    rows, micro, accumulate = split_batch(args, T, process)
    flops, peak = flops_per_token(meta_model(config), T), peak_flops(device)
    model, trainer, _ = make_trainer(args, config, process, micro, accumulate, init_roughly)
    model.train()
    batch = torch.randint(config.vocab_size, (micro, T + 1), device=device,
                          generator=torch.Generator(device).manual_seed(args.seed + process.dp_rank))
    for step in range(3 + args.bench):
        if step == 3:
            trainer.loss.item()  # waits for the device
            start = time.time()
        trainer.loss.zero_()
        for i in range(accumulate):
            trainer.micro_step(batch[:, :-1], batch[:, 1:], last=i == accumulate - 1)
        trainer.update()
    loss = all_reduce(trainer.loss).item() / process.world
    rate = args.bench * rows * T / (time.time() - start)
    metrics = {"tokens_per_s": round(rate), "peak_memory": peak_memory(device), "loss": round(loss, 4)}
    metrics |= {"mfu": round(flops * rate / process.world / peak, 4)} if peak else {}
    if process.rank == 0:
        print(f"{process.world} process(es), {accumulate} x {micro} rows x {T} tokens each: {rate:,.0f} tokens/s, "
              + (f"{metrics['mfu']:.1%} MFU, " if peak else "") + f"{metrics['peak_memory'] / 1e9:.1f} GB")
        print(json.dumps(metrics))
    process.close()


def main():
    args = get_args()
    process = setup_process(args.device, args)
    if args.bench:
        return bench(args, process)
    for name in ("log_every", "spike_window"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed} is negative: give 0 or more")
    if not args.resume:
        check_out(args.out)
    device, main_process = process.device, process.rank == 0
    say = print if main_process else lambda *a, **k: None
    started = time.time()

    # data and tokenizer: rank 0 prepares, the others read
    if main_process:
        folders, tokenizer = data.prepare(args.data, args.tokenizer, args.vocab_size, args.input)
    if process.world > 1:
        process.wait()
        if not main_process:
            folders, tokenizer = data.prepare(args.data, args.tokenizer, args.vocab_size, args.input)
    config = make_config(args, tokenizer.n_vocab)
    for sentence in moe.warnings(config):
        say(f"warning: {sentence}")
    T = config.block_size
    check_layout(config, process, T)
    rows, micro, accumulate = split_batch(args, T, process)
    _, levels, length = parse_ramp(args)
    loader = data.TokenLoader([(w, data.open_tokens(f / "train.bin")) for w, f in folders.values()], T, args.seed)
    val = {name: (w, data.open_tokens(f / "val.bin")) for name, (w, f) in folders.items()}
    token_bytes = torch.tensor([len(b) for b in tokenizer.token_bytes()])
    corpus = {name: json.loads((f / "meta.json").read_text())["sha256"] for name, (_, f) in folders.items()}

    counted = meta_model(config)
    (total, matmul), flops = count_parameters(counted), flops_per_token(counted, T)
    model, trainer, dtype = make_trainer(args, config, process, micro, accumulate, init_weights)

    out, step, best = Path(args.out), 0, {"val_loss": math.inf}
    # rows left out; what --spike looks at; spikes in a row, and the furthest step that had one
    past = {"left_out": 0, "history": [], "in_a_row": 0, "furthest": 0}
    if args.resume:
        saved = load_optim(args.out)
        if saved["config"] != vars(config) or saved["corpus"] != corpus:
            raise BadInput(f"--resume: the model or the data differ from those of {out}: "
                           f"give the run's own flags, or start without --resume")
        if saved["args"]["optimizer"] != args.optimizer:
            raise BadInput(f"--resume: {out} was trained by {saved['args']['optimizer']}, not {args.optimizer}: leave "
                           f"--optimizer out")
        trainer.load_state_dict(saved)
        step, best, past, logged = saved["step"], saved["best"], saved["past"], saved["log"]
        del saved  # lets go of the file, which the next save replaces
    if main_process:
        if not args.resume:
            start_run(out)
        tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
        if args.resume:  # the log goes back to what was written before the save
            os.truncate(out / "log.jsonl", min(logged, (out / "log.jsonl").stat().st_size))
    peak = peak_flops(device)
    active = f"{(total - moe.idle_parameters(counted)) / 1e6:.2f}M active, " if config.n_expert else ""
    say(f"{total / 1e6:.2f}M parameters, {active}{matmul / 1e6:.2f}M in matrix products; {rows} rows x {T} tokens a "
        f"step in {accumulate} x {process.dp_world} micro-batches"
        + (f", {levels} times as many after {(levels - 1) * length} steps" if levels > 1 else "")
        + f"; {device}, {args.dtype}, {args.optimizer}\n"
        f"MFU = (6 x {matmul:,} + 12 L H D T) x tokens/s / "
        + (f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "the device's peak, which is not known here: mfu n/a"))
    ceiling = None
    if args.calibrate:
        ceiling, bandwidth = calibrate(device, dtype)
        say(f"measured here: {ceiling / 1e12:.3g} TFLOP/s in a large product of {args.dtype}, "
            f"{bandwidth / 1e9:.3g} GB/s in a copy, read and written")

    def first_row(step):
        """How many rows of the run the steps before this one took."""
        return past["left_out"] + rows * levels_before(step, levels, length)

    def batches(step, row):
        """This process's micro-batches from a step on, (rows, T + 1) ids and the rows' prefixes, if they have any."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread's own
        while True:
            for i in range(accumulate * batch_level(step, levels, length)):
                first = row + (i * process.dp_world + process.dp_rank) * micro
                batch, prefix = torch.from_numpy(loader.batch(first, micro)), None
                if config.prefix_lm:
                    prefix = prefix_lengths(args.seed, torch.arange(first, first + micro), T)
                yield [t if t is None or device.type != "cuda" else t.pin_memory() for t in (batch, prefix)]
            row += rows * batch_level(step, levels, length)
            step += 1

    if process.world > 1:
        say(f"{args.parallel} over {process.dp_world} x tp {args.tp} x cp {args.cp} x pp {args.pp}" + (
            f"; {accumulate} micro-batches leave a stage idle {trainer.sharded.pipeline.bubble(accumulate):.0%} of the "
            f"time ({args.pp_schedule})" if args.pp > 1 else ""))

    def save(metrics, weights=True):
        """What resuming needs, then what the next stages need; `weights` False leaves an earlier best in place."""
        if main_process:
            log.flush()
        whole = save_optim(out, trainer, process, args.ckpt == "sharded", step=step, best=best, past=past,
                           args=vars(args), config=vars(config), corpus=corpus,
                           log=(out / "log.jsonl").stat().st_size if main_process else 0)
        if weights and trainer.ema and not trainer.sharded.plain:
            whole = whole | trainer.whole_ema()
        if weights and main_process:
            folders = [out] + [out / f"step-{step:06}"] * (args.keep == "all")
            with trainer.averaged():
                for folder in folders:
                    save_run(folder, model, describe(metrics), None if trainer.sharded.plain else whole)
            if args.keep == "all":
                tokenizer.save(folders[1])
        process.wait()

    def describe(metrics):
        return {"stage": "train", "step": step, "rows": first_row(step), "metrics": metrics, "args": vars(args),
                "tokenizer": tokenizer.spec()}

    # loop
    stop = []  # signals that came
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stop.append(True))
    model.train()
    first, interrupted, rewound, metrics = step, False, False, {}
    # steps without a line yet, and their tokens; tokens and seconds after the first step
    pending, tokens, timed, clock = [], 0, [0, 0.0], time.time()
    stream = data.prefetch(batches(step, first_row(step)), args.prefetch)
    if args.spike == "rewind" and not args.resume:
        save(metrics, weights=False)  # something to go back to
    while True:
        last = step >= args.steps
        evaluating = last or (args.eval_every and step % args.eval_every == 0)
        saving = rewound or (args.save_every and step % args.save_every == 0 and step > first and not last)
        alone = process.world == 1
        if pending and (evaluating or saving or step % args.log_every == 0 or step == first + 1 or (alone and stop)):
            # one copy from the device for all steps since the last line; ranks agree here on stopping
            stats = torch.stack([s for s, _ in pending] + [torch.full((2,), float(bool(stop)), device=device)])
            *stats, (stopped, _) = (all_reduce(stats) / process.world).tolist()
            interrupted, seconds = stopped > 0, time.time() - clock
            experts = moe.take_stats(model) if config.n_expert else {}
            if step > first + 1:  # the first step compiles
                timed = [timed[0] + tokens, timed[1] + seconds]
            tokens_per_s = tokens / seconds
            if experts:
                pending[-1][1]["experts"] = experts
            for (loss, norm), (_, line) in zip(stats, pending):
                line.update(loss=round(loss, 5), grad_norm=round(norm, 4), tokens_per_s=round(tokens_per_s))
                if main_process:
                    log.write(json.dumps(line) + "\n")
                if not math.isfinite(loss) and "spike" not in line:
                    raise BadInput(f"the loss is {loss} at step {line['step']} (lr {line['lr']:.2g}, gradient norm "
                                   f"{norm:.2g}): lower --lr or raise --warmup; {out} keeps its last save")
            rate = flops * tokens_per_s / process.world
            mfu = f"mfu {rate / peak:.1%}" if peak else f"{rate / 1e12:.3g} TFLOP/s, mfu n/a"
            mfu += " of bf16's peak, with fp8 products" if args.fp8 and peak else ""
            mfu += f" ({rate / ceiling:.1%} of measured)" if ceiling else ""
            left = divmod(round((args.steps - step) * seconds / len(pending)), 60) if timed[0] else None
            say(f"step {line['step']}/{args.steps}  loss {loss:.4f}  lr {line['lr']:.2e}  norm {norm:.2f}  "
                f"{tokens_per_s:,.0f} tok/s  {mfu}  {peak_memory(device) / 2 ** 30:.2f} GiB"
                + (f"  {line['batch_tokens']:,} tokens a step" if levels > 1 else "")
                + (moe.describe(experts) if experts else "")
                + (f"  {left[0]}:{left[1]:02} left" if left else ""), flush=True)
            pending, tokens, clock = [], 0, time.time()
        if evaluating and not interrupted and not rewound and (step > first or last):
            with trainer.averaged():
                metrics = validate(trainer.sharded, val, T, args.eval_tokens, micro, process, token_bytes)
            say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
            if metrics["val_loss"] < best["val_loss"]:
                best = metrics
                if args.keep == "best":
                    save(metrics)
        if last or interrupted:
            break
        if saving:
            save(metrics, weights=args.keep != "best" and not rewound)
        rewound = False
        if not pending:
            clock = time.time()  # neither validation nor saving is training

        share = lr_share(step, args.steps, args.warmup, args.schedule, args.min_lr)
        trainer.set_lr(share)
        level, row = batch_level(step, levels, length), first_row(step)
        if config.prefix_lm:  # targets of the step, a process
            lengths = prefix_lengths(args.seed, torch.arange(row, row + rows * level), T)
            trainer.parts.fill_((T - (lengths - 1).clamp(min=0)).sum().item() / process.dp_world)
        elif levels > 1:
            trainer.parts.fill_(accumulate * level)
        if config.dropout or config.n_expert:  # masks too are a function of (seed, step, rank)
            torch.manual_seed(hash((args.seed, step, process.rank)) % 2 ** 32)
        for i in range(accumulate * level):
            batch, prefix = (t if t is None else t.to(device, non_blocking=True) for t in next(stream))
            targets = batch[:, 1:] if prefix is None else mask_prefix(batch[:, 1:], prefix)
            trainer.micro_step(batch[:, :-1], targets, last=i == accumulate * level - 1, prefix=prefix)
        trainer.clip()
        line = {"step": step + 1, "lr": args.lr * share} | ({"batch_tokens": rows * level * T} if levels > 1 else {})
        stats = torch.stack((trainer.loss, trainer.norm))
        trainer.loss.zero_()
        pending.append((stats, line))
        tokens += rows * level * T
        spike = ""
        if args.spike != "none":  # a function of means over all processes: they decide the same
            loss, norm = (all_reduce(stats.clone()) / process.world).tolist()
            overflow = trainer.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
            if not overflow:  # which is the scaler's to skip
                spike = find_spike(past["history"], loss, norm, args.spike_z, args.spike_norm, args.spike_window)
        if not spike:
            trainer.apply()
            step += 1
            if args.spike != "none" and not overflow:
                past["history"] = [*past["history"], [loss, norm]][-args.spike_window:]
                past["in_a_row"] *= step <= past["furthest"]
            continue

        # a spike
        trainer.drop()
        line["spike"] = spike
        past |= {"in_a_row": past["in_a_row"] + 1, "furthest": max(past["furthest"], step + 1)}
        if past["in_a_row"] >= 10:
            raise BadInput(f"ten loss spikes in a row up to step {step + 1} (the last: {spike}): lower --lr, or raise "
                           f"--spike_z; {out} keeps its last save")
        where = f"step {step + 1}: loss {loss:.4f}, gradient norm {norm:.2f}, {spike}: "
        if args.spike == "skip":
            step += 1
            say(f"{where}its update is left out", flush=True)
        else:
            saved, end = load_optim(args.out), first_row(step + 1)
            trainer.load_state_dict(saved)
            step, best, rewound = saved["step"], saved["best"], True
            past |= {"history": saved["past"]["history"]}
            past["left_out"] += end - first_row(step)  # goes on with the row after the spike's
            line["rewound_to"] = step
            stream.close()
            stream = data.prefetch(batches(step, first_row(step)), args.prefetch)
            say(f"{where}back to step {step}, and on with row {end}", flush=True)

    # what it learned
    stream.close()
    save(metrics, weights=args.keep != "best")
    if interrupted:
        say(f"stopped at step {step} and saved: python train.py --resume --out {out} goes on from here")
    elif main_process:
        metrics = best if args.keep == "best" else metrics
        if not trainer.sharded.plain:  # one whole model, to look at
            model = load_run(out, device)[0]
            model.compute_dtype = dtype
        elif args.keep == "best":
            model.load_state_dict(load_safetensors(out / "model.safetensors"))
        elif trainer.ema:
            model.load_state_dict(trainer.ema, strict=False)
        if not (config.n_expert and config.router == "expert_choice"):  # which cannot generate
            metrics = metrics | report(model, tokenizer, folders, say)
        if timed[0]:
            tokens_per_s = timed[0] / timed[1]
            metrics |= {"tokens_per_s": round(tokens_per_s), "peak_memory": peak_memory(device)}
            metrics |= {"mfu": flops * tokens_per_s / process.world / peak} if peak else {}
        metrics |= {"seconds": round(time.time() - started, 1)}
        metrics = {name: round(value, 5) for name, value in metrics.items()}
        save_run(out, model, describe(metrics))
        print(json.dumps(metrics))
    process.close()


if __name__ == "__main__":
    cli(main)
