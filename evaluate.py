"""
Evaluation: one yardstick for every stage, and an interval on every figure.

Almost every figure here is a function f of sums over independent examples (right answers and questions; nats,
tokens and bytes; matched n-grams), so one bootstrap serves them all: draw the n examples again with replacement,
f(Σ parts), 1,000 times; the 2.5th and 97.5th percentile are the interval (Efron 1979). A share of yes and no gets
Wilson's interval (1927) instead, which is honest at 0 and 1. Win rates and ratings are drawn by prompt. One example
alone has no interval: nan, in JSON null.

    python evaluate.py                                  # the newest run: its validation text, its questions
    python evaluate.py --task text=book.txt --window 128 --stride 64 --init out/base gpt2
    python evaluate.py --init HuggingFaceTB/SmolLM2-135M --task choices=hellaswag.jsonl lastword=lambada.jsonl \\
        answers=gsm8k_test.jsonl --limit 50 --shots 5
    python evaluate.py --task winrate=prompts.jsonl --init out/sft out/rl --judge model=out/sft

    --task      source, a JSONL file unless said                           figures
    val         none: the token files that the run was trained beside      val_loss (nats), val_bpb
    text        a text file; none: this Python's own source                loss, perplexity by token, word, byte
    choices     rows of HellaSwag, ARC, MMLU, PIQA, TruthfulQA, BLiMP, or  accuracy by log-probability, per token
                {"prompt", "choices", "answer": index}                     and per byte; mc2; calibration error
    lastword    {"text"}, as LAMBADA                                       accuracy, perplexity of the last word
    answers     GSM8K's rows or {"prompt", "answer"}                       exact match, pass@k, calibration error
    checks      none: the questions about the run's data                   exact match
    arithmetic  number of digits; bios: number of people                   as answers
    samples     none, or {"prompt"}                                        distinct-n, repetition
    probe       {"text", "label"}, "description"; none: arithmetic         accuracy; random model; majority
    winrate     {"prompt"}, and two runs or more                           share of prompts won; as arena
    pairs       {"prediction", "reference": text or list}                  BLEU, NIST, ROUGE-1/2/L, distinct-n
    judged      {"true": yes/no, "informative": yes/no, …} of an answer    the share of each and of all together
    arena       {"model_a", "model_b", "winner"}                           Elo, Bradley-Terry, win matrix
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from bpe import BadInput, Tokenizer, chat_stops, cli, read_json, render_chat, replace_file
from data import Figure, arithmetic, bios, number, read_rows, reading, share, stdlib
from data import text as text_files
from model import GPT, RewardModel, continuations, init_weights, newest_run, pad, setup_process, token_scores

# -----------------------------------------------------------------------------
# Intervals


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def bootstrap(parts, f=ratio, resamples=1000, seed=0, centred=False):
    """
    parts (n, k): what each example adds to k sums; or a list of such arrays, strata that are drawn each for
    itself. f maps sums (..., k) to the figure (...). centred: where f of a draw exceeds f of the whole on average, as
    a sum of absolute values does, the interval is moved back by as much. -> Figure
    """
    strata = [np.asarray(p, dtype=float) for p in (parts if np.ndim(parts[0]) == 2 else [parts])]
    rng, drawn = np.random.default_rng(seed), 0
    with np.errstate(all="ignore"):  # a resample without any match
        value = float(f(sum(part.sum(0) for part in strata)))
        if min(map(len, strata)) < 2:
            return Figure(value, math.nan, math.nan)
        for part in strata:
            picks = (rng.integers(len(part), size=len(part)) for _ in range(resamples))
            drawn = drawn + np.stack([np.bincount(pick, minlength=len(part)) @ part for pick in picks])
        figures = f(drawn)
        low, high = np.nanpercentile(figures, [2.5, 97.5]) - (np.nanmean(figures) - value if centred else 0)
    return Figure(value, float(low), float(high))


def mean(values):
    """Of numbers in 0 … 1, (n,); where each is 0 or 1, which is a share, Wilson's interval."""
    return share(values) if set(values) <= {0, 1} else bootstrap([[v, 1] for v in values])


# -----------------------------------------------------------------------------
# Text against text


def tokenize_13a(text):
    """Words and marks as mteval-v13a, WMT and sacrebleu cut them."""
    marks = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
    for mark, plain in marks.items():
        text = text.replace(mark, plain)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # not inside 1,000.5
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def bleu_counts(prediction, references, order=4):
    """Words -> (2 order + 2,): n-grams matched and n-grams, n = 1 … order, its length, the nearest reference's."""
    n_all, matched = [ngrams(prediction, n) for n in range(1, order + 1)], []
    for n, found in enumerate(n_all, 1):
        most = Counter()
        for reference in references:
            most |= ngrams(reference, n)
        matched.append((found & most).total())
    near = min((abs(len(r) - len(prediction)), len(r)) for r in references)[1]
    return [*matched, *(found.total() for found in n_all), len(prediction), near]


def bleu_of(sums):
    """100 · exp(min(0, 1 - r/c)) · exp(mean ln p_n); the i-th zero match counts as 2^-i (sacrebleu's "exp")."""
    order = sums.shape[-1] // 2 - 1
    matched, found, c, r = sums[..., :order], sums[..., order:-2], sums[..., -2], sums[..., -1]
    none = matched == 0
    with np.errstate(all="ignore"):
        p = np.where(none, 0.5 ** np.cumsum(none, -1), matched) / found
        score = 100 * np.exp(np.minimum(0, 1 - r / c) + np.log(p).mean(-1))
    return np.where((found == 0).any(-1) | none.all(-1), 0.0, score)


def bleu(predictions, references):
    """Papineni et al. 2002, over a corpus: a list of texts and, for each, a list of reference texts. 0 … 100."""
    counts = [bleu_counts(tokenize_13a(p), [*map(tokenize_13a, rs)]) for p, rs in zip(predictions, references)]
    return float(bleu_of(np.sum(counts, 0)))


def nist_counts(predictions, references, order=5):
    """
    Doddington 2002: a match weighs its information in all references, log2(count(w_1 … w_n-1) / count(w_1 … w_n)).
    Lists of words -> (texts, 2 order + 2): information matched, n-grams, lengths here and of the best reference.
    """
    count, rows = Counter(), []
    for reference in itertools.chain(*references):
        count[()] += len(reference)
        for n in range(1, order + 1):
            count.update(ngrams(reference, n))
    for words, options in zip(predictions, references):
        found, best = [ngrams(words, n) for n in range(1, order + 1)], []
        for n, grams in enumerate(found, 1):
            matches = [((grams & ngrams(r, n)).items(), len(r)) for r in options]
            best.append(max((sum(math.log2(count[g[:-1]] / count[g]) * k for g, k in match), length)
                            for match, length in matches))
        rows.append([*(information for information, _ in best), *(grams.total() for grams in found),
                     order * len(words), sum(length for _, length in best)])
    return rows


def nist_of(sums):
    """Σ_n matched / n-grams, times exp(β ln²(min(1, c/r))) with β such that c/r = 2/3 gives 1/2."""
    order = sums.shape[-1] // 2 - 1
    with np.errstate(all="ignore"):
        precision = np.nan_to_num(sums[..., :order] / sums[..., order:-2]).sum(-1)
        short = np.log(np.minimum(1, sums[..., -2] / sums[..., -1]))
        return precision * np.exp(math.log(0.5) / math.log(1.5) ** 2 * short ** 2)


def lcs(a, b):
    """Length of the longest common subsequence, a bit for each place of a (Hyyrö 2004)."""
    places = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge(prediction, reference):
    """{"rouge1" | "rouge2" | "rougeL": (precision, recall, F1)} (Lin 2004), words of a-z and 0-9, no stemming."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    hits = {"rouge1": ((ngrams(a, 1) & ngrams(b, 1)).total(), len(a), len(b)),
            "rouge2": ((ngrams(a, 2) & ngrams(b, 2)).total(), len(a) - 1, len(b) - 1),
            "rougeL": (lcs(a, b), len(a), len(b))}
    return {name: (h / max(m, 1), h / max(n, 1), 2 * h / max(m + n, 1)) for name, (h, m, n) in hits.items()}


def distinct(texts, n):
    """
    Different n-grams over all n-grams of a list of token lists (Li et al. 2016). The interval is a jackknife's, as
    drawing a text twice would make n-grams less distinct: se² = (m-1)/m Σ (θ without text i - their mean)².
    -> Figure
    """
    counts = [ngrams(text, n) for text in texts]
    total = Counter(itertools.chain.from_iterable(count.elements() for count in counts))
    types, tokens, m = len(total), max(1, total.total()), len(texts)
    left = [(types - sum(total[g] == k for g, k in c.items())) / max(1, tokens - c.total()) for c in counts]
    half = 1.959964 * math.sqrt((m - 1) * np.var(left)) if m > 1 else math.nan
    low, high = np.clip([types / tokens - half, types / tokens + half], 0, 1)
    return Figure(types / tokens, float(low), float(high))


def repetition(text, n=4):
    """Share of a token list's n-grams that it already has said (Welleck et al. 2020)."""
    counts = ngrams(text, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def pass_at_k(n, c, k):
    """Probability that one of k answers drawn from n, of which c are right, is right: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def ece(confidence, right, per=1, bins=10):
    """
    Expected calibration error (Guo et al. 2017): Σ over bins of |Σ confidence - Σ right| / n. Lists of n numbers in
    0 … 1; each `per` of them in turn answer one question and are drawn together. -> Figure
    """
    place = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    parts = np.eye(bins)[place] * (np.asarray(confidence) - np.asarray(right, dtype=float))[:, None]
    parts = np.c_[parts, np.ones(len(parts))].reshape(-1, per, bins + 1).sum(1)
    value, low, high = bootstrap(parts, lambda s: np.abs(s[..., :-1]).sum(-1) / s[..., -1], centred=True)
    return Figure(value, float(np.maximum(0, low)), high)


# -----------------------------------------------------------------------------
# Ratings from battles


def elo(battles, n_players, k=32.0, orders=None):
    """
    R_a ← R_a + k (s - E), E = 1 / (1 + 10^((R_b - R_a) / 400)), R_b the other way, from 1000 (Elo 1978).
    battles: (M, 3) of a, b, s = 1, 0.5 or 0. orders (P, m): which battle comes when, P times, M: none;
    -> ratings (P, n).
    """
    orders = np.arange(len(battles))[None] if orders is None else orders
    battles = np.r_[np.asarray(battles, dtype=float), [(0, 0, 0.5)]]  # the last one moves nobody
    ratings, rows = np.full((len(orders), n_players), 1000.0), np.arange(len(orders))
    for column in orders.T:
        a, b = battles[column, :2].astype(int).T
        change = k * (battles[column, 2] - 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / 400)))
        ratings[rows, a] += change
        ratings[rows, b] -= change
    return ratings


def win_matrix(battles, n_players):
    """battles (M, 3) as in elo -> (n, n): how often row beat column, a tie half each."""
    a, b, s = np.asarray(battles, dtype=float).T
    cells = np.r_[a * n_players + b, b * n_players + a].astype(int)
    return np.bincount(cells, np.r_[s, 1 - s], n_players ** 2).reshape(n_players, n_players)


def connected(wins):
    """Whether a path of wins leads from each to each: only then has the likelihood a maximum (Ford 1957)."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins).bit_length()):
        reach = (reach.astype(int) @ reach) > 0
    return bool(reach.all())


def bradley_terry(wins, prior=0.0):
    """
    Maximum likelihood of P(i beats j) = σ(β_i - β_j) (Bradley & Terry 1952) by Newton's method, on Elo's scale:
    1000 + 400 / ln 10 · β, mean 1000. wins (..., n, n): see win_matrix; prior: wins added to each side of a pair.
    """
    n = wins.shape[-1]
    wins = wins + prior * (1 - np.eye(n))
    games, beta = wins + np.swapaxes(wins, -1, -2), np.zeros(wins.shape[:-1])
    for _ in range(200):
        p = 1 / (1 + np.exp(beta[..., None, :] - beta[..., :, None]))
        gradient = (wins - games * p).sum(-1)
        spread = games * p * (1 - p)
        hessian = np.eye(n) * spread.sum(-1)[..., None] - spread + 1 / n  # + 1/n: the mean is free, keep it
        step = np.linalg.solve(hessian + 1e-12 * np.eye(n), gradient[..., None])[..., 0]
        beta = beta + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return 1000 + 400 / math.log(10) * (beta - beta.mean(-1, keepdims=True))


# -----------------------------------------------------------------------------
# What a model says of given text


def windows(n, T, stride):
    """
    (start, done, end) of each window: it reads ids[start:end], at most T, and predicts ids[done + 1:end + 1],
    which no window before it did: ids 1 … n-1 once each and, after the first window, from T - stride or more.
    """
    done = 0
    for start in range(0, n - 1, stride):
        end = min(start + T, n - 1)
        yield start, done, end
        done = end
        if end == n - 1:
            return


@torch.inference_mode()
def window_losses(model, ids, spans):
    """Nats of each predicted token of ids (n,), an int64 array: a tensor for each of the windows `spans`."""
    hidden = model.trunk(pad([ids[start:end] for start, _, end in spans], model.device))
    x = torch.cat([row[done - start:end - start] for row, (start, done, end) in zip(hidden, spans)])
    targets = torch.from_numpy(np.concatenate([ids[done + 1:end + 1] for _, done, end in spans]))
    return (-token_scores(model, x, targets.to(model.device))[0]).split([end - done for _, done, end in spans])


def perplexity(model, ids, window=0, stride=0, rows=8):
    """exp of the mean nats of ids[1:]; window 0: the model's context, stride 0: the window, no overlap."""
    T, ids = window or model.context, np.asarray(ids, dtype=np.int64)
    spans = list(windows(len(ids), T, stride or T))
    losses = [window_losses(model, ids, spans[i:i + rows]) for i in range(0, len(spans), rows)]
    return math.exp(torch.cat([*itertools.chain(*losses)]).mean())


# -----------------------------------------------------------------------------
# One run under evaluation


class Subject:
    """A model, its tokenizer, and the log of answers it has given: with --resume no question is asked twice."""

    def __init__(self, init, args, device):
        self.init, self.name, self.args = Path(init), Path(init).name or str(init), args
        self.model = GPT.from_pretrained(init, device, getattr(torch, args.dtype)).eval()
        self.tokenizer = Tokenizer.from_pretrained(init)
        self.start, run = self.tokenizer.begin, self.init / "run.json"
        self.run = read_json(run) if run.exists() else {}
        self.folder = self.init if self.run else Path("out", self.name)  # nobody else's folder is written to
        places = [self.init, *(Path(base) for base in [self.run.get("base")] if base)]  # an adapter's weights are two
        files = [file for p in places for file in ([p] if p.is_file() else p.glob("*.safetensors"))]
        self.stamp = [str(init), args.dtype, sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
        # what one forward pass reads; on a GPU it has to be enough to keep one busy
        self.budget = args.forward_tokens or (65536 if self.model.device.type == "cuda" else 8192)
        self.asked, self.seconds, self.cut = 0, 0.0, 0  # of what was asked now, not in an earlier run
        self.device, self.written = device, {}  # for winrate
        self.known, self.log = {}, self.folder / "evaluate.jsonl"
        lines = self.log.read_text().splitlines() if args.resume and self.log.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # a crash cut it short
                self.known.update([json.loads(line)])
        with replace_file(self.log, "w") as f:
            f.writelines(json.dumps(item) + "\n" for item in self.known.items())

    def ask(self, kind, items, size, compute):
        """
        compute(list of items) -> their results, in batches of similar size: size(item) = (rows, length), and all
        rows · longest stay below --forward_tokens, or half of it as often as memory ends there. Results come in the
        items' order and are logged as they come. kind and item: everything but the model that changes a result.
        """
        keys = [hashlib.sha256(json.dumps([self.stamp, kind, item]).encode()).hexdigest()[:24] for item in items]
        todo = list({key: i for i, key in enumerate(keys) if key not in self.known}.values())
        sizes = {i: size(items[i]) for i in todo}
        todo.sort(key=lambda i: -sizes[i][1])  # the longest first: what fits then always fits
        started, at = time.time(), 0
        with open(self.log, "a") as log:
            while at < len(todo):
                room = self.budget // max(1, sizes[todo[at]][1])
                ends = itertools.accumulate(sizes[i][0] for i in todo[at:at + max(1, room)])
                batch = todo[at:at + max(1, sum(rows <= room for rows in ends))]
                rows = sum(sizes[i][0] for i in batch)
                try:
                    results = compute([items[i] for i in batch])
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise BadInput(f"the device's memory ends at one question of {rows} rows of "
                                       f"{sizes[batch[0]][1]} tokens: give a smaller --dtype or --device cpu") from None
                    self.budget = min(self.budget, rows * sizes[batch[0]][1]) // 2
                    continue
                for i, result in zip(batch, results):
                    self.known[keys[i]] = result
                    log.write(json.dumps([keys[i], result]) + "\n")
                log.flush()
                at, self.asked = at + len(batch), self.asked + rows
        self.seconds += time.time() - started
        return [self.known[key] for key in keys]

    def text(self, context, shots=()):
        solved = (question + answer for question, answer in shots)
        return "".join(s if s.endswith("\n") else s + "\n\n" for s in solved) + context

    def messages(self, context, shots=()):
        return [{"role": ("user", "assistant")[i % 2], "content": turn.strip()}
                for i, turn in enumerate([*itertools.chain(*shots), context])]

    def prompt(self, context, shots=()):
        """Ids of a question after solved ones, [(context, answer)]: as text, or with --chat as a conversation."""
        if self.args.chat:
            return render_chat(self.tokenizer, self.messages(context, shots), generation=True)[0]
        return self.start + self.tokenizer.encode(self.text(context, shots))

    def groups(self, questions, shots=()):
        """[context ids, [choice ids, …]] of each; where a token spans the border it counts with the choices."""
        if self.args.chat:  # the answer as generation would write it, without the token that ends it
            stops, found = chat_stops(self.tokenizer), []
            for q in questions:
                turns = self.messages(q.context, shots)
                parts = [data.prompt_and_response(self.tokenizer, turns, choice.strip()) for choice in q.choices]
                rows = [prompt + [i for i in answer if i not in stops] for prompt, answer in parts]
                found.append(self.group(q.where, [parts[0][0], *rows]))
            return found
        found = []
        for some in (questions[i:i + 256] for i in range(0, len(questions), 256)):  # tiktoken cuts many at once
            texts = [self.text(q.context, shots) + choice for q in some for choice in ("", *q.choices)]
            texts = iter(self.tokenizer.encode_batch(texts))
            found += [self.group(q.where, [self.start + next(texts) for _ in ("", *q.choices)]) for q in some]
        return found

    def group(self, where, texts):
        """texts: ids of the context and of the context with each choice."""
        (prompt, *rows), T = texts, self.model.context
        shared = next((i for i, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), min(map(len, texts)))
        shared = min(shared, *(len(row) - 1 for row in rows))
        if shared < 1:
            raise BadInput(f"{where} has an empty context, and the tokenizer no token to begin with: give one")
        longest = max(map(len, rows)) - shared
        if longest > T:
            raise BadInput(f"{where} has a choice of {longest} tokens, longer than the model's context of {T}: "
                           "shorten it or leave the row out")
        return [self.last(prompt[:shared], T + 1 - longest), [row[shared:] for row in rows]]

    def last(self, ids, room):
        """What fits into the model's context, cut on the left, as report tells."""
        self.cut += len(ids) > room
        return ids[-room:]

    def report(self, label):
        """What was asked since the last report; a choice, an answer or a window is a row."""
        if self.asked:
            print(f"{self.name}, {label}: {self.asked} rows in {self.seconds:.1f} s, {self.asked / self.seconds:.1f} "
                  "rows/s", file=sys.stderr)
        if self.cut:
            print(f"{self.name}, {label}: {self.cut} prompts longer than the model's context were cut on the left",
                  file=sys.stderr)
        self.asked, self.seconds, self.cut = 0, 0.0, 0


# -----------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    where: str            # file and line
    context: str
    choices: tuple = ()   # texts that may follow it
    right: tuple = ()     # ((index, bool), …) of the choices of which one is picked
    truth: tuple = ()     # TruthfulQA's MC2: ((index, bool), …)
    answer: str = ""      # where the model writes it itself


@reading
def read_choices(where, row):
    """One multiple-choice row of any of the known sets."""
    q = known_choices(where, row)
    if not all(choice.strip() for choice in q.choices) or not any(label for _, label in q.right) or len(q.right) < 2:
        raise ValueError("an empty choice, no two of them, or an answer that is none of them")
    return q


def known_choices(where, row):
    """The same, not yet checked."""
    if "sentence_good" in row:  # BLiMP (Warstadt et al. 2020): the whole sentences compete
        return Question(where, "", (row["sentence_good"], row["sentence_bad"]), ((0, True), (1, False)))
    if "mc1_targets" in row:  # TruthfulQA (Lin et al. 2022)
        one, many = (dict(zip(row[k]["choices"], row[k]["labels"])) for k in ("mc1_targets", "mc2_targets"))
        choices = [*dict.fromkeys([*one, *many])]
        right, truth = ([(choices.index(c), bool(label)) for c, label in d.items()] for d in (one, many))
        return Question(where, f"Q: {row['question']}\nA:", tuple(" " + c for c in choices), (*right,), (*truth,))
    if "endings" in row:  # HellaSwag (Zellers et al. 2019), cleaned as usual of WikiHow's marks
        def clean(text):
            return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        context, choices, label = clean(context), [" " + clean(c) for c in row["endings"]], int(row["label"])
    elif "goal" in row:  # PIQA
        context, label = f"Question: {row['goal']}\nAnswer:", row["label"]
        choices = [" " + row["sol1"], " " + row["sol2"]]
    elif "answerKey" in row:  # ARC
        context, letters = f"Question: {row['question']}\nAnswer:", row["choices"]["label"]
        choices, label = [" " + c for c in row["choices"]["text"]], letters.index(row["answerKey"])
    elif "question" in row:  # MMLU: the letter competes
        letters, answer = "ABCDEFGHIJ"[:len(row["choices"])], row["answer"]
        label = letters.index(answer) if isinstance(answer, str) else answer
        context = "\n".join([row["question"], *(f"{a}. {c}" for a, c in zip(letters, row["choices"])), "Answer:"])
        choices = [" " + letter for letter in letters]
    else:
        context, choices, label = row["prompt"], row["choices"], row["answer"]
    return Question(where, context, tuple(choices), tuple((i, i == label) for i in range(len(choices))))


@reading
def read_last_word(where, row):
    context, word = row["text"].rstrip().rsplit(" ", 1)
    return Question(where, context, (" " + word,), ((0, True),))


@reading
def read_answer(where, row):
    if "question" in row:  # GSM8K (Cobbe et al. 2021)
        return Question(where, f"Question: {row['question']}\nAnswer:", answer=" " + row["answer"])
    return Question(where, row["prompt"], answer=row["answer"] + "")


def gives_answer(text, answer):
    """Does the text give the answer: GSM8K's by number, others letter by letter, with no word going on behind?"""
    if "####" in answer:
        return number(answer) is not None and number(text) == number(answer)
    text = text if answer[:1].isspace() else text.lstrip()
    return re.match(re.escape(answer) + (r"(?!\w|[.,]\d)" if answer[-1:].isalnum() else ""), text) is not None


def swap(text, rng):
    """The second and the third letter of a word change places, in one word of five; numbers stay."""
    def changed(m):
        return m[1] + m[3] + m[2] + m[4] if rng.random() < 0.2 else m[0]
    return re.sub(r"\b([^\W\d_])([^\W\d_])([^\W\d_])([^\W\d_])", changed, text)


PERTURB = {
    "swap": swap,
    "drop": lambda text, rng: "".join(c for c in text if not c.isalpha() or rng.random() > 0.03),
    "case": lambda text, rng: text.lower(),
    "spaces": lambda text, rng: re.sub(" ", lambda m: "  " if rng.random() < 0.2 else " ", text),
}


def perturbed(measure, questions, args):
    """
    measure(questions) -> (figures, [right]). Again for each of --perturb, with the contexts (not the choices) as
    careless people write them: accuracy_NAME, and robust, the share that is right every time.
    """
    figures, always = measure(questions)
    for name in args.perturb:
        rng = random.Random(f"{args.seed} {name}")
        found, right = measure([q._replace(context=PERTURB[name](q.context, rng)) for q in questions])
        figures[f"accuracy_{name}"], always = found["accuracy"], [a and b for a, b in zip(always, right)]
    return figures | ({"robust": share(always)} if args.perturb else {})


def load(source, read, args):
    """
    ([(context, answer)] solved before each question, questions): --shots from --shots_from, else the first rows of
    the file itself, which are then not asked.
    """
    own = 0 if args.shots_from else args.shots
    questions = [read(*row) for row in read_rows(source, args.limit and args.limit + own)]
    solved, questions = questions[:own], questions[own:]
    if args.shots_from:
        solved = [read(*row) for row in read_rows(args.shots_from, args.shots)[:args.shots]]
        if len(solved) < args.shots:
            raise BadInput(f"--shots_from {args.shots_from} has {len(solved)} rows: lower --shots {args.shots}")
    if not questions:
        raise BadInput(f"--shots {args.shots} leaves no question to ask: lower it, or give --shots_from FILE")
    answers = [q.answer or next(q.choices[i] for i, right in q.right if right) for q in solved]
    return [(q.context, answer) for q, answer in zip(solved, answers)], questions


def scored(subject, kind, questions, shots):
    """The continuations' scores of each question, see continuations."""
    def size(group):
        return len(group[1]), len(group[0]) + max(map(len, group[1]))
    groups = subject.groups(questions, shots)
    return subject.ask([kind], groups, size, lambda batch: continuations(subject.model, batch))


def task_choices(subject, source, args):
    """Accuracy of argmax log P(choice | context), the same per token and per byte of the choice, ECE, MC2."""
    shots, questions = load(source, read_choices, args)

    def measure(questions):
        right, confidence, truth = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}, [], []
        for q, scores in zip(questions, scored(subject, "questions", questions, shots)):
            logp = np.array([s[0] for s in scores])
            sizes = [len(text_files.clean(c.strip()).encode()) for c in q.choices]
            per = 1, np.array([s[1] for s in scores]), np.array(sizes)
            options, labels = map(list, zip(*q.right))
            for name, length in zip(right, per):
                right[name].append(labels[int(np.argmax((logp / length)[options]))])
            confidence.append(float(np.exp(logp[options] - np.logaddexp.reduce(logp[options])).max()))
            if q.truth:  # the share of probability on what is true
                p = np.exp(logp - logp.max())
                truth.append(sum(p[i] for i, true in q.truth if true) / sum(p[i] for i, _ in q.truth))
        figures = {name: share(values) for name, values in right.items()}
        figures |= {"mc2": mean(truth)} if truth else {}
        return figures | {"ece": ece(confidence, right["accuracy"])}, right["accuracy"]
    return perturbed(measure, questions, args)


def task_last_word(subject, source, args):
    """LAMBADA (Paperno et al. 2016): would greedy decoding say the last word; exp of its mean nats."""
    shots, questions = load(source, read_last_word, args)

    def measure(questions):
        scores = [s[0] for s in scored(subject, "last words", questions, shots)]
        right = [bool(greedy) for _, _, greedy in scores]
        return {"accuracy": share(right), "ece": ece([math.exp(min(0, logp)) for logp, _, _ in scores], right),
                "perplexity": bootstrap([[-s[0], 1] for s in scores], lambda s: np.exp(ratio(s)))}, right
    return perturbed(measure, questions, args)


def write_answers(subject, prompts, new, args):
    """
    [text, log-probability of each token] for lists of ids; greedy unless --temperature. Every answer has a stream of
    random numbers of its own, else the luck of one would be the luck of all, and no interval would know.
    """
    stop = chat_stops(subject.tokenizer) if args.chat else {subject.tokenizer.eot} - {None}
    T = subject.model.context

    def compute(items):
        tokens, logp = subject.model.generate([p for p, _ in items], new, stop=stop, temperature=args.temperature,
                                              seed=[seed for _, seed in items])
        return [[subject.tokenizer.decode(t, goes_on=not args.chat), [round(x, 4) for x in lp]]
                for t, lp in zip(tokens, logp)]
    seeds = ((args.seed * 0x9E3779B1 + i) & 0xFFFFFFFF if args.temperature else 0 for i in itertools.count())
    items = [[subject.last(p, max(T - new, T // 2)), seed] for p, seed in zip(prompts, seeds)]
    kind = ["answers as they go on", new, args.temperature, sorted(stop)]
    return subject.ask(kind, items, lambda item: (1, len(item[0]) + new), compute)


def answered(subject, questions, shots, args, label):
    """Exact match of what the model writes; with --num_samples n > 1, pass@k for k = 1, 2, 4 … up to n."""
    n = args.num_samples or 1
    if n > 1 and not args.temperature:
        raise BadInput(f"--num_samples {n} answers of temperature 0 would all be the same: add --temperature 0.8")

    def measure(questions):
        asked = [q for q in questions for _ in range(n)]
        lengths = [len(subject.tokenizer.encode(q.answer)) for q in asked]
        worked = any("####" in q.answer for q in asked)
        new = args.max_new_tokens or (256 if worked else max(lengths) + 4)
        texts = write_answers(subject, [subject.prompt(q.context, shots) for q in asked], new, args)
        right, confidence = [], []
        with open(args.texts or os.devnull, "a") as f:
            for q, (text, logp), length in zip(asked, texts, lengths):
                text = text.split("\nQuestion:")[0]  # a new question of its own
                # a turn of a chat has no line to end
                right.append(gives_answer(text, q.answer.strip() if args.chat else q.answer))
                confidence.append(math.exp(sum(logp[:length])))  # of as many tokens as the answer has
                f.write(json.dumps({"run": subject.name, "task": label, "prompt": q.context, "prediction": text,
                                    "reference": q.answer}) + "\n")
        passed = np.array(right).reshape(-1, n).sum(1).tolist()
        figures = {"accuracy": share(right) if n == 1 else mean([c / n for c in passed])}
        figures |= {} if worked else {"ece": ece(confidence, right, n)}
        for k in [2 ** i for i in range(n.bit_length()) if n > 1]:
            figures[f"pass@{k}"] = mean([pass_at_k(n, c, k) for c in passed])
        return figures, [c > 0 for c in passed]
    return perturbed(measure, questions, args)


def task_answers(subject, source, args):
    shots, questions = load(source, read_answer, args)
    return answered(subject, questions, shots, args, label_of("answers", source))


def made(rows, subject, args, label):
    """The same for questions that code makes, the first of them solved with --shots."""
    questions = [Question(label, row["prompt"], answer=row["answer"]) for row in rows]
    shots = [(q.context, q.answer) for q in questions[:args.shots]]
    questions = questions[args.shots:][:args.limit or None]
    if not questions:
        raise BadInput(f"--shots {args.shots} leaves no question of {label}: lower it")
    return answered(subject, questions, shots, args, label)


def whole(name, source, default):
    if source is not None and not (source.isdecimal() and int(source)):
        raise BadInput(f"--task {name}={source}: give a positive number there, such as {name}={default}")
    return int(source or default)


def task_arithmetic(subject, source, args):
    """Held-out "93-57=", of numbers with exactly so many digits (Brown et al. 2020, 3.9.1)."""
    digits = whole("arithmetic", source, 2)
    form = re.compile(rf"\d{{{digits}}}[+-]\d{{{digits}}}=")
    pairs = dict.fromkeys(arithmetic.draw("val", 8000, digits))
    rows = [{"prompt": q, "answer": f"{a}\n"} for q, a in pairs if form.fullmatch(q)]
    return made(rows[:arithmetic.CHECKED], subject, args, "arithmetic")


def task_bios(subject, source, args):
    """The facts of the invented people, completed letter by letter."""
    return made(bios.checks(n_people=whole("bios", source, bios.N_PEOPLE))["recall"], subject, args, "bios")


# -----------------------------------------------------------------------------
# Text


def losses(subject, ids, label, args):
    """(windows, 4): the nats, tokens, bytes and words (by their first letters) that each window predicts."""
    T = args.window or subject.model.context
    stride = args.stride or T
    if not 0 < stride <= T <= subject.model.context:
        raise BadInput(f"--window {T} and --stride {stride}: the stride must be at most the window, which must be "
                       f"at most the model's context of {subject.model.context}")
    if len(ids) < 2:
        raise BadInput(f"{label} holds no text to predict: give a longer one")
    ids, spell = np.asarray(ids, dtype=np.int64), subject.tokenizer.token_bytes()
    text = np.frombuffer(b"".join(map(spell.__getitem__, ids)), np.uint8)
    ink = ~np.isin(text, list(b" \t\n\r\v\f"))
    begun = np.r_[0, np.cumsum(ink & ~np.r_[False, ink[:-1]])]
    end = np.cumsum(np.array([*map(len, spell)])[ids])  # of each token, in the text
    spans = list(windows(len(ids), T, stride))
    kind = ["windows", hashlib.sha256(ids.tobytes()).hexdigest()]
    nats = subject.ask(kind, spans, lambda span: (1, span[2] - span[0]),
                       lambda batch: [float(x.sum()) for x in window_losses(subject.model, ids, batch)])
    print(f"{subject.name}, {label}: {len(ids) - 1} tokens, each predicted once; window {T}, stride {stride}",
          file=sys.stderr)
    return np.array([[x, b - a, end[b] - end[a], begun[end[b]] - begun[end[a]]]
                     for x, (_, a, b) in zip(nats, spans)])


def bits_per_byte(sums):
    return sums[..., 0] / sums[..., 2] / math.log(2)


def task_val(subject, source, args):
    """As train.py: --eval_tokens shared by the corpora's weights, sum over sum."""
    parts, figures, found = [], {}, data.corpora(subject.run)
    if not found:
        raise BadInput(f"no data under data/ has the tokenizer of {subject.init}: give --task text=FILE")
    for name, (weight, folder) in found.items():
        limit = max(1, round(args.eval_tokens * weight)) if args.eval_tokens else None
        ids = data.open_tokens(folder / "val.bin")
        parts.append(losses(subject, ids[:limit and limit + 1], name, args))
        figures[f"val_loss_{name}"] = bootstrap(parts[-1])
    total = {"val_loss": bootstrap(parts), "val_bpb": bootstrap(parts, bits_per_byte)}
    return total | (figures if len(found) > 1 else {})


def task_text(subject, source, args):
    """Every token after the document's start once; words are runs without white space, bytes those of UTF-8."""
    files, ids = [Path(source)] if source else list(stdlib.files("val")), []
    for piece, starts in itertools.chain(*map(text_files.read, files)):
        ids += (subject.start if starts else []) + subject.tokenizer.encode(text_files.clean(piece), goes_on=not starts)
        if args.eval_tokens and len(ids) > args.eval_tokens:
            ids = ids[:args.eval_tokens + 1]
            break
    parts = losses(subject, ids, source or "stdlib", args)
    figures = {"loss": ratio, "bpb": bits_per_byte, "perplexity": lambda s: np.exp(ratio(s)),
               "byte_perplexity": lambda s: np.exp(s[..., 0] / s[..., 2]),
               "word_perplexity": lambda s: np.exp(s[..., 0] / s[..., 3])}
    return {name: bootstrap(parts, f) for name, f in figures.items()}


def task_checks(subject, source, args):
    """The questions that the run's corpora can check, with the names that train.py gives them."""
    figures = {}
    for name, (_, folder) in data.corpora(subject.run).items():
        for metric, rows in read_json(folder / "checks.json").items():
            found = made(rows, subject, args, metric)
            figures[metric] = found.pop("accuracy")
            figures |= {f"{metric}_{name}": value for name, value in found.items() if name != "ece"}
    return figures


def read_prompts(source, args, keys=("prompt",)):
    rows = read_rows(source, args.limit)
    for where, row in rows:
        for key in keys:
            if not isinstance(row.get(key), str):
                raise BadInput(f"{where} has no {key}, a text: every row needs one")
    return [row for _, row in rows]


def task_samples(subject, source, args):
    """Of texts from nothing, or from prompts: how many different n-grams, and how much each says again."""
    rows = read_prompts(source, args) if source else []
    prompts = [subject.prompt(row["prompt"]) for row in rows] or [subject.start] * 32
    args = argparse.Namespace(**{**vars(args), "temperature": args.temperature or 1.0})
    words = [text.split() for text, _ in write_answers(subject, prompts, args.max_new_tokens or 64, args)]
    figures = {f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)}
    return figures | {"repetition_4": mean([*map(repetition, words)])}


@reading
def read_pair(where, row):
    references = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
    if not references or not all(isinstance(t, str) for t in [row["prediction"], *references]):
        raise ValueError("texts, please")
    return row["prediction"], references


def task_pairs(subject, source, args):
    """BLEU of the whole corpus; ROUGE's F1 of each text, against its best reference, averaged."""
    predictions, references = zip(*(read_pair(*row) for row in read_rows(source, args.limit)))
    words, truths = [*map(tokenize_13a, predictions)], [[*map(tokenize_13a, rs)] for rs in references]
    figures = {"bleu": bootstrap([bleu_counts(p, rs) for p, rs in zip(words, truths)], bleu_of),
               "nist": bootstrap(nist_counts(words, truths), nist_of)}
    scores = [[rouge(p, r) for r in rs] for p, rs in zip(predictions, references)]
    for name in "rouge1", "rouge2", "rougeL":
        figures[name] = mean([max(s[name][2] for s in options) for options in scores])
    return figures | {f"distinct_{n}": distinct(words, n) for n in (1, 2)}


def task_judged(subject, source, args):
    """The share of each yes-or-no key in the rows, and of all together (TruthfulQA: true and informative)."""
    rows = read_rows(source, args.limit)
    keys = [key for key, value in rows[0][1].items() if isinstance(value, bool)]
    for where, row in rows:
        if not keys or not all(isinstance(row.get(key), bool) for key in keys):
            raise BadInput(f"{where} has no true or false under {', '.join(keys) or 'any key'}: judge every row")
    return {key: share([row[key] for _, row in rows]) for key in keys} | {
        "_and_".join(keys): share([all(row[key] for key in keys) for _, row in rows])}


# -----------------------------------------------------------------------------
# Battles

VERDICTS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


@reading
def read_battle(where, row):
    a, b, winner = str(row["model_a"]), str(row["model_b"]), str(row["winner"])
    if winner not in VERDICTS and winner not in (a, b) or a == b:
        raise BadInput(f"{where} has the winner {winner!r} between {a!r} and {b!r}: name one of two different "
                       "players, or model_a, model_b or tie")
    return a, b, VERDICTS[winner] if winner in VERDICTS else float(winner == a), json.dumps(row.get("prompt", where))


def task_arena(subject, source, args):
    """
    Ratings of everyone in a file of battles, Elo's as a mean over orders of them; prints the win matrix. Battles over
    the same prompt are drawn together. A draw has one order, so that Elo's interval holds the luck of an order too.
    """
    battles = [read_battle(*row) for row in read_rows(source, args.limit)]
    *_, prompts = zip(*battles)
    names = sorted({name for a, b, *_ in battles for name in (a, b)})
    place = {name: i for i, name in enumerate(names)}
    battles = np.array([(place[a], place[b], s) for a, b, s, _ in battles])
    n, M, rng = len(names), len(battles), np.random.default_rng(args.seed)
    wins = win_matrix(battles, n)
    prior = 0.0 if connected(wins) else 0.5
    if prior:
        print(f"{source}: wins and defeats do not lead from each player to each other, so no rating is likeliest; half "
              "a win is added to each side of each pair")
    orders = rng.permuted(np.tile(np.arange(M), (args.orders, 1)), axis=1)
    _, which = np.unique(prompts, return_inverse=True)
    P = int(which.max()) + 1
    counts = (np.bincount(rng.integers(P, size=P), minlength=P)[which] for _ in range(1000))
    draws = [rng.permutation(np.repeat(np.arange(M, dtype=np.int32), count)) for count in counts]
    drawn = np.full((len(draws), max(map(len, draws))), M, np.int32)
    for row, draw in zip(drawn, draws):
        row[:len(draw)] = draw
    # a resample may lack someone's only win or defeat: a hundredth of a win keeps its ratings finite
    resampled = bradley_terry(np.stack([win_matrix(battles[draw], n) for draw in draws]), prior or 0.01)
    rated = {"bt": (bradley_terry(wins, prior), resampled),
             "elo": (elo(battles, n, args.elo_k, orders).mean(0), elo(battles, n, args.elo_k, drawn))}
    if P == 1:  # one example has no interval
        rated = {kind: (value, np.full_like(other, np.nan)) for kind, (value, other) in rated.items()}
    games = wins + wins.T
    width = max(map(len, names))
    print("share of battles that the row won (ties half), and how many there were")
    for i in np.argsort(-rated["bt"][0]):
        cells = (f"{wins[i, j] / games[i, j]:6.2f} ({games[i, j]:.0f})" if games[i, j] else "-" for j in range(n))
        print(f"  {names[i]:{width}}", *(f"{cell:>12}" for cell in cells))
    return {f"{kind}_{name}": Figure(float(value[i]), *map(float, np.percentile(other[:, i], [2.5, 97.5])))
            for kind, (value, other) in rated.items() for i, name in enumerate(names)}


JUDGE = ("Here are a request and two answers to it.\n\nRequest: {}\n\nAnswer A: {}\n\nAnswer B: {}\n\n"
         "Which answer is better, A or B? The better answer is")


def parse_judge(text):
    kind, _, where = (text or "").partition("=")
    if kind not in ("check", "human", "reward", "model") or (kind in ("reward", "model")) != bool(where):
        raise BadInput("--task winrate needs --judge check, human, reward=DIR or model=DIR")
    return kind, where


def judge(pairs, args, log):
    """[(row, first answer, second answer)] -> for each 1 where the first is better, 0 the second, 0.5 neither."""
    kind, where = parse_judge(args.judge)
    if kind == "check":
        known = [row["answer"].strip() if args.chat else row["answer"] for row, *_ in pairs]
        points = [(gives_answer(a, answer), gives_answer(b, answer)) for (_, a, b), answer in zip(pairs, known)]
    elif kind == "reward":
        answers = [*dict.fromkeys((row["prompt"], answer) for row, *both in pairs for answer in both)]
        reward = dict(zip(answers, RewardModel(where, log.device)(*zip(*answers))))
        points = [(reward[row["prompt"], a], reward[row["prompt"], b]) for row, a, b in pairs]
    elif kind == "model":
        texts = [JUDGE.format(row["prompt"], a.strip(), b.strip()) for row, a, b in pairs]
        questions = [Question("a judged pair", text, (" A", " B")) for text in texts]
        referee = Subject(where, argparse.Namespace(**{**vars(args), "resume": True}), log.device)
        points = [(a[0], b[0]) for a, b in scored(referee, "questions", questions, ())]
        referee.report("the judge")
    else:
        points = [log.ask(["person"], [pair], lambda _: (1, 1), lambda pairs: [ask_person(*pairs[0])])[0]
                  for pair in pairs]
    return [(1 + (a > b) - (a < b)) / 2 for a, b in points]


def ask_person(row, a, b):
    print(f"\n{row['prompt']}\n\n--- A\n{a}\n\n--- B\n{b}\n")
    while True:
        print("better: a, b or t (tie)? ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise BadInput("--judge human: the answers ended; go on with --resume")
        if line.strip().lower() in ("a", "b", "t"):
            return {"a": (1, 0), "b": (0, 1), "t": (0, 0)}[line.strip().lower()]


def contestant(subject, source, args):
    """One run's part in task_winrate: its answers, which outlive the model."""
    rows = read_prompts(source, args, ("prompt", "answer") if args.judge == "check" else ("prompt",))
    prompts = [subject.prompt(row["prompt"]) for row in rows]
    subject.written[source] = [text for text, _ in write_answers(subject, prompts, args.max_new_tokens or 64, args)]
    return {}


def task_winrate(subjects, source, args):
    """
    Every two runs have answered the same prompts; the judge sees each two answers in both orders (a person once, the
    order in turn). Writes --battles, and returns the share of prompts won, of verdicts that the order did not
    change, and the ratings.
    """
    rows, points, lines, figures = read_prompts(source, args), {}, [], {}
    names, written = [s.name for s in subjects], [s.written[source] for s in subjects]
    turns = [(a, b, n) for i, j in itertools.combinations(range(len(subjects)), 2) for n in range(len(rows))
             for a, b in (((j, i), (i, j))[n % 2:][:1] if args.judge == "human" else ((i, j), (j, i)))]
    verdicts = judge([(rows[n], written[a][n], written[b][n]) for a, b, n in turns], args, subjects[0])
    for (a, b, n), s in zip(turns, verdicts):
        points.setdefault((min(a, b), max(a, b)), {}).setdefault(n, []).append(s if a < b else 1 - s)
        lines.append({"model_a": names[a], "model_b": names[b], "prompt": rows[n]["prompt"],
                      "winner": {1: "model_a", 0: "model_b"}.get(s, "tie"), "answer_a": written[a][n],
                      "answer_b": written[b][n], "judge": args.judge})
    for (i, j), won in points.items():
        figures[f"win_rate_{names[i]}_over_{names[j]}"] = mean([sum(p) / len(p) for p in won.values()])
        if args.judge != "human":
            figures[f"consistent_{names[i]}_over_{names[j]}"] = share([len({*p}) == 1 for p in won.values()])
    with replace_file(args.battles, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    return figures | task_arena(None, args.battles, argparse.Namespace(**{**vars(args), "limit": 0}))


# -----------------------------------------------------------------------------
# Probing


def probe(model, train, test, n_classes, rank, steps, lr, rows=64, seed=0):
    """
    V-probing of Physics of Language Models (Allen-Zhu & Li 2023, 2024): is a label there, for a linear head to
    read, in a frozen model? Trained are the head on the last token's last hidden state and, so that the model may
    understand what it is asked, an update A B of its embedding, A (V, rank), B (rank, E).
    train, test: lists of (ids, class). Returns the classes it gives to test, (n,).
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    A = torch.zeros(model.config.padded_vocab, rank, device=model.device, requires_grad=True)
    B = torch.randn(rank, model.config.embd_dim, device=model.device).requires_grad_()
    head = torch.nn.Linear(model.config.n_embd, n_classes, device=model.device)
    optimizer = torch.optim.AdamW([A, B, *head.parameters()], lr=lr, weight_decay=0.01)

    def logits(batch):
        idx = pad([ids for ids, _ in batch], model.device)
        x = model.trunk(None, embeds=model.wte(idx).float() + A[idx] @ B)
        last = torch.tensor([len(ids) - 1 for ids, _ in batch], device=x.device)
        return head(x[torch.arange(len(batch), device=x.device), last].float())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        batch = [train[i] for i in torch.randint(len(train), (rows,)).tolist()]
        optimizer.zero_grad()
        F.cross_entropy(logits(batch), torch.tensor([y for _, y in batch], device=model.device)).backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([logits(test[i:i + rows]).argmax(1) for i in range(0, len(test), rows)]).cpu()


@reading
def read_probe(where, row):
    return row["text"] + "", row.get("description", "") + "", str(row["label"])


def task_probe(subject, source, args):
    """
    Rows are probed at the end of "text <|im_start|> description <|im_end|>"; a fifth of the texts is held out.
    Without a file: does the model know at "93-57=", before it writes, the answer's first digit, and its last?
    """
    if source:
        rows = [read_probe(*row) for row in read_rows(source, args.limit)]
    else:
        pairs, places = arithmetic.draw("val", 4000), (("first", 0), ("last", -1))
        rows = [(q, name, answer[at]) for q, answer in pairs for name, at in places]
    marks = [subject.tokenizer.special.get(name) for name in ("<|im_start|>", "<|im_end|>")]
    classes, texts = sorted({label for *_, label in rows}), sorted({text for text, *_ in rows})
    held_out = set(random.Random(args.seed).sample(texts, len(texts) // 5))
    described = {}
    for text, description, label in rows:
        ids = subject.start + subject.tokenizer.encode(text)
        if description:
            ids += [i for i in [marks[0], *subject.tokenizer.encode(description), marks[1]] if i is not None]
        described.setdefault(description, ([], []))[text in held_out].append((ids, classes.index(label)))
    described = {name: parts for name, parts in described.items() if all(parts)}  # rare ones may stand on one side only
    train, test = ([row for parts in described.values() for row in parts[i]] for i in (0, 1))
    if not train or not test:
        raise BadInput(f"{source} has too few texts to hold out a fifth: give five different ones or more")
    # ours begin with branches that end in zero matrices, and would pass on the last token alone: GPT-2's weights
    place = subject.model.config.place
    blank = GPT(replace(subject.model.config, init="gpt2", place="pre" if place == "deepnorm" else place))
    init_weights(blank, args.seed)
    settings = dict(n_classes=len(classes), rank=args.rank, steps=args.steps, lr=args.lr, seed=args.seed)
    guesses = {"accuracy": probe(subject.model, train, test, **settings).tolist(),
               "random_model": probe(blank.to(subject.model.device).eval(), train, test, **settings).tolist()}
    figures, at = {}, 0
    for description, (known, asked) in described.items():
        truth, name = [y for _, y in asked], f"_{description}" if description and len(described) < 10 else ""
        most = Counter(y for _, y in known).most_common(1)[0][0]
        for kind, guess in guesses.items():
            figures[kind + name] = share([g == y for g, y in zip(guess[at:at + len(truth)], truth)])
        figures["majority" + name] = share([y == most for y in truth])
        at += len(truth)
    return figures


# -----------------------------------------------------------------------------

TASKS = {
    "val": task_val, "text": task_text, "choices": task_choices, "lastword": task_last_word, "checks": task_checks,
    "answers": task_answers, "arithmetic": task_arithmetic, "bios": task_bios, "samples": task_samples,
    "probe": task_probe, "winrate": task_winrate, "pairs": task_pairs, "judged": task_judged, "arena": task_arena}
WITHOUT_MODEL = ("pairs", "judged", "arena")
WITHOUT_FILE = ("val", "text", "checks", "arithmetic", "bios", "samples", "probe")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", nargs="+", help="runs, Hugging Face folders or hub names (default: the newest run that reads texts)")
    add("--task", nargs="+", metavar="NAME[=SOURCE]", help="see above (default: val checks, or text)")
    add("--limit", type=int, default=0, help="only the first rows of a file; 0: all")
    add("--shots", type=int, default=0, help="solved questions before each question")
    add("--shots_from", help="file of the solved questions (default: the first rows of the file itself)")
    add("--chat", action="store_true", help="ask in the model's chat template")
    add("--window", type=int, default=0, help="tokens that perplexity reads at once; 0: the model's context")
    add("--stride", type=int, default=0, help="tokens from one window to the next; 0: the window, no overlap")
    add("--eval_tokens", type=int, default=65536, help="of a text or of the validation data; 0: all")
    add("--num_samples", type=int, default=0, help="answers to each question, for pass@k")
    add("--temperature", type=float, default=0.0)
    add("--max_new_tokens", type=int, default=0, help="of a written answer; 0: by the task")
    add("--perturb", nargs="+", default=[], choices=PERTURB, help="ask again with careless typing")
    add("--judge", help="of winrate: check, human, reward=DIR or model=DIR")
    add("--battles", default="out/battles.jsonl", help="file for winrate's verdicts")
    add("--elo_k", type=float, default=32.0, help="points that a battle can move")
    add("--orders", type=int, default=100, help="orders of the battles over which Elo is averaged")
    add("--rank", type=int, default=8, help="of the probe's change to the embedding")
    add("--steps", type=int, default=300, help="of training the probe")
    add("--lr", type=float, default=0.01, help="of the probe, falling to 0")
    add("--forward_tokens", type=int, default=0, help="tokens in one forward pass; 0: 65536 on a GPU, else 8192")
    add("--texts", help="JSONL file to which written answers are added")
    add("--json", help="file for the metrics, beside the run's evaluate.json")
    add("--resume", action="store_true", help="take the answers that the run's evaluate.jsonl already holds")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    return parser.parse_args(argv)


def parse_task(text):
    name, _, source = text.partition("=")
    if name not in TASKS:
        raise BadInput(f"--task {name} is unknown: choose from {', '.join(TASKS)}")
    if not source and name not in WITHOUT_FILE:
        raise BadInput(f"--task {name} needs a file: --task {name}=FILE.jsonl")
    return name, source or None


def label_of(name, source):
    """choices=x/hellaswag.jsonl is hellaswag, arithmetic=4 is arithmetic4, val is val."""
    made_by_code = name in ("arithmetic", "bios") or not source
    return f"{name}{source or ''}" if made_by_code else Path(source).name.split(".")[0]


def label_tasks(tasks):
    """[(name, source, label)], the whole source in the label where two would have the same."""
    short = [label_of(*task) for task in tasks]
    return [(name, source, label if short.count(label) == 1 else f"{name}={source}" if source else name)
            for (name, source), label in zip(tasks, short)]


def show(results):
    """results: {run: {metric: Figure}}, as one table with a column for each run."""
    columns = [["metric", *dict.fromkeys(m for figures in results.values() for m in figures)]]
    for name, figures in results.items():
        columns.append([name, *(str(figures.get(metric, "")) for metric in columns[0][1:])])
    widths = [max(map(len, column)) for column in columns]
    for metric, *cells in zip(*columns):
        print(metric.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:])), sep="   ")


def summary(figures, args, T=0):
    """Values by plain names, their intervals, and what they depend on; T: the model's context."""
    rounded = {m: [round(x, 5) if math.isfinite(x) else None for x in figure] for m, figure in figures.items()}
    untold = "init", "task", "texts", "json", "battles", "resume", "device", "forward_tokens"
    settings = {name: value for name, value in vars(args).items() if name not in untold}
    settings["window"] = args.window or T
    settings["stride"] = args.stride or settings["window"]
    return {**{metric: values[0] for metric, values in rounded.items()},
            "intervals": {metric: values[1:] for metric, values in rounded.items()}, "settings": settings}


def write_json(path, metrics):
    with replace_file(path, "w") as f:
        json.dump(metrics, f, indent=1)


def main():
    args = get_args()
    tasks = [parse_task(task) for task in args.task or ()]
    device = setup_process(args.device).device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    for name in "limit", "shots", "eval_tokens", "num_samples", "max_new_tokens", "window", "stride", "forward_tokens":
        if getattr(args, name) < 0:
            raise BadInput(f"--{name} {getattr(args, name)} is negative: give 0 or more")
    if args.seed < 0 or not args.lr > 0:
        raise BadInput(f"--seed {args.seed} --lr {args.lr}: a seed is 0 or more, a rate above 0")
    if args.texts and tasks and all(name in ("samples", "winrate") for name, _ in tasks):
        raise BadInput(f"--texts {args.texts}: {tasks[0][0]} writes no answers that are right or wrong: leave it out")
    for name in "orders", "rank", "steps":
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give 1 or more")

    if args.texts:
        try:
            Path(args.texts).parent.mkdir(parents=True, exist_ok=True)
            open(args.texts, "a").close()
        except OSError as error:
            raise BadInput(f"--texts {args.texts} cannot be written ({error.strerror}): give another file") from None

    results, subjects, contexts = {}, [], {}
    alone = bool(tasks) and all(name in WITHOUT_MODEL for name, _ in tasks)
    many = any(name == "winrate" for name, _ in tasks)
    if many:
        if len(args.init or ()) < 2:
            raise BadInput("--task winrate needs two runs or more: --init RUN RUN")
        parse_judge(args.judge)
    inits = [] if alone else args.init or [newest_run(fits=data.reads_texts)]
    for init in inits:
        subject = Subject(init, args, device)
        if subject.name in results:  # another folder's run of that name
            subject.name = str(init)
        subjects += [subject] * many
        figures = results[subject.name] = {}
        contexts[subject.name] = subject.model.context
        known = data.corpora(subject.run)
        for name, source, label in label_tasks(tasks or [("val", None), ("checks", None)] * bool(known)
                                               or [("text", None)]):
            if name in WITHOUT_MODEL:
                continue
            found = (contestant if name == "winrate" else TASKS[name])(subject, source, args)
            prefix = "" if name in ("val", "checks") else f"{label}/"
            figures |= {prefix + metric: figure for metric, figure in found.items()}
            subject.report(label)
        if figures:
            write_json(subject.folder / "evaluate.json", summary(figures, args, contexts[subject.name]))
        subject.model = None  # one at a time has to fit into memory
    for name, source, label in label_tasks(tasks):
        if name == "winrate" or name in WITHOUT_MODEL:
            results[label if label not in contexts else f"{name}={source}"] = TASKS[name](subjects, source, args)
    results = {name: figures for name, figures in results.items() if figures}
    if not results:
        raise BadInput("no question is known about the data of this run: give --task text, or another of --help")
    show(results)
    metrics = {name: summary(figures, args, contexts.get(name, 0)) for name, figures in results.items()}
    metrics = {"runs": metrics} if len(metrics) > 1 else next(iter(metrics.values()))
    if args.json:
        write_json(args.json, metrics)
    print(json.dumps(metrics))


if __name__ == "__main__":
    cli(main)
