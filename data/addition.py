"""
Two-digit sums, the answer's last digit first: 57+68= → 521. The smallest task that reinforcement learning visibly
solves.

All 10,000 problems of two digits and two digits, 9,000 to train on and 1,000 held out, every answer three digits.
Written last digit first, each digit needs only the digits above it and one carry.
"""
from itertools import cycle, islice

from bpe import BadInput
from data import held_out

HELD_OUT = 1000
LETTERS = "0123456789+=\n"


def answer(a, b):
    return f"{a + b:03}"[::-1]


def problems(split, n=None):
    """n rows {"prompt": "57+68=", "answer": "521"}; n beyond a split's size goes round again."""
    rows = held_out("addition", ((a, b) for a in range(100) for b in range(100)), split, HELD_OUT)
    for a, b in islice(cycle(rows), len(rows) if n is None else n):
        yield {"prompt": f"{a:02}+{b:02}=", "answer": answer(a, b)}


def chats(split, input=None):
    """problems() to tune on."""
    if input is not None:
        raise BadInput("--input: addition makes its own questions; give a file of yours with --data FILE")
    return problems(split)
