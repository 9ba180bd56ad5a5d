"""
Instruction tuning: next-token prediction on conversations, where only what the assistant says is asked,

    L = - Σ_t m_t log p(x_t | x_<t) / Σ_t m_t + λ L_pretrain,     m_t = 1 on answers and the token that ends them,

all weights or, through lora.py, a few (Ouyang et al. 2022; Wei et al. 2022). Conversations share rows without seeing
each other. L_pretrain is the mean over rows of the text that the model was pretrained on, which keeps what it knows.

    python sft.py                                                    # out/base learns to answer questions: out/sft
    python sft.py --init HuggingFaceTB/SmolLM2-135M --data alpaca,rows.jsonl --lora_rank 16 --lora_targets all
    torchrun --nproc_per_node 8 sft.py --init out/base --data sharegpt --parallel fsdp --batch_tokens 131072
    python sft.py --task classify --data labelled.jsonl              # GPT-1's head on the last token

Rows: {"messages": [{"role", "content"}, …]}, Alpaca's, ShareGPT's, GSM8K's, {"prompt", "completion"}, {"text"}.
"""
import argparse
import bisect
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import lora
import moe
from bpe import CHAT_TEMPLATES, BadInput, Tokenizer, chat_end, chat_format, chat_stops, cli, render_chat, replace_file
from model import (PARALLEL, AdamW8bit, adamw_groups, all_reduce, cap, check_out, linear_cross_entropy, load_run,
                   peak_memory, save_run, setup_process, shard, start_run)

# -----------------------------------------------------------------------------
# Losses


def asked_cross_entropy(x, weight, targets, vocab_size, reduction="mean", softcap=0.0, smooth=0.0, chunk=4096):
    """
    model.linear_cross_entropy of the rows with a target alone: most tokens of a conversation have none, and no logits
    are made for them. x (N, C), weight (V', C), targets (N,). smooth ε: (1 - ε) (-log p(target)) + ε · mean over the
    vocabulary of -log p (Szegedy et al. 2016, 7).
    """
    keep = (targets != -100).nonzero().squeeze(1)
    x, wanted = x[keep], targets[keep]
    if not smooth or not torch.is_grad_enabled():  # validation is in nats
        loss = linear_cross_entropy(x, weight, wanted, vocab_size, "none" if reduction == "none" else "sum", softcap)
    else:
        def rows(xi, ti):
            logits = cap((xi @ weight.to(xi.dtype).T).float(), softcap)[:, :vocab_size]
            return F.cross_entropy(logits, ti, reduction="none", label_smoothing=smooth)
        parts = [checkpoint(rows, xi, ti, use_reentrant=False) for xi, ti in zip(x.split(chunk), wanted.split(chunk))]
        loss = torch.cat(parts) if reduction == "none" else sum(part.sum() for part in parts)
    if reduction == "none":
        return torch.zeros(targets.shape, device=x.device).index_put((keep,), loss)
    return loss if reduction == "sum" else loss / max(1, len(keep))


def neftune_noise(shape, lengths, alpha, generator):
    """
    U(-1, 1) · α / sqrt(L d) for embeddings (B, T, d) (Jain et al. 2024); lengths (B, T): L of each token's own
    conversation, so that neither padding nor neighbours in the row change it.
    """
    noise = torch.rand(shape, generator=generator, device=lengths.device) * 2 - 1
    return noise * (alpha / (lengths * shape[-1]).clamp(min=1).sqrt()).unsqueeze(-1)


def auto_lr(base_lr, supervised_tokens, steps, epochs, pretrain_batch):
    """
    base_lr · sqrt(supervised tokens of an update / tokens of pretraining's batch), the former all of them ÷ (steps ÷
    epochs).
    """
    return base_lr * math.sqrt(supervised_tokens / (steps / epochs) / pretrain_batch)


def lr_share(step, steps, warmup, schedule):
    """Linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t))}[schedule]


# -----------------------------------------------------------------------------
# Data: rows to ids and masks, filters, epochs


def encode(where, row, tokenizer, args):
    """
    (ids, mask) of a row as np arrays, mask 1 on what is asked; or the reason why it is left out, in words.
    args.template: a name, or None for the tokenizer's own.
    """
    row = data.conversation(row, where, chat_format(tokenizer, args.template)[0])
    if "messages" not in row:
        end = [tokenizer.eot] if tokenizer.eot is not None else []
        prompt = tokenizer.begin + tokenizer.encode(row.get("prompt", ""))
        answer = tokenizer.encode(row.get("completion", row.get("text", "")), goes_on=bool(row.get("prompt")))
        if not answer:
            return "with an empty completion"
        mask = [int(args.train_on_prompt)] * len(prompt) + [1] * (len(answer) + len(end))
        return np.array(prompt + answer + end), np.array(mask)
    turns = row["messages"]
    while turns and turns[-1].get("role") == "user":  # nobody answers
        turns = turns[:-1]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not answers:
        return "without an assistant's turn"
    if any(isinstance(answer, str) and not answer.strip() for answer in answers):
        return "with an empty answer"
    try:
        ids, mask = render_chat(tokenizer, turns, args.template, args.system)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return np.array(ids), np.ones(len(ids), int) if args.train_on_prompt else np.array(mask)


def shingles(ids, n=5):
    """Hashes of the runs of n tokens."""
    return {hash(tuple(ids[i:i + n])) for i in range(max(1, len(ids) - n + 1))}


def near_duplicates(examples, threshold=0.8, bands=16, rows=4):
    """
    Indices of examples whose runs of five tokens agree with an earlier one's by a Jaccard index of `threshold` or more.
    Candidates share a band of minhashes (Broder 1997), so that not every pair is compared. Runs that more than a
    twentieth of the examples have (of a thousand or fewer, more than fifty of them or half) are a template's, and say
    nothing.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1, 2 ** 31 - 1, (bands * rows, 1)) for _ in range(2))
    sets = [shingles(ids.tolist()) for ids, _ in examples]
    n, shared = len(examples), Counter(itertools.chain.from_iterable(sets))
    most = max(3, n // 20, min(50, n // 2))
    sets = [{run for run in mine if shared[run] <= most} or mine for mine in sets]
    seen, found = {}, set()
    for i, mine in enumerate(sets):
        hashes = np.fromiter(mine, np.int64) & 0x7FFFFFFF
        signature = ((a * hashes + b) % (2 ** 31 - 1)).min(1).reshape(bands, rows)
        keys = [(band, *signature[band]) for band in range(bands)]
        near = {j for key in keys for j in seen.get(key, ())}
        if any(len(mine & sets[j]) >= threshold * len(mine | sets[j]) for j in near):
            found.add(i)
            continue
        for key in keys:
            seen.setdefault(key, []).append(i)
    return found


def read_examples(rows, tokenizer, args, T, left_out):
    """Encoded rows that pass the filters; left_out counts the others by reason."""
    examples = []
    for where, row in rows:
        new = encode(where, row, tokenizer, args)
        if isinstance(new, str):
            left_out[new] += 1
            continue
        ids, mask = new
        if len(ids) > T + 1:
            if args.long == "drop":
                left_out[f"longer than {T} tokens"] += 1
                continue
            ids, mask = ids[:T + 1], mask[:T + 1]
            left_out[f"cut to {T} tokens"] += 1
        n = int(mask[1:].sum())
        if n < max(1, args.min_answer) or args.max_answer and n > args.max_answer:
            left_out[f"with {'no token' if n == 0 else 'too short or too long an answer'} to learn from"] += 1
            continue
        examples.append((ids, mask))
    if args.dedup != "none" and examples:
        twice = near_duplicates(examples) if args.dedup == "near" else set()
        known = set()
        for i, (ids, _) in enumerate(examples):
            key = ids.tobytes()
            twice |= {i} if key in known else set()
            known.add(key)
        if twice:
            left_out["that repeat another"] += len(twice)
        examples = [e for i, e in enumerate(examples) if i not in twice]
    return examples


class Epochs:
    """
    Which conversations stand in which row of which step: a pure function of (seed, step). An epoch takes each set's
    examples in a new order, at most `limit` of them (examples-proportional mixing with a cap, Raffel et al. 2020,
    3.5.2), packs them and deals the rows out; its last step is filled up with empty rows.
    """

    def __init__(self, sets, T, rows, packing, limit, seed):
        """sets: lists of examples; rows: of a step."""
        self.sets, self.T, self.rows, self.packing, self.limit, self.seed = sets, T, rows, packing, limit, seed
        self.examples = [e for examples in sets for e in examples]
        self.plan = functools.lru_cache(maxsize=2)(self.plan)
        self.starts = [0]  # the first step of each epoch, as far as was asked

    def plan(self, epoch):
        """The rows of an epoch, each a list of indices into self.examples."""
        rng, chosen, first = np.random.default_rng([self.seed, epoch]), [], 0
        for number, examples in enumerate(self.sets):
            n = min(len(examples), self.limit or len(examples))
            # a capped set goes through all it has before it repeats
            turn, skip = divmod(epoch * n, len(examples))
            order = np.concatenate([np.random.default_rng([self.seed, number, turn + i]).permutation(len(examples))
                                    for i in range(2)])
            chosen += (first + order[skip:skip + n]).tolist()
            first += len(examples)
        chosen = rng.permutation(chosen).tolist()
        rows = [[i] for i in chosen]
        if self.packing:
            packed = data.pack([len(self.examples[i][0]) - 1 for i in chosen], self.T)
            rows = [[chosen[i] for i in row] for row in packed]
            rows = [rows[i] for i in rng.permutation(len(rows))]
        return rows + [[]] * (-len(rows) % self.rows)

    def begins(self, epoch):
        """The first step of an epoch."""
        while len(self.starts) <= epoch:
            self.starts.append(self.starts[-1] + len(self.plan(len(self.starts) - 1)) // self.rows)
        return self.starts[epoch]

    def at(self, step):
        """(epoch, the step's rows)"""
        while self.starts[-1] <= step:
            self.begins(len(self.starts))
        epoch = bisect.bisect_right(self.starts, step) - 1
        first = (step - self.starts[epoch]) * self.rows
        return epoch, self.plan(epoch)[first:first + self.rows]


def to_device(rows, packing, device):
    """{"idx", "targets" and, of packed rows, "doc_ids", "positions"} as tensors."""
    tensors = {name: torch.from_numpy(t).to(device) for name, t in rows._asdict().items()}
    return tensors if packing else {name: tensors[name] for name in ("idx", "targets")}


def micro_batches(examples, rows, micro, T, packing, device):
    """Rows of example indices as batches of `micro` rows of T, or, padded, of the longest of them."""
    for i in range(0, len(rows), micro):
        some = rows[i:i + micro]
        longest = max([len(examples[e][0]) - 1 for row in some for e in row], default=1)
        width = T if packing else min(T, 8 * math.ceil(longest / 8))
        yield to_device(data.lay_out(examples, some, width), packing, device)


def asked(examples, rows):
    """How many targets these rows have."""
    return sum(int(examples[e][1][1:].sum()) for row in rows for e in row)


# -----------------------------------------------------------------------------
# One step


class Neftune:
    """A hook on the embedding: noise while training, scaled by the length of each token's own conversation."""

    def __init__(self, model, alpha):
        self.alpha, self.lengths, self.generator = alpha, None, torch.Generator(model.device)
        model.wte.register_forward_hook(self)

    def set(self, batch, seed):
        if "doc_ids" in batch:
            self.lengths = (batch["doc_ids"][:, :, None] == batch["doc_ids"][:, None, :]).sum(-1).float()
        else:  # one conversation, which ends with the last thing asked
            B, T = batch["targets"].shape
            places = torch.arange(1, T + 1, device=batch["targets"].device)
            self.lengths = (places * (batch["targets"] != -100)).amax(1, keepdim=True).expand(B, T).float()
        self.generator.manual_seed(seed)

    def __call__(self, module, inputs, x):
        if module.training and self.lengths is not None and x.shape[:2] == self.lengths.shape:
            return x + neftune_noise(x.shape, self.lengths, self.alpha, self.generator).to(x.dtype)


def summed_loss(sharded, batch, last=True):
    """Σ loss over a batch's targets on this process; in training `last` says that the step's gradient is complete."""
    if sharded.sharded and sharded.model.training:
        sharded.model.set_requires_gradient_sync(last)
    wrapped = sharded.forward is not sharded.model and not last and sharded.model.training
    with sharded.forward.no_sync() if wrapped else contextlib.nullcontext():
        return (sharded.forward if sharded.model.training else sharded.model)(reduction="sum", **batch)[1]


@torch.no_grad()
def validate(sharded, sets, args, T, process):
    """val_loss in nats per asked token over the validation rows of all sets, and of each where there are several."""
    sharded.eval()
    losses, total = {}, torch.zeros(2, dtype=torch.float64)
    for name, examples in sets.items():
        rows = [[i] for i in range(len(examples))]
        if args.packing:
            rows = data.pack([len(ids) - 1 for ids, _ in examples], T)
        rows += [[]] * (-len(rows) % process.dp_world)
        part = torch.zeros(2, dtype=torch.float64)
        for batch in micro_batches(examples, rows[process.dp_rank::process.dp_world], args.micro_batch, T, args.packing,
                                   process.device):
            part += torch.tensor([summed_loss(sharded, batch).item(), (batch["targets"] != -100).sum().item()])
        if process.world > 1:
            part = all_reduce(part.to(process.device)).cpu()
        losses[f"val_loss_{name}"] = (part[0] / part[1]).item()
        total += part
    sharded.train()
    return {"val_loss": (total[0] / total[1]).item()} | (losses if len(losses) > 1 else {})


def answer(model, tokenizer, args, prompts, max_new_tokens, batch=128):
    """What the model says to conversations that end with a user's turn, greedily."""
    texts, T = [], model.context
    for i in range(0, len(prompts), batch):
        ids = [render_chat(tokenizer, turns, args.template, args.system, generation=True)[0]
               for turns in prompts[i:i + batch]]
        ids = [row[-(T - 1):] for row in ids]
        rows, _ = model.generate(ids, max_new_tokens, temperature=0, stop=chat_stops(tokenizer, args.template))
        texts += [tokenizer.decode(row) for row in rows]
    return texts


def held_out_chats(parts, limit, args):
    """The first validation rows that are conversations which the assistant ends."""
    chats = (data.conversation(row, where, args.template).get("messages") for where, row in parts["val"])
    chats = (turns for turns in chats if turns and [turn["role"] for turn in turns[-2:]] == ["user", "assistant"])
    return list(itertools.islice(chats, limit))


def show(model, tokenizer, args, sets, say):
    """Answers to the first --show held-out questions, to read."""
    chats = [turns for parts in sets.values() for turns in held_out_chats(parts, args.show, args)][:args.show]
    for turns, text in zip(chats, answer(model, tokenizer, args, [turns[:-1] for turns in chats], 120)):
        say("    " + turns[-2]["content"].replace("\n", "\n    ") + "\n  > " + text.strip().replace("\n", "\n    "))


def report(model, tokenizer, args, sets, say):
    """Ask the validation rows' last question of each set and count the answers that are right -> metrics."""
    right = {}
    for name, parts in sets.items():
        limit = args.eval_answers if args.eval_answers is not None else 300 if name in ("bios", "arithmetic") else 0
        chats = held_out_chats(parts, limit, args)
        if not chats:
            continue
        longest = max(len(tokenizer.encode(turns[-1]["content"])) for turns in chats)
        texts = answer(model, tokenizer, args, [turns[:-1] for turns in chats], min(512, 2 * longest + 8))
        right[name] = [data.is_right(text, turns[-1]["content"]) for text, turns in zip(texts, chats)]
        say(f"{name}: {sum(right[name]) / len(chats):.1%} of {len(chats)} held-out questions right, for example")
        for turns, text, good in list(zip(chats, texts, right[name]))[::max(1, len(chats) // 3)][:3]:
            say(f"    {turns[-2]['content']} | {text.strip()}"
                + ("" if good else f"   (right: {turns[-1]['content']})"))
    if not right:
        return {}
    figures = {f"accuracy_{name}": sum(r) / len(r) for name, r in right.items()}
    return {"accuracy": sum(map(sum, right.values())) / sum(map(len, right.values()))} | \
        (figures if len(figures) > 1 else {})


# -----------------------------------------------------------------------------
# Classification: GPT-1's head and input transformations


def read_labelled(rows, tokenizer, T, labels=None):
    """
    Rows of one of four kinds -> ([(texts, label index)], labels, kind). Each text is ids from a start to an extract
    token, whose state the head reads (Radford et al. 2018, 3.3):
        text        {"text", "label"}                      start text extract
        entailment  {"premise", "hypothesis", "label"}     start premise delimiter hypothesis extract
        similarity  {"text_a", "text_b", "label"}          both orders, their states added
        choice      {"context", "choices", "answer": i}    start context delimiter choice extract, a score each
    """
    special = tokenizer.special
    start, between, end = (special.get(name, tokenizer.eot) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    kinds = {"choices": "choice", "premise": "entailment", "text_a": "similarity", "text": "text"}
    kind = next((k for key, k in kinds.items() if key in rows[0][1]), None)
    out = []
    for where, row in rows:
        try:
            parts = {"text": lambda: [[row["text"]]], "entailment": lambda: [[row["premise"], row["hypothesis"]]],
                     "similarity": lambda: [[row["text_a"], row["text_b"]], [row["text_b"], row["text_a"]]],
                     "choice": lambda: [[row["context"], choice] for choice in row["choices"]]}[kind]()
            label = row["answer"] if kind == "choice" else str(row["label"])
            if kind == "choice" and label not in range(len(row["choices"])):
                raise KeyError("answer")
            texts = []
            for part in parts:
                ids = [tokenizer.encode(text) for text in part]
                room = T - 1 - len(ids)
                ids[0] = ids[0][:max(1, room - sum(map(len, ids[1:])))]  # the first, longer text is cut
                texts.append(([start] + sum(([between] * (i > 0) + t for i, t in enumerate(ids)), []))[:T - 1] + [end])
        except (KeyError, TypeError, AttributeError):
            raise BadInput(f"{where} is no row to classify: give text and label, premise, hypothesis and label, "
                           f"text_a, text_b and label, or context, choices and answer, the same in all rows") from None
        out.append((texts, label))
    if kind == "choice":
        return out, ["score"], kind
    labels = labels or sorted({label for _, label in out})
    unknown = {label for _, label in out} - set(labels)
    if unknown:
        raise BadInput(f"--data has the label {min(unknown)!r} in its validation rows alone: give rows of it to train "
                       f"on")
    return [(texts, labels.index(label)) for texts, label in out], labels, kind


def class_logits(model, texts, kind):
    """texts: id lists of B examples -> (logits (B, classes or choices), ids (N, L), lengths (N,), states (N, L, C))."""
    rows = [ids for some in texts for ids in some]
    lengths = torch.tensor([len(ids) for ids in rows], device=model.device)
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for r, ids in enumerate(rows):
        idx[r, :len(ids)] = torch.tensor(ids)
    idx = idx.to(model.device)
    x = model.trunk(idx)
    last = x[torch.arange(len(rows), device=x.device), lengths - 1].view(len(texts), -1, x.shape[-1])  # (B, m, C)
    logits = model.class_head(last.sum(1) if kind == "similarity" else last).float()
    logits = logits.squeeze(-1) if kind == "choice" else logits.view(len(texts), -1)
    return logits, idx, lengths, x


def classifier_loss(model, texts, labels, kind, aux):
    """L2 + λ L1: -log p(label) as a mean over examples, and the mean of the texts' own -log p(token) (3.2, eq. 5)."""
    logits, idx, lengths, x = class_logits(model, texts, kind)
    loss = F.cross_entropy(logits, torch.tensor(labels, device=logits.device))
    if aux:
        places = torch.arange(idx.shape[1], device=idx.device)
        targets = idx.roll(-1, 1).masked_fill(places >= lengths[:, None] - 1, -100)
        loss = loss + aux * model.loss(model.features(x).flatten(0, 1), model.head_weight, targets.flatten(),
                                       model.config.vocab_size, "mean", model.config.softcap)
    return loss


@torch.no_grad()
def judge(model, examples, kind, batch=64):
    """(accuracy, mean -log p(label)) of examples."""
    model.eval()
    right, nats = 0, 0.0
    for i in range(0, len(examples), batch):
        texts, labels = zip(*examples[i:i + batch])
        logits, labels = class_logits(model, texts, kind)[0], torch.tensor(labels, device=model.device)
        right += (logits.argmax(-1) == labels).sum().item()
        nats += F.cross_entropy(logits, labels, reduction="sum").item()
    model.train()
    return right / len(examples), nats / len(examples)


NOT_TO_CLASSIFY = ("resume compile relora input cap template add_tokens system train_on_prompt long min_answer "
                   "max_answer dedup packing mix mix_share mix_weight micro_batch optimizer base_lr pretrain_batch "
                   "neftune label_smoothing recompute eval_every eval_answers show patience save_every").split()


def classify(args, process, tokenizer, started, say):
    """The run of --task classify: --batch_tokens / T examples a step, replicas by summed gradients."""
    usual = vars(get_args([]))
    given = [f"--{name}" for name in NOT_TO_CLASSIFY if getattr(args, name) != usual[name]]
    if given or args.lr == "auto":
        raise BadInput(f"--task classify has no use for {', '.join(given or ['--lr auto'])}: leave it out")
    if args.parallel != "ddp" or args.offload or args.tune == "adalora":
        raise BadInput("--task classify runs with --parallel ddp, without --offload, and with no --tune adalora")
    if set(args.data.split(",")) & set(data.CHATS):
        raise BadInput(f"--data {args.data}: --task classify reads files of labelled rows, see read_labelled")
    raw = data.chat_sets(args.data, None, args.val, args.limit)
    rows = {split: [row for parts in raw.values() for row in parts[split]] for split in ("train", "val")}
    limit = args.block_size or 2048
    examples, labels, kind = read_labelled(rows["train"], tokenizer, limit)
    if kind == "choice" and len({len(texts) for texts, _ in examples}) > 1:
        raise BadInput("--data: every row needs the same number of choices")
    val, *_ = read_labelled(rows["val"], tokenizer, limit, labels) if rows["val"] else ([], 0, 0)
    dtype = choose_dtype(args.dtype, process.device)
    model, base = lora.start(args.init, lora.from_args(args), process.device, dtype, tokenizer, args.seed, len(labels))
    model.compute_dtype, model.loss = dtype, asked_cross_entropy
    longest = max(len(ids) for texts, _ in examples + val for ids in texts)
    if longest > model.context:
        raise BadInput(f"a row of {longest} tokens is longer than the model's context of {model.context}: give "
                       f"--block_size {model.context}")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adamw_groups(model, args.weight_decay), lr=0.0, betas=(0.9, args.beta2))
    B = max(process.world, args.batch_tokens // longest // process.world * process.world)
    steps = args.steps or round((args.epochs or 3) * math.ceil(len(examples) / B))  # GPT-1's three epochs
    lr, out = number("--lr", args.lr), Path(args.out)
    say(f"{len(examples):,} examples to train, {len(val):,} to validate, {kind}, labels {', '.join(labels)}; "
        f"{B} a step")
    model.train()
    for step in range(steps):
        taken = data.batch_indices(len(examples), B, step, args.seed)
        chosen = [examples[i] for i in taken[process.rank::process.world]]
        torch.manual_seed(hash((args.seed, step, process.rank)) % 2 ** 32)
        loss = classifier_loss(model, *zip(*chosen), kind, args.aux)
        loss.backward()
        for p in params if process.world > 1 else ():
            if p.grad is not None:
                all_reduce(p.grad).div_(process.world)
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_share(step, steps, args.warmup, args.schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            say(f"step {step + 1}/{steps}  loss {loss.item():.4f}  norm {norm.item():.2f}", flush=True)
    metrics = dict(zip(("accuracy", "val_loss"), judge(model, val, kind))) if val else {}
    metrics = {k: round(v, 5) for k, v in metrics.items()} | {"seconds": round(time.time() - started, 1)}
    if process.rank == 0:
        start_run(out)
        tokenizer.save(out)
        run = {"stage": "sft", "step": steps, "metrics": metrics, "args": vars(args), "tokenizer": tokenizer.spec(),
               "classify": {"kind": kind, "labels": labels}}
        save_run(out, model, run) if base is None else lora.save(out, model, run, base)
    say(json.dumps(metrics))
    process.close()


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, dict(action=argparse.BooleanOptionalAction)
    # run
    add("--init", default="out/base", help="run directory, Hugging Face directory or hub name to tune")
    add("--out", default="out/sft", help="run directory; a finished run already there is kept as OUT.old")
    add("--resume", action="store_true", help="go on from OUT/optim.pt, with its arguments unless given again")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations, and of a frozen base")
    add("--compile", default=None, **flag, help="torch.compile the block (default: on CUDA)")
    # what is tuned
    add("--task", default="chat", choices=["chat", "classify"],
        help="classify: a head on the last token, see read_labelled")
    add("--aux", type=float, default=0.5, help="weight of the language model's loss beside a classifier's")
    lora.add_flags(parser)
    add("--relora", type=int, default=0, help="put --tune lora into the weights every so many steps and start anew")
    # data
    add("--data", default="bios,arithmetic",
        help=f"sets, comma-separated: {', '.join(data.CHATS)}, .jsonl or .json files")
    add("--input", help="a local file in place of the one set's download")
    add("--val", type=float, default=0.05, help="share held out of a set that has no split of its own")
    add("--limit", type=int, default=0, help="rows read of each set; 0: all")
    add("--cap", type=int, default=0, help="examples of one set in an epoch, others wait for the next; 0: all")
    add("--template", choices=sorted(CHAT_TEMPLATES),
        help="how a chat is written (default: the model's own, else chatml)")
    add("--add_tokens", help="special tokens to add to the vocabulary, such as '<|im_start|>,<|im_end|>'")
    add("--system", help="system text of conversations without one; it is saved with the template")
    add("--train_on_prompt", action="store_true", help="ask for every token, not only the assistant's")
    add("--long", default="truncate", choices=["truncate", "drop"], help="rows that do not fit into --block_size")
    add("--min_answer", type=int, default=1, help="asked tokens that a row must have")
    add("--max_answer", type=int, default=0, help="and may have; 0: any number")
    add("--dedup", default="exact", choices=["none", "exact", "near"], help="leave out rows that repeat an earlier one")
    add("--packing", default=True, **flag,
        help="conversations share rows, unseen by each other; else one a row, padded")
    add("--mix", default="auto", help="text to go on pretraining with, as train.py's --data; auto: what the run was "
                                      "pretrained on, if it says so; none")
    add("--mix_share", type=float, default=0.5, help="of a step's rows that come from --mix")
    add("--mix_weight", type=float, default=1.0, help="λ of its loss")
    # optimization
    add("--epochs", type=float, default=0, help="passes over the data (0: as --steps says)")
    add("--steps", type=int, default=0, help="(0: as --epochs says; without either 400)")
    add("--block_size", type=int, default=0, help="T of a row (0: the model's, at most 2048)")
    add("--batch_tokens", type=int, default=2048, help="tokens per optimizer step over all processes")
    add("--micro_batch", type=int, default=0, help="rows per forward pass and process (0: as fits)")
    add("--optimizer", default="adamw", choices=["adamw", "adam8bit"])
    add("--lr", default="2e-3", help="peak; auto: by the size of an update, see auto_lr")
    add("--base_lr", type=float, default=5e-5, help="of --lr auto")
    add("--pretrain_batch", type=float, default=4e6, help="tokens of pretraining's batch, of --lr auto")
    add("--schedule", default="linear", choices=["constant", "linear", "cosine"])
    add("--warmup", type=int, default=20, help="steps")
    add("--weight_decay", type=float, default=0.0, help="of matrices")
    add("--beta2", type=float, default=0.95)
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    add("--neftune", type=float, default=0.0, help="α of the noise on embeddings (Jain et al.: 5); 0: none")
    add("--label_smoothing", type=float, default=0.0)
    # processes
    add("--parallel", default="ddp", choices=list(PARALLEL), help="see python train.py --help")
    add("--hsdp_shard", type=int, default=0, help="processes of an hsdp group (0: one machine's)")
    add("--recompute", default="none", choices=["none", "block", "selective"])
    add("--offload", default=False, **flag, help="optimizer state and the weights it steps in main memory")
    add("--timeout", type=float, default=120)
    # looking
    add("--eval_every", type=int, default=100, help="steps; 0: only at the end")
    add("--eval_answers", type=int, help="questions asked at the end (default: 300 of bios and arithmetic); 0: none")
    add("--show", type=int, default=0, help="held-out questions whose answers are printed before and after")
    add("--patience", type=int, default=0,
        help="stop after so many validations without a lower loss, and keep the best")
    add("--save_every", type=int, default=0, help="steps between saves of optim.pt, to --resume from; 0: none")
    add("--log_every", type=int, default=10)
    args = parser.parse_args(argv)
    if args.resume:  # saved arguments become the defaults, so what is given again wins
        saved = load_optim(args.out)["args"]
        parser.set_defaults(**{**saved, "resume": True})
        args = parser.parse_args(argv)
        if args.epochs != saved["epochs"] and args.steps == saved["steps"]:
            args.steps = 0  # as many as the new epochs have
    return args


def load_optim(out):
    path = Path(out) / "optim.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise BadInput(f"--resume: there is no {path}; start without --resume, or give the run's --out") from None
    except Exception as error:  # pickle, zip and torch each have their own
        raise BadInput(f"{path} is damaged ({type(error).__name__}): start again without --resume") from None


def with_tokens(tokenizer, names):
    """The tokenizer with further special tokens at the end of its vocabulary."""
    new = [name for name in names if name not in tokenizer.special]
    special = tokenizer.special | {name: tokenizer.n_vocab + i for i, name in enumerate(new)}
    return Tokenizer(tokenizer.kind, tokenizer.ranks, tokenizer.patterns, special, tokenizer.normal, tokenizer.prefix,
                     tokenizer.chat)


def number(flag, text):
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{flag} {text} is no number") from None


def check_args(args, model, process):
    """Refuse what does not go together."""
    adapter = model.adapter
    whole = args.parallel == "ddp" and not args.offload or process.world == 1 and not args.offload
    if not whole and (model.virtual is not None or args.relora or adapter and adapter.tune == "adalora"):
        raise BadInput(f"--parallel {args.parallel}{' --offload' * args.offload}: virtual tokens, adalora and --relora "
                       f"need whole weights: use --parallel ddp")
    if args.relora and (adapter is None or adapter.tune != "lora" or adapter.quantize != "none"):
        raise BadInput("--relora restarts --tune lora over weights that are not quantized: give --lora_rank with it")
    if args.resume and (args.relora or adapter and adapter.tune == "adalora"):
        raise BadInput("--resume: adalora and --relora keep no record of their restarts: start again without --resume")
    if args.block_size < 0 or args.block_size > model.config.block_size:
        raise BadInput(f"--block_size {args.block_size}: the model's context is {model.config.block_size}")


def choose_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def mix_spec(args):
    """(mixture, input) of --mix; auto: what a pretraining run of ours says, or a tuning run that went on with it."""
    if args.mix != "auto":
        return (None, None) if args.mix == "none" else (args.mix, None)
    path = Path(args.init) / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {}
    given = run.get("args", {})
    if run.get("stage") == "train":
        return given.get("data"), given.get("input")
    return given.get("mix") if given.get("mix") not in ("auto", "none") else None, None


def split_rows(args, T, process):
    """(rows of a step over all processes, of them from --mix, rows of a micro-batch)"""
    rows, rest = divmod(args.batch_tokens, T * process.dp_world)
    if not rows:
        raise BadInput(f"--batch_tokens {args.batch_tokens} is less than a row of {T} tokens for each of "
                       f"{process.dp_world} process(es): use {T * process.dp_world} or more")
    mixed = max(round(rows * args.mix_share), int(args.mix_share > 0 and rows > 1))
    if not 0 <= mixed < rows:
        raise BadInput(f"--mix_share {args.mix_share} leaves none of {rows} rows to the conversations: use less")
    limit = 65536 if process.device.type == "cuda" else 16384  # tokens that one forward pass may hold
    return rows * process.dp_world, mixed * process.dp_world, args.micro_batch or max(1, min(rows, limit // T))


def main():
    args = get_args()
    process = setup_process(args.device, args)
    device, main_process, started = process.device, process.rank == 0, time.time()
    say = print if main_process else lambda *a, **k: None
    if not args.resume:
        check_out(args.out, args.init)

    # tokenizer and model
    tokenizer = Tokenizer.from_pretrained(args.init)
    if args.add_tokens:
        tokenizer = with_tokens(tokenizer, args.add_tokens.split(","))
    template, system = chat_format(tokenizer, args.template, args.system)
    if args.task == "classify":
        return classify(args, process, tokenizer, started, say)
    chat_end(tokenizer, template)  # refuses a tokenizer that lacks the template's tokens
    tokenizer.chat, args.template = {"template": template, "system": system or None}, template
    dtype = choose_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    adapter = lora.from_args(args)
    model, base = lora.start(args.init, adapter, device, dtype, tokenizer, args.seed)
    model.compute_dtype = dtype
    check_args(args, model, process)
    T = min(args.block_size or 2048, model.context)

    # data
    raw, left_out = data.chat_sets(args.data, args.input, args.val, args.limit), Counter()
    sets = {name: read_examples(parts["train"], tokenizer, args, T, left_out) for name, parts in raw.items()}
    val = {name: read_examples(parts["val"], tokenizer, args, T, Counter()) for name, parts in raw.items()}
    if args.dedup != "none":  # what is trained on says nothing of the rest
        known = {ids.tobytes() for examples in sets.values() for ids, _ in examples}
        val = {name: [e for e in examples if e[0].tobytes() not in known] for name, examples in val.items()}
    val = {name: examples for name, examples in val.items() if examples}
    why = "; ".join(f"{n} {reason}" for reason, n in left_out.items())
    if why:
        say(f"rows: {why}")
    for name, examples in sets.items():
        if not examples:
            raise BadInput(f"--data {name} has no row to learn from ({why}): correct the rows")
    (spec, input), asked_to_mix = mix_spec(args), args.mix != "auto"
    args.mix = spec or "none"
    args.mix_share *= spec is not None
    rows, mixed, micro = split_rows(args, T, process)
    args.micro_batch = micro
    if args.mix_share and not mixed:
        why = f"a row of {T} tokens a step and process leaves no room for pretraining text"
        if asked_to_mix:
            raise BadInput(f"--mix {args.mix}: {why}: raise --batch_tokens")
        say(f"{why}: --batch_tokens {2 * args.batch_tokens} would mix some in")
    epochs = Epochs(list(sets.values()), T, rows - mixed, args.packing, args.cap, args.seed)
    if mixed:
        if main_process:
            folders = data.prepared(tokenizer, spec, input)
        process.wait()
        folders = data.prepared(tokenizer, spec, input)
        loader = data.TokenLoader([(w, data.open_tokens(f / "train.bin")) for w, f in folders.values()], T, args.seed)
    supervised = asked(epochs.examples, epochs.plan(0))
    args.steps = args.steps or (round(args.epochs * epochs.begins(1)) if args.epochs else 400)
    args.lr = auto_lr(args.base_lr, supervised, epochs.begins(1), 1, args.pretrain_batch) if args.lr == "auto" \
        else number("--lr", args.lr)

    # optimizer
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile_parts()
    model.loss = functools.partial(asked_cross_entropy, smooth=args.label_smoothing)
    noise = Neftune(model, args.neftune) if args.neftune else None
    sharded = shard(model, process, args)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in sharded.stand_in.named_parameters():
        p.requires_grad_(name in trained)
    groups = [g for g in adamw_groups(sharded.stand_in, args.weight_decay) if g["params"]]
    if args.optimizer == "adam8bit":
        optimizer = AdamW8bit(groups, lr=args.lr, betas=(0.9, args.beta2))
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=device.type in ("cuda", "cpu"))
    allocator = None
    if model.adapter is not None and model.adapter.tune == "adalora":
        allocator = lora.RankAllocator(model, model.adapter.lora_rank, args.steps, args.steps // 10, args.steps // 3)

    # beside parameters: biases that balance experts
    balance = {} if model.adapter else {name: b for name, b in model.named_buffers() if name in model.state_dict()}

    def tuned_weights():
        """What training changes; with --relora that is all, and its tensors are others after a restart."""
        return model.state_dict() if args.relora else {name: sharded.parts[name] for name in trained} | balance

    out, step, best, waited = Path(args.out), 0, None, 0
    if args.resume:
        saved = load_optim(args.out)
        for name, b in balance.items():
            b.copy_(saved["model"].pop(name, b))
        sharded.load_state_dict({"model": dict(sharded.parts) | saved["model"], "optimizers": saved["optimizers"]},
                                [optimizer])
        step = saved["step"]
    if main_process:
        if args.resume:  # the log goes back to what was written before the save
            os.truncate(out / "log.jsonl", min(saved["log"], (out / "log.jsonl").stat().st_size))
        else:
            start_run(out)
            tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
    tuned, total = lora.trained_share(model)
    say(f"{sum(map(len, sets.values())):,} conversations, {supervised:,} asked tokens; "
        f"{rows - mixed} rows of {T} tokens a step, {epochs.begins(1)} steps an epoch"
        + (f", {mixed} rows of {args.mix}" if mixed else "")
        + f"\n{model.adapter.tune if model.adapter else 'full'}: {tuned:,} of {total:,} numbers are trained "
        f"({tuned / total:.2%}); {device}, {args.dtype}, lr {args.lr:.3g}, template {template}")

    def save(metrics):
        """What resuming needs, and the model or its adapter."""
        if main_process:
            log.flush()
        state = sharded.state_dict([optimizer])
        if not main_process:
            return
        state["model"] |= {name: b.cpu() for name, b in balance.items()}
        run = {"stage": "sft", "step": step, "metrics": metrics, "args": vars(args), "tokenizer": tokenizer.spec()}
        whole = None if sharded.plain else state["model"]
        if sharded.plain and base is not None:  # the frozen base is where it was
            state["model"] = {name: t for name, t in state["model"].items() if name in trained or args.relora}
        if args.save_every:
            with replace_file(out / "optim.pt") as f:
                torch.save({**state, "step": step, "args": vars(args), "log": (out / "log.jsonl").stat().st_size}, f)
        if base is None:
            save_run(out, model, run, whole)
        elif args.relora:
            lora.save_merged(out, model, run)
        else:
            lora.save(out, model, run, base, whole)

    if args.show and main_process and sharded.plain:
        say("before:")
        show(model, tokenizer, args, raw, say)
    if val and args.eval_every and step == 0:
        before = validate(sharded, val, args, T, process)
        say("step 0: " + "  ".join(f"{name} {value:.4f}" for name, value in before.items()), flush=True)

    # loop
    stop = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stop.append(True))
    sharded.train()
    pending, metrics, restarted, read, clock, timed = [], {}, 0, 0, time.time(), [0, 0.0]
    while step < args.steps and not (stop and process.world == 1):  # ranks would not agree on when
        _, chosen = epochs.at(step)
        count = max(1, asked(epochs.examples, chosen))
        share = lr_share(step, args.steps, args.warmup, args.schedule)
        if args.relora and step - restarted < args.warmup:  # each restart warms up (Lialin et al. 2023, 3)
            share *= (step - restarted + 1) / (args.warmup + 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        seed = hash((args.seed, step, process.rank)) % 2 ** 32
        torch.manual_seed(seed)  # dropout, a function of (seed, step, rank)
        batches = [(batch, 1 / count, 0) for batch in micro_batches(
            epochs.examples, chosen[process.dp_rank::process.dp_world], micro, T, args.packing, device)]
        if mixed:
            first, mine = step * mixed + process.dp_rank * (mixed // process.dp_world), mixed // process.dp_world
            ids = torch.from_numpy(loader.batch(first, mine)).to(device)
            batches += [({"idx": part[:, :-1], "targets": part[:, 1:]}, args.mix_weight / (mixed * T), 1)
                        for part in ids.split(micro)]
        losses = torch.zeros(2, device=device)
        for i, (batch, weight, kind) in enumerate(batches):
            if noise:
                noise.set(batch, seed + i)
            loss = summed_loss(sharded, batch, last=i == len(batches) - 1) * weight
            losses[kind] += loss.detach()
            if allocator and i == 0:
                loss = loss + 0.5 * lora.orthogonality(model) / process.dp_world
            (loss * process.dp_world).backward()  # replicas' gradients are averaged
        norm = sharded.reduce(args.grad_clip or math.inf)
        optimizer.step()
        sharded.publish()
        if model.config.n_expert and model.adapter is None:
            moe.balance(model)
        if allocator:
            allocator.step(step)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if args.relora and step % args.relora == 0 and step < args.steps:
            lora.restart(model, args.seed + step)
            optimizer.state.clear()
            restarted = step
        pending.append((torch.cat((all_reduce(losses), norm.view(1))), args.lr * share))
        read += sum(len(epochs.examples[e][0]) - 1 for row in chosen for e in row) + mixed * T  # padding is not text
        last = step == args.steps
        if last or step % args.log_every == 0 or step == 1 or args.save_every and step % args.save_every == 0:
            for i, (stats, lr) in enumerate(pending):
                loss, mix_loss, norm = stats.tolist()
                line = {"step": step - len(pending) + 1 + i, "loss": round(loss, 5), "lr": lr}
                line |= {"grad_norm": round(norm, 4)}
                line |= {"mix_loss": round(mix_loss / (args.mix_weight or 1), 5)} if mixed else {}
                if main_process:
                    log.write(json.dumps(line) + "\n")
                if not math.isfinite(loss):
                    raise BadInput(f"the loss is {loss} at step {line['step']}: lower --lr or raise --warmup")
            seconds = time.time() - clock
            timed = [timed[0] + read, timed[1] + seconds] if step > 1 else timed  # the first step compiles
            say(f"step {step}/{args.steps}  loss {loss:.4f}  " + (f"mix {line['mix_loss']:.4f}  " if mixed else "")
                + f"lr {lr:.2e}  norm {norm:.2f}  epoch {epochs.at(step - 1)[0] + 1}  "
                f"{read / seconds:,.0f} tok/s  {peak_memory(device) / 2 ** 30:.2f} GiB", flush=True)
            pending, read, clock = [], 0, time.time()
        if val and (last or args.eval_every and step % args.eval_every == 0):
            metrics = validate(sharded, val, args, T, process)
            say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
            waited += 1
            if args.patience and (best is None or metrics["val_loss"] < best[0]["val_loss"]):
                best, waited = (metrics, {name: t.clone() for name, t in tuned_weights().items()}), 0
            clock = time.time()
            if args.patience and waited >= args.patience:
                say(f"no better for {waited} validations: back to val_loss {best[0]['val_loss']:.4f}")
                break
        if args.save_every and step % args.save_every == 0 and not last:
            save(metrics)
            clock = time.time()

    # what it learned
    if best is not None:
        metrics = best[0]
        with torch.no_grad():
            for name, t in tuned_weights().items():
                t.copy_(best[1][name])
    save(metrics)
    if stop and process.world == 1:
        say(f"stopped at step {step} and saved" + (f": python sft.py --resume --out {out} goes on from here"
                                                   if args.save_every else ""))
    elif main_process:
        if not sharded.plain:  # one whole model, to ask
            model = load_run(out, device)[0]
            model.compute_dtype = dtype
        model.eval()
        if args.show:
            say("after:")
            show(model, tokenizer, args, raw, say)
        metrics = metrics | report(model, tokenizer, args, raw, say)
        if timed[1]:
            metrics |= {"tokens_per_s": round(timed[0] / timed[1])}
        metrics |= {"trained": tuned, "peak_memory": peak_memory(device), "seconds": round(time.time() - started, 1)}
        metrics = {name: round(value, 5) for name, value in metrics.items()}
        run = json.loads((out / "run.json").read_text())
        with replace_file(out / "run.json", "w") as f:
            json.dump(run | {"metrics": metrics}, f, indent=1)
        print(json.dumps(metrics))
    process.close()


if __name__ == "__main__":
    cli(main)
