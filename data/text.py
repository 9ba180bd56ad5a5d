"""
Any text of yours: a file, or a folder of files.

    python train.py --data text --input book.txt
    python train.py --data text --input DIR       # with train.* and val.*, or any files

A plain file (.txt, .md, .py, whatever holds UTF-8) is one document. Each line of a
.jsonl file is one: {"text": ...}, or {"messages": [...]}, or {"prompt", "completion"}.
Any of them may be packed (.gz, .xz). In a folder, files named train.* and val.* are
the two splits, and checks.jsonl beside them holds questions for the trained model;
any other folder, and any one file, gives its last tenth (in characters) to "val".

Files are streamed: memory holds a few blocks of a text, or one line of a .jsonl file.
"""

import codecs
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from pathlib import Path

from bpe import BadInput, replace_file

LIMIT = 2**16  # characters in one piece of a document, and bytes in one read
UNPACK = {".gz": gzip.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# -----------------------------------------------------------------------------
# Long documents


def cut(text):
    """
    Where to end a piece of a text that is longer than LIMIT: an index in 1 .. LIMIT.

    Tokenizers first split a text into chunks by a pattern. After a single newline between
    two non-space characters, a chunk ends under every common pattern, so the pieces of a
    text give the tokens of the whole text. Second best is after any newline, then before
    a space, which begins the next word's chunk, then anywhere.
    """
    at = text.rfind("\n", 1, LIMIT)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", 1, at)
    at = text.rfind("\n", 0, LIMIT) + 1 or text.rfind(" ", 1, LIMIT)
    return at if at > 0 else LIMIT


def pieces(blocks):
    """
    One document, from blocks of its text, as (piece, starts_document) pairs.

    Pieces have at most LIMIT characters and do not depend on how the blocks fall.
    """
    rest, starts = "", True
    for block in blocks:
        rest += block
        while len(rest) > LIMIT:
            at = cut(rest)
            yield rest[:at], starts
            rest, starts = rest[at:], False
    if rest:
        yield rest, starts


def clean(text):
    """The text with U+FFFD for each byte that was not UTF-8 (a lone surrogate in Python)."""
    try:
        text.encode()  # far faster than a search
        return text
    except UnicodeEncodeError:
        return LONE_SURROGATE.sub("\ufffd", text)


# -----------------------------------------------------------------------------
# One file


def unpacked(path):
    """The file opened for reading bytes, through gzip or xz where its name says so."""
    return UNPACK.get(path.suffix, open)(path, "rb")


def unreadable(path, error):
    """The BadInput for a file that could not be read to its end."""
    if path.suffix in UNPACK and not isinstance(error, PermissionError):
        why = f"is cut short, damaged or not a {path.suffix} file ({error})"
        return BadInput(f"{path} {why}; replace it or leave it out.")
    return BadInput(f"{path} cannot be read ({error}); replace it or leave it out.")


def blocks(path):
    """The text of a plain file, block by block; bytes that are not UTF-8 as lone surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    try:
        with unpacked(path) as file:
            while data := file.read(LIMIT):
                yield decoder.decode(data)
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    yield decoder.decode(b"", final=True)


def json_rows(path):
    """(line number, object) of each line of a .jsonl file that is not blank."""
    try:
        with unpacked(path) as file:
            # newline="\n": a stray \r inside a row does not end it
            lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    why = "not a JSON object; correct or remove the line."
                    raise BadInput(f"{path}, line {number}: {why}")
                yield number, row
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def row_text(row):
    """The text of one .jsonl row, or None where the row has none of the known keys."""
    if isinstance(row.get("text"), str):
        return row["text"]
    if "messages" in row:
        parts = row["messages"]
    else:
        parts = row.get("prompt"), row.get("completion")
        if all(isinstance(part, str) for part in parts):
            prompt, completion = parts
            joined = prompt[-1:].isspace() or completion[:1].isspace()
            return prompt + ("" if joined else "\n") + completion
        parts = parts[0] + parts[1] if all(isinstance(part, list) for part in parts) else None
    try:
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content'].strip()}" for m in parts)
    except (TypeError, KeyError, AttributeError):
        return None


def suffix(path):
    """The file's kind, such as ".jsonl", without the packing."""
    return Path(path.stem).suffix if path.suffix in UNPACK else path.suffix


def read(path):
    """The documents of one file as (piece, starts_document) pairs."""
    if suffix(path) != ".jsonl":
        yield from pieces(blocks(path))
        return
    for number, row in json_rows(path):
        text = row_text(row)
        if text is None:
            keys = 'needs "text", or "messages", or "prompt" and "completion"'
            raise BadInput(f"{path}, line {number}: the row {keys}; correct or remove the line.")
        yield from pieces(text[i : i + LIMIT] for i in range(0, len(text), LIMIT))


# -----------------------------------------------------------------------------
# Files and splits


def is_text(path):
    """No zero byte near the start: pictures, token files and UTF-16 are not for us."""
    try:
        with unpacked(path) as file:
            return b"\0" not in file.read(8192)
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def find(folder):
    """Every file under the folder, in order of its path; hidden ones and checks.jsonl aside."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        found += [Path(top, name) for name in names if name[0] != "." and name != "checks.jsonl"]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.parts)


def files_of(split, input):
    """(files of the split, True), or (all files, False) where the files set no splits."""
    if input is None:
        raise BadInput("--data text needs --input FILE or --input FOLDER.")
    path = Path(input)
    if path.is_file():
        if not is_text(path):
            raise BadInput(f"--input {path}: not UTF-8 text; convert it or name another file.")
        return [path], False
    if not path.is_dir():
        what = "not a file or folder" if path.exists() else "no such file or folder"
        raise BadInput(f"--input {path}: {what}; give the path of your text.")
    named = {name: sorted(path.glob(f"{name}.*")) for name in ("train", "val")}
    named = {name: [p for p in paths if p.is_file() and is_text(p)] for name, paths in named.items()}
    if all(named.values()):
        return named[split], True
    found = find(path)
    files = [p for p in found if is_text(p)]
    if split == "train" and len(files) < len(found):
        some = f"{len(found) - len(files)} of {len(found)} files"
        print(f"{path}: left out {some}, not UTF-8 text", file=sys.stderr)
    return files, False


def count(files, report):
    """Characters in all the files; `report` says on stderr how many files are not quite UTF-8."""
    total, flawed = 0, set()
    for path in files:
        for text, _ in read(path):
            total += len(text)
            if clean(text) is not text:
                flawed.add(path)
    if flawed and report:
        some = f"{len(flawed)} of {len(files)} files hold bytes that are not UTF-8"
        print(f"{some}, such as {min(flawed)}: replaced by U+FFFD", file=sys.stderr)
    return total


def documents(split, input=None):
    """
    (text, starts_document) pairs of a split; a longer document than LIMIT comes in pieces.

    Reads everything once to count, then once more. Where the files set no splits,
    "train" has the first int(0.9 * characters) and a document that crosses this border
    is split there. Raises BadInput for what cannot be read and for an empty split.
    """
    files, separate = files_of(split, input)
    total = count(files, report=separate or split == "train")
    if total < (1 if separate else 10):
        raise BadInput(f"--input {input}: {total} characters for {split}; give a longer text.")
    border = int(0.9 * total)
    begin, end = (0, total) if separate else (0, border) if split == "train" else (border, total)
    seen, first = 0, True
    for text, starts in (pair for path in files for pair in read(path)):
        mine = text[max(0, begin - seen) : max(0, end - seen)]
        if mine:
            yield clean(mine), starts or first
            first = False
        seen += len(text)
        if seen >= end:
            return


def checks(input=None):
    """{metric: [{"prompt", "answer"}, ...]} from checks.jsonl in the folder; {} without one."""
    path = Path(input or "", "checks.jsonl")
    asked = {}
    if input is None or not path.is_file():
        return asked
    for number, row in json_rows(path):
        if not all(isinstance(row.get(key), str) for key in ("metric", "prompt", "answer")):
            keys = 'needs "metric", "prompt" and "answer"'
            raise BadInput(f"{path}, line {number}: the row {keys}; correct or remove the line.")
        asked.setdefault(row["metric"], []).append({"prompt": row["prompt"], "answer": row["answer"]})
    return asked


# -----------------------------------------------------------------------------
# Writing what can be read here


def write_jsonl(path, rows):
    """One JSON object a line. The file appears whole or not at all; raises BadInput."""
    with replace_file(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_checks(path, checks):
    """{metric: rows} as the checks.jsonl that checks() reads."""
    write_jsonl(path, ({"metric": metric, **row} for metric, asked in checks.items() for row in asked))
