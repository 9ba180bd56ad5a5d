"""
Three digits times two, written out as at school: 123*45= → 5160+2940####53550, all numbers last digit first: 615 and
492, then 615 + 10 · 492 = 5535.

81,000 problems, 80,000 to train on and 1,000 held out. The checker reads what follows ####; the way there is free.
"""
from itertools import cycle, islice

from bpe import BadInput
from data import held_out

HELD_OUT = 1000
LETTERS = "0123456789*=+#\n"


def reverse(number, width):
    return f"{number:0{width}}"[::-1]


def answer(a, b):
    return f"{reverse(a * (b % 10), 4)}+{reverse(a * (b // 10), 4)}####{reverse(a * b, 5)}"


def problems(split, n=None):
    """n rows {"prompt": "123*45=", "answer": "5160+2940####53550"}; n beyond a split's size goes round again."""
    rows = held_out("multiplication", ((a, b) for a in range(100, 1000) for b in range(10, 100)), split, HELD_OUT)
    for a, b in islice(cycle(rows), len(rows) if n is None else n):
        yield {"prompt": f"{a}*{b}=", "answer": answer(a, b)}


def chats(split, input=None):
    """problems() to tune on."""
    if input is not None:
        raise BadInput("--input: multiplication makes its own questions; give a file of yours with --data FILE")
    return problems(split)
