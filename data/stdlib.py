"""
The source of Python's standard library, as this very machine has it.

    python train.py --data stdlib

Real text with no download: about 12 MB of code and English docstrings, one file one
document. It differs a little between Python versions, so compare losses on one machine.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

from bpe import BadInput
from data import text

# tests are repetitive, and installed packages are not the standard library
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def files(split):
    """The library's .py files; "val" has those whose relative path hashes into one tenth."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for top, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(top, name) for name in names if name.endswith(".py")]
    for path in sorted(found, key=lambda path: path.parts):
        name = path.relative_to(library).as_posix()
        in_val = int(hashlib.md5(name.encode()).hexdigest(), 16) % 10 == 0
        if in_val == (split == "val"):
            yield path


def documents(split, input=None):
    """Each file as (text, starts_document) pairs, in order of path."""
    if input is not None:
        raise BadInput("--input: stdlib reads this Python's own files; read yours with --data text --input DIR.")
    found = False
    for path in files(split):
        for piece, starts in text.read(path):
            found = True
            yield text.clean(piece), starts
    if not found:
        raise BadInput("--data stdlib: this Python comes without source files; choose another --data.")
