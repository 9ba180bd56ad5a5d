"""
Sampling: what to do with a trained model's next-token distribution, from one line of text to a conversation.

    x_{t+1} ~ softmax(logits_t / temperature), cut to the top_k likeliest ids, to the top_p mass, …

    python sample.py                                     # chat with the newest run, or let it write
    python sample.py --prompt "993-7=" --temperature 0   # the likeliest continuation
    echo "ROMEO:" | python sample.py --init out/shakespeare --num_samples 3 --stop "\\n\\n"

    python sample.py --prompt "993-7=" --beams 4 --num_samples 2                # the likeliest texts
    python sample.py --prompt "The sky is" --choices " blue" " green" --logprobs
    python sample.py --prompt "Tom has 3 pens and buys 4. How many?" --cot zero --chat --votes 5
    python sample.py --questions test.jsonl --shots_from train.jsonl --nearest  # accuracy, a JSON line a question

    python sample.py --init out/big --draft out/small    # guessed by one model, checked by the other: exact and faster
    python sample.py --init out/big --train_medusa 500   # heads that let a model guess for itself: --draft medusa

The engine (cache, recorded steps, the order of penalties and cuts) is model.py's; here is what is only about decoding.
Papers: beam search with length penalty, Wu et al. 2016; contrastive search, Su et al. 2022; speculative decoding,
Leviathan et al. 2023, Chen et al. 2023; blockwise parallel decoding, Stern et al. 2018; Medusa, Cai et al. 2024;
chain of thought, Wei et al. 2022; "Let's think step by step", Kojima et al. 2022; Auto-CoT, Zhang et al. 2022;
self-consistency, Wang et al. 2022; demonstrations by nearest neighbour, Liu et al. 2021.
"""
import argparse
import contextlib
import heapq
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import (BadInput, StreamDecoder, Tokenizer, chat_stops, cli, read_json, read_pieces, render_chat,
                 replace_file)
from data import number, read_rows, reading, reads_texts, share
from model import (GPT, Decoder, KVCache, Linear, Sampling, continuations, invert, kv_cache_bytes, linear_cross_entropy,
                   load_safetensors, newest_run, pad, process_logits, save_safetensors, setup_process, uniform)

# -----------------------------------------------------------------------------
# Search: beam search and contrastive search


def prefill(model, prompts, new):
    """
    Run prompts (lists of ids of any lengths) once. Returns a cache with room for `new` more tokens a row, or as many
    as the context has; that number of tokens; and the hidden states (B, T, C).
    """
    T = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=0) == 0:
        raise BadInput("the prompt is empty: give at least one token, for example <|endoftext|>")
    new = min(new, model.context + 1 - T)  # the last token is not read any more
    lengths = torch.tensor([*map(len, prompts)], device=model.device)
    cache = KVCache(model.config, len(prompts), max(T, T + new - 1), model.device, model.compute_dtype)
    x = model.trunk(pad(prompts, model.device), cache=cache, prefix=lengths if model.config.prefix_lm else None)
    cache.pos.copy_(lengths)
    cache.even = len(set(map(len, prompts))) == 1
    return cache, new, x


def take_rows(cache, rows, low=0):
    """Make row i of the cache what row rows[i] was; entries before `low` are known to be the same already."""
    if len(rows) == cache.k.shape[1]:
        for kv in cache.k, cache.v:
            kv[:, :, :, low:cache.bound] = kv[:, rows, :, low:cache.bound]
    else:
        cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]
    cache.pos = cache.pos[rows]


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, beams=4, stop=(), length_penalty=1.0, early_stopping=False):
    """
    For each prompt the `beams` best continuations found, [(score, ids)], best first: those of the highest

        score = Σ log p(token) / length^length_penalty,        length with the stop token, ids without it,

    when each step keeps the `beams` likeliest beginnings that go on (Wu et al. 2016, 7). The details are those of
    transformers: a stop token among the `beams` best candidates of a step finishes its beginning, one further down
    is dropped; at the last step all the best candidates finish. A row is done when it has `beams` finished texts and
    early_stopping is True, or the worst of them scores no less than the best beginning, taken at its present length,
    or with "never" at the greatest length where that is better for it.
    """
    K, V, B, stop = beams, model.config.vocab_size, len(prompts), set(stop)
    cache, new, x = prefill(model, prompts, max_new_tokens)
    if new < 1:
        return [[(0.0, [])] for _ in prompts]
    shared = min(map(len, prompts))  # up to here a row's beams never differ
    owner = torch.arange(B, device=x.device).repeat_interleave(K)
    hidden = x[owner, cache.pos[owner] - 1]  # (B K, C)
    take_rows(cache, owner)
    scores = torch.full((B, K), -1e9, device=x.device)
    scores[:, 0] = 0  # at first the K beginnings are one and the same
    alive, ids, finished = list(range(B)), [[[]] * K for _ in prompts], [[] for _ in prompts]
    for length in range(1, new + 1):
        logp = model.logits(hidden).log_softmax(-1).view(-1, K, V) + scores[..., None]
        best, places = logp.flatten(1).topk(min(K * max(2, 1 + len(stop)), K * V))  # K can go on, whatever stops
        rows, tokens, scores, still = [], [], [], []
        for a, (b, values, where) in enumerate(zip(alive, best.tolist(), places.tolist())):
            going = []
            for rank, (value, place) in enumerate(zip(values, where)):
                beam, token = divmod(place, V)
                if token in stop or length == new:
                    if rank < K:
                        text = ids[b][beam] + [token] * (token not in stop)
                        finished[b].append((value / length ** length_penalty, text))
                elif len(going) < K:
                    going.append((value, beam, token))
            finished[b] = sorted(finished[b], key=lambda item: -item[0])[:K]
            if length == new:
                continue
            longest = new if early_stopping == "never" and length_penalty > 0 else length
            full = len(finished[b]) == K
            if full and (early_stopping is True or finished[b][-1][0] >= going[0][0] / longest ** length_penalty):
                continue
            ids[b] = [ids[b][beam] + [token] for _, beam, token in going]
            still.append(b)
            rows += [a * K + beam for _, beam, _ in going]
            tokens += [token for _, _, token in going]
            scores.append([value for value, _, _ in going])
        if not still:
            break
        alive, scores = still, torch.tensor(scores, device=x.device)
        take_rows(cache, torch.tensor(rows, device=x.device), shared)
        hidden = model.trunk(torch.tensor(tokens, device=x.device)[:, None], cache=cache)[:, -1]
    return finished


@torch.inference_mode()
def contrastive_search(model, prompts, max_new_tokens, alpha=0.6, top_k=4, stop=()):
    """
    Among the top_k likeliest tokens v the one that is likely and unlike what stands there (Su et al. 2022, eq. 5),

        (1 - α) p(v | x) - α max_j cos(h_v, h_j),        h the last hidden states,

    for each prompt a list of ids that ends before an id of `stop`. α = 0 is greedy.
    """
    B, rows, k = len(prompts), torch.arange(len(prompts), device=model.device), min(top_k, model.config.vocab_size)
    cache, new, x = prefill(model, prompts, max_new_tokens + 1)  # the last token is read too
    shared, ends = min(map(len, prompts)), torch.tensor(sorted(stop), device=x.device)
    past = F.pad(F.normalize(x.float(), dim=-1), (0, 0, 0, new))  # (B, T + new, C), of length 1
    logits, at = model.logits(x[rows, cache.pos - 1]), cache.pos.clone()
    take_rows(cache, rows.repeat_interleave(k))
    tokens, done = [], torch.zeros_like(at, dtype=torch.bool)
    for _ in range(new - 1):
        p, candidates = logits.softmax(-1).topk(k)  # (B, k)
        h = model.trunk(candidates.view(-1, 1), cache=cache)[:, -1]  # (B k, C)
        unit = F.normalize(h.float(), dim=-1).view(B, k, -1)
        there = torch.arange(past.shape[1], device=x.device) < at[:, None]
        likeness = (unit @ past.mT).masked_fill(~there[:, None], -1).amax(-1)  # (B, k)
        choice = ((1 - alpha) * p - alpha * likeness).argmax(-1)
        chosen = rows * k + choice
        take_rows(cache, chosen.repeat_interleave(k), shared)
        past[rows, at] = unit[rows, choice]
        at += 1
        tokens.append(candidates[rows, choice])
        logits = model.logits(h[chosen])
        done |= torch.isin(tokens[-1], ends)
        if done.all():
            break
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * B
    return [list(itertools.takewhile(lambda i: i not in stop, row)) for row in rows]


# -----------------------------------------------------------------------------
# Choice among given strings


def choice_scores(model, prompts):
    """
    prompts: [(ids before the choice, [ids with each of the n choices])] -> log P(choice | prompt) in nats, (N, n),
    exact for the choice's own tokens; where a token spans the border it counts with the choice. What a prompt's
    choices share is computed once, then all of them in one pass over its cache. Where one choice begins another, the
    probability of the longer is part of the shorter's.
    """
    groups, T = [], model.context
    for ids, rows in prompts:
        shared = min(len(os.path.commonprefix([ids, *rows])), *(len(row) - 1 for row in rows))
        if shared < 1:
            raise BadInput("the prompt is empty: give at least one token before the choices")
        if max(map(len, rows)) > T + 1:
            raise BadInput(f"the prompt and its longest choice have {max(map(len, rows))} tokens, more than the "
                           f"model's context of {T}: shorten them")
        groups.append([ids[:shared], [row[shared:] for row in rows]])
    return torch.tensor([[logp for logp, _, _ in scores] for scores in continuations(model, groups)])


def choose(logp, temperature=0.0, seeds=(0,)):
    """One index for each of seeds, from log-probabilities (n,): the greatest, or ~ softmax(logp / temperature)."""
    if temperature == 0:
        return [int(logp.argmax())] * len(seeds)
    p = (logp / temperature).softmax(-1)
    return [int(p.multinomial(1, generator=torch.Generator().manual_seed(seed))) for seed in seeds]


# -----------------------------------------------------------------------------
# Speculative decoding: something cheap guesses the next ids, the model checks them all in one forward pass


def accept_exactly(q, p, drafted, u, u_last):
    """
    Keep a prefix of the drafted ids (B, k) and draw the id after it, so that all are distributed as if the model had
    drawn them alone (Leviathan et al. 2023, algorithm 1; Chen et al. 2023):

        keep x_i with probability min(1, q_i(x_i) / p_i(x_i)); after the first that is not kept draw from
        norm(max(0, q_i - p_i)), after all of them from q_{k+1}

    q (B, k + 1, V) the model's probabilities at each place, p (B, k, V) those the ids were really drawn from, None
    where there was no draw; u (B, k), u_last (B,) in [0, 1). Returns (how many are kept (B,), the id after them (B,)).
    """
    k, V = drafted.shape[1], q.shape[2]
    p = F.one_hot(drafted, V).to(q.dtype) if p is None else p
    mine, theirs = (z.gather(2, drafted.unsqueeze(2)).squeeze(2) for z in (q[:, :k], p))
    count = (u * theirs < mine).long().cumprod(1).sum(1)
    here = count[:, None, None].expand(-1, 1, V)
    last = q.gather(1, here).squeeze(1)
    rest = (last - F.pad(p, (0, 0, 0, 1)).gather(1, here).squeeze(1)).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, last)  # q = p, but for rounding
    return count, invert(rest, u_last)


def look_up(ids, n, k, longest=3):
    """
    Guess that the text goes on as it did before (prompt lookup): the k ids behind the latest earlier place of the last
    `longest` ids, or of the last fewer. ids (B, S), of which n (B,) are known. Returns (B, k).
    """
    start = n - 1  # nothing like it: any guess
    for size in range(1, longest + 1):
        tail = ids.gather(1, (n[:, None] + torch.arange(-size, 0, device=ids.device)).clamp(min=0))
        windows = ids.unfold(1, size, 1)  # (B, S - size + 1, size)
        place = torch.arange(windows.shape[1], device=ids.device)
        same = (windows == tail[:, None]).all(2) & (place < n[:, None] - size)
        latest = torch.where(same, place, -1).amax(1)
        start = torch.where(latest >= 0, latest + size, start)
    return ids.gather(1, (start[:, None] + torch.arange(k, device=ids.device)).clamp(max=ids.shape[1] - 1))


def accept_greedily(logits, nodes, tree, **_):
    """Keep a node that its parent's logits find the likeliest. logits (B, N, V), nodes (B, N) ids -> (B, N) bool."""
    return nodes == logits.argmax(-1)[:, tree.parent]


def accept_typically(logits, nodes, tree, epsilon=0.09, delta=0.3):
    """
    Keep a node whose probability under its parent exceeds min(ε, δ exp(-H)), H the entropy there (Cai et al. 2024,
    Medusa, 2.3.1; δ = sqrt(ε)). Not the model's own distribution: text that it finds likely enough.
    """
    logp = logits.log_softmax(-1)
    limit = (delta * (logp.exp() * logp).nansum(-1).exp()).clamp(max=epsilon)  # exp(-H)
    mine = logp[:, tree.parent].gather(2, nodes.unsqueeze(2)).squeeze(2)
    return mine.exp() > limit[:, tree.parent]


class Tree:
    """
    Guesses that share their beginnings, checked in one forward pass with a mask that shows each node its ancestors
    alone (Miao et al. 2023; Medusa, 2.1.2). paths: the ranks that lead to each node, such as [[0], [1], [0, 0]]: the
    first head's two likeliest ids, and behind the first of them the second head's likeliest.
    """

    def __init__(self, paths, device):
        paths = sorted({tuple(path[:i + 1]) for path in paths for i in range(len(path))}, key=lambda p: (len(p), p))
        nodes = [()] + paths  # the root is the id that is already sure
        place = {path: i for i, path in enumerate(nodes)}
        leaves = [path for path in nodes if not any(other[:-1] == path and other for other in nodes)]
        deepest = max(map(len, nodes))
        def tensor(z): return torch.tensor(z, device=device)
        self.depth = tensor([len(path) for path in nodes])
        self.sees = tensor([[other == path[:len(other)] for other in nodes] for path in nodes])
        self.parent = tensor([0] + [place[path[:-1]] for path in paths])
        self.head = tensor([len(path) - 1 for path in paths])  # which head and rank guesses a node
        self.rank = tensor([path[-1] for path in paths])
        self.leaves = tensor([[place[leaf[:min(i, len(leaf))]] for i in range(deepest + 1)] for leaf in leaves])
        self.real = tensor([[0 < i <= len(leaf) for i in range(deepest + 1)] for leaf in leaves])
        self.width = max((path[-1] for path in paths), default=0) + 1  # ranks in use

    def longest(self, kept):
        """kept (B, N) -> the nodes of the path that goes furthest (B, deepest + 1), and how far it goes (B,)."""
        ways = (kept[:, self.leaves] & self.real)[:, :, 1:].long().cumprod(2).sum(2)
        count, best = ways.max(1)
        return self.leaves[best], count


class Speculator:
    """
    Rows that a model continues a round at a time: guess, check, keep. Each row keeps a number of its own, and nothing
    waits for the host, so a round is recorded as one CUDA graph. ids (B, S) holds every row's text, of which n (B,) are
    sure; the cache holds all of them but the last.
    """

    def __init__(self, model, drafter, batch, size, stop, k, sampling, compile):
        self.model, self.drafter, self.sampling, device = model, drafter, sampling, model.device
        self.heads = drafter if isinstance(drafter, MedusaHeads) else None
        self.tree = self.heads.tree if self.heads else Tree([[0] * (i + 1) for i in range(k)], device)
        self.k = len(self.tree.depth) - 1
        self.target = Decoder(model, batch, size, sampling, compile)
        self.draft = Decoder(drafter, batch, size, sampling, compile) if isinstance(drafter, GPT) else None
        self.ids = torch.zeros(batch, size + self.k + 1, dtype=torch.long, device=device)
        self.logp = torch.zeros(self.ids.shape, device=device)
        self.stop = torch.tensor(sorted(stop), device=device, dtype=torch.long)
        # ids that are sure, where the row ends; rounds, guesses kept, numbers drawn from the row's stream
        self.n, self.limit, self.rounds, self.kept, self.drawn = (self.target.seeds.clone() for _ in range(5))
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        # the state that told the last sure id, from which the heads guess
        self.hidden = torch.zeros(batch, model.config.n_embd, device=device, dtype=model.compute_dtype)
        self.compile, self.graph = compile, None
        self.settle = torch.compile(self.decide, dynamic=False) if compile and device.type == "cuda" else self.decide

    def start(self, rows, new, seeds):
        """Prefill, and the first new id of each row."""
        device = self.n.device
        for d in filter(None, (self.target, self.draft)):
            d.cache.tree, d.cache.static = None, False
            hidden = d.prefill(rows)
            if d is self.target:
                self.hidden.copy_(hidden)
            d.cache.even, d.cache.static = False, device.type == "cuda"
            d.cache.compiled = self.compile and (device.type == "cpu" or d.model.fuses(2))
        self.target.seeds.copy_(torch.tensor(seeds))
        self.target.drawn.zero_()
        self.target.choose()
        for i, row in enumerate(rows):
            self.ids[i, :len(row)] = torch.tensor(row, device=device)
        for t in (self.rounds, self.kept, self.drawn, self.done):
            t.zero_()
        lengths = torch.tensor([*map(len, rows)], device=device)
        self.n.copy_(lengths)
        self.limit.copy_(lengths + new)
        fixed = self.n, self.drawn, self.done
        self.append(self.target.token[:, None], self.target.logprob[:, None], torch.zeros_like(lengths), 1)
        for t, now in zip(fixed, (self.n, self.drawn, self.done)):  # a recorded graph knows these tensors
            t.copy_(now)
        self.n, self.drawn, self.done = fixed

    def append(self, ids, logp, count, draws):
        """The first count + 1 of ids (B, m) are sure now, in rows that are not done."""
        m = torch.arange(ids.shape[1], device=ids.device)
        at, there = self.n[:, None] + m, m <= count[:, None]
        self.ids.scatter_(1, at, ids)
        self.logp.scatter_(1, at, logp)
        stops = torch.isin(ids, self.stop) & there
        self.n, live = torch.where(self.done, self.n, (self.n + count + 1).minimum(self.limit)), ~self.done
        self.drawn = self.drawn + draws * live
        self.done = self.done | stops.any(1) | (self.n >= self.limit)
        return live

    def counts(self, nodes, seen):
        """How often each id stands in the text of each node, (B, N, V); None where no penalty asks."""
        if seen is None:
            return None
        new = F.one_hot(nodes[:, 1:], seen.shape[1]).float()  # the root is counted already; CUDA multiplies no integers
        return seen[:, None] + torch.einsum("nm,bmv->bnv", self.tree.sees[:, 1:].float(), new).int()

    def propose(self, u):
        """Guesses for all nodes but the root (B, k), and what they were drawn from (B, k, V) or None."""
        if self.heads:
            guesses = self.heads(self.hidden, self.model).topk(self.tree.width, -1).indices  # (B, heads, ranks)
            return guesses[:, self.tree.head, self.tree.rank], None
        if self.draft is None:
            return look_up(self.ids, self.n, self.k), None
        cache, ids, chances = self.draft.cache, [], []
        # the last two again: the draft has not seen the last but one where all of its guesses were kept
        last = self.ids.gather(1, self.n[:, None] + torch.arange(-2, 0, device=self.n.device))
        cache.pos.copy_(self.n - 2)
        cache.bound = 0 if cache.static else int(self.n.max()) - 2
        seen = self.target.seen
        for i in range(self.k):
            logits = self.drafter.logits(self.drafter.trunk(last, cache=cache)[:, -1])
            logits = process_logits(logits, seen, **vars(self.sampling))
            chances.append(logits.softmax(-1))
            ids.append(logits.argmax(-1) if self.sampling.temperature == 0 else invert(chances[-1], u[:, i]))
            seen = None if seen is None else seen + F.one_hot(ids[-1], seen.shape[1]).int()
            last = ids[-1][:, None]
        return torch.stack(ids, 1), None if self.sampling.temperature == 0 else torch.stack(chances, 1)

    def round(self):
        k, tree, cache = self.k, self.tree, self.target.cache
        u = uniform(self.target.seeds[:, None], self.drawn[:, None] + torch.arange(2 * k + 1, device=self.n.device))
        guesses, chances = self.propose(u[:, :k])
        nodes = torch.cat((self.ids.gather(1, self.n[:, None] - 1), guesses), 1)
        cache.tree = tree.depth, tree.sees
        cache.pos.copy_(self.n - 1)
        cache.bound = 0 if cache.static else int(self.n.max()) - 1
        x = self.model.trunk(nodes, cache=cache)  # (B, k + 1, C)
        way, count, new, logp, hidden, seen = self.settle(x, nodes, chances, u[:, k:], self.target.seen)
        cache.pos.copy_(self.n - 1)
        cache.move(way, count + 1)
        self.hidden = hidden
        if seen is not None:
            self.target.seen.copy_(seen)
        live = self.append(new, logp, count, 2 * k + 1)
        self.rounds, self.kept = self.rounds + live, self.kept + count * live

    def decide(self, x, nodes, chances, u, seen):
        """
        From the states x (B, k + 1, C) of the nodes: the path that is kept, as nodes (B, m), how many of it (B,), the
        ids that follow one another on it and behind it (B, m), their log-probabilities, and what the next round
        begins with.
        """
        k, tree = self.k, self.tree
        logits = self.model.logits(x)
        processed = process_logits(logits, self.counts(nodes, seen), **vars(self.sampling))
        if self.heads:
            accept = accept_greedily if self.sampling.temperature == 0 else accept_typically
            way, count = tree.longest(accept(processed, nodes, tree))
            last = processed.argmax(-1).gather(1, way.gather(1, count[:, None])).squeeze(1)
        else:
            q = processed.softmax(-1)
            q = F.one_hot(processed.argmax(-1), q.shape[2]).to(q.dtype) if self.sampling.temperature == 0 else q
            count, last = accept_exactly(q, chances, nodes[:, 1:], u[:, :k], u[:, k])
            way = tree.leaves.expand(len(nodes), -1)
        new = nodes.gather(1, way).roll(-1, 1).scatter(1, count[:, None], last[:, None])
        raw = logits if self.sampling.temperature in (0, 1) else logits / self.sampling.temperature
        raw = raw.gather(1, way.unsqueeze(2).expand(-1, -1, raw.shape[2]))
        logp = raw.gather(2, new.unsqueeze(2)).squeeze(2) - raw.logsumexp(2)
        hidden = x.gather(1, way.gather(1, count[:, None]).unsqueeze(2).expand(-1, -1, x.shape[2])).squeeze(1)
        if seen is not None:
            there = torch.arange(new.shape[1], device=new.device) <= count[:, None]
            seen = seen + (F.one_hot(new, logits.shape[2]) * there.unsqueeze(2)).sum(1).int()
        return way, count, new, logp, hidden, seen

    def step(self):
        """One round; on CUDA a replay of the recorded graph."""
        if self.n.device.type != "cuda":
            return self.round()
        if self.graph is None:
            self.record()
        self.graph.replay()

    def record(self):
        """A graph of the round over fixed tensors: what the round assigns is copied back into them."""
        fixed = {name: getattr(self, name) for name in "ids logp n done drawn rounds kept hidden".split()}
        seen = [t for t in (self.target.seen,) if t is not None]
        before = [t.clone() for t in (*fixed.values(), *seen)]

        def body():
            self.round()
            for name, t in fixed.items():
                if getattr(self, name) is not t:
                    t.copy_(getattr(self, name))
                    setattr(self, name, t)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        for t, value in zip((*fixed.values(), *seen), before):
            t.copy_(value)
        with torch.cuda.graph(self.graph):
            body()
        for t, value in zip((*fixed.values(), *seen), before):
            t.copy_(value)


@torch.inference_mode()
def speculate(model, drafter, prompts, max_new_tokens=100, stop=(), k=4, seed=0, compile=False, poll=None, stats=None,
              **sampling):
    """
    model.stream with guesses: iterates over lists of (number of the prompt, new ids, their log-probabilities). drafter:
    a smaller GPT of the same vocabulary, "ngram" (look_up), or MedusaHeads. k: ids guessed a round (Medusa: its tree).
    A draft model and n-grams leave the distribution as it is; Medusa's heads do at temperature 0, and above it keep
    typical ids. stats, a dict, receives rounds and kept. Arguments else as in GPT.stream.
    """
    settings = Sampling(**sampling)
    settings.check()
    rows = [list(map(int, p)) for p in prompts]
    if not rows or min(map(len, rows)) == 0:
        raise BadInput("the prompt is empty: give at least one token, for example <|endoftext|>")
    if isinstance(drafter, GPT) and drafter.config.vocab_size != model.config.vocab_size:
        raise BadInput(f"--draft: the draft model has {drafter.config.vocab_size} tokens, the model "
                       f"{model.config.vocab_size}: both need the same tokenizer")
    nodes = len(drafter.tree.depth) if isinstance(drafter, MedusaHeads) else k + 1
    for m in (model, drafter) if isinstance(drafter, GPT) else (model,):
        if max(map(len, rows)) + max_new_tokens + nodes > m.context:
            raise BadInput(f"speculative decoding stays inside the context: {max(map(len, rows))} tokens, "
                           f"{max_new_tokens} new and {nodes} guessed are more than {m.context}; lower "
                           f"--max_new_tokens or leave --draft out")
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(rows))]
    training, stop, told = model.training, set(stop), [*map(len, rows)]
    model.eval()
    try:
        size = 64 * -(-(max(map(len, rows)) + max_new_tokens + nodes) // 64)
        key = (drafter, getattr(drafter, "tree", k), len(rows), size, tuple(sorted(stop)), settings, compile,
               model.wiring())
        kept, s = getattr(model, "speculator", (None, None))
        if kept != key:
            s = Speculator(model, drafter, len(rows), size, stop, k, settings, compile)
            if model.device.type == "cuda":  # recording a round takes a while, as in GPT.decoder
                model.speculator = key, s
        s.start(rows, max_new_tokens, seeds)
        poll = poll or (8 if model.device.type == "cuda" else 1)
        while True:
            n, done = s.n.tolist(), s.done.tolist()
            ids, logp, news = s.ids.tolist(), s.logp.tolist(), []
            for i, (start, end) in enumerate(zip(told, n)):
                row = ids[i][start:end]
                cut = next((j + 1 for j, token in enumerate(row) if token in stop), len(row))
                if cut:
                    news.append((i, row[:cut], logp[i][start:start + cut]))
                told[i] = end
            if stats is not None:
                stats |= {"rounds": int(s.rounds.sum()), "kept": int(s.kept.sum()), "guesses": s.tree.real.shape[1] - 1}
            yield news
            if all(done):
                return
            for _ in range(poll):
                s.step()
    finally:
        model.train(training)


def speculative_generate(model, drafter, prompts, max_new_tokens=100, stop=(), **arguments):
    """speculate, collected as GPT.generate does: (new ids of each prompt, their log-probabilities)."""
    tokens, logprobs, stop = [[] for _ in prompts], [[] for _ in prompts], set(stop)
    for news in speculate(model, drafter, prompts, max_new_tokens, stop, **arguments):
        for i, row, logp in news:
            ends = bool(row) and row[-1] in stop
            tokens[i] += row[:len(row) - ends]
            logprobs[i] += logp[:len(row) - ends]
    return tokens, logprobs


# -----------------------------------------------------------------------------
# Medusa: the model guesses itself, by small heads for the ids after the next


class MedusaHeads(nn.Module):
    """
    Head i guesses the id after the next i + 1 from the last hidden state h (Cai et al. 2024, Medusa, 2.1.1):

        h_i = h + silu(W_i h + b_i),    logits_i = the model's own head of h_i,    W_i, b_i from 0

    Blockwise parallel decoding (Stern et al. 2018) is the case of one guess a head: paths [[0], [0, 0], …].
    """

    def __init__(self, width, heads=4, device="cpu"):
        super().__init__()
        self.layers = nn.ModuleList(Linear(width, width) for _ in range(heads)).to(device)
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.grow([[0.5 ** (r + 1) for r in range(4)]] * heads)

    def states(self, h):
        """(..., C) -> (..., heads, C)"""
        return torch.stack([h + F.silu(layer(h)) for layer in self.layers], -2)

    def forward(self, h, model):
        return model.logits(self.states(h))

    def grow(self, accuracy, nodes=24, paths=None):
        """
        The tree of the `nodes` paths likeliest to be right, where head i's guess of rank r is right in a share
        accuracy[i][r] of places; or of the given paths.
        """
        if paths is None:
            paths, heap = [], [(-p, [r]) for r, p in enumerate(accuracy[0])]
            heapq.heapify(heap)
            while heap and len(paths) < nodes:
                value, path = heapq.heappop(heap)
                paths.append(path)
                if len(path) < len(accuracy):
                    for r, p in enumerate(accuracy[len(path)]):
                        heapq.heappush(heap, (value * p, path + [r]))
        self.accuracy, self.tree = accuracy, Tree(paths, self.layers[0].weight.device)

    def save(self, path):
        save_safetensors({**self.state_dict(), "accuracy": torch.tensor(self.accuracy)}, path)

    @staticmethod
    def load(path, model, nodes=24, chain=False):
        """Heads beside the run of a model; BadInput where there are none or they are another model's."""
        path = Path(path)
        if not path.exists():
            raise BadInput(f"--draft medusa: there is no {path}; make it with --train_medusa 500")
        tensors = load_safetensors(path)
        accuracy = tensors.pop("accuracy").tolist()
        C, n = model.config.n_embd, len(tensors) // 2
        if any(t.shape[0] != C for t in tensors.values()):
            raise BadInput(f"--draft medusa: the heads in {path} are {next(iter(tensors.values())).shape[0]} wide, the "
                           f"model {C}: train them again with --train_medusa 500")
        heads = MedusaHeads(C, n, model.device)
        heads.load_state_dict(tensors)
        heads.requires_grad_(False).to(model.compute_dtype)
        heads.grow(accuracy, nodes, [[0] * (i + 1) for i in range(n)] if chain else None)
        return heads


def medusa_loss(model, heads, idx, decay=0.8):
    """
    Σ_i λ^i of head i's cross-entropy, in nats a token, λ = decay, over idx (B, T); the model is frozen.
    """
    with torch.no_grad():
        h = model.trunk(idx)
    states, loss = heads.states(h), 0.0
    for i in range(len(heads.layers)):
        x = model.features(states[:, :-2 - i, i]).flatten(0, 1)
        loss = loss + decay ** i * linear_cross_entropy(x, model.head_weight.detach(), idx[:, 2 + i:].flatten(),
                                                        model.config.vocab_size, softcap=model.config.softcap)
    return loss


@torch.no_grad()
def medusa_accuracy(model, heads, idx, ranks=10):
    """accuracy[i][r]: the share of places of idx (B, T) where head i's guess of rank r is right."""
    h, table = model.trunk(idx), []
    for i, layer in enumerate(heads.layers):
        hits = torch.zeros(ranks, device=h.device)
        for row, target in zip(h[:, :-2 - i], idx[:, 2 + i:]):  # one row's logits at a time
            guesses = model.logits(row + F.silu(layer(row))).topk(ranks, -1).indices
            hits += (guesses == target[:, None]).sum(0)
        table.append((hits / idx[:, 2 + i:].numel()).tolist())
    return table


def train_medusa(model, heads, rows, steps, lr=1e-3, batch=16, seed=0, say=print):
    """
    Train the heads on rows (N, T) of ids, an eighth of which is kept back to count what they get right, and grow the
    tree from that. AdamW with a linear fall.
    """
    held = rows[:max(1, len(rows) // 8)].to(model.device)
    rows = rows[len(held):] if len(rows) > 1 else rows
    optimizer = torch.optim.AdamW(heads.parameters(), lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        pick = torch.randint(len(rows), (batch,), generator=generator)
        loss = medusa_loss(model, heads, rows[pick].to(model.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    heads.grow(medusa_accuracy(model, heads, held))
    for i, row in enumerate(heads.accuracy):
        say(f"head {i + 1}: the id after the next {i + 1} is its first guess at {row[0]:.1%}, among five at "
            f"{sum(row[:5]):.1%}")


# -----------------------------------------------------------------------------
# How close to the memory's speed


def read_bandwidth(device, size=2 ** 28):
    """Bytes per second that a sum over `size` bytes reads, the best of five."""
    x, best = torch.ones(size // 4, device=device), 0.0
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        x.sum()
        wait(device)
        best = max(best, size / (time.perf_counter() - start))
    return best


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_step(model, rows, held):
    """Bytes that one step reads for `rows` rows of `held` tokens each: each weight once, each row's keys and values."""
    c = model.config
    tables = ["wpe.weight"] + ["wte.weight"] * (not c.tied)  # of which only some rows are read
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())  # buffers: quantized weights
    weights = sum(t.numel() * t.element_size() for name, t in tensors if name not in tables)
    return weights + kv_cache_bytes(c, rows, held, torch.tensor([], dtype=model.compute_dtype).element_size())


def roofline(model, prompts, prefill, decode, made, args):
    """
    One line: tokens/s of the prompts and of what was decoded (`made` ids in `decode` seconds), the bytes that a token
    took, and the bandwidth that this needs, also as a share of what a plain sum over memory reaches here.
    """
    held, rows, kept_share = sum(map(len, prompts)), len(prompts), ""
    steps, total = made / rows, sum(map(len, set(map(tuple, prompts))))  # equal rows are computed once
    if args.drafter and made:
        rounds, kept = args.guessed["rounds"], args.guessed["kept"]
        steps, kept_share = rounds / rows, f", {kept / rounds:.2f} of {args.guessed['guesses']} guesses kept a round"
    line = f"prefill {total / prefill:,.0f} tokens/s; {made + rows} tokens, {made / max(decode, 1e-9):,.0f} tokens/s"
    if not made:
        return line
    mean, T = (held + made / 2) / rows, model.context
    mean = mean if (held + made) / rows <= T else 0.75 * T  # a row that is full goes on from half of it
    moved, best = bytes_per_step(model, rows, mean), read_bandwidth(model.device)
    rate = moved * steps / decode
    return (f"{line}{kept_share}; {moved * steps / made / 1e6:,.1f} MB a token, {rate / 1e9:,.1f} GB/s, "
            f"{rate / best:.0%} of the {best / 1e9:,.1f} that a sum reads here")


# -----------------------------------------------------------------------------
# Text as it comes


class TextStream:
    """
    Ids to text as they come, up to the first of the strings `stops`, which is no part of it. Shown text never has to be
    taken back: bytes of an unfinished character are held, and letters with which a stop string could begin. The text
    does not depend on where the tokens' borders are.
    """

    def __init__(self, tokenizer, stops=(), fresh=True):
        self.decoder, self.stops, self.held, self.done = StreamDecoder(tokenizer), stops, "", False
        self.decoder.at_start &= fresh  # not after text: there a first space counts

    def push(self, i):
        return self.put(self.decoder.push(i))

    def put(self, text):
        text = self.held + text
        found = [(text.find(s) + len(s), text.find(s)) for s in self.stops if s in text]
        if found:  # the one that is complete first
            self.done, self.held = True, ""
            return text[:min(found)[1]]
        keep = max((n for s in self.stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]

    def flush(self):
        """What was held, when nothing comes any more."""
        return "" if self.done else self.put(self.decoder.flush()) + self.held


class Text(NamedTuple):
    text: str
    ids: list
    logprobs: list = ()  # nats, of each id
    score: float = 0.0   # of beam search


def sampling(args):
    """The flags that say how a token is drawn."""
    return {field.name: getattr(args, field.name) for field in fields(Sampling)}


def stream_text(model, tokenizer, prompts, new, seeds, args, ends=(), stops=(), fresh=False):
    """
    Continue prompts (lists of ids); yields (row, piece of text, id, log-probability) as they come, and at the end a
    row's last piece with no id. A row ends before an id of `ends` and before a string of `stops`.
    """
    streams, going = [TextStream(tokenizer, stops, fresh) for _ in prompts], set(range(len(prompts)))
    last, start, began, made = {*ends, *lone(tokenizer, stops)}, time.perf_counter(), None, 0
    settings = dict(seed=list(seeds), compile=args.compile, **sampling(args))
    if args.drafter:
        args.guessed = {}
        events = speculate(model, args.drafter, prompts, new, last, args.draft_k, stats=args.guessed, **settings)
    else:
        events = model.stream(prompts, new, last, slots=args.rows if args.votes else None, **settings)
    for news in events:
        made += sum(len(tokens) for _, tokens, _ in news) if began else 0
        began = began or time.perf_counter()
        args.timing = began - start, time.perf_counter() - began, made
        for i, tokens, logprobs in news:
            for token, logprob in zip(tokens, logprobs):
                if i in going and token not in ends:
                    yield i, streams[i].push(token), token, logprob
                if token in last or streams[i].done:
                    going.discard(i)
        if not going:
            break
    for i, stream in enumerate(streams):
        yield i, stream.flush(), None, None


def lone(tokenizer, stops):
    """Stop strings that are a token: the engine, which sees ids, can end a row there."""
    return [ids[0] for ids in map(tokenizer.encode, stops) if len(ids) == 1]


def by_sampling(model, tokenizer, prompts, new, seeds, args, ends, stops):
    """A Text for each of seeds, for each prompt: (N, len(seeds))."""
    rows, n = [prompt for prompt in prompts for _ in seeds], len(seeds)
    pieces, ids, logprobs = ([[] for _ in rows] for _ in range(3))
    for i, piece, token, logprob in stream_text(model, tokenizer, rows, new, [*seeds] * len(prompts), args, ends,
                                                stops):
        pieces[i].append(piece)
        if token is not None:
            ids[i].append(token)
            logprobs[i].append(logprob)
    texts = [Text("".join(p), t, lp) for p, t, lp in zip(pieces, ids, logprobs)]
    return [texts[i:i + n] for i in range(0, len(rows), n)]


def say(model, tokenizer, prompt, new, seed, args, ends, stops, fresh):
    """Print a text as it comes, and return it; Ctrl-C ends it where it is, and then the second value is True."""
    pieces, ids, logprobs, cut_short = [], [], [], False
    try:
        for _, piece, token, logprob in stream_text(model, tokenizer, [prompt], new, [seed], args, ends, stops, fresh):
            pieces.append(piece)
            print(piece, end="", flush=True)
            if token is not None:
                ids.append(token)
                logprobs.append(logprob)
    except KeyboardInterrupt:
        cut_short = True
    print()
    return Text("".join(pieces), ids, logprobs), cut_short


def cut(tokenizer, ids, stops, score=0.0):
    """The Text of ids, up to a stop string."""
    stream = TextStream(tokenizer, stops, fresh=False)
    pieces = [stream.push(i) for i in ids if not stream.done]
    return Text("".join(pieces) + stream.flush(), ids, score=score)


def by_beams(model, tokenizer, prompts, new, seeds, args, ends, stops):
    ends = {*ends, *lone(tokenizer, stops)}
    found = beam_search(model, prompts, new, args.beams, ends, args.length_penalty, args.early_stopping)
    return [[cut(tokenizer, ids, stops, score) for score, ids in row[:len(seeds)]] for row in found]


def by_contrast(model, tokenizer, prompts, new, seeds, args, ends, stops):
    found = contrastive_search(model, prompts, new, args.contrastive, args.top_k or 4, ends)
    return [[cut(tokenizer, ids, stops)] * len(seeds) for ids in found]


def writer(args):
    """The function (model, tokenizer, prompts, new, seeds, args, ends, stops) -> [[Text]] that the flags ask for."""
    return by_beams if args.beams else by_contrast if args.contrastive is not None else by_sampling


# -----------------------------------------------------------------------------
# Prompting: demonstrations, chains of thought, votes

STEPS = "Let's think step by step."  # Kojima et al. 2022
THEREFORE = "\nTherefore, the answer is"
QUESTION = "Question: {}\nAnswer:"


class Solved(NamedTuple):
    """A question and its answer; `form` is how plain text puts it, such as QUESTION."""
    question: str
    answer: str
    form: str = QUESTION


@reading
def read_solved(where, row):
    """{"question", "answer"}, such as GSM8K's, or {"prompt", "answer"}, a text to continue as it stands."""
    asked = "question" in row
    return Solved(row["question" if asked else "prompt"] + "", row["answer"] + "", QUESTION if asked else "{}")


def worked(answer, chain):
    """
    How a demonstration answers: with its chain of thought, "… The answer is 72.", or without, "72". GSM8K's answers
    hold the chain before their ####, and a calculator's notes <<48/2=24>> that nobody is meant to learn here.
    """
    if "####" not in answer:
        return answer
    thought, final = re.sub(r"<<.*?>>", "", answer).rsplit("####", 1)
    return f"{' '.join(thought.split())} The answer is {final.strip()}." if chain else final.strip()


def numeric(answer):
    """Is a known answer a number, with or without a unit, all of it or what stands after #### or "answer is"?"""
    last = re.split(r"####|answer is:?", answer, flags=re.IGNORECASE)[-1].strip(" \n.")
    return re.fullmatch(r"-?[$]?\d[\d,]*(\.\d+)?\s*%?(\s+[^\d\s]+){0,3}", last) is not None


def extract(text, numbers=True):
    """
    The answer that a text gives: the first number after its last "####" or "answer is", else its last number; a
    text without numbers, or where none are asked: the line after the mark. In a form in which equal answers are equal
    strings.
    """
    marked = re.sub(r"answer is:?", "####", text, flags=re.IGNORECASE)
    value = number(marked) if numbers else None
    if value is not None:
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    lines = marked.split("####")[-1].strip().splitlines()
    return lines[0].strip(" .").lower() if lines else ""


def vote(answers):
    """(the most frequent answer, its share): self-consistency. An empty one is no vote; the first wins a tie."""
    counts = Counter(answer for answer in answers if answer)
    best, n = counts.most_common(1)[0] if counts else ("", 0)
    return best, n / len(answers)


class Asker:
    """How questions become ids: as plain text, or through the chat template with each demonstration a turn."""

    def __init__(self, tokenizer, args, T):
        self.tokenizer, self.chat, self.system, self.T = tokenizer, args.chat, args.system, T

    def ids(self, question, shots=(), lead=""):
        """Ids up to where the answer begins, or with `lead`, its first letters, to the end of these."""
        if self.chat:
            turns = [turn for s in shots for turn in (s.question, s.answer.strip())] + [question.question]
            turns += [lead] if lead else []
            turns = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            ids, mask = render_chat(self.tokenizer, turns, system=self.system, generation=not lead)
            return ids[:max(i for i, m in enumerate(mask) if m)] if lead else ids  # without the token that ends it
        parts = [s.form.format(s.question) + " " * (s.form == QUESTION) + s.answer for s in shots]
        text = "".join(p if p.endswith("\n") else p + "\n\n" for p in parts) + question.form.format(question.question)
        return self.tokenizer.begin + self.tokenizer.encode(text + lead)

    def fitting(self, question, shots, room):
        """The last of the shots, as many as leave `room` tokens of the context."""
        for many in range(len(shots) + 1):
            size = len(self.ids(question, shots[len(shots) - many:])) + room
            if size > self.T:
                if many:
                    return shots[len(shots) - many + 1:]
                break
        else:
            return shots
        raise BadInput(f"the prompt has {size - room} tokens, and {room} more are to come: more than the model's "
                       f"context of {self.T}; shorten it, or lower --max_new_tokens")

    def stops(self, question, shots):
        """Strings at which a base model has begun a question of its own."""
        if self.chat:
            return []
        lines = bool(shots) and all(s.answer.endswith("\n") for s in shots)
        return ["\nQuestion:"] * (question.form == QUESTION) + (["\n"] if lines else ["\n\n"] * bool(shots))


@torch.inference_mode()
def embed(model, tokenizer, texts, batch=16):
    """The model's own embedding of each text, (N, C) float32: the mean of its last hidden states."""
    start, found = tokenizer.begin, []
    T = model.context - len(start)
    rows = [tokenizer.encode(text or " ")[:T] for text in texts]
    for i in range(0, len(rows), batch):
        x = model.trunk(pad([start + row for row in rows[i:i + batch]], model.device)).float().cpu()
        found += [h[len(start):len(start) + len(row)].mean(0) for h, row in zip(x, rows[i:i + batch])]
    return torch.stack(found)


def directions(x, pool):
    """x (N, C) less the pool's mean, a direction that all texts share, at length 1."""
    return F.normalize(x - pool.mean(0), dim=-1)


def nearest(pool, query, n):
    """Indices of the n rows of pool (N, C) most like query (C,), the nearest last (Liu et al. 2021)."""
    likeness = directions(pool, pool) @ directions(query[None], pool)[0]
    return likeness.argsort(descending=True, stable=True)[:n].flip(0).tolist()


def k_means(x, k, seed=0, steps=100):
    """
    x (N, C) -> [indices of each of k clusters, the nearest to the centre first]: Lloyd's algorithm from centres drawn
    with probability ~ squared distance to those before (k-means++, Arthur & Vassilvitskii 2007).
    """
    g = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        distance = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[distance.multinomial(1, generator=g)]])
    label = None
    for _ in range(steps):
        old, label = label, torch.cdist(x, centres).argmin(1)
        if old is not None and torch.equal(old, label):
            break
        centres = torch.stack([x[label == c].mean(0) if (label == c).any() else centres[c] for c in range(k)])
    order = torch.cdist(x, centres).argsort(dim=0, stable=True)
    return [[i for i in order[:, c].tolist() if label[i] == c] for c in range(k)]


def think(model, tokenizer, asked, args, seeds, ends):
    """
    Answer [(question, shots)] once for each of seeds -> [[(what was written, answer)]]. With --cot zero in two stages
    (Kojima et al. 2022): first the thought, then, greedily, what comes after "Therefore, the answer is".
    """
    T, new = context(model, args), args.max_new_tokens
    asker, zero = Asker(tokenizer, args, T), args.cot == "zero"
    lead = (" " * (not args.chat) + STEPS) if args.cot in ("zero", "auto") else ""
    second = len(tokenizer.encode(THEREFORE)) + 16 if zero else 0  # tokens of the second stage
    new = min(new, T // 2)
    room = len(tokenizer.encode(lead)) + new + second + guesses(args)
    asked = [(question, asker.fitting(question, shots, room)) for question, shots in asked]
    known = [[question.answer] if question.answer else [s.answer for s in shots] for question, shots in asked]
    numbers = [all(map(numeric, answers)) for answers in known]  # what kind of answer is looked for
    prompts, texts = [asker.ids(*item, lead) for item in asked], [None] * len(asked)
    stops = [sorted({*args.stop, *asker.stops(*item)}) for item in asked]
    for same in map(list, {tuple(s) for s in stops}):  # an answer never depends on who is asked beside it
        who = [i for i, s in enumerate(stops) if s == same]
        found = writer(args)(model, tokenizer, [prompts[i] for i in who], new, seeds, args, ends, same)
        for i, row in zip(who, found):
            texts[i] = row
    if not zero:
        mark = "" if args.cot else "####"  # without a chain the answer comes first
        return [[((lead + t.text).strip(), extract(mark + t.text, kind)) for t in row]
                for row, kind in zip(texts, numbers)]
    thoughts = [[lead + t.text.rstrip() for t in row] for row in texts]
    prompts = [asker.ids(*item, thought + THEREFORE) for item, row in zip(asked, thoughts) for thought in row]
    prompts = [prompt[-(T - 16 - guesses(args)):] for prompt in prompts]  # encoded again, a thought may have grown
    finals = by_sampling(model, tokenizer, prompts, 16, [0], greedily(args), ends, sorted({"\n", *sum(stops, [])}))
    finals = (THEREFORE + row[0].text for row in finals)
    return [[(thought.strip(), extract(next(finals), kind)) for thought in row]
            for row, kind in zip(thoughts, numbers)]


def context(model, args):
    """Tokens that the model can read, and with --draft the one that guesses."""
    return min(model.context, args.drafter.context if isinstance(args.drafter, GPT) else model.context)


def guesses(args):
    """Places behind the text that a round of --draft needs."""
    if isinstance(args.drafter, MedusaHeads):
        return len(args.drafter.tree.depth)
    return args.draft_k + 1 if args.drafter else 0


def greedily(args, **others):
    return argparse.Namespace(**{**vars(args), "temperature": 0.0, "beams": 0, "contrastive": None, **others})


def auto_cot(model, tokenizer, pool, k, args, ends):
    """
    Demonstrations without anybody's answers (Zhang et al. 2022): cluster the questions by the model's embedding, let
    the model think step by step about the one nearest to each centre, of which the thought is simple: a question of at
    most 60 tokens, at most 5 lines or sentences, and an answer. Three of a cluster are tried, then the first is taken.
    """
    x = embed(model, tokenizer, [s.question for s in pool])
    clusters = k_means(directions(x, x), k, args.seed)
    short = [len(tokenizer.encode(s.question)) <= 60 for s in pool]
    tried = [sorted(cluster, key=lambda i: not short[i])[:3] for cluster in clusters if cluster]
    asked = [(pool[i], ()) for members in tried for i in members]
    thoughts, shots = iter(think(model, tokenizer, asked, greedily(args, cot="zero"), [0], ends)), []
    for members in tried:
        found = [(pool[i], *next(thoughts)[0]) for i in members]
        simple = [f for f in found if f[2] and len(re.findall(r"[.!?\n]+(?=\s|$)", f[1])) - 1 <= 5]
        question, thought, answer = (simple or found)[0]
        shots.append(question._replace(answer=f"{' '.join(thought.split())} The answer is {answer}."))
    return shots


def demonstrations(model, tokenizer, questions, args, ends):
    """The solved questions before each question, a list for each, as --shots, --nearest and --cot say."""
    if args.cot == "auto":
        pool = [read_solved(*row) for row in read_rows(args.shots_from, 0)] if args.shots_from else questions
        shots = auto_cot(model, tokenizer, pool, min(args.shots, len(pool)), args, ends)
        return [[s for s in shots if s.question != q.question] for q in questions]
    if not args.shots_from:
        return [[] for _ in questions]
    pool = [read_solved(*row) for row in read_rows(args.shots_from, 0 if args.nearest else args.shots)]
    shots = [s._replace(answer=worked(s.answer, args.cot == "shots")) for s in pool]
    if not args.nearest:
        return [shots for _ in questions]
    x = embed(model, tokenizer, [s.question for s in pool])
    y = embed(model, tokenizer, [q.question for q in questions])
    near = (nearest(x, query, args.shots + 1) for query in y)  # one more: the question itself may be there
    return [[shots[i] for i in found if pool[i].question != q.question][-args.shots:]
            for q, found in zip(questions, near)]


def answer_questions(model, tokenizer, questions, args, ends):
    """Yields for each question a dict: prediction, share of the votes, and the texts that were written."""
    solved = demonstrations(model, tokenizer, questions, args, ends)
    seeds = range(args.seed, args.seed + (args.votes or 1))
    size = max(1, args.rows // len(seeds))
    for i in range(0, len(questions), size):
        asked = list(zip(questions, solved))[i:i + size]
        if args.choices:
            asker = Asker(tokenizer, args, model.context)
            longest = max(len(tokenizer.encode(choice)) for choice in args.choices)
            asked = [(question, asker.fitting(question, shots, longest)) for question, shots in asked]
            prompts = [(asker.ids(*item), [asker.ids(*item, choice) for choice in args.choices]) for item in asked]
            for (question, _), logp in zip(asked, choice_scores(model, prompts)):
                picks = [args.choices[c] for c in choose(logp, args.temperature, seeds)]
                best, agreed = vote(picks)
                yield {"question": question.question, "prediction": best, "votes": agreed,
                       "logprobs": [round(p, 4) for p in logp.tolist()]}
            continue
        for (question, _), row in zip(asked, think(model, tokenizer, asked, args, seeds, ends)):
            best, agreed = vote([answer for _, answer in row])
            yield {"question": question.question, "prediction": best, "votes": agreed, "texts": [t for t, _ in row]}


def is_right(prediction, answer, choices=()):
    """A choice or a number as it is; words where the prediction begins with them."""
    if choices:
        return prediction.strip() == answer.strip()
    known = extract("####" + answer.split("####")[-1], numeric(answer))
    if numeric(answer):
        return prediction == known
    return known != "" and re.match(re.escape(known) + r"(?!\w|[.,]\d)", prediction) is not None


# -----------------------------------------------------------------------------
# Chat

HELP = """\
  /system TEXT     what the model is told first; without TEXT: show it
  /temperature X   0: always the likeliest token
  /clear           forget the conversation, keep the system text
  /save FILE       write the conversation as {"messages": […]};  /load FILE goes on with it
  /quit            leave (or Ctrl-D);  Ctrl-C stops an answer;  /help shows this"""


def fit(tokenizer, system, messages, room):
    """
    (ids of the conversation up to where the next answer begins, number of messages left out): the newest whole turns,
    each a user's message and what follows, that fit into `room` tokens. The system text always stays.
    """
    fits = None
    for first in [i for i, message in enumerate(messages) if message["role"] == "user"][::-1]:
        ids = render_chat(tokenizer, messages[first:], system=system, generation=True)[0]
        if len(ids) > room:
            break
        fits = ids, first
    if fits:
        return fits
    raise BadInput(f"the message has {len(ids)} tokens with the system text, more than the {room} that the model's "
                   "context leaves for it: shorten it")


def save_chat(path, system, messages):
    """One line of JSON, which is also a row of training data for chats."""
    told = [] if system is None else [{"role": "system", "content": system}]
    with replace_file(path, "w") as f:
        f.write(json.dumps({"messages": told + messages}) + "\n")


def load_chat(path, tokenizer):
    """(system text or None, the other messages), which end with an answer."""
    chat = read_json(path)
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list):
        raise BadInput(f"{path} holds no chat: give a file of /save, an object with \"messages\"")
    try:
        render_chat(tokenizer, [*messages, {"role": "user", "content": ""}])
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    told = [m["content"] for m in messages if m["role"] == "system"]
    return told[0] if told else None, [m for m in messages if m["role"] != "system"]


def temperature(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadInput(f"/temperature {text}: give a number of 0 or more")
    return value


def chat(model, tokenizer, args):
    """A conversation of many turns on the terminal."""
    with contextlib.suppress(ImportError):  # where it is there, input() has a history and arrow keys
        importlib.import_module("readline")
    system, messages = args.system, []
    if args.load:
        system, messages = load_chat(args.load, tokenizer)
        system = system if args.system is None else args.system
    T, turn = context(model, args), len(messages)
    ends, told = chat_stops(tokenizer), False  # told: that turns are left out
    print("Type a message, or /help.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit leaves the chat")
            continue
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if command == "/quit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/clear":
                messages = []
            elif command == "/system":
                system = rest or system
                print(f"system: {system or 'as the template has it'}")
            elif command == "/temperature":
                args.temperature = temperature(rest) if rest else args.temperature
                print(f"temperature: {args.temperature}")
            elif command in ("/save", "/load") and not rest:
                raise BadInput(f"{command} needs a file: {command} chat.json")
            elif command == "/save":
                save_chat(rest, system, messages)
                print(f"{len(messages)} messages saved to {rest}")
            elif command == "/load":
                system, messages = load_chat(rest, tokenizer)
                print(f"{len(messages)} messages from {rest}")
            elif command.startswith("/"):
                raise BadInput(f"{command} is no command: /help lists them")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                room = T - guesses(args) - min(args.max_new_tokens, T // 2)
                ids, first = fit(tokenizer, system, asked, room)
                if first and not told:
                    print("(the oldest turns no longer fit into the context and are left out)", file=sys.stderr)
                    told = True
                new = min(args.max_new_tokens, T - guesses(args) - len(ids))
                answer, _ = say(model, tokenizer, ids, new, args.seed + turn, args, ends, args.stop, fresh=True)
                turn += 1
                if answer.text:  # stopped before its first letter: as if nothing had been asked
                    messages = [*asked, {"role": "assistant", "content": answer.text}]
        except BadInput as error:
            print(error)
        except KeyboardInterrupt:  # between an answer's tokens and the next question
            print()


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--init", help="run directory or Hugging Face directory (default: the newest run under out/)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the step")

    add = parser.add_argument_group("what to write").add_argument
    add("--prompt", help="text to continue, @FILE for a file's text (default: standard input if it is not a terminal)")
    add("--max_new_tokens", type=int, default=200)
    add("--num_samples", type=int, default=1)
    add("--stop", nargs="+", default=[], metavar="TEXT", help="strings before which to stop; \\n is a line's end")
    add("--logprobs", action="store_true", help="also each token's log-probability")
    add("--seed", type=int, default=0, help="sample i draws from stream seed + i")

    add = parser.add_argument_group("sampling, in the order in which it is done").add_argument
    add("--repetition_penalty", type=float, default=1.0, help="makes ids that were there less likely (Keskar 2019)")
    add("--presence_penalty", type=float, default=0.0, help="subtracted from the logits of ids that were there")
    add("--temperature", type=float, help="0: always the likeliest token (default: 0.8; 0 with --choices, and with "
                                          "--questions unless they are voted on)")
    add("--top_k", type=int, help="choose among this many likeliest tokens")
    add("--top_p", type=float, help="choose among the likeliest tokens that hold this much probability")
    add("--min_p", type=float, help="choose among tokens at least this share as likely as the likeliest")
    add("--typical_p", type=float, help="choose among tokens of nearly the expected surprise, of this much probability")

    add = parser.add_argument_group("search").add_argument
    add("--beams", type=int, default=0, help="beam search; --num_samples of them are shown")
    add("--length_penalty", type=float, default=1.0, help="power of the length that divides a beam's log-probability")
    add("--early_stopping", default="false", choices=["false", "true", "never"], help="when a beam search is done")
    add("--contrastive", type=float, metavar="ALPHA", help="contrastive search among the --top_k (default: 4)")
    add("--choices", nargs="+", metavar="TEXT", help="pick one of these")

    add = parser.add_argument_group("speculative decoding").add_argument
    add("--draft", metavar="RUN", help="who guesses: a smaller run with the same tokenizer; ngram, the text so far; "
                                       "medusa, heads from --train_medusa; blockwise, their first guesses alone")
    add("--draft_k", type=int, default=3, help="ids that a run or ngram guesses at a time")
    add("--medusa_nodes", type=int, default=24, help="guesses in Medusa's tree")
    add("--medusa_heads", type=int, default=4)
    add("--train_medusa", type=int, metavar="STEPS", help="train the heads on the frozen model and save them beside it")
    add("--medusa_text", metavar="FILE", help="what to train them on (default: what the model writes by itself)")

    add = parser.add_argument_group("prompting").add_argument
    add("--questions", metavar="FILE", help='JSONL {"prompt" or "question", "answer"}: answer each, print the accuracy')
    add("--limit", type=int, default=0, help="only the first questions of the file; 0: all")
    add("--shots", type=int, default=5, help="solved questions before each question")
    add("--shots_from", metavar="FILE", help="file of the solved questions, of the same form (default: none)")
    add("--nearest", action="store_true", help="the shots most like the question, the nearest last; else the first")
    add("--cot", choices=["zero", "shots", "auto"],
        help="chain of thought: step by step; as in the shots' answers; as the model solves one question a cluster")
    add("--votes", type=int, default=0, help="so many answers to each question; the most frequent counts")
    add("--rows", type=int, default=32, help="answers written at once")

    add = parser.add_argument_group("chat").add_argument
    add("--chat", action=argparse.BooleanOptionalAction, help="through the chat template (default: on a terminal, with "
                                                              "no prompt, where the model has one)")
    add("--system", help="what the model is told first (default: as the template has it)")
    add("--load", metavar="FILE", help="go on with a chat that /save wrote")
    args = parser.parse_args(argv)
    args.stop = [s.replace("\\n", "\n") for s in args.stop]
    args.drafter = args.timing = None  # what --draft loads; seconds of prefill and decoding, ids decoded
    check_args(args, parser.get_default)
    args.early_stopping = {"false": False, "true": True, "never": "never"}[args.early_stopping]
    if args.temperature is None:
        args.temperature = 0.0 if args.choices or args.questions and not args.votes else 0.8
    return args


def check_args(args, usual):
    """Refuses what cannot be, and flags that nothing listens to; usual(name): a flag's default."""
    for name in "max_new_tokens", "beams", "limit", "votes":
        if getattr(args, name) < 0:
            raise BadInput(f"--{name} {getattr(args, name)} is negative: give 0 or more")
    for name in "num_samples", "shots", "rows", "draft_k", "medusa_nodes", "medusa_heads":
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.beams and args.num_samples > args.beams:
        raise BadInput(f"--num_samples {args.num_samples} of --beams {args.beams}: ask for at most as many as beams")
    if args.contrastive is not None and not 0 <= args.contrastive <= 1:
        raise BadInput(f"--contrastive {args.contrastive}: give a number from 0, greedy, to 1")
    if args.votes > 1 and (args.temperature == 0 or args.beams or args.contrastive is not None):
        raise BadInput(f"--votes {args.votes} of a search or of temperature 0 would all be the same: sample them")
    search = "--beams" if args.beams else "--contrastive" if args.contrastive is not None else ""
    chance = ["top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"]
    asking = args.questions or args.shots_from or args.cot or args.votes
    for what, deaf, names in ((search, search, chance + ["top_k"] * (search == "--beams")
                               + ["num_samples"] * (search == "--contrastive")),
                              ("--choices", args.choices, [*chance, "top_k", "beams", "contrastive", "draft", "stop",
                                                           "num_samples"]),
                              ("answers to questions", asking, ["num_samples"]),
                              ("no --beams", not args.beams, ["length_penalty", "early_stopping"])):
        for name in names if deaf else ():
            if getattr(args, name) != usual(name):
                raise BadInput(f"--{name} with {what} would change nothing: leave it out")
    if search and args.temperature:
        raise BadInput(f"--temperature with {search} would change nothing: leave it out")
    for unheard, what in ((args.beams and args.contrastive is not None, "--beams with --contrastive"),
                          (search and args.draft, f"--draft with {search}"),
                          (args.logprobs and search, f"--logprobs with {search}"),
                          (args.logprobs and args.questions, "--logprobs with --questions"),
                          (args.choices and args.cot in ("zero", "auto"), f"--cot {args.cot} with --choices"),
                          (args.questions and args.prompt is not None, "--prompt with --questions"),
                          (args.medusa_text and args.train_medusa is None, "--medusa_text without --train_medusa")):
        if unheard:
            raise BadInput(f"{what} would change nothing: leave one of the two out")
    if args.train_medusa is not None and args.train_medusa < 1:
        raise BadInput(f"--train_medusa {args.train_medusa}: give 1 step or more")
    if not -2 ** 63 <= args.seed < 2 ** 63 - args.num_samples - args.votes:
        raise BadInput(f"--seed {args.seed} has more than 64 bits: give a smaller one")
    if args.nearest and not args.shots_from or args.cot == "shots" and not args.shots_from:
        raise BadInput(f"--{'nearest' if args.nearest else 'cot shots'} needs solved questions: add --shots_from FILE")
    if args.cot == "auto" and not (args.shots_from or args.questions):
        raise BadInput("--cot auto needs questions to think about: add --shots_from FILE or --questions FILE")
    if args.choices and ("" in args.choices or len(set(args.choices)) < len(args.choices) or len(args.choices) < 2):
        raise BadInput("--choices needs two strings or more, each once and none empty")
    if "" in args.stop:
        raise BadInput("--stop has an empty string, which is everywhere: leave it out")


def load_drafter(init, model, tokenizer, args):
    """What --draft names, for speculate; None without it."""
    if args.draft in ("medusa", "blockwise"):
        return MedusaHeads.load(Path(init) / "medusa.safetensors", model, args.medusa_nodes, args.draft == "blockwise")
    if args.draft in (None, "ngram"):
        return args.draft
    theirs = Tokenizer.from_pretrained(args.draft)
    if theirs.token_bytes() != tokenizer.token_bytes():
        raise BadInput(f"--draft {args.draft} has another tokenizer than {init}: both must be trained with the same")
    return GPT.from_pretrained(args.draft, model.device, model.compute_dtype).eval()


def main_medusa(init, model, tokenizer, args):
    """--train_medusa: rows of a text, or of the model's own, and heads from them."""
    if not Path(init).is_dir():
        raise BadInput(f"--train_medusa saves the heads beside the model, but {init} is no folder: import it first "
                       f"with python model.py import {init} --out out/model")
    T, rows = min(256, model.context), 256
    if args.medusa_text:
        ids = tokenizer.encode("".join(itertools.islice(read_pieces([args.medusa_text]), 8)))  # 8 MB
        rows = torch.tensor(ids[:len(ids) // T * T]).view(-1, T)
    else:
        print(f"writing {rows} rows of {T} tokens", flush=True)
        own = [tokenizer.begin or [0]] * rows
        new, _ = model.generate(own, T, slots=64, temperature=args.temperature, compile=args.compile)
        rows = torch.tensor([a + b for a, b in zip(own, new)])[:, :T]
    if len(rows) < 2:
        raise BadInput(f"--medusa_text {args.medusa_text} has less than {2 * T} tokens: give more text")
    heads = MedusaHeads(model.config.n_embd, args.medusa_heads, model.device)
    model.requires_grad_(False)
    train_medusa(model, heads, rows, args.train_medusa, seed=args.seed)
    heads.save(Path(init) / "medusa.safetensors")
    print(f"{Path(init) / 'medusa.safetensors'}: python sample.py --init {init} --draft medusa")


def read_prompt(args):
    if args.prompt is None:
        try:
            return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError as error:
            raise BadInput(f"the standard input is not UTF-8 ({error}): convert it, or give --prompt") from None
    if not args.prompt.startswith("@"):
        return args.prompt
    try:
        return Path(args.prompt[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt {args.prompt}: the file cannot be read ({error})") from None


def main_prompting(model, tokenizer, args, ends):
    """--questions, --shots_from, --cot, --votes and --choices: one answer to each question."""
    if args.questions:
        questions = [read_solved(*row) for row in read_rows(args.questions, args.limit)]
    else:
        form = QUESTION
        if not args.cot and not args.chat:  # as the shots are written, or as it stands
            form = read_solved(*read_rows(args.shots_from, 1)[0]).form if args.shots_from else "{}"
        questions = [Solved(read_prompt(args), "", form)]
    right = []
    for question, found in zip(questions, answer_questions(model, tokenizer, questions, args, ends)):
        if not args.questions:
            if args.choices and args.logprobs:
                for choice, logp in zip(args.choices, found["logprobs"]):
                    print(f"{logp:10.4f}  {choice!r}")
            if not args.choices:
                print(*found["texts"], sep="\n---\n")
            votes = f"  ({found['votes']:.0%} of {args.votes} votes)" if args.votes > 1 else ""
            print("answer: " * (not args.choices) + found["prediction"] + votes)
            continue
        right.append(is_right(found["prediction"], question.answer, args.choices))
        print(json.dumps({**found, "answer": question.answer, "right": right[-1]}, ensure_ascii=False), flush=True)
    if right:
        figure = share(right)
        print(json.dumps({"accuracy": round(figure.value, 4), "interval": [round(x, 4) for x in figure[1:]],
                          "questions": len(right)}))


def main():
    args = get_args()
    Sampling(**sampling(args)).check()
    device = setup_process(args.device).device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    init = args.init or newest_run(fits=reads_texts)
    tokenizer = Tokenizer.from_pretrained(init)
    model = GPT.from_pretrained(init, device, getattr(torch, args.dtype)).eval()
    if args.train_medusa is not None:
        return main_medusa(init, model, tokenizer, args)
    args.drafter = load_drafter(init, model, tokenizer, args)
    terminal = args.prompt is None and not args.questions and sys.stdin is not None and sys.stdin.isatty()
    prompting = args.questions or args.shots_from or args.cot or args.votes or args.choices
    if terminal and not prompting and (tokenizer.chat if args.chat is None else args.chat):
        if args.beams or args.contrastive is not None or args.logprobs:
            raise BadInput("a chat draws its answers: leave --beams, --contrastive and --logprobs out")
        print(f"{init}: chat on {device}, {args.dtype}", file=sys.stderr)
        return chat(model, tokenizer, args)
    if args.load:
        raise BadInput("--load goes on with a chat, which needs a terminal and a model with a chat template, or --chat")
    if args.system is not None and not args.chat:
        raise BadInput("--system is told through a chat template: add --chat")
    ends = chat_stops(tokenizer) if args.chat else {tokenizer.eot} - {None}
    if prompting and terminal:
        raise BadInput("there is no question: give --prompt TEXT or --questions FILE")
    if prompting:
        return main_prompting(model, tokenizer, args, ends)

    text = read_prompt(args)
    T, shown = context(model, args), "" if args.chat else text
    prompt = tokenizer.begin + tokenizer.encode(text)
    if args.chat:
        prompt = Asker(tokenizer, args, T).ids(Solved(text, ""))
    if len(prompt) > T:
        raise BadInput(f"the prompt has {len(prompt)} tokens, more than the model's context of {T}: shorten it")
    if args.drafter and args.max_new_tokens > (left := T - len(prompt) - guesses(args)):
        if left < 1:
            raise BadInput(f"--draft stays inside the context of {T}, and the prompt has {len(prompt)} tokens: shorten "
                           f"it")
        print(f"--draft stays inside the context of {T}: {left} new tokens at most", file=sys.stderr)
        args.max_new_tokens = left
    print(f"{init}: {args.num_samples} sample(s) on {device}, {args.dtype}", file=sys.stderr)
    seeds, start = range(args.seed, args.seed + args.num_samples), time.perf_counter()
    alone = args.num_samples == 1 and writer(args) is by_sampling  # then the text appears as it is written
    if alone:
        print(shown, end="", flush=True)
        text, stopped = say(model, tokenizer, prompt, args.max_new_tokens, args.seed, args, ends, args.stop, not shown)
        if stopped:
            raise KeyboardInterrupt
        texts = [text]
    else:
        texts = writer(args)(model, tokenizer, [prompt], args.max_new_tokens, seeds, args, ends, args.stop)[0]
    seconds = time.perf_counter() - start
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- {i + 1}" + f", score {text.score:.4f}" * bool(args.beams))
        if not alone:
            print(shown + text.text)
        if args.logprobs:
            show_logprobs(tokenizer, text)
    if args.timing is None:
        count = sum(len(text.ids) for text in texts)
        return print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)
    print(roofline(model, [prompt] * args.num_samples, *args.timing, args), file=sys.stderr)


def show_logprobs(tokenizer, text):
    """A line a token: nats and the token; then the sum and what each token cost in the mean."""
    for logprob, i in zip(text.logprobs, text.ids):
        print(f"{logprob:10.4f}  {tokenizer.decode([i])!r}")
    if text.logprobs:
        print(f"{sum(text.logprobs):10.4f}  in all, {sum(text.logprobs) / len(text.ids):.4f} a token")


if __name__ == "__main__":
    cli(main)
