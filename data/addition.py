"""
Two-digit sums, the answer's last digit first: 57+68= → 521. The smallest task that reinforcement learning visibly
solves.

All 10,000 problems of two digits and two digits, 9,000 to train on and 1,000 held out, every answer three digits.
Written last digit first, each digit needs only the digits above it and one carry.
"""
import random
from itertools import cycle, islice

from bpe import BadInput

HELD_OUT = 1000
LETTERS = "0123456789+=\n"


def answer(a, b):
    return f"{a + b:03}"[::-1]


def split_problems(split):
    """
    The operands of a split, shuffled: random() is the one generator method whose sequence Python promises to keep.
    """
    rng = random.Random("addition")
    order = sorted(((a, b) for a in range(100) for b in range(100)), key=lambda _: rng.random())
    return order[HELD_OUT:] if split == "train" else order[:HELD_OUT]


def problems(split, n=None):
    """n rows {"prompt": "57+68=", "answer": "521"}; n beyond a split's size goes round again."""
    rows = split_problems(split)
    for a, b in islice(cycle(rows), len(rows) if n is None else n):
        yield {"prompt": f"{a:02}+{b:02}=", "answer": answer(a, b)}


def chats(split, input=None):
    """problems() to tune on."""
    if input is not None:
        raise BadInput("--input: addition makes its own questions; give a file of yours with --data FILE")
    return problems(split)
