"""
How text becomes batches: a corpus is tokenized once into a flat file, and every batch is a pure function
of (seed, step, row), whatever the number of processes and wherever a run was resumed.

A corpus is a module of this folder with documents(split, input) -> (text, starts_document) pairs and, if a
model can be asked about it, checks(input) -> {metric: [{"prompt", "answer"}, …]}. One that comes tokenized has
TOKENIZER, a name, and shards(input) -> {split: [token files]} instead.

    data/<corpus>/<tokenizer>/train.bin, val.bin     256 int32 of header, then uint16 or uint32 ids,
                              train.json, val.json   or the names of several such files
    data/<corpus>/<tokenizer>/meta.json, tokenizer.tiktoken, checks.json

A set of conversations is a module with chats(split, input) -> rows that `conversation` reads, or a file of such rows.
"""
import bisect
import contextlib
import copy
import hashlib
import importlib
import json
import math
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests

from bpe import BadInput, Tokenizer, render_chat, replace_file

CORPORA = ("bios", "arithmetic", "shakespeare", "tinystories", "fineweb", "text", "stdlib")
MAGIC = 20240520  # of the public fineweb shards: header[0]; header[1] version, header[2] number of tokens
TASKS = ("arithmetic", "addition", "multiplication", "gsm8k", "tastes")  # questions whose answers a program checks
TOKENIZER_CHARS = 100_000_000  # a tokenizer is trained on at most this much of a corpus

# -----------------------------------------------------------------------------
# Token files


def write_tokens(path, arrays, n_vocab):
    """Stream arrays of ids into one file, atomically; returns the number of tokens."""
    dtype = np.uint16 if n_vocab <= 2 ** 16 else np.uint32
    count = 0
    with replace_file(path) as f:
        f.write(bytes(1024))
        for ids in arrays:
            f.write(np.asarray(ids).astype(dtype).tobytes())
            count += len(ids)
        header = np.zeros(256, dtype=np.int32)
        header[:3] = MAGIC, 1 if dtype == np.uint16 else 2, count if count < 2 ** 31 else -1
        f.seek(0)
        f.write(header.tobytes())
    return count


def open_tokens(path):
    """
    The ids of a token file as a read-only memory map, (n,) uint16 or uint32; where there is NAME.json instead of
    NAME.bin, those of all the files that it lists, one after the other.
    """
    path = Path(path)
    if not path.exists() and (names := _read_json(path.with_suffix(".json"))):
        return Shards([open_tokens(path.parent / name) for name in names])
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype=np.int32, count=256)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    if len(header) < 256 or header[0] != MAGIC or header[1] not in (1, 2):
        raise BadInput(f"{path} is not a token file of version 1 or 2: delete it, it is made again when needed")
    dtype = np.uint16 if header[1] == 1 else np.uint32
    count = (size - 1024) // np.dtype(dtype).itemsize
    if (size - 1024) % np.dtype(dtype).itemsize or header[2] not in (count, -1):
        raise BadInput(f"{path} holds {count} tokens but its header says {header[2]}: delete it, it is made again")
    return np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(count,)) if count else np.zeros(0, dtype)


class Shards:
    """Several arrays of ids that are read as one: len, slices of step 1, nothing loaded before it is asked for."""

    def __init__(self, parts):
        self.parts, self.starts = parts, np.cumsum([0] + [len(ids) for ids in parts])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, where):
        start, stop, _ = where.indices(len(self))
        first = min(int(np.searchsorted(self.starts, start, side="right")), len(self.parts)) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, stop, side="left")))
        pieces = [ids[max(0, start - a):max(0, stop - a)]
                  for ids, a in zip(self.parts[first:last], self.starts[first:last].tolist())]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


# -----------------------------------------------------------------------------
# A corpus, tokenized once


def parse_mixture(spec):
    """'bios:0.7,arithmetic:0.3' -> {"bios": 0.7, "arithmetic": 0.3}, weights scaled to sum 1."""
    weights = {}
    for part in spec.split(","):
        name, _, weight = part.partition(":")
        if name not in CORPORA:
            raise BadInput(f"--data {name!r} is unknown: choose from {', '.join(CORPORA)}, weighted as in "
                           f"bios:0.7,arithmetic:0.3")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0
        if not weights[name] > 0:
            raise BadInput(f"--data {part!r} needs a positive weight after the colon, as in bios:0.7")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _documents(name, split, input):
    return importlib.import_module(f"data.{name}").documents(split, input=input)


def _texts(names, input, most):
    """The training text of several corpora in turn, each up to its share of `most` characters."""
    for name in names:
        left = most / len(names)
        for text, _ in _documents(name, "train", input):
            if left <= 0:
                break
            left -= len(text)
            yield text


def _encode(name, split, tokenizer, input, count):
    """
    Arrays of ids, document by document, each starting with the token that ends one, then the one that begins one where
    that is another; count[split] adds up UTF-8 bytes.
    """
    documents, border = _documents(name, split, input), list(dict.fromkeys([tokenizer.eot, *tokenizer.begin]))
    while batch := list(islice(documents, 64)):
        for (text, starts), ids in zip(batch, tokenizer.encode_batch([text for text, _ in batch])):
            count[split] = count.get(split, 0) + len(text.encode())
            if not starts and tokenizer.prefix:
                ids = tokenizer.encode(text, goes_on=True)
            yield border + list(ids) if starts else ids


def _fingerprint(name, input):
    """What a prepared corpus was made from: this folder's code, Python (for stdlib), the input's size and time."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    made = {"corpus": name, "code": hashlib.sha256(code).hexdigest(), "python": sys.version}
    if input is not None and Path(input).exists():
        files = sorted(p for p in Path(input).rglob("*") if p.is_file()) if Path(input).is_dir() else [Path(input)]
        stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        made["input"] = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return made


def _read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def prepare(spec, tokenizer=None, vocab_size=1024, input=None, root=None):
    """
    Tokenize every corpus of the mixture `spec`, unless that was done before.
    tokenizer: None trains a byte-level BPE of vocab_size on the mixture; "char"; a Tokenizer; or what
    Tokenizer.from_pretrained takes. Returns ({corpus: (weight, folder)}, tokenizer).
    """
    weights, root = parse_mixture(spec), Path(root or Path(__file__).parent)
    names = sorted(weights)
    made = {name: _fingerprint(name, input) for name in names}
    ready = {name: module for name in names
             if hasattr(module := importlib.import_module(f"data.{name}"), "shards")}  # these come tokenized
    for name, module in ready.items():
        theirs = Tokenizer.from_pretrained(module.TOKENIZER)
        same = isinstance(tokenizer, Tokenizer) and tokenizer.spec() == theirs.spec()
        if not same and tokenizer not in (None, module.TOKENIZER):
            raise BadInput(f"--data {name} comes tokenized: leave --tokenizer out, or give {module.TOKENIZER}")
        tokenizer = theirs
    if isinstance(tokenizer, Tokenizer):
        if tokenizer.eot is None:
            raise BadInput(f"--tokenizer: that one of {tokenizer.n_vocab} ids has no token that ends a document: make "
                           f"one with --special \"<|endoftext|>\"")
        label = f"{tokenizer.kind}-{hashlib.sha256(json.dumps(tokenizer.spec()).encode()).hexdigest()[:8]}"
    elif tokenizer in (None, "char"):
        label = "char" if tokenizer == "char" else f"bpe{vocab_size}"
        label += "" if len(names) == 1 else "-" + "+".join(names)
    else:
        tokenizer = Tokenizer.from_pretrained(tokenizer)
        return prepare(spec, tokenizer, input=input, root=root)
    folders = {name: root / name / label for name in names}
    for name, module in ready.items():  # another choice of shards is another folder
        folders[name] = folders[name].with_name(f"{label}-{hashlib.sha256(str(input).encode()).hexdigest()[:8]}")
    metas = {name: _read_json(folder / "meta.json") for name, folder in folders.items()}
    if all(metas[name] and metas[name]["made_from"] == made and is_whole(folders[name], metas[name]["tokens"])
           for name in names):
        return {name: (weights[name], folders[name]) for name in names}, Tokenizer.load(folders[names[0]])

    start = time.time()
    if not isinstance(tokenizer, Tokenizer):
        texts = _texts(names, input, math.inf if tokenizer == "char" else TOKENIZER_CHARS)
        if tokenizer == "char":  # every character that is ever asked
            texts = chain(texts, (text for name in names for text, _ in _documents(name, "val", input)))
        tokenizer = Tokenizer.train(texts, vocab_size, digits=True, kind="char" if tokenizer == "char" else "bpe")
        print(f"tokenizer: {tokenizer.n_vocab} ids, trained in {time.time() - start:.1f} s")
    for name, final in folders.items():
        folder = final.with_name(f".{final.name}.{os.getpid()}.part")  # complete before it takes its place
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start, size = time.time(), {}
        if name in ready:
            tokens = link_tokens(folder, ready[name].shards(input), tokenizer.n_vocab)
        else:
            tokens = {split: write_tokens(folder / f"{split}.bin", _encode(name, split, tokenizer, input, size),
                                          tokenizer.n_vocab) for split in ("train", "val")}
        for split, n in tokens.items():
            if n < 2:
                raise BadInput(f"--data {name} has no text for {split}: give a file or folder with more text")
        module = importlib.import_module(f"data.{name}")
        checks = module.checks(input=input) if hasattr(module, "checks") else {}
        (folder / "checks.json").write_text(json.dumps(checks))
        tokenizer.save(folder)
        (folder / "meta.json").write_text(json.dumps({
            "tokenizer": tokenizer.spec(), "tokens": tokens, "bytes": size, "made_from": made,
            "sha256": {s: digest(open_tokens(folder / f"{s}.bin")) for s in tokens}}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        try:
            folder.rename(final)
        except OSError:  # another run made the same in the meantime
            shutil.rmtree(folder)
        print(f"{name}: {tokens['train']:,} + {tokens['val']:,} tokens "
              + (f"of {sum(size.values()):,} bytes " if size else "") + f"in {time.time() - start:.1f} s")
    return {name: (weights[name], folders[name]) for name in names}, tokenizer


def is_whole(folder, tokens):
    """Do the token files hold what meta.json says? A deleted or damaged one is made again."""
    try:
        return all(len(open_tokens(folder / f"{split}.bin")) == n for split, n in tokens.items())
    except BadInput:
        return False


def link_tokens(folder, shards, n_vocab):
    """List token files that exist in folder/{train,val}.json; returns {split: number of tokens}."""
    tokens = {}
    for split, paths in shards.items():
        for path in paths:
            ids = open_tokens(path)
            largest = max((int(ids[i:i + 2 ** 24].max()) for i in range(0, len(ids), 2 ** 24)), default=0)
            if largest >= n_vocab:
                raise BadInput(f"{path} holds id {largest}, but its tokenizer has {n_vocab}: it is of another one")
        (folder / f"{split}.json").write_text(json.dumps([str(Path(path).resolve()) for path in paths]))
        tokens[split] = len(open_tokens(folder / f"{split}.bin"))
    return tokens


def digest(ids):
    """The sha256 of an array of ids, a block at a time."""
    sha = hashlib.sha256()
    for i in range(0, len(ids), 2 ** 24):
        sha.update(np.ascontiguousarray(ids[i:i + 2 ** 24]))
    return sha.hexdigest()


# -----------------------------------------------------------------------------
# Batches


class TokenLoader:
    """
    Windows of T + 1 tokens from a weighted mixture of token files. Row g of the whole run, g = step · rows + row,
    belongs to the source that slot g mod 1024 names, and there to the next window of a shuffled epoch; each
    epoch is cut at another offset. Nothing is remembered between calls, so resuming needs only the step.
    """
    SLOTS = 1024

    def __init__(self, sources, T, seed):
        """sources: list of (weight, ids (n,)); weights sum to 1."""
        self.T, self.seed, self.tokens, self.orders = T, seed, [ids for _, ids in sources], {}
        for ids in self.tokens:
            if len(ids) < T + 1:
                raise BadInput(f"a training text of {len(ids)} tokens is shorter than --block_size {T} + 1: "
                               f"give more text or a smaller --block_size")
        shares = np.cumsum([0] + [weight for weight, _ in sources])
        edges = np.round(shares * self.SLOTS).astype(int)
        slots = np.repeat(np.arange(len(sources)), np.diff(edges))
        np.random.default_rng([seed, 0]).shuffle(slots)
        self.source = slots  # (SLOTS,) which source, and how many of its rows came before in the round
        self.rank = np.array([np.sum(slots[:i] == s) for i, s in enumerate(slots)])
        self.per_round = np.bincount(slots, minlength=len(sources))
        if self.per_round.min() == 0:
            raise BadInput(f"a --data weight below 1/{self.SLOTS} of the sum is never drawn: leave that corpus out")

    def window(self, g):
        """Ids (T + 1,) of row g of the run."""
        rounds, slot = divmod(g, self.SLOTS)
        s = self.source[slot]
        ids, index = self.tokens[s], int(rounds * self.per_round[s] + self.rank[slot])
        windows = max(1, (len(ids) - 1) // self.T - 1)
        epoch, i = divmod(index, windows)
        if self.orders.get(s, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, 1 + s, epoch])
            offset = int(rng.integers(len(ids) - windows * self.T))
            self.orders[s] = epoch, offset, rng.permutation(windows)
        _, offset, order = self.orders[s]
        start = offset + int(order[i]) * self.T
        return ids[start:start + self.T + 1]

    def batch(self, first, rows):
        """Rows first … first + rows of the run, (rows, T + 1) int64: inputs are [:, :-1], targets [:, 1:]."""
        return np.stack([self.window(g) for g in range(first, first + rows)]).astype(np.int64)


def eval_batches(ids, T, max_tokens, rows, rank=0, world=1):
    """
    The first max_tokens targets of a token file (0: all of them) in consecutive windows, dealt to the ranks in
    turn: inputs and targets, (rows, T) int64 each; targets past the end are -100. Every rank gets as many batches,
    the last of them perhaps empty, because ranks that hold parts of one model compute together.
    """
    targets = len(ids) - 1 if max_tokens == 0 else min(len(ids) - 1, max_tokens)
    starts = range(rank * T, targets, world * T)
    for i in range(0, len(range(0, targets, world * T)), rows):
        x, y = np.zeros((rows, T), np.int64), np.full((rows, T), -100, np.int64)
        for row, start in enumerate(starts[i:i + rows]):
            n = min(T, targets - start)
            x[row, :n], y[row, :n] = ids[start:start + n], ids[start + 1:start + n + 1]
        yield x, y


def prefetch(items, depth=2):
    """
    The items of an iterator, the next `depth` of them made by a thread while the last one is used (0: no thread).
    Same items, same order; an error in the thread is raised here; the thread ends when this is closed or dropped.
    """
    if not depth:
        yield from items
        return
    ready, stopped = queue.Queue(depth), threading.Event()

    def fill():
        error = None
        try:
            for item in items:
                ready.put((item, None, False))
                if stopped.is_set():
                    return
        except BaseException as e:  # it is the consumer's to see
            error = e
        ready.put((None, error, True))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            item, error, end = ready.get()
            if error is not None:
                raise error
            if end:
                return
            yield item
    finally:
        stopped.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)  # room for what it wants to put


def download(url, path):
    """The file at a URL, kept at path; BadInput where it cannot be had."""
    if not path.exists():
        try:
            answer = requests.get(url, timeout=60)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise BadInput(f"{url} could not be had ({type(error).__name__}): put the file at {path} or give "
                           f"--input FILE") from None
        with replace_file(path) as f:
            f.write(answer.content)
    return path


# -----------------------------------------------------------------------------
# Conversations: what instruction tuning reads

CHATS = ("bios", "arithmetic", "addition", "multiplication", "alpaca", "gsm8k", "sharegpt", "ppt")


def read_chats(path):
    """(file and line, row) of a .jsonl file, or of a .json file that holds a list; either may be packed."""
    from data import text
    path = Path(path)
    if text.suffix(path) != ".json":
        yield from ((f"{path}, line {number}", row) for number, row in text.json_rows(path))
        return
    try:
        with text.unpacked(path) as f:
            rows = json.load(f)
    except text.UNREADABLE as error:
        raise text.unreadable(path, error) from None
    except ValueError as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"{path}{where}: not JSON ({error}); correct it, or give a .jsonl file") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} holds no list of objects: give one, or a .jsonl file with an object a line")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def conversation(row, where="the row", template=None):
    """
    {"messages": [{"role", "content"}, …]} of a row of ours, of Alpaca's, GSM8K's, ShareGPT's or {"prompt", "answer"};
    what is not a conversation, {"prompt", "completion"} and {"text"}, comes back as it is.
    """
    from data import alpaca, gsm8k, sharegpt
    try:
        if "instruction" in row:
            return {"messages": alpaca.messages(row, template)}
        if "conversations" in row:
            return {"messages": sharegpt.messages(row, where)}
        if "question" in row:
            return {"messages": gsm8k.messages(row)}
        if "messages" in row:
            return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
        if "prompt" in row and "answer" in row:
            return {"messages": [{"role": "user", "content": row["prompt"]},
                                 {"role": "assistant", "content": row["answer"]}]}
        if "completion" in row:
            return {"prompt": row["prompt"] + "", "completion": row["completion"] + ""}
        return {"text": row["text"] + ""}
    except (KeyError, TypeError):
        raise BadInput(f"{where} is no row to tune on, it has the keys {', '.join(row) or 'none'}: give messages, or "
                       f"instruction and output, question and answer, conversations, prompt and completion, or text"
                       ) from None


def chat_sets(spec, input=None, val=0.05, limit=0):
    """
    "bios,alpaca,FILE" -> {name: {"train": [(where, row)], "val": [(where, row)]}}. A module may know its own split;
    a file's and another's validation rows are a share `val` of it, drawn by a seed of their own. input: a file in place
    of the one module's download. limit: of each split.
    """
    sets = {}
    for name in spec.split(","):
        if name in CHATS:
            module = importlib.import_module(f"data.{name}")
            parts = {split: [(f"{name}, row {i}", row) for i, row
                             in enumerate(islice(module.chats(split, input), limit or None), 1)]
                     for split in ("train", "val")}
        elif Path(name).is_file():
            parts = {"train": list(islice(read_chats(name), limit or None)), "val": []}
        else:
            raise BadInput(f"--data {name} is no file and no set of conversations: choose from {', '.join(CHATS)}, or "
                           f"give a .jsonl or .json file")
        if not parts["train"]:
            raise BadInput(f"--data {name} is empty: give a file with one conversation a line")
        if not parts["val"] and len(parts["train"]) > 1 and val:
            rows, n = parts["train"], max(1, round(val * len(parts["train"])))
            chosen = set(np.random.default_rng(0).permutation(len(rows))[:n].tolist())
            parts = {"train": [row for i, row in enumerate(rows) if i not in chosen],
                     "val": [row for i, row in enumerate(rows) if i in chosen]}
        sets[name] = parts
    return sets


def pack(lengths, T):
    """
    Lists of indices whose lengths sum to at most T each: the longest first, each into the fullest row that still has
    room (best fit decreasing). Raises ValueError for a length above T.
    """
    rows, room = [], []  # room: (places left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > T:
            raise ValueError(f"length {lengths[i]} above {T}")
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            left, row = T, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


class Rows(NamedTuple):
    """Conversations side by side in rows, (R, T) int64 each."""
    idx: np.ndarray
    targets: np.ndarray    # -100 where nothing is asked, and on padding
    doc_ids: np.ndarray    # which of a row's conversations a token belongs to, -1: padding
    positions: np.ndarray  # from 0 in each conversation


def lay_out(examples, rows, T):
    """Rows of examples [(ids, mask)]: rows lists their indices; inputs are ids[:-1], targets ids[1:] where mask[1:]."""
    idx, positions = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    targets, doc_ids = np.full((len(rows), T), -100, np.int64), np.full((len(rows), T), -1, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for d, i in enumerate(row):
            ids, mask = examples[i]
            here = slice(start, start + len(ids) - 1)
            idx[r, here], doc_ids[r, here], positions[r, here] = ids[:-1], d, np.arange(len(ids) - 1)
            targets[r, here] = np.where(mask[1:], ids[1:], -100)
            start = here.stop
    return Rows(idx, targets, doc_ids, positions)


def cut_by(spec):
    """{corpus: folder} of the prepared data whose tokenizer is that of `spec`."""
    same = {k: v for k, v in spec.items() if k != "chat"}
    return {path.parent.parent.name: path.parent for path in Path(__file__).parent.glob("*/*/meta.json")
            if same and (_read_json(path) or {}).get("tokenizer") == same}


def prepared(tokenizer, spec, input=None):
    """{corpus: (weight, folder)} of a mixture as this tokenizer cut it, made where it is not there yet."""
    weights, found = parse_mixture(spec), cut_by(tokenizer.spec())
    if input is None and weights.keys() <= found.keys():
        return {name: (weight, found[name]) for name, weight in weights.items()}
    plain = copy.copy(tokenizer)
    plain.chat = None  # how a chat is written is nothing to a corpus
    return prepare(spec, plain, input=input)[0]


def corpora(run):
    """{corpus: (weight, folder)} of the prepared data that a run's tokenizer cut, weighted as it was trained."""
    found = cut_by(run.get("tokenizer", {}))
    try:
        weights = parse_mixture(run["args"]["data"])
    except (KeyError, AttributeError, TypeError, BadInput):
        weights = dict.fromkeys(found, 1 / max(1, len(found)))
    return {name: (weight, found[name]) for name, weight in weights.items() if name in found}


def reads_texts(run):
    """Does a run say something of any text? Not a reward model, nor rlhf.py's small starts with one task's letters."""
    return not run.get("config", {}).get("scalar_head") and \
        (run.get("tokenizer", {}).get("kind") != "char" or bool(corpora(run)))


# -----------------------------------------------------------------------------
# Questions


def exact_match(model, tokenizer, rows, batch=256):
    """
    Ask each row's prompt as a document's beginning, greedily; right where the text goes on with the answer, letter by
    letter. Returns (share that is right, the generated texts).
    """
    prompts = [tokenizer.begin + tokenizer.encode(row["prompt"]) for row in rows]
    longest = max(len(tokenizer.encode(row["answer"])) for row in rows)
    texts = []
    for i in range(0, len(prompts), batch):
        tokens, _ = model.generate(prompts[i:i + batch], max_new_tokens=longest + 4, temperature=0)
        texts += [tokenizer.decode(row, goes_on=True) for row in tokens]
    return sum(text.startswith(row["answer"]) for text, row in zip(texts, rows)) / len(rows), texts


def held_out(name, problems, split, n):
    """
    Of all problems of a task, shuffled, the first n for "val" and the rest for "train". random() is the one generator
    method whose sequence Python promises to keep.
    """
    rng = random.Random(name)
    order = sorted(problems, key=lambda _: rng.random())
    return order[n:] if split == "train" else order[:n]


def read_rows(path, limit=0):
    """[(file and line, object)] of a JSONL file."""
    from data import text
    rows = islice(text.json_rows(Path(path)), limit or None)
    rows = [(f"{path}, line {number}", row) for number, row in rows]
    if not rows:
        raise BadInput(f"{path} is empty: give a file with one JSON object a line")
    return rows


def reading(read):
    """A row that lacks a key, or has another type there, is the user's to mend."""
    def read_row(where, row):
        try:
            return read(where, row)
        except BadInput:  # has its sentence already
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadInput(f"{where} is no row that this task reads ({type(error).__name__}: {error}): it has "
                           f"the keys {', '.join(row) or 'none'}; see --help") from None
    return read_row


def number(text):
    """The number after ####, else the last one; None without."""
    found = re.findall(r"-?[$]?\d[\d,]*(?:\.\d+)?", text.split("####")[-1])
    if not found:
        return None
    digits = re.sub("[$,]", "", found[0 if "####" in text else -1])
    return float(digits) if "." in digits or len(digits) > 4000 else int(digits)  # longer ones Python refuses


def is_right(text, answer):
    """Does an answer agree with the known one: its number, where that comes after GSM8K's ####, or all of it."""
    if "####" in answer:
        return number(text) == number(answer) is not None
    return text.strip() == answer.strip()


class Figure(NamedTuple):
    """A measured value and its 95 % interval."""
    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def share(right, z=1.959964):
    """The share of true ones, with Wilson's interval (p + z²/2n ± z √(p q/n + z²/4n²)) / (1 + z²/n)."""
    n, p = len(right), sum(map(bool, right)) / len(right)
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return Figure(p, max(0, (middle - half) / (1 + z * z / n)), min(1, (middle + half) / (1 + z * z / n)))


# -----------------------------------------------------------------------------
# Preferences: which answer people, a program or a model liked better


def read_preferences(path, limit=0, strict=True):
    """
    Rows of a .jsonl or .json file (also packed, .gz or .xz), each one of
        {"messages": the turns before the answer, "ranked": [answers, the best first], "tie": bool, "margin": float}
        {"messages": …, "completion": an answer, "label": True where it is liked}
    from {"prompt", "chosen", "rejected"} (texts or lists of messages; without prompt, two dialogues that agree up to
    an answer; hh-rlhf's "\n\nHuman: … \n\nAssistant: …" too), {"prompt", "ranked"}, {"prompt", "completion",
    "label"}, {"messages", "label"}, and ShareGPT's {"conversations"} in the prompt's place.
    Any other row raises BadInput, which names its line; without `strict` it is left out and counted on the screen.
    """
    from data import text
    path = Path(path)
    if text.suffix(path) == ".jsonl":
        numbered = text.json_rows(path)
    else:
        with contextlib.closing(text.unpacked(path)) if path.is_file() else contextlib.nullcontext() as file:
            try:
                numbered = enumerate(json.load(file), 1)
            except text.UNREADABLE as error:
                raise text.unreadable(path, error) from None
            except (ValueError, TypeError, AttributeError):
                raise BadInput(f"{path} is not a list of JSON objects: give a .jsonl file, an object a line, or such a "
                               f"list") from None
    rows, left_out = [], 0
    for number, row in islice(numbered, limit or None):
        try:
            rows.append(preference(row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            if not strict:
                left_out += 1
                continue
            raise BadInput(f"{path}, line {number}: a preference has prompt, chosen and rejected, or prompt, "
                           f"completion and label; correct or remove the line") from None
    if left_out:
        print(f"{path}: left out {left_out} of {left_out + len(rows)} rows that are no preference between two answers")
    if not rows:
        raise BadInput(f"{path} holds no preferences: give another file")
    return rows


def turns(prompt):
    """Messages of a text, of a list of messages, or of ShareGPT's conversation."""
    if isinstance(prompt, str):
        return dialogue(prompt) if prompt.startswith("\n\nHuman:") else [{"role": "user", "content": prompt}]
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles.get(role, role), "content": content} for role, content in
            ((m["role"], m["content"]) if "role" in m else (m["from"], m["value"]) for m in prompt)]


def dialogue(text):
    """hh-rlhf's text as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("no dialogue")
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2])]


def answer(given):
    """The text of an answer, given as text, as a message, or as a list of one."""
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    return given if isinstance(given, str) else turns([given])[0]["content"]


def preference(row):
    """One row as read_preferences gives it; KeyError, TypeError or ValueError for what is none."""
    before = row.get("prompt", row.get("conversations"))
    if "label" in row:
        if not isinstance(row["label"], (bool, int)):
            raise ValueError("the label is true or false")
        if before is None:
            *before, last = turns(row["messages"])
            return {"messages": before, "completion": last["content"], "label": bool(row["label"])}
        return {"messages": turns(before), "completion": answer(row["completion"]), "label": bool(row["label"])}
    if "ranked" in row:
        ranked, before = [answer(text) for text in row["ranked"]], turns(before)
    elif before is None:
        both = list(zip(turns(row["chosen"]), turns(row["rejected"])))
        at = next((i for i, (a, b) in enumerate(both) if a != b), len(both) - 1)  # where the dialogues part
        if {m["role"] for m in both[at]} != {"assistant"}:
            raise ValueError("they part in another turn than the assistant's")
        ranked, before = [m["content"] for m in both[at]], [a for a, _ in both[:at]]
    else:
        ranked, before = [answer(row["chosen"]), answer(row["rejected"])], turns(before)
    if len(ranked) < 2 or not all(isinstance(text, str) for text in ranked):
        raise ValueError("a preference is between two texts or more")
    return {"messages": before, "ranked": ranked, "tie": bool(row.get("tie")), "margin": float(row.get("margin", 0))}


# -----------------------------------------------------------------------------
# Prompts and their responses in rows, without padding between them


class Packed(NamedTuple):
    idx: np.ndarray        # (R, T) ids
    targets: np.ndarray    # (R, T) what each position predicts, -100 where nothing is asked
    positions: np.ndarray  # (R, T)
    doc_ids: np.ndarray    # (R, T, 2), as GPT.forward reads it
    segments: np.ndarray   # (R, T) number of the response that the target belongs to, -1 where there is none
    n: int                 # responses; with ask_prompt prompt g is segment n + g


def branch_lengths(group, T, share):
    """The documents that a group becomes, [(tokens, its responses' numbers), …]: few, of at most T, in their order."""
    prompt, responses = group
    documents = []
    for i, response in enumerate(responses):
        if share and documents and documents[-1][0] + len(response) <= T:
            documents[-1][0] += len(response)
            documents[-1][1].append(i)
        else:
            documents.append([len(prompt) - 1 + len(response), [i]])
    return documents


def fit(rooms, lengths, T):
    """Put documents of these lengths, the longest first, each where least room is left; rooms: what rows have left."""
    rooms, places = list(rooms), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        open_rows = [row for row, room in enumerate(rooms) if room >= lengths[i]]
        places[i] = min(open_rows, key=rooms.__getitem__) if open_rows else len(rooms)
        if not open_rows:
            rooms.append(T)
        rooms[places[i]] -= lengths[i]
    return rooms, places


def micro_batches(groups, T, rows, share=True):
    """Lists of indices of groups such that each list packs into at most `rows` rows of T; the longest groups first."""
    sizes = [[n for n, _ in branch_lengths(group, T, share)] for group in groups]
    for size, group in zip(sizes, groups):
        if max(size) > T:
            raise BadInput(f"a prompt of {len(group[0])} tokens with its response does not fit into {T}: cut it first")
    batch, rooms = [], []
    for g in sorted(range(len(groups)), key=lambda g: -max(sizes[g])):
        new, _ = fit(rooms, sizes[g], T)
        if batch and len(new) > rows:
            yield batch
            batch, (new, _) = [], fit([], sizes[g], T)
        batch, rooms = batch + [g], new
    if batch:
        yield batch


def apart(groups, T, rows, share=True):
    """The groups, those that take more than `rows` rows of T in several parts; the order of all responses stays."""
    parts = []
    for prompt, responses in groups:
        first, sizes = 0, []
        for n, which in branch_lengths((prompt, responses), T, share):
            if sizes and len(fit([], [*sizes, n], T)[0]) > rows:
                parts.append((prompt, responses[first:which[0]]))
                first, sizes = which[0], []
            sizes.append(n)
        parts.append((prompt, responses[first:]))
    return parts


def pack_branches(groups, T, share=True, ask_prompt=False, steady=False):
    """
    groups: [(prompt ids, [response ids, …]), …] -> Packed rows of at most T tokens. A group is one document
        p_1 … p_{P-1} | p_P r_1 … r_{n-1} | p_P s_1 … s_{m-1} | …
    whose branches each see the prompt and themselves, at positions that go on from P - 1: the prompt is computed once
    for all its responses, and each branch begins with the token that predicts its first. A group longer than T becomes
    several such documents; share False: one a response. ask_prompt: p_2 … p_P are targets too, once a group. steady:
    rows of exactly T, a power of two of them, so that what is compiled for each shape is compiled for few.
    """
    pieces = []  # (group, responses) a document, with its length
    for g, group in enumerate(groups):
        pieces += [(n, g, which) for n, which in branch_lengths(group, T, share)]
    rooms, places = fit([], [n for n, _, _ in pieces], T)
    R, width = len(rooms), T - min(rooms, default=0)
    if steady:
        R, width = 1 << (R - 1).bit_length(), T
    idx, positions = np.zeros((R, width), np.int64), np.zeros((R, width), np.int64)
    targets, segments = np.full((R, width), -100, np.int64), np.full((R, width), -1, np.int64)
    doc_ids = np.zeros((R, width, 2), np.int64)
    first = np.cumsum([0] + [len(responses) for _, responses in groups])
    n, filled, document, asked = int(first[-1]), [0] * R, 0, set()

    def write(row, ids, goals, at, segment, own, also):
        here = slice(filled[row], filled[row] + len(ids))
        idx[row, here], targets[row, here], segments[row, here] = ids, goals, segment
        positions[row, here] = np.arange(at, at + len(ids))
        doc_ids[row, here] = own, also
        filled[row] = here.stop

    for (_, g, which), row in zip(pieces, places):
        prompt, responses = groups[g]
        document += 1
        shared = document
        ask = ask_prompt and g not in asked
        asked.add(g)
        write(row, prompt[:-1], prompt[1:] if ask else -100, 0, n + g if ask else -1, shared, shared)
        for i in which:
            document += 1
            ids = responses[i]
            write(row, [prompt[-1], *ids[:-1]], ids, len(prompt) - 1, first[g] + i, document, shared)
    return Packed(idx, targets, positions, doc_ids, segments, n)


def prompt_and_response(tokenizer, messages, text, template=None):
    """A chat that the assistant ends with `text` -> (ids up to where the answer begins, the answer's with its end)."""
    ids, mask = render_chat(tokenizer, [*messages, {"role": "assistant", "content": text}], template)
    end = len(mask) - mask[::-1].index(1)
    start = max((i + 1 for i in range(end) if not mask[i]), default=0)
    return list(ids[:start]), list(ids[start:end])


def question(tokenizer, text, template=None):
    """The ids of a chat in which the user asks `text` and the assistant is about to answer."""
    return list(render_chat(tokenizer, [{"role": "user", "content": text}], template, generation=True)[0])


def answer_text(tokenizer, ids):
    """What an answer says, without special tokens."""
    special = set(tokenizer.special.values())
    return tokenizer.decode([i for i in ids if i not in special])


def batch_indices(n, batch, step, seed):
    """Which of n examples a step takes: consecutive parts of shuffled epochs, a function of (seed, step) alone."""
    batch = min(batch, n)
    at, rest = divmod(step * batch, n)
    order = np.random.default_rng([seed, at]).permutation(n).tolist()[rest:]
    if len(order) < batch:
        order += np.random.default_rng([seed, at + 1]).permutation(n).tolist()
    return order[:batch]


def read_tasks(name, split, n, input=None):
    """n questions of a task module (problems(split, n)) or of a .jsonl file: [{"prompt", "answer"}, …]."""
    if name in TASKS:
        return list(importlib.import_module(f"data.{name}").problems(split, n))
    from data import text
    rows = [row for _, row in islice(text.json_rows(Path(input)), n)]
    if not rows or not all(isinstance(row.get("prompt", row.get("question")), str) for row in rows):
        raise BadInput(f"{input} is no list of questions: give an object with prompt and answer on each line")
    return [{"prompt": row.get("prompt", row.get("question")), "answer": str(row.get("answer", ""))} for row in rows]
