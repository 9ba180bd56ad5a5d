"""Byte-pair encoding: the tokenizer, from training to every file format people keep one in.

A language model reads integers. Bytes would do, but a page is thousands of them; words would do,
but there is always a new one. Byte-pair encoding sits between: begin with the 256 bytes, and

    repeat:  (a, b) = the most frequent adjacent pair in the text
             make it a new token, and replace every a b by it

A token's id is the round in which it was made. Encoding replays the rounds: while some adjacent
pair forms a known token, merge the pair whose token has the lowest id. Text is first cut into
chunks (a word with the space before it, a number, punctuation) and no merge crosses a cut.

Papers: Gage 1994 (A New Algorithm for Data Compression), Sennrich et al. 2016 (arXiv:1508.07909,
BPE for translation), Radford et al. 2019 (GPT-2: over bytes, so that no text is out of reach).

    python bpe.py                                   # train on Python's own source, then look
    python bpe.py train book.txt --vocab_size 4096 --out out/tokenizer
    python bpe.py inspect "hello world" --tokenizer out/tokenizer
    python bpe.py chat "Who are you?" "A model." --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct

After the tokenizer: hub() fetches a model's files from Hugging Face, and render_chat() writes a
conversation as tokens in the way its model was trained on.
"""

import argparse
import base64
import binascii
import codecs
import contextlib
import fnmatch
import functools
import gzip
import hashlib
import heapq
import importlib.util
import json
import lzma
import math
import os
import re
import struct
import subprocess
import sys
import sysconfig
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import regex  # arrives with tiktoken; unlike re it knows \p{L} and possessive ++
import requests
import tiktoken

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
# What other families call the end of a document, in the order in which they are looked for.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")
# And its beginning, in tokenizer_config.json.
BEGINS = ("<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")


class BadInput(ValueError):
    """Something the user can mend: one sentence that names the flag or file and the way out."""


def cli(main):
    """Runs a script's main; what the user can mend ends in one sentence and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # lone surrogates, bytes that were no UTF-8, can be shown
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):  # and read
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        main()
        sys.stdout.flush()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":  # one sentence, not one a process
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `python bpe.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def replace_file(path, mode="wb"):
    """Write beside `path`, then take its place: a crash leaves the old file or the new one whole."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise BadInput(f"{path} could not be written ({cause.strerror}): free some space or give "
                       "another --out; what was saved before is untouched") from error
    finally:
        with contextlib.suppress(OSError):  # mostly: it has taken its place and is no longer here
            partial.unlink()


# ------------------------------------------------------------------------------------------------
# Cutting text into chunks

# Possessive ++ never gives characters back: the same chunks as +, found faster. \s+(?!\S) leaves
# the last space of a run to the word after it. cl100k keeps all the white space that ends a text
# in one chunk; llama3 is otherwise the same.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
              r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DIGIT = r"\p{N}"  # every digit a chunk of its own: "993" is three tokens, and sums are learnable

# Cheaper than the GPT-2 pattern, and every cut it makes is one of that pattern's cuts too. (re is
# quicker than regex here; to it \x1c-\x1f are spaces, which Unicode and the pattern deny.)
WORDS = re.compile(r" ?[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]")


def whole(pattern):
    """A pattern that loses nothing: a run of text that it does not match is a chunk as well."""
    if pattern in PATTERNS.values():
        return pattern  # these match every character already
    return f"(?:{pattern})|(?:(?!{pattern})(?s:.))+"


def fold(patterns):
    """Patterns to apply in turn, as fewer. Digits and then one of PATTERNS are one expression:
    a digit ends the text as far as what stands before it can see."""
    if len(patterns) == 2 and patterns[0] == DIGIT and patterns[1] in PATTERNS.values():
        rest = patterns[1].replace(r"| ?\p{N}++", "")
        rest = rest.replace(r"(?!\S)", r"(?![^\s\p{N}])").replace("$", r"(?=\p{N}|$)")
        return [f"{DIGIT}|{rest}"]
    return [whole(pattern) for pattern in patterns]


@functools.lru_cache(maxsize=64)
def splitter(patterns):
    """-> a function from text to its list of chunks, which joined are the text."""
    finds = []
    for pattern in fold(patterns):
        try:
            compiled = regex.compile(pattern)
        except regex.error as error:
            raise BadInput(f"--pattern {pattern!r} is no regular expression: {error}") from None
        if compiled.groups:
            raise BadInput(f"--pattern {pattern!r} has a capturing group; write (?:...)")
        if compiled.match(""):
            raise BadInput(f"--pattern {pattern!r} matches the empty text; write + for *")
        finds.append(compiled.findall)

    def split(text):
        chunks = finds[0](text)
        for find in finds[1:]:
            chunks = [chunk for piece in chunks for chunk in find(piece)]
        return chunks

    return split


def count_chunks(texts, patterns):
    """Counter of chunks. Memory grows with the distinct chunks, not with the text."""
    split = splitter(tuple(patterns))
    chunks = Counter()
    if patterns != [PATTERNS["gpt2"]]:
        for text in texts:
            chunks.update(split(clean(text)))
        return chunks
    words = Counter()  # twice as fast: the real pattern sees each distinct word once
    for text in texts:
        words.update(WORDS.findall(clean(text)))
    while words:
        word, n = words.popitem()
        for chunk in split(word):
            chunks[chunk] += n
    return chunks


def clean(text):
    """Half a surrogate pair is not text and has no UTF-8: it becomes U+FFFD, as in tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ------------------------------------------------------------------------------------------------
# Training

def train_merges(chunks, n_merges, min_frequency):
    """chunks: Counter of str -> up to n_merges pairs of ids, in the order they are merged.

    The most frequent pair goes first, the smaller pair of ids where two are equal. Only what a
    merge changes is counted again. All the chunks lie end to end in one array as a linked list:

        ids     t h e SEP t h i s SEP       merging (t, h):    th . e SEP th . i s SEP
        after   a position's next live one; before: its previous one

    A pair that holds the newest token did not exist before that token, so its positions are all
    known the moment it appears; later merges can only take some away. Hence where[pair] is
    written once and filtered when used, counts only fall, and a heap entry is an upper bound.
    For the same reason a pair that begins below a floor never rises to it: most pairs are rare,
    and are left uncounted until no pair at or above the floor is left. Then the dead positions
    are dropped, the floor sinks to an eighth, and the pairs are counted anew.
    """
    SEP, DEAD = -1, -2
    words = [chunk.encode() for chunk in chunks]
    lengths = [len(word) + 1 for word in words]
    text = b"".join(b"\0" + word for word in words) + b"\0"
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    ids[np.cumsum([0, *lengths])] = SEP
    weight = np.append(np.repeat(np.fromiter(chunks.values(), np.int64), lengths), 0)

    def grouped(keys, positions):
        """-> (key, its positions, their summed weight) for each distinct key."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        totals = np.add.reduceat(weight[positions], starts)
        ends = [*starts[1:].tolist(), len(keys)]
        for key, start, end, total in zip(keys[starts].tolist(), starts.tolist(), ends,
                                          totals.tolist()):
            yield key, positions[start:end], total

    least = max(min_frequency, 1)
    merges, heap, floor = [], [], None
    while len(merges) < n_merges and (heap or floor != least):
        if not heap:
            live = ids != DEAD
            ids, weight, count, where = ids[live], weight[live], {}, {}
            after = np.arange(1, len(ids) + 1, dtype=np.int32)
            before = np.arange(-1, len(ids) - 1, dtype=np.int32)
            at = np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)).astype(np.int32)
            pairs = list(grouped(ids[at].astype(np.int64) << 32 | ids[at + 1], at))
            top = max((total for _, _, total in pairs), default=0)
            floor = max(least, min(top, floor or top) // 8)
            for key, at, total in pairs:
                if total >= floor:
                    pair = key >> 32, key & 0xFFFFFFFF
                    count[pair], where[pair] = total, at
                    heapq.heappush(heap, (-total, pair))
            continue

        bound, pair = heapq.heappop(heap)
        n = count[pair]
        if n < floor:
            continue
        if n < -bound:
            heapq.heappush(heap, (-n, pair))
            continue
        a, b = pair
        new = 256 + len(merges)
        merges.append(pair)
        del count[pair]
        at = where.pop(pair)
        at = at[(ids[at] == a) & (ids[after[at]] == b)]
        if a == b:  # in a run a a a the pairs overlap: take every second one, from the left
            at = np.sort(at)
            i = np.arange(len(at))
            starts = np.concatenate([[True], after[at[:-1]] != at[1:]])
            at = at[(i - np.maximum.accumulate(np.where(starts, i, 0))) % 2 == 0]

        # x [a b] y  ->  x [new .] y
        b_at = after[at]
        x_at, y_at = before[at], after[b_at]
        ids[at], ids[b_at] = new, DEAD
        x, y = ids[x_at], ids[y_at]
        # The pairs (x, a) and (b, y) lose these places. Where two merges touch, the first one's
        # y reads new (it was a) and the second one's x reads DEAD (already counted as that y).
        y_was = np.where(y == new, a, y)
        for z, _, total in grouped(x[x >= 0], at[x >= 0]):
            if (z, a) in count:
                count[z, a] -= total
        for z, _, total in grouped(y_was[y_was >= 0], at[y_was >= 0]):
            if (b, z) in count:
                count[b, z] -= total
        after[at], before[y_at] = y_at, at
        # And (x, new), (new, y) appear; (new, new) is seen from its left side only.
        x_at = before[at]
        x = ids[x_at]
        ok = (x >= 0) & (x != new)
        appeared = [((z, new), *rest) for z, *rest in grouped(x[ok], x_at[ok])]
        appeared += [((new, z), *rest) for z, *rest in grouped(y[y >= 0], at[y >= 0])]
        for pair, positions, total in appeared:
            if total >= floor:
                count[pair], where[pair] = total, positions
                heapq.heappush(heap, (-total, pair))
    return merges


# ------------------------------------------------------------------------------------------------
# Encoding, to be read (tiktoken does the same in Rust)

def merge(parts, ranks, below=math.inf):
    """parts: the pieces of one chunk, list of bytes -> the chunk's tokens, list of bytes.

    ranks: {token: rank}; only ranks under `below` merge. The pair whose token has the lowest
    rank merges first, the leftmost where two are equal. The heap makes it O(n log n): a megabyte
    without a space is slow, not hopeless.
    """
    parts, n = list(parts), len(parts)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = []

    def offer(i):
        if i >= 0 and after[i] < n:
            token = parts[i] + parts[after[i]]
            if ranks.get(token, below) < below:
                heapq.heappush(heap, (ranks[token], i, token))

    for i in range(n):
        offer(i)
    while heap:
        _, i, token = heapq.heappop(heap)
        j = after[i]
        if parts[i] is None or j >= n or parts[i] + parts[j] != token:
            continue  # another merge took one of the two
        parts[i], parts[j] = token, None
        after[i] = after[j]
        if after[j] < n:
            before[after[j]] = i
        offer(before[i])
        offer(i)
    return [part for part in parts if part is not None]


# tiktoken's regular expressions run out of stack in a million spaces: such a text takes the way
# through Python. Only long texts are searched for them.
LONG = 100_000  # characters
WIDE = regex.compile(r"\s{50000}")


class Tokenizer:
    """Text to ids and back.

    kind      "bpe": over bytes. "sentencepiece": over characters, with a space written as ▁ and
              a character that is in no token written as bytes <0xE2>. "char": one id a character
    ranks     {token as bytes: id}, in the order in which they merge, which is nearly always
              that of the ids (LLaMA-2 merges its runs of spaces last and numbers them first)
    patterns  how text is cut into chunks, each applied to what the one before has cut
    special   {name: id}: tokens that text never makes, unless encode is told to allow them
    normal    Unicode normal forms applied before anything else, such as ["NFC"]
    prefix    sentencepiece writes a ▁ before the text's first word: "prepend" always, "always"
              unless one stands there, "first" so too but not after a special token; "" never
    chat      {"template": of CHAT_TEMPLATES, "system": the default system text or None}, or None
    """

    def __init__(self, kind, ranks, patterns=(), special=(), normal=(), prefix="", chat=None):
        self.kind, self.ranks, self.prefix, self.chat = kind, ranks, prefix, chat
        self.patterns, self.special, self.normal = list(patterns), dict(special), list(normal)
        self._order = {token: n for n, token in enumerate(ranks)}
        self.n_vocab = 1 + max([*ranks.values(), *self.special.values()])
        self._bytes = [b""] * self.n_vocab
        for token, i in ranks.items():
            self._bytes[i] = self._plain(token) if kind == "sentencepiece" else token
        self._spelled = list(self._bytes)
        for name, i in self.special.items():
            self._spelled[i] = name.encode()
        # A long-tailed cache: most chunks of a text are words that have been seen before.
        self._chunk = functools.lru_cache(maxsize=1 << 16)(self._encode_chunk)
        self._lacks = kind == "bpe" and any(bytes([b]) not in ranks for b in range(256))
        self._fast = self._tiktoken() if kind == "bpe" else None

    @classmethod
    def train(cls, texts, vocab_size, pattern="gpt2", special=SPECIAL, digits=False,
              min_frequency=1, kind="bpe"):
        """Learns a vocabulary of vocab_size tokens (256 bytes and the merges; or the characters,
        all of them) from any iterable of pieces of text. Special tokens get the ids after it."""
        special = list(special)
        if len({"", *special}) <= len(special):
            raise BadInput("--special names a token twice, or an empty one; name each once")
        if kind == "char":
            letters = set()
            for text in texts:
                letters.update(clean(text))
            letters = sorted(letters)
            if not letters:
                raise BadInput("the training text is empty; give a file with text in it")
            ranks = {letter.encode(): i for i, letter in enumerate(letters)}
            return cls(kind, ranks, (), {s: len(ranks) + i for i, s in enumerate(special)})
        if vocab_size < 256:
            raise BadInput(f"--vocab_size {vocab_size} is below the 256 bytes that every "
                           f"vocabulary has (the {len(special)} special tokens come on top); "
                           "ask for 256 or more")
        patterns = [DIGIT] * digits + [PATTERNS.get(pattern, pattern)]
        chunks = count_chunks(texts, patterns)
        if not chunks:
            raise BadInput("the training text is empty; give a file with text in it")
        merges = train_merges(chunks, vocab_size - 256, min_frequency)
        if len(merges) < vocab_size - 256:
            often = f" seen {min_frequency} times or more" if min_frequency > 1 else ""
            raise BadInput(f"the text has only {len(merges)} merges{often}; set --vocab_size to "
                           f"{256 + len(merges)} or less, or give more text")
        tokens = [bytes([b]) for b in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        ranks = {token: i for i, token in enumerate(tokens)}
        return cls(kind, ranks, patterns, {s: len(ranks) + i for i, s in enumerate(special)})

    # Encoding

    def encode(self, text, allowed_special=(), goes_on=False):
        """-> list of ids. The name of a special token in the text is text like any other, so that
        nobody's message can end a document; allowed_special lists the names (or says "all")
        that become their ids. goes_on: other text stands right before this one, so that no space
        is put in front."""
        text = clean(text)
        names = self.special if allowed_special == "all" else allowed_special
        for name in names:
            if name not in self.special:
                raise BadInput(f"{name!r} is not a special token of this tokenizer; it has "
                               + (", ".join(self.special) or "none"))
        if not names:
            return self._encode_plain(text, first=None if goes_on else True)
        cut = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        ids = []
        for i, part in enumerate(re.split(f"({cut})", text)):
            first = i == 0 and (None if goes_on else True)  # None in the middle of text
            ids += [self.special[part]] if i % 2 else self._encode_plain(part, first)
        return ids

    def encode_batch(self, texts, threads=None):
        """A list of texts -> their lists of ids; tiktoken's threads run on all cores."""
        texts = list(map(clean, texts))
        if self._fast and not self.normal and max(map(len, texts), default=0) <= LONG:
            threads = threads or os.cpu_count()
            batch = self._fast.encode_ordinary_batch(texts, num_threads=threads)
            return list(map(self._known, batch)) if self._lacks else batch
        return [self._encode_plain(text) for text in texts]

    def _encode_plain(self, text, first=True):
        """first: True at the beginning, False after a special token, None in the middle of text."""
        for form in self.normal:
            text = unicodedata.normalize(form, text)
        if self.kind == "char":
            try:
                return [self.ranks[letter.encode()] for letter in text]
            except KeyError as error:
                raise BadInput(f"the character {error.args[0].decode()!r} is not in the "
                               "vocabulary; train the tokenizer on text that has it") from None
        if self._fast and not (len(text) > LONG and WIDE.search(text)):
            return self._known(self._fast.encode_ordinary(text))
        if self.kind == "sentencepiece" and text:
            text = text.replace(" ", "▁")
            if first is not None and (self.prefix == "prepend" or not text.startswith("▁") and (
                    self.prefix == "always" or self.prefix == "first" and first)):
                text = "▁" + text
        ids = []
        for chunk in splitter(tuple(self.patterns))(text):
            ids += self._chunk(chunk)
        return ids

    def _encode_chunk(self, chunk):
        if self.kind == "bpe":
            whole_chunk = self.ranks.get(chunk.encode())
            if whole_chunk is not None:
                return (whole_chunk,)
            parts = [bytes([b]) for b in chunk.encode()]
        else:
            parts = []
            for letter in map(str.encode, chunk):
                parts += [letter] if letter in self.ranks else [b"<0x%02X>" % b for b in letter]
        merged = merge(parts, self._order)
        return tuple(self.ranks[part] for part in merged if part in self.ranks)

    def _tiktoken(self):
        """The same in Rust; None for a vocabulary or patterns that it cannot express."""
        patterns = fold(self.patterns)
        ids = list(self.ranks.values())
        if len(patterns) > 1 or ids != sorted(ids):
            return None
        # A few vocabularies (SmolLM2's) lack a byte that their training text lacked. As in
        # Hugging Face's encoder it is left out; tiktoken needs an id for it until then.
        lacking = {bytes([b]): self.n_vocab + b for b in range(256)} if self._lacks else {}
        try:
            return tiktoken.Encoding("bpe.py", pat_str=patterns[0], special_tokens={},
                                     mergeable_ranks={**lacking, **self.ranks})
        except ValueError as error:
            raise BadInput(f"--pattern {self.patterns[-1]!r} is no regular expression that "
                           f"tiktoken knows: {error}") from None

    def _known(self, ids):
        return [i for i in ids if i < self.n_vocab] if self._lacks else ids

    # Decoding

    def _plain(self, piece):
        """The bytes of text that a sentencepiece token stands for."""
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁".encode(), b" ")

    def spell(self, i):
        """The bytes of one id; a special token's are its name."""
        if not 0 <= i < self.n_vocab:
            raise BadInput(f"the id {i} is outside the vocabulary of {self.n_vocab} tokens")
        return self._spelled[i]

    def decode_bytes(self, ids, goes_on=False):
        data = b"".join([self.spell(i) for i in ids])
        return data[1:] if self.prefix and data[:1] == b" " and not goes_on else data

    def decode(self, ids, goes_on=False):
        """
        Ids need not be whole characters: bytes that are no UTF-8 come out as U+FFFD. goes_on: they continue a text, so
        that a first space is one, where SentencePiece puts one in front of every text.
        """
        return self.decode_bytes(ids, goes_on).decode("utf-8", errors="replace")

    def token_bytes(self):
        """[bytes of each id]; b"" for special tokens and for ids that stand for nothing."""
        return list(self._bytes)

    @property
    def eot(self):
        """The id that ends a document, or None."""
        return next((self.special[name] for name in ENDS if name in self.special), None)

    @property
    def begin(self):
        """[the id that a document begins with]: where there is none of its own that of the last one's end; or []."""
        ids = [self.special[name] for name in BEGINS if name in self.special] + [self.eot]
        return [i for i in ids if i is not None][:1]

    def __len__(self):
        return self.n_vocab

    def __eq__(self, other):
        """Of the same ids for every text; how a chat is written is no part of it."""
        return isinstance(other, Tokenizer) and {**self.spec(), "chat": None} == {
            **other.spec(), "chat": None}

    # Keeping

    def spec(self):
        """What the rank file does not say, for the JSON beside it."""
        sha256 = hashlib.sha256(format_ranks(self.ranks)).hexdigest()
        spec = {"kind": self.kind, "patterns": self.patterns, "special": self.special,
                "n_vocab": self.n_vocab, "sha256": sha256}
        if self.normal:
            spec["normal"] = self.normal
        if self.prefix:
            spec["prefix"] = self.prefix
        if self.chat:
            spec["chat"] = self.chat
        return spec

    def save(self, dir):
        Path(dir).mkdir(parents=True, exist_ok=True)
        with replace_file(Path(dir) / "tokenizer.tiktoken") as file:
            file.write(format_ranks(self.ranks))

    def export(self, dir):
        """Writes tokenizer.json, which Hugging Face tokenizers reads, and tokenizer_config.json,
        which transformers needs to call it a tokenizer and to write a chat."""
        names = {i: name for name, i in self.special.items()}
        end = chat_end(self, self.chat["template"]) if self.chat else self.eot
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names.get(end),
                  "bos_token": next((name for name in BEGINS if name in self.special), None),
                  "pad_token": "<|pad|>" if "<|pad|>" in self.special else None,
                  "chat_template": chat_jinja(**self.chat) if self.chat else None}
        config = {key: value for key, value in config.items() if value is not None}
        config["clean_up_tokenization_spaces"] = False  # decode what was encoded
        for name, data in (("tokenizer.json", to_hugging_face(self)),
                           ("tokenizer_config.json", config)):
            with replace_file(Path(dir) / name, "w") as file:
                file.write(json.dumps(data, ensure_ascii=False, indent=1))

    @classmethod
    def from_spec(cls, spec, ranks_path):
        data = read_bytes(ranks_path)
        if hashlib.sha256(data).hexdigest() != spec["sha256"]:
            raise BadInput(f"{ranks_path} is corrupt, or not the tokenizer that the JSON beside it "
                           "describes; copy both from the same place")
        return cls(spec["kind"], parse_ranks(data, ranks_path), spec["patterns"], spec["special"],
                   spec.get("normal", ()), spec.get("prefix", ""), spec.get("chat"))

    @classmethod
    def load(cls, dir):
        """Reads tokenizer.tiktoken and the "tokenizer" of the run.json or meta.json beside it."""
        for name in ("run.json", "meta.json"):
            path = Path(dir) / name
            if path.exists():
                spec = read_json(path).get("tokenizer")
                if spec:
                    return cls.from_spec(spec, Path(dir) / "tokenizer.tiktoken")
        raise BadInput(f"{dir} has no run.json or meta.json with a tokenizer; name a run directory")

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """A folder (ours or Hugging Face's), a file, a tiktoken name or org/model on the hub."""
        path, name = Path(name_or_dir), str(name_or_dir)
        if path.is_dir():
            return from_folder(path)
        if path.is_file():
            return from_file(path)
        if name in tiktoken.list_encoding_names() or not is_hub_name(name):
            return from_tiktoken(name)
        try:
            return from_folder(hub(name, "tokenizer"))
        except BadInput as error:
            raise BadInput(f"{name!r} is no folder, no file and no tiktoken encoding, and as a "
                           f"model of the hub: {error}") from None


class StreamDecoder:
    """Turns ids into text as they come, and holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = bool(tokenizer.prefix)

    def push(self, i):
        data = self.tokenizer.spell(i)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self):
        return self.utf8.decode(b"", final=True)


# ------------------------------------------------------------------------------------------------
# Reading what others wrote

def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); put the file there") from None


def read_json(path):
    data = read_bytes(path)
    try:
        return json.loads(data)
    except ValueError:
        raise BadInput(f"{path} is not valid JSON; copy it again") from None


def by_id(ranks):
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def format_ranks(ranks):
    """tiktoken's format: one line a token, base64 and id, in the order of merging. Sentencepiece
    tokens stand there as they are spelled, ▁the and <0x0A>."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for token, i in ranks.items())


def parse_ranks(data, path):
    """The lines of a .tiktoken file -> {token: id}."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, i = line.split()
            token, i = base64.b64decode(token, validate=True), int(i)
            if not token or i < 0 or token in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            raise BadInput(f"{path} is corrupt at line {number}; copy or train it again") from None
        ranks[token] = i
    if not ranks or len(set(ranks.values())) < len(ranks):
        raise BadInput(f"{path} is corrupt: it is empty or gives an id twice; copy it again")
    return ranks


def from_tiktoken(name):
    if name not in tiktoken.list_encoding_names():
        raise BadInput(f"{name!r} is no folder, no file and no tiktoken encoding; name one of "
                       + ", ".join(tiktoken.list_encoding_names()))
    try:
        encoding = tiktoken.get_encoding(name)
    except requests.RequestException as error:
        url = error.request.url if error.request else "the rank file"
        file = hashlib.sha1(url.encode()).hexdigest()
        raise BadInput(f"{name} is not cached and {url} cannot be reached; fetch that file on a "
                       f"machine with a network and put it, named {file}, into the folder that "
                       "TIKTOKEN_CACHE_DIR names") from None
    return Tokenizer("bpe", by_id(encoding._mergeable_ranks), [encoding._pat_str],
                     encoding._special_tokens)


def from_folder(path):
    if any((path / name).exists() for name in ("run.json", "meta.json")):
        return Tokenizer.load(path)
    if (path / "tokenizer.json").exists():
        file = path / "tokenizer.json"
        return with_chat(from_hugging_face(read_json(file), file), path)
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (path / vocabulary).exists() and (path / merges).exists():
            lines = read_bytes(path / merges).decode().splitlines()
            model = {"type": "BPE", "vocab": read_json(path / vocabulary),
                     "merges": [line for line in lines if line and not line.startswith("#version")]}
            data = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}
            return with_chat(from_hugging_face(data, path / vocabulary), path)
    raise BadInput(f"{path} holds no tokenizer; it needs tokenizer.json, vocab.bpe and "
                   "encoder.json, vocab.json and merges.txt, or tokenizer.tiktoken and its JSON")


def from_file(path):
    if path.suffix == ".json":
        return from_hugging_face(read_json(path), path)
    if path.suffix == ".bin":
        return from_llama2c(path)
    # A rank file says nothing of its pattern: its name may, and GPT-2's is the best guess.
    ranks = by_id(parse_ranks(read_bytes(path), path))
    pattern = next((p for name, p in PATTERNS.items() if name in path.name), PATTERNS["gpt2"])
    after = 1 + max(ranks.values())
    return Tokenizer("bpe", ranks, [pattern], {s: after + i for i, s in enumerate(SPECIAL)})


def byte_letters():
    """GPT-2 writes each byte as a visible letter, so that JSON can hold it: bytes that are
    visible stand for themselves, the 68 others are the letters from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def steps(section):
    """A section of tokenizer.json, none, one or a Sequence, as a list."""
    if not section:
        return []
    if section["type"] != "Sequence":
        return [section]
    inner = next(value for value in section.values() if isinstance(value, list))
    return [step for item in inner for step in steps(item)]


def from_hugging_face(data, path):
    """tokenizer.json of byte-level BPE (GPT-2, LLaMA-3, Qwen, SmolLM2, DeepSeek) or of
    SentencePiece BPE with byte fallback (LLaMA-2, TinyLlama, Mistral).

    Every added token is special here, also one that Hugging Face would find in any text."""
    def refuse(what):
        raise BadInput(f"{path} has {what}; only byte-level BPE and SentencePiece BPE with byte "
                       "fallback are read, so convert it to one of them")

    try:
        model, added = data["model"], data.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added}
        vocabulary = {t: i for t, i in model["vocab"].items() if t not in special}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        made = [model["vocab"][a + b] for a, b in merges]
    except (KeyError, TypeError, ValueError, AttributeError):
        refuse("no BPE vocabulary with merges")

    normal, prefix, patterns, pieces, apart = [], "", [], model.get("byte_fallback", False), False
    for step in steps(data.get("normalizer")):
        if step["type"] in ("NFC", "NFD", "NFKC", "NFKD"):
            normal.append(step["type"])
        elif pieces and step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = "prepend"
        elif not pieces or step["type"] != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, "▁"):
            refuse(f"the normalizer {step['type']}")
    for step in steps(data.get("pre_tokenizer")):
        if step["type"] == "Split":
            pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
            # To cut out what does not match the separator and to keep it is to keep the matches.
            if (step["behavior"], step.get("invert", False)) not in (("Isolated", False),
                                                                     ("Removed", True)):
                refuse(f"a Split that is {step['behavior']}")
            patterns.append(pattern)
        elif step["type"] == "Digits":
            patterns.append(DIGIT if step["individual_digits"] else DIGIT + "+")
        elif step["type"] == "ByteLevel" and not pieces:
            if step.get("add_prefix_space", False):
                refuse("add_prefix_space")
            patterns += [PATTERNS["gpt2"]] * step.get("use_regex", True)
        elif step["type"] == "Metaspace" and pieces:
            scheme = step.get("prepend_scheme", "always")
            prefix = "" if scheme == "never" else scheme
            apart = step.get("split", True)  # no token reaches over the next ▁
        else:
            refuse(f"the pre-tokenizer {step['type']}")

    if not pieces and not any(step["type"] == "ByteLevel"
                              for step in steps(data.get("pre_tokenizer"))):
        refuse("no byte-level pre-tokenizer")
    if pieces and patterns:
        refuse("a pre-tokenizer that splits, beside SentencePiece's ▁")
    # Letters first, then what merges make, in the order of the merges.
    order = {i: n for n, i in reversed(list(enumerate(made)))}
    byte_of = {letter: b for b, letter in byte_letters().items()}
    ranks = {}
    for token, i in sorted(vocabulary.items(), key=lambda t: (order.get(t[1], -1), t[1])):
        single = len(token) == 1 or pieces and re.fullmatch("<0x[0-9A-F]{2}>", token)
        if not single and i not in order and not model.get("ignore_merges"):
            special[token] = i  # no merge makes it: only its name can
        elif pieces:
            ranks[token.encode()] = i
        elif not set(token) <= byte_of.keys():
            refuse(f"the token {token!r}, which is not of bytes")
        else:
            ranks[bytes(byte_of[letter] for letter in token)] = i
    if pieces:
        return sentencepiece(ranks, special, normal, prefix, apart)
    return Tokenizer("bpe", ranks, patterns, special, normal)


def sentencepiece(ranks, special, normal=(), prefix="prepend", apart=False):
    """Cuts before ▁, so that words can be cached, unless a token has one inside. apart: before each ▁ of several."""
    inside = any("▁" in token.decode().lstrip("▁") for token in ranks)
    patterns = ["▁[^▁]*|[^▁]+"] if apart else [r"(?s:.)+"] if inside else ["▁*[^▁]+|▁+"]
    return Tokenizer("sentencepiece", ranks, patterns, special, normal, prefix)


def from_llama2c(path):
    """llama2.c's tokenizer.bin: int32 longest token, then for each id float32 score, int32 length
    and bytes, to the end of the file. Ids 0 to 2 are unknown, begin and end; the bytes follow.
    The pair whose token has the highest score merges first."""
    data, scores, at = read_bytes(path), {}, 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                raise ValueError
            token = data[at - length:at].decode().replace(" ", "▁").encode()
            scores[token] = score, len(scores)
        special = {"<unk>": 0, "<s>": 1, "</s>": 2}
        if scores[b"<0x00>"][1] != len(special):
            raise ValueError
    except (struct.error, ValueError, KeyError):
        raise BadInput(f"{path} is not llama2.c's tokenizer format; copy it again") from None
    ordered = sorted(scores.items(), key=lambda item: -item[1][0])
    return sentencepiece({token: i for token, (_, i) in ordered if i >= len(special)}, special)


def to_hugging_face(tokenizer):
    """-> tokenizer.json as a dict. Its merges are pairs: what a token's bytes become when only
    the tokens before it may merge."""
    if tokenizer.kind == "char":
        raise BadInput("a character tokenizer has no tokenizer.json; train one of --kind bpe")
    ranks = tokenizer.ranks
    if tokenizer.kind == "bpe":
        letters = byte_letters()

        def spell(token):
            return "".join(letters[b] for b in token)

        order = {token: n for n, token in enumerate(ranks)}
        pairs = (merge([bytes([b]) for b in token], order, below=n)
                 for token, n in order.items() if len(token) > 1)
        merges = [[spell(a), spell(b)] for a, b in (pair for pair in pairs if len(pair) == 2)]
        # Oniguruma takes {1,3}+ for a loop of loops and $ for the end of a line.
        known = {p: p.replace("{1,3}+", "{1,3}").replace("$", r"\z") for p in PATTERNS.values()}
        cuts = [known.get(p, p) for p in tokenizer.patterns]
        before = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated",
                   "invert": False} for cut in cuts]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": False}
        before, decoder = {"type": "Sequence", "pretokenizers": [*before, byte_level]}, byte_level
        normal = []
    else:
        def spell(token):
            return token.decode()

        merges = [[token[:cut], token[cut:]] for token in map(spell, ranks)
                  for cut in range(1, len(token))
                  if {token[:cut].encode(), token[cut:].encode()} <= ranks.keys()]
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        before, normal = None, [replace]
        if tokenizer.prefix == "prepend":
            normal = [{"type": "Prepend", "prepend": "▁"}, replace]
        elif tokenizer.prefix:
            before = {"type": "Metaspace", "replacement": "▁", "split": False,
                      "prepend_scheme": tokenizer.prefix}
        decoder = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": int(bool(tokenizer.prefix)), "stop": 0}]}
    normal = [{"type": form} for form in tokenizer.normal] + normal
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": True}
                         for name, i in sorted(tokenizer.special.items(), key=lambda s: s[1])],
        "normalizer": {"type": "Sequence", "normalizers": normal} if normal else None,
        "pre_tokenizer": before, "decoder": decoder,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": tokenizer.kind == "sentencepiece",
                  "ignore_merges": tokenizer.kind == "bpe",
                  "vocab": {spell(token): i for token, i in ranks.items()} | tokenizer.special,
                  "merges": merges},
    }


# ------------------------------------------------------------------------------------------------
# Chat: messages to tokens, and which of them to train on

class ChatTemplate(NamedTuple):
    """How a family of models writes a conversation; {user} and the like stand for a content.

    An assistant's turn is its header, its answer and what comes after. Generation goes on from
    the header; training is on the answer, which ends in the token that says so. A system message
    either has a form of its own or stands, in `first`, with the first user's: a family that does
    the latter takes users and assistants in turn. {eos} is the tokenizer's end of a document."""
    user: str
    header: str
    answer: str
    after: str = ""
    system: str = ""
    first: str = ""
    begin: str = ""
    needs: tuple = ("{eos}",)  # its special tokens; the last one ends an answer
    strip: bool = False  # drops the white space around a content


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately " \
         "completes the request.\n\n### Instruction:\n{{user}}\n\n"

CHAT_TEMPLATES = {
    "chatml": ChatTemplate(  # ours, SmolLM2, Qwen
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{user}<|im_end|>\n",
        header="<|im_start|>assistant\n", answer="{assistant}<|im_end|>", after="\n",
        needs=("<|im_start|>", "<|im_end|>")),
    "llama3": ChatTemplate(
        begin="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n", answer="{assistant}<|eot_id|>",
        needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True),
    "llama2": ChatTemplate(
        first="<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
        user="<s>[INST] {user} [/INST]", header="", answer=" {assistant} </s>",
        needs=("<s>", "</s>"), strip=True),
    "mistral": ChatTemplate(  # 7B Instruct v0.1 and v0.2; later ones write their spaces otherwise
        begin="<s>", first=" [INST] {system}\n\n{user} [/INST]", user=" [INST] {user} [/INST]",
        header="", answer=" {assistant}</s>", needs=("<s>", "</s>")),
    "zephyr": ChatTemplate(  # also TinyLlama-Chat; <|user|> is seven tokens of plain text there
        system="<|system|>\n{system}{eos}\n", user="<|user|>\n{user}{eos}\n",
        header="<|assistant|>\n", answer="{assistant}{eos}", after="\n"),
    "alpaca": ChatTemplate(
        first=ALPACA.format(", paired with an input that provides further context")
        + "### Input:\n{system}\n\n",
        user=ALPACA.format(""), header="### Response:\n", answer="{assistant}{eos}"),
    # For a base model and a tokenizer without special tokens other than the end of a document.
    "plain": ChatTemplate(first="{system}\n{user}\n", user="{user}\n", header="",
                          answer="{assistant}{eos}"),
}


def chat_end(tokenizer, name):
    """The id that ends an answer in template `name`; refuses a tokenizer that lacks its tokens."""
    if name not in CHAT_TEMPLATES:
        raise BadInput(f"--template {name} is unknown; choose one of " + ", ".join(CHAT_TEMPLATES))
    needs = CHAT_TEMPLATES[name].needs
    lacks = [token for token in needs if token not in tokenizer.special
             and (token != "{eos}" or tokenizer.eot is None)]
    if lacks:
        lacks = " or ".join(lacks).replace("{eos}", "token that ends a document")
        raise BadInput(f"--template {name} does not fit the tokenizer, which has no {lacks}; "
                       "choose another template (plain needs the fewest) or another tokenizer")
    return tokenizer.eot if needs[-1] == "{eos}" else tokenizer.special[needs[-1]]


def chat_stops(tokenizer, template=None):
    """-> the set of ids after which an answer is over."""
    return {chat_end(tokenizer, chat_format(tokenizer, template)[0]), tokenizer.eot} - {None}


def chat_format(tokenizer, template=None, system=None):
    """What a caller left open, as the tokenizer has it, else chatml -> (name, system text)."""
    own = tokenizer.chat or {"template": "chatml", "system": None}
    if system is None and template in (None, own["template"]):
        system = own["system"]
    return template or own["template"], system


def render_chat(tokenizer, messages, template=None, system=None, generation=False):
    """messages: list of {"role": system, user or assistant, "content": str} -> (ids, loss_mask),
    where the mask is 1 on the assistants' answers and the tokens that end them, else 0.

    template defaults to the tokenizer's own, else chatml. system is for messages that do not
    begin with one; it defaults to the template's, and "" is none. With generation the ids end
    where an assistant's answer begins.

    A content is plain text: a special token's name in it stays text. An answer is encoded apart
    from the header before it, as generation will meet it, so that

        render_chat(m + [answer]) begins with render_chat(m, generation=True)
    """
    name, system = chat_format(tokenizer, template, system)
    end = chat_end(tokenizer, name)
    form = CHAT_TEMPLATES[name]
    system, messages = check_messages(messages, name, system or None, generation)

    def trim(text):
        return text.strip() if form.strip else text

    parts = [(form.begin, {}, 0)]  # (form, its contents, trained)
    if system is not None and form.system:
        parts.append((form.system, {"{system}": trim(system)}, 0))
    for n, (role, text) in enumerate(messages):
        if role == "assistant":
            parts += [(form.header, {}, 0), (form.answer, {"{assistant}": trim(text)}, 1),
                      (form.after, {}, 0)]
        elif n == 0 and system is not None and form.first:  # llama2 strips the two as one text
            text = text.rstrip() if form.strip else text
            parts.append((form.first, {"{system}": system, "{user}": text}, 0))
        else:
            parts.append((form.user, {"{user}": trim(text)}, 0))
    if generation:
        parts.append((form.header, {}, 0))

    # Text that no special token parts is encoded as one, as when the whole chat were a string.
    special = {"{eos}": end, **tokenizer.special}
    runs = [["", 0]]  # [text or id, trained]
    for written, contents, trained in parts:
        marks = sorted((s for s in [*contents, *special] if s in written), key=len, reverse=True)
        cut = "|".join(map(re.escape, marks)) or "(?!)"
        for part in re.split(f"({cut})", written):
            item = contents[part] if part in contents else special.get(part, part)
            if isinstance(item, str) and isinstance(runs[-1][0], str) and runs[-1][1] == trained:
                runs[-1][0] += item
            elif item != "":
                runs.append([item, trained])
    ids, mask, first = [], [], True
    for item, trained in runs[not runs[0][0]:]:
        text = isinstance(item, str)
        new = tokenizer._encode_plain(clean(item), first) if text else [item]
        first = None if text else False
        ids += new
        mask += [trained] * len(new)
    return ids, mask


def check_messages(messages, name, system, generation):
    """-> (system text or None, [(role, content) of the others]), in an order the template has."""
    def refuse(why):
        raise BadInput(f"the chat cannot be written in --template {name}: {why}")

    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError):
        refuse("each message must be an object with a role and a content")
    for n, (role, content) in enumerate(turns):
        if role not in ("system", "user", "assistant"):
            refuse(f"message {n} has the role {role!r}; use system, user or assistant")
        if not isinstance(content, str):
            refuse(f"message {n}'s content is {type(content).__name__}; give it as text")
        if role == "system" and n:
            refuse(f"message {n} is a system message; put it first, there is room for one")
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    if not turns:
        refuse("there is no message from a user; add one")
    if CHAT_TEMPLATES[name].first:
        for n, (role, _) in enumerate(turns):
            if role != ("user", "assistant")[n % 2]:
                refuse("users and assistants must take turns, a user first")
        if generation and turns[-1][0] != "user":
            refuse("to go on from here the last message must be the user's")
    return system, turns


def jinja_string(text):
    """Jinja reads Python's escapes in its strings."""
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"


def chat_jinja(template, system=None):
    """-> the text that makes transformers write the same chat; system: the default system text."""
    form = CHAT_TEMPLATES[template]

    def write(written, **contents):
        parts = [contents.get(part[1:-1]) or (part[1:-1] + "_token" if part == "{eos}" else
                                              jinja_string(part))
                 for part in re.split(r"(\{\w+\})", written) if part]
        return "{{ " + " + ".join(parts) + " }}" if parts else ""

    content = "message['content']" + ".strip()" * form.strip
    user, check = write(form.user, user=content), ""
    if form.first:
        first = write(form.first, system="system_message",
                      user="message['content']" + ".rstrip()" * form.strip)
        user = ("{% if loop.first and system_message is not none %}" + first + "{% else %}" + user
                + "{% endif %}")
        check = ("{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
                 "'users and assistants must take turns, a user first') }}{% endif %}")
    alone = write(form.system, system="system_message" + ".strip()" * form.strip)
    return ("{% set rest = messages %}{% set system_message = "
            + ("none" if system is None else jinja_string(system)) + " %}"
            "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
            "{% set system_message = messages[0]['content'] %}{% endif %}" + write(form.begin)
            + ("{% if system_message is not none %}" + alone + "{% endif %}" if alone else "")
            + "{% for message in rest %}" + check + "{% if message['role'] == 'user' %}" + user
            + "{% elif message['role'] == 'assistant' %}"
            + write(form.header + form.answer + form.after, assistant=content)
            + "{% else %}{{ raise_exception('a role is system (first), user or assistant') }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}" + write(form.header)
            + "{% endif %}")


# What tells a family's published Jinja text: it has the first and none of the second.
CHAT_MARKS = {
    "chatml": (["<|im_start|>", "<|im_end|>"],
               ["bos_token", "trim", ".strip()", "strftime", "<|im_sep|>"]),
    "llama3": (["<|start_header_id|>", "<|eot_id|>", "trim"], ["date_string", "strftime"]),
    "llama2": (["'[INST] '", "<<SYS>>", "bos_token", ".strip()"], ["== true"]),
    "mistral": ([" [INST] ", " [/INST]", "bos_token"], ["<<SYS>>", "TOOL", "trim"]),
    "zephyr": (["<|user|>", "<|assistant|>", "eos_token"], ["bos_token", "<|end|>", "trim"]),
}
# Where it keeps a default system text: in a turn written out, or in a variable.
JINJA_SYSTEM = re.compile(
    r"""(['"])<\|im_start\|>system(?:\n|\\n)(?P<turn>(?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
    r"""|set system_message = (['"])(?P<variable>(?:\\.|(?!\3)[^\\])*)\3""")


def recognize_chat_template(jinja, tokenizer):
    """-> (name in CHAT_TEMPLATES, default system text or None), or None for an unknown text or one
    whose special tokens the tokenizer lacks. A family's plain conversation is meant: tools are
    not written, nor what Qwen3 has of thoughts in an earlier answer."""
    system = JINJA_SYSTEM.search(jinja)
    if system:  # unescaped as Jinja does it
        system = system["turn"] if system["turn"] is not None else system["variable"]
        system = system.encode("ascii", "backslashreplace").decode("unicode_escape", "replace")
    plain = jinja.replace('"', "'")
    for name in CHAT_TEMPLATES:
        has, lacks = CHAT_MARKS.get(name, (["\0"], []))
        if jinja == chat_jinja(name, system) or (all(mark in plain for mark in has)
                                                 and not any(mark in plain for mark in lacks)):
            with contextlib.suppress(BadInput):
                chat_end(tokenizer, name)
                return name, system
    return None


def with_chat(tokenizer, folder):
    """Sets tokenizer.chat from a Hugging Face folder's chat template, if that is one we know."""
    jinja = None
    if (folder / "chat_template.jinja").exists():
        jinja = read_bytes(folder / "chat_template.jinja").decode("utf-8", "replace")
    elif (folder / "tokenizer_config.json").exists():
        config = read_json(folder / "tokenizer_config.json")
        jinja = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(jinja, list):
        jinja = {entry.get("name"): entry.get("template") for entry in jinja}.get("default")
    known = recognize_chat_template(jinja, tokenizer) if isinstance(jinja, str) else None
    if known:
        tokenizer.chat = dict(zip(("template", "system"), known))
    return tokenizer


# ------------------------------------------------------------------------------------------------
# The hub: a local folder with the files of a Hugging Face model

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
HUB_FILES = {"tokenizer": ["tokenizer*.json", "vocab.json", "merges.txt",
                           "special_tokens_map.json", "chat_template.jinja"]}
HUB_FILES["model"] = HUB_FILES["tokenizer"] + ["config.json", "generation_config.json"]
HUB_INDEX = "model.safetensors.index.json"
HUB_TRIES = 5


def is_hub_name(name):
    """org/model, or one word as in gpt2-medium; what looks like a path of ours is none."""
    return (HUB_NAME.fullmatch(name) is not None and not name.startswith(("out/", "data/"))
            and not name.endswith((".json", ".bin", ".tiktoken"))
            and not ("/" in name and Path(name).parent.exists()))


def hub_home():
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub(name, wanted="model", revision="main"):
    """-> a folder with the files of the Hugging Face model `name`, downloaded unless it is there.

    wanted: "tokenizer", or "model" for configuration and weights as well. A folder of Hugging
    Face's own cache serves as it is. Ours, flat/org--model/revision beside it, keeps the commit
    of its first download (delete it for a newer one) and says in hub.json what is complete."""
    if not HUB_NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name of a model on the hub; write org/model")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII):
        raise BadInput(f"--revision {revision!r} is no branch, tag or commit")
    theirs = hub_snapshot(name, wanted, revision)
    folder = hub_home() / "flat" / name.replace("/", "--") / revision
    if theirs or hub_manifest(folder).keys() & {wanted, "model"}:  # a model has its tokenizer
        return theirs or folder
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise BadInput(f"{name} is not complete in {folder} and HF_HUB_OFFLINE forbids a download; "
                       "unset that, or copy the folder from a machine that has it")
    try:
        found = hub_list(name, hub_manifest(folder).get("commit", revision))
        folder.mkdir(parents=True, exist_ok=True)
        with hub_lock(folder):
            if wanted not in hub_manifest(folder):  # else another process was here first
                hub_fill(folder, name, wanted, *found)
    except requests.RequestException as error:
        raise BadInput(f"{name} is not complete in {folder} and {hub_endpoint()} cannot be reached "
                       f"({type(error).__name__}); try again with a network, or copy the folder "
                       "from a machine that has it") from None
    except OSError as error:
        raise BadInput(f"{folder} could not be written ({error.strerror}): free some space or set "
                       "HF_HOME to another folder") from error
    return folder


def hub_snapshot(name, wanted, revision):
    """The folder in Hugging Face's own cache, if what is wanted is in it, else None."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub")
    cache = cache / ("models--" + name.replace("/", "--"))
    ref = cache / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = cache / "snapshots" / commit

    def has(*files):
        return all((folder / file).exists() for file in files)

    if not has("tokenizer.json") and not has("vocab.json", "merges.txt"):
        return None
    if wanted == "tokenizer":
        return folder
    weights = indexed(folder / HUB_INDEX) if has(HUB_INDEX) else ["model.safetensors"]
    return folder if has("config.json", *weights) else None


def indexed(path):
    """The files among which an index divides the weights."""
    try:
        return sorted(set(read_json(path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no index of safetensors files; delete it and "
                       "run again") from None


def hub_manifest(folder):
    """{"commit": its hash, what was wanted: {file: bytes}}, without what is no longer whole."""
    if not (folder / "hub.json").exists():
        return {}
    manifest = read_json(folder / "hub.json")
    return {key: files for key, files in manifest.items() if key == "commit" or all(
        (folder / file).is_file() and (folder / file).stat().st_size == size
        for file, size in files.items())}


@contextlib.contextmanager
def hub_lock(folder):
    """One process at a time: all ranks of a run ask for the same model at once."""
    with open(folder / ".lock", "w") as lock:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hub_fill(folder, name, wanted, commit, listed):
    """Downloads what is wanted and writes the manifest. All of a folder is of one commit."""
    manifest = hub_manifest(folder)
    if manifest.setdefault("commit", commit) != commit:  # another process began with an older one
        commit, listed = hub_list(name, manifest["commit"])
    with replace_file(folder / "hub.json", "w") as file:
        json.dump(manifest, file, indent=1)

    def fetch(file):
        url = f"{hub_endpoint()}/{name}/resolve/{commit}/{quote(file)}"
        download(url, folder / file, *listed[file], name)

    files = sorted(file for file in listed if "/" not in file
                   and any(fnmatch.fnmatchcase(file, like) for like in HUB_FILES[wanted]))
    if not files:
        raise BadInput(f"{name} has no {wanted} files at its root; name another --revision")
    for file in files:
        fetch(file)
    if wanted == "model":
        weights = [file for file in listed if fnmatch.fnmatchcase(file, "*.safetensors")
                   and "/" not in file]
        if HUB_INDEX in listed:
            fetch(HUB_INDEX)
            files.append(HUB_INDEX)
            weights = indexed(folder / HUB_INDEX)
            if not set(weights) <= set(listed):
                raise BadInput(f"{name}'s {HUB_INDEX} names files that are not there; choose "
                               "another --revision")
        elif "model.safetensors" in weights:
            weights = ["model.safetensors"]
        if not weights:
            pickled = any(file.endswith((".bin", ".pt", ".pth")) for file in listed)
            why = "has its weights only as pickle files, which can run code and are never read" \
                if pickled else "has no weights"
            raise BadInput(f"{name} {why}; name a --revision with safetensors (often refs/pr/1) or "
                           "convert it")
        for file in weights:
            fetch(file)
        files += weights
    manifest[wanted] = {file: listed[file][0] for file in files}
    with replace_file(folder / "hub.json", "w") as file:
        json.dump(manifest, file, indent=1)


def hub_list(name, revision):
    """-> (commit, {file: (bytes, hash function begun, hex digest)}) as the hub has them."""
    url = f"{hub_endpoint()}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
    response = hub_get(url)
    if response.status_code != 200:
        raise hub_refusal(name, response)
    try:
        answer, files = response.json(), {}
        if not re.fullmatch(r"[0-9a-f]{40}", answer["sha"]):
            raise ValueError
        for entry in answer["siblings"]:
            file, size = entry["rfilename"], entry["size"]
            if not file or file[0] == "/" or "\\" in file or ":" in file or {"", ".", ".."} & set(
                    file.split("/")):
                raise BadInput(f"{name} lists a file named {file!r}, which could lie outside its "
                               "folder; do not use this model")
            if entry.get("lfs"):
                files[file] = int(size), hashlib.sha256(), entry["lfs"]["sha256"]
            else:  # git's hash of a file
                files[file] = int(size), hashlib.sha1(b"blob %d\0" % size), entry["blobId"]
        return answer["sha"], files
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{hub_endpoint()} gave no list of {name}'s files; "
                       "check HF_ENDPOINT") from None


def hub_get(url, headers=(), **options):
    """requests sends the token to this host only, also where it redirects to another."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token and (hub_home() / "token").is_file():
        token = (hub_home() / "token").read_text().strip()
    headers = {"Accept-Encoding": "identity", **dict(headers)}  # a range is one of the file itself
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return requests.get(url, headers=headers, timeout=(10, 60), **options)


def hub_refusal(name, response):
    if response.status_code in (401, 403):
        return BadInput(f"{hub_endpoint()} refuses {name} ({response.status_code}): check the "
                        "name, or if it is private or gated accept its licence at "
                        f"{hub_endpoint()}/{name} and set HF_TOKEN to your access token")
    if response.status_code == 404:
        return BadInput(f"{name} is not on {hub_endpoint()}, or has no such --revision; check both")
    return BadInput(f"{hub_endpoint()} answered {name} with {response.status_code} "
                    f"{response.reason}; try again later")


def download(url, file, size, hasher, digest, name):
    """Streams to FILE.part, which a later try or run continues; verified before it is renamed."""
    part = file.with_name(file.name + ".part")
    if file.exists() and file.stat().st_size == size:
        return
    for attempt in range(HUB_TRIES):
        have = part.stat().st_size if part.exists() else -1
        if have == size:
            break
        if have > size:
            part.unlink()
        time.sleep(attempt ** 2 / 2)
        with contextlib.suppress(requests.RequestException):  # it broke off: go on from there
            resume = {"Range": f"bytes={have}-"} if 0 < have < size else {}
            with hub_get(url, resume, stream=True) as response:
                status = response.status_code
                if status == 416:  # nothing from there on
                    part.unlink()
                elif status == 429 or status >= 500:
                    continue
                elif status not in (200, 206):
                    raise hub_refusal(name, response)
                else:
                    receive(response, part, status == 206, size)
    if not part.exists() or part.stat().st_size != size:
        raise BadInput(f"{file.name} of {name} broke off {HUB_TRIES} times; run it again to go on "
                       "from where it stopped")
    with open(part, "rb") as data:
        while block := data.read(1 << 20):
            hasher.update(block)
    if hasher.hexdigest() != digest:
        part.unlink()
        raise BadInput(f"{file.name} of {name} arrived with a wrong {hasher.name} and was deleted; "
                       "try again, and if it stays so, trust neither it nor the network")
    os.replace(part, file)


def receive(response, part, resumed, size):
    with open(part, "ab" if resumed else "wb") as out:
        for block in response.iter_content(1 << 16):  # of a block that breaks off nothing is kept
            out.write(block)
            if size > 10_000_000 and sys.stderr.isatty():
                print(f"\r{part.stem}: {out.tell() / 1e6:,.0f} of {size / 1e6:,.0f} MB",
                      end="\n" * (out.tell() == size), file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# The command line

UNPACK = {".gz": gzip.open, ".xz": lzma.open}


def read_pieces(paths, size=1 << 20):
    """Text of files, folders (all .txt, .md and .py in them) and "-", in pieces of about a MiB.

    A piece ends after a newline between two characters that no pattern joins, or before a space
    between two such, so that the pieces' chunks are the text's; where a MiB has none, anywhere."""
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md", ".py")) \
            if path.is_dir() else [path]
        for file in files:
            try:
                if str(file) == "-":
                    yield from pieces_of(sys.stdin, size)
                    continue
                unpack = UNPACK.get(file.suffix, open)
                with unpack(file, "rt", encoding="utf-8", errors="replace", newline="") as text:
                    yield from pieces_of(text, size)
            except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
                raise BadInput(f"{file} cannot be read: {error}") from None


def pieces_of(file, size):
    rest = ""
    while block := file.read(size):
        rest += block
        at = rest.rfind("\n", 1, len(rest) - 1)
        while at > 0 and not (rest[at + 1].isalnum() and not rest[at - 1].isspace()):
            at = rest.rfind("\n", 1, at)
        at = max(at + 1, 0)
        if not at and len(rest) > size:  # lines that end in CRLF, or no lines
            at = rest.rfind(" ", 1, len(rest) - 1)
            while at > 0 and not (rest[at + 1].isalpha() and rest[at - 1].isalnum()):
                at = rest.rfind(" ", 1, at)
            at = at if at > 0 else len(rest) - 1
        if at:
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def standard_library():
    """Real text that is on every machine that runs this: Python's own source."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def show(tokenizer, ids, colour, mask=()):
    """The text with every token's background in the next of five colours; | in a plain file.
    Where mask is 1 the token is bold and underlined; in a plain file, in brackets."""
    shown = []
    for n, i in enumerate(ids):
        piece = tokenizer.spell(i).decode("utf-8", "backslashreplace")
        marked = n < len(mask) and mask[n]
        if colour:
            background = (153, 157, 223, 217, 189)[n % 5]  # light blue, green, yellow, red, violet
            piece = f"\x1b[{'1;4;' * marked}30;48;5;{background}m{piece}\x1b[0m"
        elif marked:
            piece = f"[{piece}]"
        shown.append(piece)
    return ("" if colour else "|").join(shown)


def train(args):
    start = time.perf_counter()
    texts = read_pieces(args.files or standard_library())
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.pattern, args.special, args.digits,
                                args.min_frequency, args.kind)
    tokenizer.save(args.out)
    if args.kind == "bpe":
        tokenizer.export(args.out)
    meta = {"tokenizer": tokenizer.spec(), "source": [str(file) for file in args.files]}
    with replace_file(Path(args.out) / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    print(f"{args.out}: {tokenizer.n_vocab} tokens, {len(tokenizer.special)} of them special, "
          f"in {time.perf_counter() - start:.1f} s")
    if args.kind == "bpe":
        longest = sorted(tokenizer.ranks, key=len)[-8:]
        print("its longest:", *(repr(token.decode("utf-8", "replace")) for token in longest))
        sample = "The quick brown fox counts 1,234 zebras; it isn't sure."
        print(show(tokenizer, tokenizer.encode(sample), sys.stdout.isatty()))


def encode(args):
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    text = sys.stdin.read() if args.text == "-" else args.text
    print(*tokenizer.encode(text, args.allow_special))


def decode(args):
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    ids = args.ids or sys.stdin.read().split()
    try:
        ids = list(map(int, ids))
    except ValueError:
        raise BadInput("decode takes whole numbers; encode prints them") from None
    sys.stdout.write(tokenizer.decode(ids) + "\n")


def inspect(args):
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    if args.glitch or args.files:
        return glitch(tokenizer, read_pieces(args.files or standard_library()))
    text = sys.stdin.read() if args.text == "-" else args.text
    ids = tokenizer.encode(text, args.allow_special)
    print(show(tokenizer, ids, sys.stdout.isatty()))
    print(f"{len(text)} characters, {len(text.encode('utf-8', 'replace'))} bytes, "
          f"{len(ids)} tokens:", *ids)


def chat(args):
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    messages = [{"role": ("user", "assistant")[n % 2], "content": text}
                for n, text in enumerate(args.messages)]
    ids, mask = render_chat(tokenizer, messages, args.template, args.system,
                            generation=len(messages) % 2 == 1)
    print(show(tokenizer, ids, sys.stdout.isatty(), mask))
    print(f"{len(ids)} tokens, {sum(mask)} of them trained:", *ids)


def glitch(tokenizer, texts):
    """Lists the tokens that a text never produces. Where it is the text a model is trained on,
    the model knows nothing of them (SolidGoldMagikarp, Rumbelow and Watkins 2023). Most are
    steps on the way to a longer token that always swallows them."""
    counts = np.zeros(tokenizer.n_vocab, np.int64)
    for text in texts:
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.n_vocab)
    named = set(tokenizer.special.values())
    never = [i for i, n in enumerate(counts) if not n and i not in named and tokenizer.spell(i)]
    print(f"{len(never)} of {tokenizer.n_vocab} tokens never occur in {counts.sum()} tokens of "
          "text:")
    for i in never:
        print(f"{i:7d}  {tokenizer.spell(i)!r}")


def compare(args):
    texts = list(read_pieces(args.files or standard_library()))
    n_bytes = sum(len(clean(text).encode()) for text in texts)
    n_words = sum(len(text.split()) for text in texts)
    if not n_words:
        raise BadInput("the text to compare on is empty; give a file with text in it")
    print(f"{n_bytes:,} bytes, {n_words:,} words, one core\n")
    print(f"{'tokenizer':24} {'vocabulary':>10} {'tokens':>12} {'bytes/token':>12}"
          f" {'tokens/word':>12} {'MB/s':>8}")
    for name in args.tokenizers:
        tokenizer = Tokenizer.from_pretrained(name)
        start = time.process_time()
        n = sum(len(tokenizer.encode(text)) for text in texts)
        rate = n_bytes / 1e6 / (time.process_time() - start)
        print(f"{name:24} {tokenizer.n_vocab:10,} {n:12,} {n_bytes / n:12.3f} {n / n_words:12.3f}"
              f" {rate:8.1f}", flush=True)


def train_ours(texts, vocab_size):
    return hashlib.sha256(format_ranks(Tokenizer.train(texts, vocab_size).ranks)).hexdigest()


def train_huggingface(texts, vocab_size):
    from tokenizers import Tokenizer as Peer, models, pre_tokenizers, trainers
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))


def train_rustbpe(texts, vocab_size):
    import rustbpe
    peer = rustbpe.Tokenizer()
    peer.train_from_iterator(texts, vocab_size, pattern=PATTERNS["gpt2"])
    ranks = {bytes(token): i for token, i in peer.get_mergeable_ranks()}
    return hashlib.sha256(format_ranks(by_id(ranks))).hexdigest()


TRAINERS = {"bpe.py": train_ours, "tokenizers": train_huggingface, "rustbpe": train_rustbpe}


def bench(args):
    """Every trainer in its own process, on the same pieces of the same file."""
    if args.trainer:
        import resource  # not on Windows
        start, begun = time.perf_counter(), time.process_time()
        ranks = TRAINERS[args.trainer](read_pieces([args.file]), args.vocab_size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB
        print(json.dumps({"cpu": time.process_time() - begun, "peak": peak, "ranks": ranks,
                          "wall": time.perf_counter() - start}))
        return
    if not Path(args.file).is_file():
        raise BadInput(f"{args.file} is not there; name a text file to train on")
    print(f"{Path(args.file).stat().st_size / 1e6:,.0f} MB, vocabulary {args.vocab_size}, "
          f"{os.cpu_count()} cores\n")
    print(f"{'trainer':12} {'CPU s':>8} {'bpe.py / it':>12} {'wall s':>8} {'peak GiB':>9}  ranks")
    ours = None
    for name in args.trainers:
        if name != "bpe.py" and not importlib.util.find_spec(name):
            print(f"{name:12} not installed")
            continue
        command = [sys.executable, __file__, "bench", args.file, "--trainer", name,
                   "--vocab_size", str(args.vocab_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"the trainer {name} failed (its message is above)")
        row = json.loads(done.stdout.splitlines()[-1])
        ours = ours or row
        same = "-" if not row["ranks"] else "same" if row["ranks"] == ours["ranks"] else "differ"
        print(f"{name:12} {row['cpu']:8.1f} {ours['cpu'] / row['cpu']:12.2f} {row['wall']:8.1f}"
              f" {row['peak']:9.2f}  {same}", flush=True)


def get_args():
    parser = argparse.ArgumentParser(description="byte-pair encoding", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    library = "files or folders of text, - for standard input (default: Python's own source)"

    def command(run, help):
        sub = commands.add_parser(run.__name__, help=help, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    def read(sub):
        sub.add_argument("--tokenizer", default="out/tokenizer",
                         help="a folder, a file, a tiktoken name such as gpt2, or org/model of "
                              "Hugging Face")
        return sub

    def allow(sub):
        sub.add_argument("--allow_special", nargs="*", default=[], metavar="NAME",
                         help="special tokens that the text may contain")
        return sub

    sub = command(train, "learn a vocabulary from text")
    sub.add_argument("files", nargs="*", default=[], help=library)
    sub.add_argument("--vocab_size", type=int, default=4096, help="the 256 bytes and the merges")
    sub.add_argument("--pattern", default="gpt2",
                     help="how text is cut: " + ", ".join(PATTERNS) + ", or a regular expression")
    sub.add_argument("--digits", action="store_true", help="make every digit its own token")
    sub.add_argument("--special", nargs="*", default=list(SPECIAL),
                     help="special tokens, counted beside vocab_size")
    sub.add_argument("--min_frequency", type=int, default=1, help="merge no pair rarer than this")
    sub.add_argument("--kind", choices=("bpe", "char"), default="bpe",
                     help="char: a token for each character of the text")
    sub.add_argument("--out", default="out/tokenizer", help="folder to write")

    sub = allow(read(command(encode, "text to ids")))
    sub.add_argument("text", help="the text, - for standard input")
    sub = read(command(decode, "ids to text"))
    sub.add_argument("ids", nargs="*", help="(default: read from standard input)")
    sub = allow(read(command(inspect, "colour the tokens of a text")))
    sub.add_argument("text", nargs="?", default="It isn't 1,234 zebras; 안녕하세요!",
                     help="the text, - for standard input")
    sub.add_argument("--glitch", action="store_true",
                     help="list the tokens that the text of --files never produces")
    sub.add_argument("--files", nargs="*", default=[], help=library)
    sub = read(command(chat, "colour the tokens of a chat, the trained ones underlined"))
    sub.add_argument("messages", nargs="+", help="question, answer, question, ...")
    sub.add_argument("--template", help=", ".join(CHAT_TEMPLATES) + " (default: the tokenizer's, "
                                        "else chatml)")
    sub.add_argument("--system", help="a system message (default: the tokenizer's; '' for none)")
    sub = command(compare, "table several tokenizers on one text")
    sub.add_argument("files", nargs="*", default=[], help=library)
    sub.add_argument("--tokenizers", nargs="+", default=["out/tokenizer"],
                     help="folders, files or tiktoken names")
    sub = command(bench, "time training against the trainers that are installed")
    sub.add_argument("file", help="a text file")
    sub.add_argument("--vocab_size", type=int, default=32768, help="the 256 bytes and the merges")
    sub.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS),
                     help="which to run, one after the other")
    sub.add_argument("--trainer", choices=TRAINERS, help="run one in this process, print JSON")
    return parser.parse_args(sys.argv[1:] or ["train"])


def main():
    args = get_args()
    args.run(args)


if __name__ == "__main__":
    from bpe import cli, main
    cli(main)
