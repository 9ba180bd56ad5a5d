"""
Preference optimization: a policy from pairs of answers of which one was liked better, without a reward model.

    L = -E log σ(β h),   h = log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)        (Rafailov et al. 2023, eq. 7)

whose minimum, over all y, is π*(y|x) ∝ π_ref(y|x) e^{r(x,y)/β} where r are the rewards of a Bradley-Terry model of who
is liked; tests/test_dpo.py converges to it. --loss takes one of METHODS:

    dpo     -log σ(β h)                                    hinge   max(0, 1 - β h)                     Liu 2023
    cdpo    -(1-ε) log σ(β h) - ε log σ(-β h)              ipo     (h - 1/(2β))²                       Azar 2023
    robust  (-(1-ε) log σ(β h) + ε log σ(-β h)) / (1-2ε)   simpo   -log σ(β(ℓ_w/|w| - ℓ_l/|l|) - γ)    Meng 2024
    cpo     -log σ(β(ℓ_w - ℓ_l)) - ℓ_w/|w|    Xu 2024      orpo    -ℓ_xw/|xw| - β log σ(log odds ratio)   Hong 2024
    kto     1 - σ(±β(log π/π_ref - z_0)), unpaired rows    sft     -ℓ_w/|w|, to compare with    kto: Ethayarajh 2024

ℓ is log π(y|x) summed over y with its end token. DPO alone lowers both ℓ_w and ℓ_l; --sft_weight adds -ℓ_w/|w| (RPO,
Pang et al. 2024), which cures that.

    python dpo.py                                           # out/sft's own right and wrong sums, then before and after
    python dpo.py --data pairs --input FILE.jsonl --init HuggingFaceTB/SmolLM2-135M-Instruct --lora_rank 16
    torchrun --nproc_per_node 8 dpo.py --data hh --parallel fsdp --loss ipo
    python dpo.py table --seeds 3                           # every method from one base; frontier: reward over KL
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import lora
from bpe import BadInput, Tokenizer, chat_end, chat_format, cli, replace_file
from data import hh, tastes
from model import (PARALLEL, RewardModel, adamw_groups, add_up, all_reduce, check_out, gather_into, load_safetensors,
                   peak_memory, rollouts, same_count, save_run, save_safetensors, setup_process, shard, shares_prompts,
                   start_run, step_forward, token_logprobs)

# -----------------------------------------------------------------------------
# Losses. Sums of log-probabilities of B responses each, (B,) in nats -> the loss of each pair, (B,)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """
    -(1-ε) log σ(β h) - ε log σ(-β h). ε = 0: DPO (Rafailov et al. 2023, eq. 7); ε > 0, the chance that a label is
    wrong: cDPO (Mitchell 2023); ε = 1/2: a tie. ε may differ by pair, (B,). ln 2 where policy and reference agree.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    """
    (-(1-ε) log σ(β h) + ε log σ(-β h)) / (1-2ε): its mean over flipped labels is DPO's loss (Chowdhury et al. 2024).
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    flipped = (1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return -flipped / (1 - 2 * label_smoothing)


def hinge_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """max(0, 1 - β h) (Liu et al. 2023, eq. 9, RSO; SLiC's own has no reference)."""
    return torch.relu(1 - beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)))


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """
    (h - (1-2ε)/(2β))² (Azar et al. 2023, eq. 17, where β is τ). With sums its optimum is π_ref e^{p(y ≻ μ)/β};
    with means over a response's tokens, as its authors ran it, β does not depend on length.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return (h - (1 - 2 * label_smoothing) / (2 * beta)).square()


def simpo_loss(policy_chosen, policy_rejected, n_chosen, n_rejected, beta, gamma, label_smoothing=0.0):
    """-log σ(β (ℓ_w/|w| - ℓ_l/|l|) - γ) (Meng et al. 2024, eq. 6): no reference; n_…: tokens of each response, (B,)."""
    z = beta * (policy_chosen / n_chosen - policy_rejected / n_rejected) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def cpo_loss(policy_chosen, policy_rejected, beta, label_smoothing=0.0):
    """-log σ(β (ℓ_w - ℓ_l)) (Xu et al. 2024, eq. 3): DPO with a uniform reference; the SFT term is added apart."""
    zero = torch.zeros_like(policy_chosen)
    return dpo_loss(policy_chosen, policy_rejected, zero, zero, beta, label_smoothing)


def log1mexp(x):
    """
    log(1 - e^x) for x ≤ 0 without cancellation (Mächler 2012); x = 0 counts as -1e-7, where the slope is still finite.
    """
    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))),
                       torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def orpo_loss(policy_chosen, policy_rejected, n_chosen, n_rejected, beta):
    """
    -β log σ(log odds_w - log odds_l), odds = p/(1-p), p = e^{ℓ/|y|} the geometric mean of a token's probability (Hong
    et al. 2024, eq. 6 and 7, where β is λ); the likelihood of the chosen answer and its prompt is added apart.
    """
    w, l = (policy_chosen / n_chosen).float(), (policy_rejected / n_rejected).float()
    return -beta * F.logsigmoid((w - l) - (log1mexp(w) - log1mexp(l)))


def kto_loss(policy, ref, liked, kl, beta, weight_liked=1.0, weight_disliked=1.0):
    """
    w (1 - σ(β (log π/π_ref - z_0))) for liked responses, w' (1 - σ(β (z_0 - log π/π_ref))) for the others (Ethayarajh
    et al. 2024, eq. 8). policy, ref (B,), liked (B,) bool, kl: z_0, see kto_kl.
    """
    sign = torch.where(liked, 1.0, -1.0)
    weight = torch.where(liked, weight_liked, weight_disliked)
    return weight * (1 - torch.sigmoid(sign * beta * (policy - ref - kl)))


def kto_kl(policy_mismatched, ref_mismatched):
    """
    z_0 = max(0, mean of log π/π_ref over answers to other questions), detached: KL(π ‖ π_ref) from a batch, a scalar.
    """
    return (policy_mismatched - ref_mismatched).mean().clamp(min=0).detach()


class Batch(NamedTuple):
    """What a loss may use of B examples, (B,) each; of an unpaired row only chosen, ref_chosen, n_chosen and p."""
    chosen: torch.Tensor        # log π(y_w|x), or of the row's response
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    n_chosen: torch.Tensor      # tokens, the end token among them
    n_rejected: torch.Tensor
    p: torch.Tensor             # chance that the first is the better: 1, of a tie 1/2; an unpaired row's label, 1 or 0
    kl: torch.Tensor            # KTO's z_0

    def ratios(self, args):
        """policy and reference of both, per token where the flags say so."""
        per_token = args.length_normalize or (args.loss == "ipo" and args.ipo_normalize == "mean")
        a, b = (self.n_chosen, self.n_rejected) if per_token else (1, 1)
        return self.chosen / a, self.rejected / b, self.ref_chosen / a, self.ref_rejected / b

    def smoothing(self, args):
        return torch.where(self.p == 0.5, 0.5, args.label_smoothing)


class Method(NamedTuple):
    loss: object         # (Batch, args) -> (B,)
    beta: float
    smoothing: float = 0.0
    sft: float = 0.0     # weight of -ℓ_w/|w|
    reference: bool = True
    ties: bool = False   # takes a tie as half a preference


METHODS = {
    "dpo": Method(lambda b, a: dpo_loss(*b.ratios(a), a.beta, b.smoothing(a)), 0.1, ties=True),
    "cdpo": Method(lambda b, a: dpo_loss(*b.ratios(a), a.beta, b.smoothing(a)), 0.1, smoothing=0.1, ties=True),
    "robust": Method(lambda b, a: robust_loss(*b.ratios(a), a.beta, a.label_smoothing), 0.1, smoothing=0.1),
    "hinge": Method(lambda b, a: hinge_loss(*b.ratios(a), a.beta), 0.1),
    "ipo": Method(lambda b, a: ipo_loss(*b.ratios(a), a.beta, b.smoothing(a)), 0.1, ties=True),
    "simpo": Method(lambda b, a: simpo_loss(b.chosen, b.rejected, b.n_chosen, b.n_rejected, a.beta, a.gamma,
                                            b.smoothing(a)), 2.0, reference=False, ties=True),
    "cpo": Method(lambda b, a: cpo_loss(b.chosen, b.rejected, a.beta, b.smoothing(a)), 0.1, sft=1.0, reference=False,
                  ties=True),
    "orpo": Method(lambda b, a: orpo_loss(b.chosen, b.rejected, b.n_chosen, b.n_rejected, a.beta), 0.1, sft=1.0,
                   reference=False),
    "kto": Method(lambda b, a: kto_loss(b.chosen, b.ref_chosen, b.p > 0.5, b.kl, a.beta, a.weight_liked,
                                        a.weight_disliked), 0.1),
    "sft": Method(lambda b, a: torch.zeros_like(b.chosen), 0.1, sft=1.0),
}

# -----------------------------------------------------------------------------
# Data: preferences as ids


class Example(NamedTuple):
    prompt: list
    responses: list  # [chosen, rejected] ids, each with its end token; [response] of an unpaired row
    p: float         # see Batch


def encode(rows, tokenizer, args, T, say=print):
    """
    data.read_preferences' rows -> Examples. What does not fit into T is cut from the prompt's front, a response only
    where it alone is too long; pairs that agree then are left out. Rankings become their pairs. All counts are printed.
    """
    method, examples = METHODS[args.loss], []
    count = dict.fromkeys(("pairs", "ties", "unpaired rows", "prompts cut", "responses cut", "identical pairs left out",
                           "ties left out"), 0)
    for row in rows:
        if "label" in row and args.loss != "kto":
            raise BadInput(f"--loss {args.loss} compares pairs, but --data {args.data} has unpaired rows "
                           f"(completion and label): use --loss kto, or give prompt, chosen and rejected")
        texts = [row["completion"]] if "label" in row else row["ranked"]
        rendered = [data.prompt_and_response(tokenizer, row["messages"], text, args.template) for text in texts]
        limit = min(args.max_response or T, T)
        responses = [r[:limit] for _, r in rendered]
        count["responses cut"] += sum(len(r) > limit for _, r in rendered)
        prompt = rendered[0][0][-(T + 1 - max(map(len, responses))):]
        count["prompts cut"] += len(prompt) < len(rendered[0][0])
        if "label" in row:
            examples.append(Example(prompt, responses, float(row["label"])))
            count["unpaired rows"] += 1
            continue
        for chosen, rejected in itertools.combinations(responses, 2):
            if chosen == rejected:
                count["identical pairs left out"] += 1
            elif row["tie"] and not method.ties:
                count["ties left out"] += 1
            elif args.loss == "kto":
                examples += [Example(prompt, [chosen], 1.0), Example(prompt, [rejected], 0.0)]
            else:
                examples.append(Example(prompt, [chosen, rejected], 0.5 if row["tie"] else 1.0))
                count["ties" if row["tie"] else "pairs"] += 1
    told = ", ".join(f"{n} {what}" for what, n in count.items() if n) or "no rows"
    if not examples:
        raise BadInput(f"--data {args.data} leaves nothing to learn from ({told}): give pairs that differ, or a larger "
                       f"--block_size")
    say(told)
    return examples


def mismatch(examples, seed, T):
    """
    For each example's prompt, cut on the left to fit into T, the response of another one, as KTO's z_0 wants: a fixed
    shuffle, shifted by one.
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    other = {}
    for i, g in enumerate(order):
        shifted = (order[(i + k) % len(order)] for k in range(1, len(order) + 1))
        other[g] = next((j for j in shifted if examples[j].prompt != examples[g].prompt), g)
    answers = [examples[other[g]].responses[0] for g in range(len(examples))]
    return [(e.prompt[-(T + 1 - len(answer)):], [answer]) for e, answer in zip(examples, answers)]


# -----------------------------------------------------------------------------
# Log-probabilities of examples


def to_tensors(packed, device):
    return [torch.from_numpy(a).to(device, non_blocking=True) for a in packed[:5]]


@torch.no_grad()
def sums_of(model, groups, T, rows, share, world=1, rank=0):
    """
    log p of every response of the groups, [[float, …], …], with micro-batches of `rows` rows of T; each rank computes
    its part and all get everything. The model's own forward, so a reference needs no wrapper.
    """
    model.eval()
    mine, found = groups[rank::world], {}
    for batch in data.micro_batches(mine, T, rows, share):
        packed = data.pack_branches([mine[g] for g in batch], T, share, steady=model.device.type == "cuda")
        idx, targets, positions, doc_ids, segments = to_tensors(packed, model.device)
        sums = model(idx, positions=positions, doc_ids=doc_ids, outcome=lambda m, x: add_up(
            token_logprobs(m, x, targets), segments, packed.n)).tolist()
        for g in batch:
            found[g], sums = sums[:len(mine[g][1])], sums[len(mine[g][1]):]
    mine = [found[g] for g in range(len(mine))]
    if world == 1:
        return mine
    parts = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return [parts[g % world][g // world] for g in range(len(groups))]


def cached(path, key, compute):
    """compute() -> [[float, …], …], kept in a file that is named by a hash of everything it depends on."""
    path = Path(path) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"
    if path.exists():
        values = load_safetensors(path)
        return [v.tolist() for v in values["sums"].split(values["counts"].tolist())], True
    found = compute()
    if int(os.environ.get("RANK", 0)) == 0:
        save_safetensors({"sums": torch.tensor([s for row in found for s in row]),
                          "counts": torch.tensor([len(row) for row in found])}, path)
    return found, False


def print_of(folder):
    """What tells one set of weights from another: a digest of a run's files, or the name on the hub."""
    sha, files = hashlib.sha256(str(folder).encode()), sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 24):
                sha.update(block)
    return sha.hexdigest() if files else str(folder)


@contextlib.contextmanager
def reference(model, args, device):
    """
    The model that log-ratios are taken to: the adapter switched off, or --ref (else --init) for as long as it is asked.
    """
    if model.adapter is not None and not args.ref:
        with lora.disabled(model):
            yield model
    else:
        other = lora.plain(args.ref or args.init, device)
        other.compute_dtype = model.compute_dtype
        yield other.eval()


# -----------------------------------------------------------------------------
# Samples, and who judges them


def judge_of(args, device):
    """score(rows, texts) -> [float]: the checker, or a reward model's run."""
    kind, _, where = args.judge.partition("=")
    if kind == "check":
        return lambda rows, texts: [float(data.is_right(text, row["answer"])) for row, text in zip(rows, texts)]
    if kind != "reward" or not where:
        raise BadInput(f"--judge {args.judge} is unknown: use check, or reward=DIR with a run of rlhf.py --stage rm")
    model = RewardModel(where, device)
    return lambda rows, texts: model([row["prompt"] for row in rows], texts)


def sample_pairs(model, tokenizer, tasks, args, judge, seed):
    """
    Rows as read_preferences gives them, from the model's own answers: to each question --samples of them, and from the
    different ones the best and the worst by the judge, or with noise (--judge_noise) as Bradley and Terry would draw
    it.
    """
    prompts = [data.question(tokenizer, task["prompt"], args.template) for task in tasks]
    rng, rows, end = random.Random(seed), [], chat_end(tokenizer, chat_format(tokenizer, args.template)[0])
    answers = rollouts(model, prompts, args.samples, end, args.max_new_tokens, args.temperature, seed,
                       args.rollout_batch)
    texts = [[data.answer_text(tokenizer, ids) for ids in group] for group in answers]
    flat = [(task, text) for task, group in zip(tasks, texts) for text in group]
    scores = judge([task for task, _ in flat], [text for _, text in flat])
    for g, (task, group) in enumerate(zip(tasks, texts)):
        scored = list(dict(zip(group, scores[g * args.samples:(g + 1) * args.samples])).items())
        rng.shuffle(scored)
        scored.sort(key=lambda item: item[1])
        if len(scored) > 1 and scored[-1][1] > scored[0][1]:
            (worst, low), (best, high) = scored[0], scored[-1]
            if args.judge_noise and rng.random() > 1 / (1 + math.exp(min(50, (low - high) / args.judge_noise))):
                best, worst = worst, best
            rows.append({"messages": [{"role": "user", "content": task["prompt"]}], "ranked": [best, worst],
                         "tie": False,
                         "margin": high - low})
    mean = sum(scores) / len(scores)
    if not rows:
        raise BadInput(f"of {len(tasks)} questions none has answers that the judge tells apart (mean score "
                       f"{mean:.3f}): give "
                       f"more --samples or questions (--limit), or start from a model that is sometimes right")
    return rows, mean


def write_pairs(path, rows):
    with replace_file(path, "w") as f:
        for row in rows:
            f.write(json.dumps({"prompt": row["messages"], "chosen": row["ranked"][0], "rejected": row["ranked"][1]},
                               ensure_ascii=False) + "\n")


# -----------------------------------------------------------------------------
# One optimizer step


class Trainer:
    """Model, optimizer, and a step over a batch of examples, in micro-batches of packed rows."""

    def __init__(self, model, args, process, T):
        self.args, self.process, self.T, self.rows = args, process, T, args.micro_batch
        self.method, self.share = METHODS[args.loss], shares_prompts(model.config)
        self.sharded = shard(model, process, args)
        groups = adamw_groups(self.sharded.stand_in, args.weight_decay)
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=(0.9, 0.99), eps=1e-8)
        self.ends = None  # ids that end a response

    def parts(self, groups):
        return same_count(data.micro_batches(groups, self.T, self.rows, self.share), self.sharded)

    def forward(self, groups, last, ask_prompt=False, entropy=False):
        """
        ℓ of each response (n,), then of each prompt if asked; entropy, sum over tokens; p(end) at ends, summed; ends.
        """
        steady = self.process.device.type == "cuda"
        packed = data.pack_branches(groups or [([0], [[0]])], self.T, self.share, ask_prompt, steady)
        idx, targets, positions, doc_ids, segments = to_tensors(packed, self.process.device)
        n = packed.n + (len(groups) if ask_prompt else 0)

        def outcome(model, x):
            logp = token_logprobs(model, x, targets)
            with torch.no_grad():
                at_end = torch.isin(targets, self.ends) & (segments >= 0) & (segments < packed.n)
                stats = torch.stack(((logp.exp() * at_end).sum(), at_end.sum().float(), torch.zeros_like(logp[0, 0])))
                if entropy:
                    stats[2] = (token_logprobs(model, x, targets, entropy=True)[1] * (segments < packed.n)).sum()
            return add_up(logp, segments, n), stats
        inputs = dict(idx=idx, positions=positions, doc_ids=doc_ids, outcome=outcome)
        if self.sharded.model.training:
            return step_forward(self.sharded, last, **inputs)
        return self.sharded.model(**inputs)

    def batch(self, sums, examples, refs, kl):
        """Batch of examples from the ℓ of their responses, in order."""
        pairs, device = len(examples[0].responses) == 2, sums.device
        column = lambda values: torch.tensor(values, device=device, dtype=torch.float32)
        first, second = (sums[0::2], sums[1::2]) if pairs else (sums, sums)
        return Batch(first, second, column([r[0] for r in refs]), column([r[-1] for r in refs]),
                     column([len(e.responses[0]) for e in examples]), column([len(e.responses[-1]) for e in examples]),
                     column([e.p for e in examples]), kl)

    def kl(self, examples):
        """KTO's z_0 over the whole batch; examples of this rank, (group, its reference's ℓ) of mismatched answers."""
        total = torch.zeros(2, device=self.process.device)
        groups = [group for group, _ in examples]
        with torch.no_grad():
            for part in self.parts(groups):
                sums, _ = self.forward([groups[g] for g in part], last=False)
                ref = torch.tensor([examples[g][1][0] for g in part], device=sums.device)
                total += torch.stack(((sums[:len(part)] - ref).sum(), total.new_tensor(len(part))))
        total = all_reduce(total)
        return kto_kl(total[0] / total[1], torch.zeros_like(total[0]))

    def step(self, examples, refs, mismatched, entropy=False):
        """
        The gradient of a batch's mean loss from this rank's part of it, and an update. The loss is Σ over pairs / pairs
        of all ranks, the SFT term Σ over tokens / tokens, so neither depends on how the batch is cut. Returns
        the sums that `figures` turns into what is logged, over all ranks, and the gradient's norm.
        """
        args, device, world = self.args, self.process.device, self.process.dp_world
        orpo, pairs = args.loss == "orpo", len(examples[0].responses) == 2
        liked = [e for e in examples if pairs or e.p > 0.5]
        tokens = sum(len(e.responses[0]) + (len(e.prompt) - 1) * orpo for e in liked)
        count, tokens = all_reduce(torch.tensor([len(examples), tokens], dtype=torch.float32, device=device)).tolist()
        kl = self.kl(mismatched) if args.loss == "kto" else torch.zeros((), device=device)
        parts, totals = self.parts([(e.prompt, e.responses) for e in examples]), torch.zeros(len(SUMS), device=device)
        for i, part in enumerate(parts):
            chosen = [examples[g] for g in part]
            sums, stats = self.forward([(e.prompt, e.responses) for e in chosen], i == len(parts) - 1, orpo, entropy)
            if not chosen:  # another rank has more
                (0 * sums.sum()).backward()
                continue
            n = sum(len(e.responses) for e in chosen)
            b = self.batch(sums[:n], chosen, [refs[g] for g in part], kl)
            loss = self.method.loss(b, args).sum() / count
            nll = -(b.chosen if pairs else b.chosen * (b.p > 0.5)).sum() / max(tokens, 1)
            if orpo:
                nll = nll - sums[n:].sum() / tokens
            ((loss + args.sft_weight * nll) * world).backward()
            totals += tally(b, loss.detach() * count, nll.detach() * tokens, stats, args.beta, pairs)
        norm = self.sharded.reduce(args.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sharded.publish()
        totals = dict(zip(SUMS, all_reduce(totals).tolist()))
        return figures(totals, count, max(tokens, 1), args.sft_weight) | (
            {"kl_batch": kl.item()} if args.loss == "kto" else {}) | {"grad_norm": float(norm)}

    @torch.no_grad()
    def evaluate(self, examples, refs, mismatched):
        """figures of held-out examples."""
        self.sharded.eval()
        world, rank = self.process.dp_world, self.process.dp_rank
        mine = range(rank, len(examples), world)
        kl = torch.zeros((), device=self.process.device)
        if self.args.loss == "kto":
            kl = self.kl([mismatched[i] for i in mine])
        parts = self.parts([(examples[i].prompt, examples[i].responses) for i in mine])
        totals, pairs = torch.zeros(len(SUMS) + 1, device=self.process.device), len(examples[0].responses) == 2
        for part in parts:
            chosen = [examples[mine[g]] for g in part]
            if not chosen:
                self.forward([], True)
                continue
            n = sum(len(e.responses) for e in chosen)
            sums, stats = self.forward([(e.prompt, e.responses) for e in chosen], True, entropy=True)
            b = self.batch(sums[:n], chosen, [refs[mine[g]] for g in part], kl)
            loss, liked = self.method.loss(b, self.args).sum(), torch.ones_like(b.p) if pairs else b.p
            totals += torch.cat((tally(b, loss, -(b.chosen * liked).sum(), stats, self.args.beta, pairs),
                                 (b.n_chosen * liked).sum().view(1)))
        *totals, tokens = all_reduce(totals).tolist()
        self.sharded.train()
        return figures(dict(zip(SUMS, totals)), len(examples), max(tokens, 1), self.args.sft_weight)


SUMS = ("loss", "nll", "chosen", "rejected", "reward_chosen", "reward_rejected", "won", "preferred", "ratio",
        "responses",
        "liked", "disliked", "tokens", "p_end", "ends", "entropy")


def tally(b, loss, nll, stats, beta, pairs):
    """Sums over a micro-batch of what is logged, in the order of SUMS, (16,)."""
    b = Batch(*(t.detach() for t in b))
    good = torch.ones_like(b.p) if pairs else b.p
    bad = torch.ones_like(b.p) if pairs else 1 - b.p
    w, l = b.chosen - b.ref_chosen, b.rejected - b.ref_rejected
    better = lambda a, c: ((a > c).float() + 0.5 * (a == c).float()).sum() if pairs else a.new_zeros(())
    return torch.stack([
        loss, nll, (b.chosen * good).sum(), (b.rejected * bad).sum(), beta * (w * good).sum(), beta * (l * bad).sum(),
        better(w, l), better(b.chosen, b.rejected), w.sum() + (l.sum() if pairs else 0),
        torch.tensor(len(w) * (2.0 if pairs else 1.0), device=w.device), good.sum(), bad.sum(),
        b.n_chosen.sum() + (b.n_rejected.sum() if pairs else 0), *stats]).float()


def figures(s, count, tokens, sft_weight):
    """
    What is logged, from sums over all ranks. reward_… is β log π/π_ref; accuracy the share of pairs where the chosen
    one's is higher, preferred where its log π is (a draw counts half); kl is -mean log π/π_ref over the responses:
    KL(π_ref ‖ π) where they are the reference's own samples.
    """
    pairs = s["responses"] > count
    good, bad, ends = max(s["liked"], 1), max(s["disliked"], 1), max(s["ends"], 1)
    found = {"loss": s["loss"] / count + sft_weight * s["nll"] / tokens,
             "reward_chosen": s["reward_chosen"] / good, "reward_rejected": s["reward_rejected"] / bad,
             "margin": s["reward_chosen"] / good - s["reward_rejected"] / bad,
             "logp_chosen": s["chosen"] / good, "logp_rejected": s["rejected"] / bad,
             "kl": -s["ratio"] / s["responses"], "length": s["tokens"] / s["responses"],
             "eos_rate": s["ends"] / s["responses"], "p_eos": s["p_end"] / ends}
    if pairs:
        found |= {"accuracy": s["won"] / count, "preferred": s["preferred"] / count}
    return found | ({"entropy": s["entropy"] / s["tokens"]} if s["entropy"] else {})


def lr_share(step, steps, warmup, schedule):
    """
    The step's share of the peak rate: up in a line over the warm-up's share of the steps, then down to 0, or constant.
    """
    rise = max(1, warmup * steps)
    return min(1.0, (step + 1) / rise, 1.0 if schedule == "constant" else (steps - step) / max(1, steps - rise))


def round_to(x):
    return float(f"{x:.6g}")


class Falling:
    """Says once, in a sentence, that the chosen responses' log-probability keeps falling, and what cures it."""

    def __init__(self, window):
        self.window, self.values, self.told = max(1, window), [], False

    def sentence(self, logp_ratio):
        """
        logp_ratio: mean of log π/π_ref of a batch's chosen responses. Three windows, each lower, the last below -0.5.
        """
        self.values.append(logp_ratio)
        if self.told or len(self.values) < 3 * self.window:
            return ""
        a, b, c = (sum(self.values[-k * self.window:][:self.window]) / self.window for k in (3, 2, 1))
        if not (a > b > c and c < -0.5):
            return ""
        self.told = True
        return (f"the chosen responses' log-probability has fallen by {-c:.1f} nats below the reference's and keeps "
                f"falling: "
                f"the loss asks only for the difference to the rejected ones; --sft_weight 1 holds it up")


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", default="train", choices=["train", *COMMANDS], help="table, frontier: see above")
    # run
    add("--init", default="out/sft",
        help="policy to start from, and reference: a run, a Hugging Face folder or hub name")
    add("--ref", help="another reference, of the same tokenizer (default: --init)")
    add("--out", default="out/dpo", help="run directory; a finished run already there is kept as OUT.old")
    add("--resume", action="store_true", help="go on from OUT/optim.pt, with its arguments unless given again")
    add("--seed", type=int, default=0, help="of samples and data order")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations")
    add("--compile", default=None, action=argparse.BooleanOptionalAction,
        help="torch.compile the blocks (default: on CUDA)")
    # data
    add("--data", default="arithmetic", choices=["pairs", "hh", "prompts", *data.TASKS],
        help="pairs: --input FILE of preferences; hh: hh-rlhf; the others, and prompts (--input FILE with prompt and "
             "answer): pairs from the model's own answers")
    add("--input", help="a local file instead of a download")
    add("--limit", type=int, default=0, help="only so many training rows or questions; 0: all, of questions 1000")
    add("--val", type=int, default=0, help="held-out rows or questions (0: 512, at most a tenth of a file)")
    add("--template", help="chat template (default: the tokenizer's own)")
    add("--block_size", type=int, default=0,
        help="tokens of a packed row, at least of a prompt and its response (0: the model's, at most 2048)")
    add("--max_response", type=int, default=0, help="tokens of a response; the rest is cut; 0: what fits")
    # samples
    add("--judge", default="check", help="of the model's own answers: check, or reward=DIR")
    add("--judge_noise", type=float, default=0.0, help="temperature of the judge's choice (Bradley-Terry); 0: none")
    add("--samples", type=int, default=8, help="answers to a question, from which a pair is made")
    add("--temperature", type=float, default=1.0, help="of the samples")
    add("--max_new_tokens", type=int, default=16, help="of a sample")
    add("--rollout_batch", type=int, default=512, help="samples at once")
    add("--rounds", type=int, default=1, help="times that pairs are sampled from the present policy and trained on")
    add("--round_ref", default="first", choices=["first", "last"],
        help="reference of a later round: --init, or the policy that the round began with")
    add("--check", default="auto",
        help="questions asked before and after: arithmetic, FILE.jsonl, or none (default: as --data)")
    # loss
    add("--loss", default="dpo", choices=list(METHODS))
    add("--beta", type=float, help="β, of IPO τ, of ORPO λ (default: 0.1, simpo 2)")
    add("--label_smoothing", type=float,
        help="ε of dpo, cdpo, robust, ipo, simpo, cpo (default: cdpo and robust 0.1, others 0)")
    add("--sft_weight", type=float,
        help="of the chosen responses' negative log-likelihood a token (default: cpo, orpo, sft 1; dpo on a task's own "
             "samples 1; others 0)")
    add("--gamma", type=float, default=0.5, help="SimPO's margin")
    add("--ipo_normalize", default="mean", choices=["mean", "sum"], help="of the log-ratios over a response's tokens")
    add("--length_normalize", action="store_true", help="log-ratios per token, in dpo, cdpo, robust, hinge, ipo")
    add("--reference_free", action="store_true", help="a uniform reference")
    add("--weight_liked", type=float, default=1.0, help="of KTO's desirable rows")
    add("--weight_disliked", type=float, default=1.0, help="of its undesirable ones")
    # optimization
    add("--epochs", type=float, default=2.0, help="passes over the pairs of a round")
    add("--steps", type=int, default=0, help="of a round; 0: by --epochs")
    add("--batch", type=int, default=32, help="pairs or unpaired rows per optimizer step over all processes")
    add("--micro_batch", type=int, default=0, help="packed rows per forward pass and process (0: as fits)")
    add("--lr", type=float, default=1e-4, help="peak; models of 100M and more want 1e-6, their adapters 1e-5")
    add("--schedule", default="linear", choices=["linear", "constant"], help="after the warm-up")
    add("--warmup", type=float, default=0.1, help="share of the steps")
    add("--weight_decay", type=float, default=0.0, help="of matrices")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    lora.add_flags(parser)
    # processes
    add("--parallel", default="ddp", choices=list(PARALLEL), help="; ".join(f"{k}: {v}" for k, v in PARALLEL.items()))
    add("--recompute", default="none", choices=["none", "block", "selective"], help="activations, in the backward pass")
    add("--timeout", type=float, default=120, help="seconds after which a process that waits for another gives up")
    # looking
    add("--eval_every", type=int, default=0, help="steps; 0: only before and after")
    add("--save_every", type=int, default=0, help="steps; 0: only at the end")
    add("--log_every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    # table, frontier
    add("--seeds", type=int, default=3, help="of a table")
    add("--jobs", type=int, default=1, help="runs of a table at once")
    add("--lrs", default="3e-5,1e-4,3e-4", help="rates that a table tries on seed 0")
    add("--betas", default="0.03,0.1,0.3", help="β that it tries, as multiples of a method's own over 0.1")
    args = parser.parse_args(argv)
    if args.resume:  # saved arguments become the defaults, so what is given again wins
        parser.set_defaults(**{**load_state(args.out)["args"], "resume": True})
        args = parser.parse_args(argv)
    return check_args(args)


def check_args(args):
    """Fills in what depends on the method, and refuses what cannot be meant."""
    method = METHODS[args.loss]
    own = args.data in data.TASKS and args.loss == "dpo"
    for name, default in (("beta", method.beta), ("label_smoothing", method.smoothing),
                          ("sft_weight", method.sft or float(own))):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.beta <= 0:
        raise BadInput(f"--beta {args.beta:g} must be positive: 0.1 is usual")
    if not 0 <= args.label_smoothing < 0.5:
        raise BadInput(f"--label_smoothing {args.label_smoothing:g} is the chance of a wrong label: 0 or more, below "
                       f"0.5")
    for name, without in (("label_smoothing", ("hinge", "orpo", "kto", "sft")),
                          ("length_normalize", ("simpo", "cpo", "orpo", "kto", "sft"))):
        if getattr(args, name) and args.loss in without:
            raise BadInput(f"--loss {args.loss} has no --{name}: leave it out")
    if args.data in ("pairs", "prompts") and not args.input:
        raise BadInput(f"--data {args.data} needs --input FILE.jsonl")
    if args.data in ("pairs", "hh") and args.rounds > 1:
        raise BadInput(f"--rounds {args.rounds} samples answers to questions, which --data {args.data} does not have: "
                       f"use --data prompts --input FILE")
    for name in ("batch", "rounds", "samples", "max_new_tokens", "rollout_batch", "log_every"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give 1 or more")
    return args


def load_state(out):
    try:
        return torch.load(Path(out) / "optim.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"--resume: there is no {Path(out) / 'optim.pt'}; start without --resume") from None
    except Exception as error:  # pickle, zip and torch each have their own
        raise BadInput(f"{Path(out) / 'optim.pt'} is damaged ({type(error).__name__}): start without "
                       f"--resume") from None


def questions(args, name, split, n):
    """n questions of a task, or of --input, of which a tenth, at most --val or 512, is held out by a fixed shuffle."""
    if name != "prompts":
        return data.read_tasks(name, split, n, name)
    rows = data.read_tasks(name, split, None, args.input)
    random.Random(0).shuffle(rows)
    held = min(args.val or 512, max(1, len(rows) // 10))
    return (rows[held:] if split == "train" else rows[:held])[:n]


def load_policy(args, process):
    """The model with its adapter, its tokenizer, and whether activations are bf16."""
    tokenizer = Tokenizer.from_pretrained(args.init)
    if args.ref and Tokenizer.from_pretrained(args.ref).spec() != tokenizer.spec():
        raise BadInput(f"--ref {args.ref} has another tokenizer than --init {args.init}: log-probabilities of "
                       f"different tokens do not compare; give a reference of the same one")
    chat_end(tokenizer, chat_format(tokenizer, args.template)[0])
    model = lora.plain(args.init)
    if args.dtype == "auto":
        cuda = process.device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.dtype = "bfloat16" if cuda else "float32"
    model.compute_dtype = getattr(torch, args.dtype)
    for m in model.modules():  # off in policy and reference alike
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    model.config.dropout = 0.0
    adapter = lora.from_args(args)
    if adapter is not None:
        lora.apply(model, adapter, tokenizer, args.seed)
    model.to(process.device)
    return model, tokenizer


def split_rows(args):
    """(training rows, held-out rows) of a set of preferences."""
    if args.data == "hh":
        train, val = hh.preferences("train", args.input), hh.preferences("val", args.input)[:args.val or 512]
    else:
        rows = data.read_preferences(args.input)
        random.Random(0).shuffle(rows)
        n = args.val or min(512, max(1, len(rows) // 10))
        if n >= len(rows):
            raise BadInput(f"--val {n} leaves none of the {len(rows)} rows of {args.input} to train on")
        train, val = rows[n:], rows[:n]
    return train[:args.limit or None], val


def check_task(model, tokenizer, tasks, args, device, refers=None):
    """
    Answers to held-out questions: accuracy greedy and sampled, share that end by themselves, and KL(π ‖ π_ref) = mean
    of log π/π_ref over the samples, in nats a response, with the reference `refers`.
    """
    end = chat_end(tokenizer, chat_format(tokenizer, args.template)[0])
    prompts = [data.question(tokenizer, task["prompt"], args.template) for task in tasks]
    found = {}
    for name, temperature in (("accuracy", 0.0), ("accuracy_sampled", 1.0)):
        answers = [a for a, in rollouts(model, prompts, 1, end, args.max_new_tokens, temperature, 977,
                                        args.rollout_batch)]
        texts = [data.answer_text(tokenizer, a) for a in answers]
        found[name] = sum(data.is_right(text, t["answer"]) for text, t in zip(texts, tasks)) / len(tasks)
    found["ended"] = sum(a[-1] == end for a in answers) / len(answers)
    groups = [(p, [a]) for p, a in zip(prompts, answers)]
    T, share = min(args.block_size or 2048, model.context), shares_prompts(model.config)
    policy = sums_of(model, groups, T, args.micro_batch, share)
    with refers(model) as ref:
        base = sums_of(ref, groups, T, args.micro_batch, share)
    found["kl"] = sum(p - r for (p,), (r,) in zip(policy, base)) / len(groups)
    wrong = next((i for i, t in enumerate(tasks) if not data.is_right(texts[i], t["answer"])), 0)
    found["sample"] = f"{tasks[wrong]['prompt']} {texts[wrong]!r}"
    return found


def main():
    args = get_args()
    if args.command != "train":
        return COMMANDS[args.command](args)
    process = setup_process(args.device, args)
    device, main_process = process.device, process.rank == 0
    say = print if main_process else lambda *a, **k: None
    started, out = time.time(), Path(args.out)
    saved = load_state(args.out) if args.resume else None
    if not args.resume:
        check_out(args.out, args.init)

    # model
    model, tokenizer = load_policy(args, process)
    T = min(args.block_size or 2048, model.context)
    if args.block_size > model.context:
        raise BadInput(f"--block_size {args.block_size} is more than the model's context of {model.context}")
    args.micro_batch = args.micro_batch or max(1, (16384 if device.type == "cuda" else 4096) // T)
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile_parts()
    share, refers = shares_prompts(model.config), lambda m: reference(m, args, device)
    trainer = Trainer(model, args, process, T)
    ends = chat_end(tokenizer, chat_format(tokenizer, args.template)[0])
    trainer.ends = torch.tensor([ends], device=device)
    if trainer.sharded.sharded and model.adapter is not None:
        raise BadInput(f"--parallel {args.parallel} with an adapter cannot gather the model to generate with: use "
                       f"--parallel ddp, or full tuning")
    whole = model if not trainer.sharded.sharded else lora.plain(args.init, device)  # a model that can generate
    whole.compute_dtype = model.compute_dtype
    trained, total = lora.trained_share(model)
    say(f"{total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M of them trained; {args.loss}, β {args.beta:g}"
        + (f" + {args.sft_weight:g} x SFT" if args.sft_weight else "") + f"; {device}, {args.dtype}")

    def look():
        """The present weights in a model that can generate; of sharded parameters that is a copy."""
        return whole if whole is model else gather_into(whole, model)

    # what is asked, and what is compared
    sampled = args.data not in ("pairs", "hh")
    check = {"auto": args.data if sampled else "none"}.get(args.check, args.check)
    if check == "none" or check == "prompts" and args.judge != "check":
        asked = []
    else:
        asked = questions(args, check, "val", args.val or 512)
    before = check_task(look(), tokenizer, asked, args, device, refers) if asked else {}
    if before:
        say("before: " + "  ".join(f"{k} {v:.4f}" for k, v in before.items() if k != "sample"))
        say(f"    {before['sample']}")

    if args.template:  # what chats with it later writes what it was trained on
        tokenizer.chat = dict(zip(("template", "system"), chat_format(tokenizer, args.template)))
    step, metrics, log = 0, {}, None
    if main_process:
        if args.resume:
            os.truncate(out / "log.jsonl", saved["log"])
        else:
            start_run(out)
            tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
    process.wait()
    if args.resume:
        trainer.sharded.load_state_dict(saved, [trainer.optimizer])
        step = saved["step"]

    def save(metrics, last=False):
        state = trainer.sharded.state_dict([trainer.optimizer])
        run_json = {"stage": "dpo", "step": step, "metrics": metrics, "args": vars(args), "tokenizer": tokenizer.spec()}
        if main_process:
            log.flush()
            with replace_file(out / "optim.pt") as f:
                torch.save({**state, "step": step, "args": vars(args), "log": (out / "log.jsonl").stat().st_size}, f)
            if model.adapter is not None:
                lora.save(out, model, run_json, args.init)
            else:
                save_run(out, model, run_json, None if trainer.sharded.plain else state["model"])
        process.wait()

    judge = judge_of(args, device) if sampled else None
    tokens_seen, busy, done = 0, 0.0, 0
    for round in range(args.rounds):
        # pairs of this round
        if sampled:
            files = [out / f"pairs{round}-{split}.jsonl" for split in ("train", "val")]
            if not all(f.exists() for f in files):
                present = look()  # on every rank: it may gather
                if main_process:
                    begun = time.time()
                    for file, split, n in zip(files, ("train", "val"), (args.limit or 1000, args.val or 512)):
                        tasks = questions(args, args.data, split, n if split == "train" else n // 2)
                        rows, mean = sample_pairs(present, tokenizer, tasks, args, judge, args.seed + 1000 * round)
                        write_pairs(file, rows)
                        say(f"round {round}, {split}: {len(rows)} pairs from {args.samples} answers to each of "
                            f"{len(tasks)} "
                            f"questions, mean score {mean:.3f}, in {time.time() - begun:.0f} s")
                process.wait()
            rows, held = (data.read_preferences(f) for f in files)
        else:
            rows, held = split_rows(args)
        examples, val = encode(rows, tokenizer, args, T, say), encode(held, tokenizer, args, T, say)

        # the reference's log-probabilities, once
        key = [print_of(args.ref or args.init), tokenizer.spec(), args.dtype, T, share,
               model.adapter and model.adapter.quantize,
               round if args.round_ref == "last" else 0]

        def refer(groups):
            if not METHODS[args.loss].reference or args.reference_free:
                return [[0.0] * len(g[1]) for g in groups]
            def compute():
                with contextlib.nullcontext(look()) if args.round_ref == "last" and round else refers(model) as ref:
                    return sums_of(ref, groups, T, args.micro_batch, share, process.dp_world, process.dp_rank)
            where = out / "reference" if round and args.round_ref == "last" else out.parent / "reference"
            found, hit = cached(where, [key, groups], compute)
            say(f"reference: {len(groups)} prompts, " + ("from the cache" if hit else "computed"))
            return found
        refs, val_refs = (refer([(e.prompt, e.responses) for e in es]) for es in (examples, val))
        kto = args.loss == "kto"
        wrong, val_wrong = ([(g, r) for g, r in zip(gs, refer(gs))] if kto else [None] * len(es)
                            for es, gs in ((es, mismatch(es, args.seed, T) if kto else None) for es in (examples, val)))
        process.wait()
        model.train()
        steps = args.steps or max(1, math.ceil(args.epochs * len(examples) / min(args.batch, len(examples))))
        if args.batch > len(examples):
            say(f"--batch {args.batch} is more than the {len(examples)} examples: each step takes them all")
        if round == 0 and not args.resume:
            first = trainer.evaluate(val, val_refs, val_wrong)
            say("held out: " + "  ".join(f"{k} {v:.4f}" for k, v in first.items()))
        falling = Falling(steps // 10)

        # loop
        for local_step in range(steps):
            if done + local_step < step:
                continue
            for group in trainer.optimizer.param_groups:
                group["lr"] = args.lr * lr_share(local_step, steps, args.warmup, args.schedule)
            begun = time.time()
            mine = data.batch_indices(len(examples), args.batch, local_step, args.seed
                                 + round)[process.dp_rank::process.dp_world]
            if not mine:
                raise BadInput(f"{len(examples)} examples are too few for {process.dp_world} processes")
            logged = (local_step + 1) % args.log_every == 0 or local_step in (0, steps - 1)
            line = trainer.step([examples[i] for i in mine], [refs[i] for i in mine], [wrong[i] for i in mine], logged)
            if not math.isfinite(line["loss"]):
                raise BadInput(f"the loss is {line['loss']} at step {step + 1}: lower --lr; {out} keeps its last save")
            step += 1
            seconds = time.time() - begun
            tokens = sum(len(examples[i].prompt) + sum(map(len, examples[i].responses))
                         for i in mine) * process.dp_world
            if local_step:
                tokens_seen, busy = tokens_seen + tokens, busy + seconds
            line = {"step": step, "round": round, "lr": group["lr"]} | line | {"tokens_per_s": int(tokens / seconds)}
            if main_process:
                log.write(json.dumps({k: v if isinstance(v, int) else round_to(v) for k, v in line.items()}) + "\n")
            if logged:
                say(f"step {step}/{done + steps}  loss {line['loss']:.4f}  reward {line['reward_chosen']:+.3f} "
                    f"{line['reward_rejected']:+.3f}" + (f"  accuracy {line['accuracy']:.2f}" if "accuracy" in line
                                                         else "")
                    + f"  logp {line['logp_chosen']:.2f} {line['logp_rejected']:.2f}  kl {line['kl']:.3f}  length "
                    f"{line['length']:.1f}  entropy {line['entropy']:.3f}  p(end) {line['p_eos']:.3f}  norm "
                    f"{line['grad_norm']:.2f}  {line['tokens_per_s']:,} tok/s", flush=True)
            if sentence := falling.sentence(line["reward_chosen"] / args.beta):
                say(f"warning: {sentence}")
            if args.eval_every and step % args.eval_every == 0:
                found = trainer.evaluate(val, val_refs, val_wrong)
                say(f"step {step}, held out: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
            if args.save_every and step % args.save_every == 0:
                save(metrics)
        done += steps
        last = trainer.evaluate(val, val_refs, val_wrong)

    # before and after
    kept = ("loss", "margin", "logp_chosen", "logp_rejected", "preferred")
    metrics = {f"val_{k}": last[k] for k in kept if k in last}
    metrics |= {"preference_accuracy": last["accuracy"]} if "accuracy" in last else {}
    after = check_task(look(), tokenizer, asked, args, device, refers) if asked else {}
    shown = ("accuracy", "preferred", "margin", "logp_chosen", "logp_rejected")
    rows = [] if args.resume else [(f"held-out {k}", first.get(k), last.get(k)) for k in shown]
    rows += [(k, before[k], after[k]) for k in after if k != "sample"]
    say(f"{'':24}{'before':>10}{'after':>10}")
    for name, a, b in rows:
        if b is not None:
            say(f"{name:24}{a:10.4f}{b:10.4f}")
    metrics |= {k: v for k, v in after.items() if k != "sample"}
    metrics |= {"tokens_per_s": tokens_seen / busy} if busy else {}
    metrics |= {"peak_memory": peak_memory(device), "seconds": time.time() - started}
    metrics = {k: round_to(v) for k, v in metrics.items()}
    save(metrics)
    if main_process:
        if after:
            print("a sample: " + after["sample"])
        print(json.dumps(metrics))
    process.close()


# -----------------------------------------------------------------------------
# Many runs, and the world of 64 answers


def table(args):
    """Every method from one base: rate and β chosen on seed 0 by accuracy of the samples, then mean ± sd over seeds."""
    out = Path(args.out)
    shared = ["--init", args.init, "--data", args.data, "--epochs", args.epochs, "--limit", args.limit,
              "--device", args.device, "--max_new_tokens", args.max_new_tokens, "--samples", args.samples]
    shared += ["--input", args.input] if args.input else []
    rows = {"SFT on chosen": ["--loss", "sft"], "DPO": ["--loss", "dpo", "--sft_weight", 0],
            "DPO + SFT": ["--loss", "dpo", "--sft_weight", 1]}
    rows |= {name: ["--loss", name.lower()] for name in ("cDPO", "robust", "IPO", "hinge", "SimPO", "CPO", "ORPO",
                                                         "KTO")}

    def many(runs):
        """{name: metrics} of {name: flags}, --jobs at a time."""
        found = lora.launch("dpo.py", {str(out / name): [*shared, *flags] for name, flags in runs.items()}, args.jobs)
        return {name: found[str(out / name)] for name in runs}

    grid = {}
    for name, flags in rows.items():
        scales = args.betas.split(",") if flags[1] not in ("sft", "orpo", "cpo") else ["0.1"]
        for lr, scale in itertools.product(args.lrs.split(","), scales):
            beta = METHODS[flags[1]].beta * float(scale) / 0.1
            grid[f"{name.replace(' ', '')}-{lr}-{beta:g}"] = (name, [*flags, "--lr", lr, "--beta", beta])
    tried = many({run: flags for run, (_, flags) in grid.items()})
    best = {name: max((r for r in grid if grid[r][0] == name), key=lambda r: tried[r]["accuracy_sampled"])
            for name in rows}
    runs = {best[name] if seed == 0 else f"{best[name]}-{seed}": (name, [*grid[best[name]][1], "--seed", seed])
            for name in rows for seed in range(args.seeds)}
    found = many({run: flags for run, (_, flags) in runs.items()})
    columns = ("accuracy", "accuracy_sampled", "preference_accuracy", "kl", "val_logp_chosen", "val_logp_rejected")
    print("| method | lr, β | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for name in rows:
        cells = []
        for column in columns:
            values = np.array([m.get(column, math.nan) for run, m in found.items() if runs[run][0] == name])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}")
        flags = grid[best[name]][1]
        lr, beta = (flags[flags.index(flag) + 1] for flag in ("--lr", "--beta"))
        print(f"| {name} | {lr}, {beta:g} | " + " | ".join(cells) + " |")


def tabular(world, loss, steps=400, lr=0.08):
    """The policy over a world's 64 answers that minimizes loss(log π (64,)), from the reference, by Adam: log π."""
    logits = torch.tensor(world.table, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    states, letters = torch.from_numpy(world.states), torch.from_numpy(world.letters)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)[states, letters].sum(1)).backward()
        optimizer.step()
    return logits.detach().log_softmax(-1)[states, letters].sum(1)


def frontier(args):
    """
    Reward over KL(π ‖ π_ref) in the world of 64 answers: the formula's curve; DPO on all pairs, which must lie on it,
    and on 300 sampled pairs, which cannot; IPO; best-of-n. Writes OUT.svg and OUT.json.
    """
    world = tastes.world(args.seed)
    ref, r = torch.from_numpy(world.ref()), torch.from_numpy(world.reward)
    weight = (ref[:, None] + ref).exp() * torch.sigmoid(r[:, None] - r)  # of the pair (chosen, rejected)
    drawn = torch.multinomial(weight.flatten(), 300, replacement=True,
                              generator=torch.Generator().manual_seed(args.seed))
    torch.set_num_threads(1)
    point = lambda p: (round((p.exp() * (p - ref)).sum().item(), 4), round((p.exp() * r).sum().item(), 4))
    curves = {"optimum": [point(torch.from_numpy(world.optimum(beta)[0])) for beta in np.geomspace(0.15, 8, 60)]}
    sweep = [0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0]
    every = lambda b: lambda p: (weight * dpo_loss(p[:, None], p, ref[:, None], ref, b)).sum()
    curves["DPO, all pairs"] = [point(tabular(world, every(b))) for b in sweep]
    a, c = drawn // 64, drawn % 64
    curves["DPO, 300 pairs"] = [point(tabular(world, lambda p: dpo_loss(p[a], p[c], ref[a], ref[c], b).mean()))
                                for b in sweep]
    curves["IPO, 300 pairs"] = [point(tabular(world, lambda p: ipo_loss(p[a], p[c], ref[a], ref[c], b).mean()))
                                for b in sweep]
    curves["best of n"] = [point(torch.from_numpy(tastes.best_of(world, n))) for n in (1, 2, 4, 8, 16, 32, 64)]
    out = Path(args.out)
    tastes.plot(out.with_suffix(".svg"), curves, "KL from the reference, nats", "reward",
                lines=["optimum", "best of n"])
    with replace_file(out.with_suffix(".json"), "w") as f:
        json.dump(curves, f)
    for name, points in curves.items():
        if name != "optimum":
            print(f"{name}: " + "  ".join(f"{x:.3f} nats {y:+.3f}" for x, y in points))


COMMANDS = {"table": table, "frontier": frontier}

if __name__ == "__main__":
    cli(main)
