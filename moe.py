"""
Mixture of experts: instead of one MLP, E of them, of which a router picks k for each token,

    y = s Σ_{i ∈ top k} g_i(x) · MLP_i(x)  (+ MLP_shared(x)),    g from softmax(x W_r) or σ(x W_r), s = --router_scale

so a model stores E MLPs and computes like one with k (Shazeer et al. 2017). Nothing is dropped unless --capacity says
so, and a token's experts depend on that token alone: a later token never changes an earlier logit, cached decoding
equals the full forward pass, a row alone equals the row in a batch.

    python train.py --n_expert 8 --n_expert_active 2           # --n_expert_shared 1, --router sigmoid, --moe_every 2 …
    torchrun --nproc_per_node 2 train.py --n_expert 8 --ep 2   # experts spread over processes
    python moe.py upcycle --init out/base --n_expert 8 --out out/upcycled      # the same function, ready to train on
    python moe.py inspect out/moe --text book.txt --picture out/experts.svg    # which expert takes which tokens
    python moe.py compare --data shakespeare --tokenizer char                  # dense and MoE of equal active FLOPs

The router and its losses are float32, whatever the rest is. Experts are plain MLPs with names of their own, so
optimizers, adapters, quantizers and files see matrices.
"""
import argparse
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from bpe import BadInput, Tokenizer, cli

# -----------------------------------------------------------------------------
# Routers: which experts, with which weights. logits (N, E) float32 -> weights (N, k) float32, experts (N, k), and
# probabilities (N, E) for the losses. Each has a gradient to the logits with k = 1 too, where dividing the one weight
# by itself would leave none.


def softmax_top_k(logits, c, training, bias):
    """Softmax over all, then the k largest, divided by their sum if router_norm and k > 1 (Mixtral; not in OLMoE)."""
    probs = logits.softmax(-1)
    weights, experts = probs.topk(c.n_expert_active, -1)
    if c.router_norm and c.n_expert_active > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts, probs


def gshard_top_2(logits, c, training, bias):
    """
    The best expert always; in training the second with probability min(1, 2 g_2), g_2 its weight after division by
    their sum (Lepikhin et al. 2020, algorithm 1). An expert not taken has the weight 0.
    """
    probs = logits.softmax(-1)
    weights, experts = probs.topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    if training:
        second = torch.rand_like(weights[:, 1]) < 2 * weights[:, 1]
        weights = torch.stack((weights[:, 0], weights[:, 1] * second), -1)
    return weights, experts, probs


def sigmoid_top_k(logits, c, training, bias):
    """
    s = σ(logits); the k experts with the largest s + b, weighted by s over the sum of theirs (if router_norm and k >
    1; DeepSeek-V3, 2024, eq. 12-16). b balances the load, see balance; it is in no gradient.
    """
    scores = logits.sigmoid()
    experts = (scores.detach() + bias).topk(c.n_expert_active, -1).indices
    weights = scores.gather(-1, experts)
    if c.router_norm and c.n_expert_active > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts, scores / scores.sum(-1, keepdim=True)


def expert_choice(logits, c):
    """
    Each expert takes the N k / E tokens that like it best (times capacity, if there is one; Zhou et al. 2022): the
    load is even, but who is taken depends on all tokens of the batch, later ones too. logits (N, E) -> weights (E,
    n), tokens (E, n), probabilities (N, E).
    """
    N, E = logits.shape
    probs = logits.softmax(-1)
    n = min(N, math.ceil((c.capacity or 1.0) * N * c.n_expert_active / E))
    return *probs.T.topk(n, -1), probs


# noisy and switch change the logits before, see Router
ROUTERS = {"softmax": softmax_top_k, "noisy": softmax_top_k, "switch": softmax_top_k, "gshard": gshard_top_2,
           "sigmoid": sigmoid_top_k, "expert_choice": expert_choice}
BALANCED = ("sigmoid", "expert_choice")  # without an auxiliary loss


class Router(nn.Module):
    """
    x W_rᵀ in float32. In training, noisy adds N(0, 1) · softplus(x W_noiseᵀ) (Shazeer et al. 2017, eq. 4), and switch
    scales each entry of x by a uniform number in [0.99, 1.01] (Fedus et al. 2022, 2.4). Not a Linear: adapters and
    quantizers leave it as it is.
    """

    def __init__(self, c):
        super().__init__()
        self.kind = c.router
        self.weight = nn.Parameter(torch.empty(c.n_expert, c.n_embd))
        self.noise = nn.Parameter(torch.empty(c.n_expert, c.n_embd)) if c.router == "noisy" else None
        self.register_buffer("bias", torch.zeros(c.n_expert) if c.router == "sigmoid" else None)

    def forward(self, x):
        x = x.float()
        if self.training and self.kind == "switch":
            x = x * torch.empty_like(x).uniform_(0.99, 1.01)
        logits = F.linear(x, self.weight.float())
        if self.training and self.kind == "noisy":
            logits = logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.noise.float()))
        return logits


# -----------------------------------------------------------------------------
# Losses of the router, per layer


def load_balancing_loss(probs, load):
    """
    E Σ_i f_i P_i (Fedus et al. 2022, eq. 4): f_i the share of all assignments that expert i gets, without gradient,
    P_i its mean probability. 1 when balanced, whatever k (theirs and Mixtral's sum f to k); E when one expert gets
    all. probs (N, E), load (E,) counts.
    """
    return probs.shape[1] * torch.dot(load / load.sum().clamp(min=1), probs.mean(0))


def router_z_loss(logits):
    """Mean of log²Σ exp(logits), which keeps logits small (Zoph et al. 2022, eq. 5). logits (N, E)."""
    return logits.logsumexp(-1).square().mean()


def within_capacity(experts, n_expert, capacity):
    """
    Which assignments find room where each expert takes `capacity` of them, (N, k) bool. Room is given in the order of
    the tokens, so that a later token takes none from an earlier one; GShard gives it to all first choices first.
    """
    _, inverse, counts = sort_order(experts.flatten(), n_expert)
    first = (counts.cumsum(0) - counts)[experts.flatten()]  # of each expert's places among all that are sorted
    return (inverse - first < capacity).view_as(experts)


# -----------------------------------------------------------------------------
# Dispatch: rows sorted by expert, through their experts, and back


class Sorted(torch.autograd.Function):
    """Rows x[order // k], (N k, C), of x (N, C). The gradient is a gather too, where that of indexing would scatter."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Permuted(torch.autograd.Function):
    """x[order]; the gradient goes back by the inverse."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


def sort_order(keys, n):
    """
    Of numbers (M,) below n: the order that sorts them, stable, its inverse, and how many there are of each (n,). A
    radix sort's time goes with the bits of its keys, and counting in a sorted list takes no atomic additions, which
    would wait for each other at n addresses.
    """
    ranked, order = keys.to(torch.int16).sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(n, device=keys.device, dtype=torch.int16), right=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse, ends.diff(prepend=ends.new_zeros(1))


def loop(experts, rows, counts):
    """
    The rows of each expert through it, one expert after the other. An empty one takes part where gradients are wanted,
    so that every process has one for every parameter.
    """
    parts = [f(x) for f, x in zip(experts, rows.split(counts.tolist())) if len(x) or torch.is_grad_enabled()]
    return torch.cat(parts) if parts else rows


def masked(experts, rows, counts):
    """Every row through every expert, keeping its own: the host reads no count, which a recorded graph needs."""
    number = torch.searchsorted(counts.cumsum(0), torch.arange(len(rows), device=rows.device), right=True)
    y = torch.zeros_like(rows)
    for i, f in enumerate(experts):
        y = torch.where((number == i).unsqueeze(1), f(rows), y)
    return y


def can_group(experts, rows):
    """Does grouped_mm take them? On a GPU, in bfloat16, plain matrices without bias, rows in multiples of 16 bytes."""
    f = experts[0]
    parts = [p for p in (f.gate, f.up, f.down) if p is not None]
    plain = all(type(p) is f.kind and p.bias is None and not isinstance(p.weight, dist.tensor.DTensor) for p in parts)
    return rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and plain and \
        all(n % 8 == 0 for n in f.up.weight.shape)


def stacked(experts, part, dtype):
    """
    The experts' matrices in one tensor (E, out, in), which grouped_mm wants. Without gradients they are laid into one
    once, and the parameters become views of it: decoding copies nothing.
    """
    linears = [getattr(f, part) for f in experts]
    weights = [m.weight for m in linears]
    if torch.is_grad_enabled() or weights[0].dtype != dtype or torch.compiler.is_compiling():
        return torch.stack([w.to(dtype) for w in weights])
    size = weights[0].numel() * weights[0].element_size()
    if any(w.data_ptr() != weights[0].data_ptr() + i * size for i, w in enumerate(weights)):
        whole = torch.stack([w.detach() for w in weights])
        for w, view in zip(weights, whole):
            w.data = view
    w = weights[0].detach()
    return torch.as_strided(w, (len(weights), *w.shape), (w.numel(), *w.stride()), w.storage_offset())


def grouped(experts, rows, counts):
    """All experts at once: one grouped product for each matrix; counts stay on the device."""
    ends = counts.cumsum(0).to(torch.int32)
    product = lambda x, part: F.grouped_mm(x, stacked(experts, part, x.dtype).mT, offs=ends)
    f = experts[0]
    up = product(rows, "up")
    h = f.act(up) if f.gate is None else f.act(product(rows, "gate")) * up
    return product(h, "down")


def run_experts(experts, rows, counts):
    """rows (M, C), sorted by expert, counts (E,) of each -> (M, C)."""
    if can_group(experts, rows):
        return grouped(experts, rows, counts)
    recording = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    return masked(experts, rows, counts) if recording else loop(experts, rows, counts)


class AllToAll(torch.autograd.Function):
    """Rows to the processes of a group: theirs[r] rows come from rank r, ours[r] go there."""

    @staticmethod
    def forward(ctx, rows, ours, theirs, group):
        ctx.splits, ctx.group = (theirs, ours), group
        new = rows.new_empty(sum(theirs), rows.shape[1])
        dist.all_to_all_single(new, rows.contiguous(), theirs, ours, group=group)
        return new

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.splits, ctx.group), None, None, None


def run_spread(experts, rows, counts, group):
    """run_experts where each of n processes has E / n experts: all-to-all, its own experts, all-to-all back."""
    n = dist.get_world_size(group)
    here = range(len(experts) // n * dist.get_rank(group), len(experts) // n * (dist.get_rank(group) + 1))
    ours, theirs = counts.view(n, -1), torch.empty_like(counts.view(n, -1))
    dist.all_to_all_single(theirs, ours.contiguous(), group=group)  # (n, E / n): from each, for each expert here
    sizes = ours.sum(1).tolist(), theirs.sum(1).tolist()
    rows = AllToAll.apply(rows, *sizes, group)
    keys = torch.arange(len(here), device=rows.device).repeat(n).repeat_interleave(theirs.flatten())
    order, inverse, counts = sort_order(keys, len(here))
    rows = run_experts([experts[i] for i in here], Permuted.apply(rows, order, inverse), counts)
    return AllToAll.apply(Permuted.apply(rows, inverse, order), *sizes[::-1], group)


# -----------------------------------------------------------------------------
# The layer


class MoE(nn.Module):
    """
    In the place of a block's MLP; mlp(c, width) makes one. While training it leaves its loss in `penalty`, and in
    `tally` (E + 3,) sums for the log: assignments of each expert, dropped ones, the router's entropy, tokens.
    """

    def __init__(self, c, mlp):
        super().__init__()
        self.config = c
        self.router = Router(c)
        self.experts = nn.ModuleList(mlp(c, c.expert_hidden) for _ in range(c.n_expert))
        for f in self.experts:
            f.kind = type(f.up)
        self.shared = mlp(c, c.n_expert_shared * c.expert_hidden) if c.n_expert_shared else None
        self.shared_gate = type(self.shared.up)(c.n_embd, 1, bias=False) if c.shared_gate else None
        self.register_buffer("load", torch.zeros(c.n_expert), persistent=False)  # since the last step, for balance
        self.register_buffer("tally", torch.zeros(c.n_expert + 3), persistent=False)
        self.penalty, self.group = None, None

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        logits = self.router(flat)
        y = self.by_expert(flat, logits) if self.config.router == "expert_choice" else self.by_token(flat, logits)
        if self.shared is not None:
            always = self.shared(flat)
            y = y + (always if self.shared_gate is None else self.shared_gate(flat).sigmoid() * always)
        return y.view_as(x)

    def by_token(self, x, logits):
        c, (N, E) = self.config, logits.shape
        weights, experts, probs = ROUTERS[c.router](logits, c, self.training, self.router.bias)
        order, inverse, counts = sort_order(experts.flatten(), E)
        if c.capacity and self.training:
            weights = weights * within_capacity(experts, E, math.ceil(c.capacity * N * c.n_expert_active / E))
        if self.training:
            self.watch(logits, probs, counts.float(), (weights == 0).sum())
        rows = Sorted.apply(x, order, inverse, c.n_expert_active)
        rows = run_experts(self.experts, rows, counts) if self.group is None else \
            run_spread(self.experts, rows, counts, self.group)
        rows = Permuted.apply(rows, inverse, order).view(N, c.n_expert_active, -1)
        return (rows * (c.router_scale * weights).to(rows.dtype).unsqueeze(-1)).sum(1)

    def by_expert(self, x, logits):
        c = self.config
        weights, tokens, probs = expert_choice(logits, c)
        load = torch.full((c.n_expert,), tokens.shape[1], device=x.device)
        if self.training:
            served = torch.zeros(len(x), device=x.device).index_fill_(0, tokens.flatten(), 1.0)
            self.watch(logits, probs, load.float(), (1 - served).sum() * c.n_expert_active)
        rows = run_experts(self.experts, x[tokens.flatten()], load)
        weights = (c.router_scale * weights).to(rows.dtype).view(-1, 1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), rows * weights)

    def watch(self, logits, probs, load, dropped):
        """The layer's loss, and its sums for the log."""
        c = self.config
        if torch.is_grad_enabled():
            self.penalty = c.router_z_loss * router_z_loss(logits)
            if c.router not in BALANCED:
                self.penalty = self.penalty + c.aux_loss * load_balancing_loss(probs, load)
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                self.penalty = None  # --recompute, in the backward pass: the loss has it already, let go of the graph
        with torch.no_grad():
            entropy = -(probs * probs.clamp(min=1e-20).log()).sum()
            self.tally += torch.cat((load, torch.stack((dropped.float(), entropy, entropy.new_full((), len(probs))))))
            self.load += load


def layers(model):
    """The MoE modules of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MoE)]


def fill_buffers(model, tensors, device):
    """After loading: counts at zero, the biases that balance experts in float32 whatever the weights are."""
    for name, m in model.named_modules():
        if isinstance(m, MoE):
            m.load, m.tally = (torch.zeros(t.shape, device=device) for t in (m.load, m.tally))
            if m.router.bias is not None:
                m.router.bias = tensors[f"{name}.router.bias"].to(device, torch.float32)


def with_penalty(loss, model, scale=1.0):
    """The loss, with the gradient of the layers' penalties added but not their value: nats stay nats."""
    penalty = scale * sum(m.penalty for m in layers(model))
    for m in layers(model):
        m.penalty = None  # lets go of the graph
    return loss + (penalty - penalty.detach())


@torch.no_grad()
def balance(model):
    """After a step, for --router sigmoid: b ← b + u · sign(mean load - load), less its mean (DeepSeek-V3, 2.1.2)."""
    for m in layers(model):
        if m.router.bias is not None:
            load = m.load
            if dist.is_initialized():
                dist.all_reduce(load)
            b = m.router.bias + m.config.bias_rate * (load.mean() - load).sign()
            m.router.bias.copy_(b - b.mean())
        m.load.zero_()


@torch.no_grad()
def take_stats(model):
    """
    Since the last call, over all processes, a list with a number for each layer: min and max load over the mean,
    entropy of the load over ln E, share of dropped assignments, the router's entropy in nats.
    """
    ms = layers(model)
    sums = torch.stack([m.tally for m in ms])
    if dist.is_initialized():
        dist.all_reduce(sums)
    for m in ms:
        m.tally.zero_()
    c, sums = ms[0].config, sums.double().cpu()
    load, (dropped, entropy, tokens) = sums[:, :-3], sums[:, -3:].T
    share = load / load.sum(1, keepdim=True).clamp(min=1)
    stats = {"min": share.amin(1) * c.n_expert, "max": share.amax(1) * c.n_expert,
             "entropy": -(share * share.clamp(min=1e-20).log()).sum(1) / math.log(max(2, c.n_expert)),
             "dropped": dropped / (tokens * c.n_expert_active).clamp(min=1), "router": entropy / tokens.clamp(min=1)}
    return {name: [round(v, 4) for v in values.tolist()] for name, values in stats.items()}


def describe(stats):
    """One line: the worst layer's load, and means over layers."""
    mean = lambda name: sum(stats[name]) / len(stats[name])
    return (f"  load {min(stats['min']):.2f}-{max(stats['max']):.2f} (entropy {min(stats['entropy']):.0%})  "
            f"router {mean('router'):.2f} nats  dropped {mean('dropped'):.1%}")


# -----------------------------------------------------------------------------
# What the model asks: does a config work, what does it cost, who holds which expert


def check(c):
    """Fill in the defaults of a config with experts, and refuse what cannot work."""
    c.expert_hidden = c.expert_hidden or c.n_hidden
    k = {"switch": 1, "gshard": 2}.get(c.router)
    for wrong, sentence in (
            (not 1 <= c.n_expert_active <= c.n_expert,
             f"--n_expert_active {c.n_expert_active} is not between 1 and the {c.n_expert} experts of --n_expert: "
             f"choose fewer, or more experts"),
            (c.router not in ROUTERS, f"--router {c.router} is unknown: choose one of {', '.join(ROUTERS)}"),
            (k and c.n_expert_active != k,
             f"--router {c.router} takes {k} expert(s) a token, not {c.n_expert_active}: add --n_expert_active {k}"),
            (c.moe_every < 1 or not any(c.moe_layers),
             f"--moe_every {c.moe_every} and --moe_first {c.moe_first} leave no layer of {c.n_layer} with experts"),
            (c.share > 1, f"--share {c.share} uses a block several times, which would route with one router at several "
                          f"depths: leave it or --n_expert out"),
            (c.capacity < 0, f"--capacity {c.capacity} is a factor on the mean load: 0 for none, or about 1.25"),
            (c.shared_gate and not c.n_expert_shared,
             "--shared_gate needs an expert to gate: add --n_expert_shared 1")):
        if wrong:
            raise BadInput(sentence)


def warnings(c):
    """Sentences that a user should read before training."""
    if c.n_expert and c.router == "expert_choice":
        yield ("expert_choice: a token's experts depend on later tokens, so training and validation losses see the "
               "future, and the model cannot generate")
    elif c.n_expert and c.capacity:
        yield (f"--capacity {c.capacity}: in training a token's result depends on the tokens before it in its batch, "
               f"and what overflows passes an MLP by; evaluation and generation drop nothing")


def active_share(c):
    """Part of the routed experts' numbers that a token meets."""
    return c.n_expert_active / c.n_expert if c.n_expert else 1.0


def is_expert(name):
    return ".experts." in name


def idle_parameters(model):
    """How many parameters a token does not meet."""
    c = model.config
    return round(sum(p.numel() for n, p in model.named_parameters() if is_expert(n)) * (1 - active_share(c)))


def activations(c, size, saved, thin):
    """
    Rows as of model.block_activations for a layer with experts, whose MLPs keep `saved` vectors of their width,
    `thin` with selective recomputation: the rows sorted by expert, what the experts keep, their outputs (for the
    gradient of the weights), and the router's float32 input and numbers.
    """
    k, C, E = c.n_expert_active, c.n_embd, c.n_expert
    width = (k + c.n_expert_shared) * c.expert_hidden * size
    router = (4 * C if size != 4 else 0) + 16 * E + 40 * k
    return [("experts", saved * width, thin * width, False), ("router", router, router, False),
            ("sorted rows", 2 * k * C * size, 2 * k * C * size, False)]


def check_layout(c, process, ep):
    """BadInput where experts cannot be spread so."""
    for wrong, sentence in (
            (ep < 1 or c.n_expert % ep, f"--ep {ep} does not divide the {c.n_expert} experts: use one that does"),
            (process.world % ep, f"--ep {ep} does not divide the {process.world} process(es) that torchrun started"),
            (ep > 1 and (process.mode != "ddp" or process.cp > 1),
             "--ep spreads experts over the processes of --parallel ddp: leave the other mode and --cp out"),
            (ep > 1 and c.router == "expert_choice",
             "expert_choice picks among the tokens of one process: leave --ep out"),
            (process.tp > 1,
             "--tp cuts the matrices of one MLP, and a token's experts are several: spread them with --ep"),
            (process.pp > 1,
             "--pp passes no router losses from stage to stage: leave it out, or use --parallel fsdp")):
        if wrong:
            raise BadInput(sentence)


def spread_experts(model, process, ep):
    """
    Expert parallelism, in place: of each layer's experts, rank r of every ep processes keeps E / ep. Returns
    (names of the parameters that are its own, the group of processes that hold the same ones).
    """
    check_layout(model.config, process, ep)
    if ep == 1:
        return [], None
    own, copies = None, None
    for start in range(0, process.world, ep):
        group = dist.new_group(list(range(start, start + ep)))
        own = group if start <= process.rank < start + ep else own
    for r in range(ep):
        group = dist.new_group(list(range(r, process.world, ep)))
        copies = group if process.rank % ep == r else copies
    each = model.config.n_expert // ep
    for m in layers(model):
        m.group = own
        for i in range(model.config.n_expert):
            if i // each != process.rank % ep:
                m.experts[i] = nn.Identity()
    return [name for name, _ in model.named_parameters() if is_expert(name)], copies


# -----------------------------------------------------------------------------
# upcycle: a dense model's MLP in every expert (Komatsuzaki et al. 2022)


def upcycled(model, config, seed=0):
    """
    A model of `config`, which has experts, that computes what the dense `model` does: each expert is the layer's MLP
    and a token's weights sum to 1; shared experts begin silent. Routers are random: which experts a token meets makes
    no difference yet, but each gets gradients from its own tokens.
    """
    from model import GPT, init_weights
    new, dense = GPT(config), model.state_dict()
    init_weights(new, seed)
    state = new.state_dict()
    for name, t in state.items():
        source = re.sub(r"\.experts\.\d+\.", ".", name)
        if source in dense:
            t.copy_(dense[source])
        elif ".shared.down." in name:
            t.zero_()
    return new


def upcycle(args):
    """a dense run or model into one with experts, which computes the same"""
    from lora import plain
    from model import GPTConfig, count_parameters, save_run, start_run
    path = Path(args.init) / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {"args": {}}
    if run.get("quantize"):
        raise BadInput(f"--init {args.init} is quantized: give the run that it was made from, {run['args']['init']}")
    model = plain(args.init)
    if model.config.n_expert:
        raise BadInput(f"--init {args.init} has experts already: give a dense model")
    if args.n_expert_active < 2 or args.router in ("switch", "expert_choice"):
        raise BadInput(f"--n_expert_active {args.n_expert_active} --router {args.router}: one expert's weight is below "
                       f"1, so the function would change; use 2 or more with softmax, noisy, gshard or sigmoid")
    names = "n_expert", "n_expert_active", "n_expert_shared", "router", "moe_every", "moe_first"
    given = {name: getattr(args, name) for name in names}
    new = upcycled(model, GPTConfig(**asdict(model.config) | given), args.seed)
    tokenizer = Tokenizer.from_pretrained(args.init)
    start_run(args.out, args.init)
    save_run(args.out, new, {"stage": "upcycle", "step": 0, "metrics": {}, "args": run["args"],
                             "tokenizer": tokenizer.spec()})
    tokenizer.save(args.out)
    total = count_parameters(new)[0]
    print(f"{args.out}: {total:,} parameters, {total - idle_parameters(new):,} of them active, from "
          f"{count_parameters(model)[0]:,}")


# -----------------------------------------------------------------------------
# inspect: which expert takes which tokens


@torch.no_grad()
def assignments(model, ids):
    """The experts of each token, (len(ids), k), for each layer that has some, best first; ids in windows of T."""
    chosen, c = [[] for _ in layers(model)], model.config
    if c.router == "expert_choice":
        raise BadInput("with expert_choice a token has no experts of its own to show")

    def keep(router, inputs, logits):
        weights, experts, _ = ROUTERS[c.router](logits, c, False, router.bias)
        chosen[order[router]].append(experts.gather(1, weights.argsort(-1, descending=True)))
    order = {m.router: i for i, m in enumerate(layers(model))}
    hooks = [router.register_forward_hook(keep) for router in order]
    for window in torch.tensor(ids).split(c.block_size):
        model.trunk(window[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).cpu() for parts in chosen]


def favourites(ids, experts, n_expert, many=8):
    """
    For each expert (its share of the assignments, ids it has far more often than its share would give it: by count
    minus what was to be expected).
    """
    ids, rows = torch.tensor(ids).repeat_interleave(experts.shape[1]), experts.flatten()
    known, place = ids.unique(return_inverse=True)
    counts = torch.zeros(n_expert, len(known)).index_put_((rows, place), torch.ones(len(rows)), accumulate=True)
    share = counts.sum(1) / counts.sum()
    more = counts - share[:, None] * counts.sum(0)
    return [(share[e].item(), known[more[e].topk(min(many, len(known))).indices].tolist()) for e in range(n_expert)]


COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#8a8a8a"]


def picture(tokens, chosen, layer, n_expert):
    """SVG: a row a layer, a cell an expert, the darker the more it takes; then the text, coloured by expert."""
    from html import escape
    size, parts, y = 28, [], 20
    for l, experts in enumerate(chosen):
        load = torch.bincount(experts.flatten(), minlength=n_expert) / experts.numel() * n_expert
        parts.append(f'<text x="4" y="{y + 18}">layer {l}</text>')
        for e, share in enumerate(load.tolist()):
            parts.append(f'<rect x="{80 + e * size}" y="{y}" width="{size - 2}" height="{size - 2}" fill="#1f3b63" '
                         f'fill-opacity="{min(1.0, share / 2):.2f}"><title>expert {e}: {share / n_expert:.1%}</title>'
                         f'</rect>')
        y += size
    y, x = y + 30, 4
    parts.append(f'<text x="4" y="{y}">layer {layer}, each token in the colour of its first expert</text>')
    y += 10
    for token, expert in zip(tokens, chosen[layer][:, 0].tolist()):
        shown = token.replace("\n", "⏎")
        width = 8 * len(shown) + 2
        if x + width > 900:
            x, y = 4, y + 22
        colour = COLOURS[expert % len(COLOURS)]
        parts.append(f'<rect x="{x}" y="{y}" width="{width - 1}" height="20" fill="{colour}" fill-opacity="0.45"/>'
                     f'<text x="{x + 1}" y="{y + 15}" xml:space="preserve">{escape(shown)}</text>')
        x += width
    width = max(910, 90 + n_expert * size)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 30}" font-family="monospace" '
            f'font-size="13"><rect width="100%" height="100%" fill="white"/>' + "\n".join(parts) + "</svg>\n")


def inspect(args):
    """which expert takes which tokens of a text: a table, and with --picture an SVG"""
    from data import reads_texts
    from model import GPT, newest_run
    init = args.init or newest_run(fits=reads_texts)
    model, tokenizer = GPT.from_pretrained(init).eval(), Tokenizer.from_pretrained(init)
    c = model.config
    if not c.n_expert:
        raise BadInput(f"{init} has no experts: train one with python train.py --n_expert 8")
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--text {args.text} cannot be read ({error})") from None
    ids = tokenizer.encode(text)[:args.tokens]
    if not ids:
        raise BadInput(f"--text {args.text} is empty: give some text to route")
    chosen = assignments(model, ids)
    for l, (number, experts) in enumerate(zip([i for i, has in enumerate(c.moe_layers) if has], chosen)):
        rows = favourites(ids, experts, c.n_expert)
        entropy = -sum(p * math.log(p) for p, _ in rows if p) / math.log(max(2, c.n_expert))
        again = (experts[1:, :1] == experts[:-1]).any(1).float().mean().item()
        print(f"layer {number}: load entropy {entropy:.3f} of 1; a token's first expert was one of the last token's in "
              f"{again:.2f} of cases")
        for e, (share, favourite) in enumerate(rows):
            bar = "█" * round(20 * share)
            print(f"  {e:3} {share:7.1%} {bar:8} " + " ".join(repr(tokenizer.decode([i])) for i in favourite))
    if args.picture:
        layer = len(chosen) // 2 if args.layer is None else args.layer
        if not 0 <= layer < len(chosen):
            raise BadInput(f"--layer {layer}: there are {len(chosen)} layers with experts, counted from 0")
        tokens = [tokenizer.decode([i]) for i in ids[:600]]
        Path(args.picture).write_text(picture(tokens, chosen, layer, c.n_expert), encoding="utf-8")
        print(f"{args.picture}: layers by experts, and {len(tokens)} tokens of layer {layer}")


# -----------------------------------------------------------------------------
# compare: dense and MoE at equal active FLOPs


def train_once(flags, out):
    """
    python train.py FLAGS --out OUT, unless it has finished there before: (contents of run.json, [(step, validation
    loss)]).
    """
    script, log = Path(__file__).with_name("train.py"), Path(out).with_suffix(".txt")
    command = [sys.executable, str(script), *map(str, flags), "--out", str(out)]
    done = log.exists() and log.read_text().startswith(" ".join(map(str, flags)) + "\n")
    if not (done and (Path(out) / "run.json").exists()):
        print("$ " + " ".join(["python", "train.py", *command[2:]]), flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
            lines = []
            for line in process.stdout:
                print("  " + line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            raise BadInput(f"train.py ended with status {process.returncode}, see above")
        log.write_text(" ".join(map(str, flags)) + "\n" + "".join(lines))
    found = re.findall(r"^step (\d+): val_loss ([\d.]+)", log.read_text(), re.M)
    return json.loads((Path(out) / "run.json").read_text()), [(int(step), float(loss)) for step, loss in found]


def mean_sd(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def at_time(curve, rate, seconds):
    """Validation loss after so many seconds at `rate` steps a second, between two evaluations; None outside."""
    points = [(step / rate, loss) for step, loss in curve]
    for (t0, a), (t1, b) in zip(points, points[1:]):
        if t0 <= seconds <= t1:
            return a + (b - a) * (seconds - t0) / max(t1 - t0, 1e-9)
    return None


def compare(args):
    """a dense model and one with experts, of equal active FLOPs, data, steps and seeds; further flags are train.py's"""
    results, out = {}, Path(args.out)

    def run(name, seed, *flags):
        record, curve = train_once([*args.rest, "--seed", seed, *flags], out / f"{name}-{seed}")
        results.setdefault(name, []).append(record["metrics"] | {"steps": record["step"], "curve": curve})
        return record
    for seed in args.seeds:
        dense = run("dense", seed)
        width, c = dense["config"]["n_hidden"], dense["config"]
        if width % args.n_expert_active:
            raise BadInput(f"--n_expert_active {args.n_expert_active} does not divide the dense MLP's width {width}: "
                           f"add an --n_hidden that it does")
        experts = run("experts", seed, "--n_expert", args.n_expert, "--n_expert_active", args.n_expert_active,
                      "--expert_hidden", width // args.n_expert_active, *args.expert_flags)
        if args.equal_time:  # as many steps as the dense model makes in the time of the other
            ratio = dense["metrics"]["tokens_per_s"] / experts["metrics"]["tokens_per_s"]
            run("dense_longer", seed, "--steps", round(dense["step"] * ratio))

    from model import GPTConfig, count_parameters, meta_model
    print(f"\n{args.n_expert} experts, {args.n_expert_active} active, each {width // args.n_expert_active} wide; dense "
          f"MLP {width} wide; seeds {' '.join(map(str, args.seeds))}\n")
    print(f"{'':18}{'stored':>12}{'in products':>13}{'steps':>7}{'validation loss':>20}{'tokens/s':>11}{'seconds':>9}")
    summary = {}
    for name, rows in results.items():
        config = c if name != "experts" else experts["config"]
        model = meta_model(GPTConfig(**config))
        (loss, sd), (rate, _) = (mean_sd([row[key] for row in rows]) for key in ("val_loss", "tokens_per_s"))
        steps = sum(row["steps"] for row in rows) / len(rows)
        seconds = steps * dense["args"]["batch_tokens"] / rate
        total, matmul = count_parameters(model)
        print(f"{name:18}{total:12,}{matmul:13,}{steps:7.0f}{loss:12.4f} ± {sd:.4f}{rate:11,.0f}{seconds:9.1f}")
        summary[name] = {"val_loss": loss, "sd": sd, "tokens_per_s": rate, "steps": steps, "seconds": seconds,
                         "parameters": total, "in_products": matmul}
    gains = [a["val_loss"] - b["val_loss"] for a, b in zip(results["dense"], results["experts"])]
    gain, sd = mean_sd(gains)
    ratio = summary["experts"]["tokens_per_s"] / summary["dense"]["tokens_per_s"]
    print(f"\nexperts below dense by {gain:.4f} ± {sd:.4f} nats at equal steps (seed by seed); tokens/s {ratio:.2f} of "
          f"dense")
    if min(len(row["curve"]) for rows in results.values() for row in rows) > 2:
        tokens = dense["args"]["batch_tokens"]
        print("\nseconds of training   dense   experts   (means over seeds, where both have been evaluated)")
        for step, _ in results["experts"][0]["curve"]:
            t, pair = step * tokens / summary["experts"]["tokens_per_s"], []
            for name in ("dense", "experts"):
                found = [at_time(row["curve"], row["tokens_per_s"] / tokens, t) for row in results[name]]
                pair.append(None if None in found else sum(found) / len(found))
            if None not in pair:
                print(f"{t:19.1f}{pair[0]:8.4f}{pair[1]:10.4f}")
    summary |= {"gain": gain, "gain_sd": sd, "speed": ratio, "seeds": args.seeds, "flags": args.rest}
    (out / "compare.json").write_text(json.dumps(summary | {"runs": results}, indent=1))
    print(json.dumps({k: v for k, v in summary.items() if k not in ("flags",)}))


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run):
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        return sub.add_argument
    add = command(upcycle)
    add("--init", required=True, help="a dense run directory, Hugging Face folder or hub name")
    add("--out", default="out/upcycled")
    add("--n_expert", type=int, default=8)
    add("--n_expert_active", type=int, default=2)
    add("--n_expert_shared", type=int, default=0, help="further experts, always active, silent at first")
    add("--router", default="softmax", choices=list(ROUTERS))
    add("--moe_every", type=int, default=1, help="layers that get experts: each so-many-th")
    add("--moe_first", type=int, default=0, help="and none of the first so many")
    add("--seed", type=int, default=0, help="of the routers")
    add = command(inspect)
    add("init", nargs="?", help="run directory, Hugging Face folder or hub name (default: the newest run)")
    add("--text", required=True, help="a file")
    add("--tokens", type=int, default=20000, help="of its beginning")
    add("--picture", help="an SVG to write")
    add("--layer", type=int, help="of those with experts, which colours the picture's text (default: the middle)")
    add = command(compare)
    add("--n_expert", type=int, default=8)
    add("--n_expert_active", type=int, default=2)
    add("--expert_flags", nargs="+", default=[],
        help="train.py's flags for the model with experts alone, as name=value, such as router=sigmoid")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--equal_time", action="store_true", help="also a dense model that trains as long as the other by the clock")
    add("--out", default="out/compare", help="folder of the runs; what has finished there is not run again")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "compare":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "compare":
        args.rest, args.expert_flags = rest, [f"--{flag}" for flag in args.expert_flags]
    return args


def main():
    args = get_args()
    args.run(args)


if __name__ == "__main__":
    from moe import main
    cli(main)
