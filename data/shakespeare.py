"""
tinyshakespeare: 1,115,394 characters of plays, the classic small real text.

    python train.py --data shakespeare --tokenizer char
    python train.py --data shakespeare --input FILE     # a copy of yours, no network

Collected by Andrej Karpathy for char-rnn. Split by characters as in nanoGPT: the
first 1,003,854 for training, the last 111,540 for validation, one document each.
"""

import hashlib
import sys
import time
from pathlib import Path

import requests

from bpe import BadInput, replace_file
from data import text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATH = Path(__file__).with_suffix("") / "input.txt"
TRIES = 3


def is_original(content):
    """Whether these bytes are the text that everyone's results are measured on."""
    return hashlib.sha256(content).hexdigest() == SHA256


def download(url, path):
    """The file at url to path, in one move and only when its checksum is right; else BadInput."""
    for attempt in range(TRIES):
        time.sleep(attempt)  # 0, 1, 2 seconds
        try:
            answer = requests.get(url, timeout=20)
            answer.raise_for_status()
            if is_original(answer.content):
                break
            reason = "what came is another text"
        except requests.RequestException as error:
            reason = type(error).__name__
    else:
        raise BadInput(f"{url} could not be had ({reason}): put the file at {path} or give --input FILE.")
    with replace_file(path) as file:
        file.write(answer.content)


def documents(split, input=None):
    """One document a split, as (text, starts_document) pieces; downloads the text on first use."""
    if input is None:
        if not PATH.exists():
            download(URL, PATH)
        elif not is_original(PATH.read_bytes()):
            raise BadInput(f"{PATH} is another text: delete it, or give your own with --input FILE.")
    elif split == "train" and Path(input).is_file() and not is_original(Path(input).read_bytes()):
        print(f"{input} is not the original tinyshakespeare: results do not compare", file=sys.stderr)
    yield from text.documents(split, PATH if input is None else input)
