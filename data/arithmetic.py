"""
Sums and differences, one a line: 993-7=986.

A task whose answers a program can check. Whether a problem is trained on or held
out is decided by a hash of the problem alone, so no checked problem is ever seen
in training, however long the run and whatever the flags; 3+5 and 5+3 count as one
problem. Operands have 1 to `digits` digits, each length equally often, so that a
young model meets problems within its reach. A difference takes the smaller number
from the larger: no answer is negative.

    python -m data.arithmetic --out DIR --digits 4
    python train.py --data text --input DIR
"""

import argparse
import hashlib
import operator
import random
from itertools import islice
from pathlib import Path

from bpe import BadInput

DOCUMENTS = {"train": 20_000, "val": 500}
LINES = 8       # problems in a document
DIGITS = 3      # operands are 0 .. 10**DIGITS - 1
CHECKED = 200   # held-out problems that checks() asks
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DEFAULT_OPERATIONS = "+-"


def split_of(a, op, b):
    """ "val" for one problem in ten, by hash; the order of a and b makes no difference."""
    problem = f"{max(a, b)}{op}{min(a, b)}"
    return "val" if int(hashlib.md5(problem.encode()).hexdigest(), 16) % 10 == 0 else "train"


def draw(split, n, digits=DIGITS, operations=DEFAULT_OPERATIONS):
    """
    n random (question, answer) pairs such as ("993-7=", "986") of one split.

    A pure function of its arguments: random() is the one generator method whose
    sequence Python promises to keep. Raises BadInput for unknown operations and
    where digits is not in 1 .. 9.
    """
    if not operations or set(operations) - set(OPERATIONS):
        known = "".join(OPERATIONS)
        raise BadInput(f"--operations {operations}: use one or more of the characters {known}.")
    if not 1 <= digits <= 9:
        raise BadInput(f"--digits {digits}: operands have 1 to 9 digits.")
    rng = random.Random(f"arithmetic {split}")
    while n > 0:
        op = operations[int(rng.random() * len(operations))]
        # a length first, then a number up to that length
        a, b = (int(rng.random() * 10 ** (1 + int(rng.random() * digits))) for _ in "ab")
        if split_of(a, op, b) != split:
            continue
        if op == "-":
            a, b = max(a, b), min(a, b)
        n -= 1
        yield f"{a}{op}{b}=", str(OPERATIONS[op](a, b))


def documents(split, input=None, n=None, digits=DIGITS, operations=DEFAULT_OPERATIONS):
    """n documents of LINES problems as (text, True) pairs; n is DOCUMENTS[split] unless given."""
    if input is not None:
        raise BadInput("--input: arithmetic makes its own text; read yours with --data text --input FILE.")
    n = DOCUMENTS[split] if n is None else n
    pairs = draw(split, n * LINES, digits, operations)
    for _ in range(n):
        yield "".join(f"{question}{answer}\n" for question, answer in islice(pairs, LINES)), True


def checks(input=None, digits=DIGITS, operations=DEFAULT_OPERATIONS):
    """
    {"accuracy": rows} of CHECKED different held-out problems; a world of one digit has fewer.

    The answer ends with its line, so that a longer number is no match.
    """
    pairs = list(dict.fromkeys(draw("val", 20 * CHECKED, digits, operations)))[:CHECKED]
    return {"accuracy": [{"prompt": q, "answer": f"{answer}\n"} for q, answer in pairs]}


def problems(split, n=None, digits=DIGITS, operations=DEFAULT_OPERATIONS):
    """Rows {"prompt": "993-7=?", "answer": "986"} for reinforcement learning, n as in documents()."""
    n = DOCUMENTS[split] * LINES if n is None else n
    for question, answer in draw(split, n, digits, operations):
        yield {"prompt": f"{question}?", "answer": answer}


def chats(split, input=None, n=2000):
    """problems() to tune on: n different ones of "train", CHECKED of "val"."""
    if input is not None:
        raise BadInput("--input: arithmetic makes its own questions; give a file of yours with --data FILE")
    rows = {row["prompt"]: row for row in problems(split, 2 * n if split == "train" else 20 * CHECKED)}
    yield from islice(rows.values(), n if split == "train" else CHECKED)


def get_args():
    parser = argparse.ArgumentParser(description="write arithmetic problems as JSONL")
    parser.add_argument("--out", required=True, help="folder to write; read it with --data text --input OUT")
    parser.add_argument("--n", type=int, default=DOCUMENTS["train"], help="training documents")
    parser.add_argument("--digits", type=int, default=DIGITS, help="longest operand")
    parser.add_argument("--operations", default=DEFAULT_OPERATIONS, help="some of " + "".join(OPERATIONS))
    return parser.parse_args()


def main():
    from data.text import write_checks, write_jsonl

    args = get_args()
    if args.n < 1:
        raise BadInput(f"--n {args.n}: write at least one document.")
    out, world = Path(args.out), dict(digits=args.digits, operations=args.operations)
    for split, n in ("train", args.n), ("val", None):
        texts = documents(split, n=n, **world)
        write_jsonl(out / f"{split}.jsonl", ({"text": text} for text, _ in texts))
    write_checks(out / "checks.jsonl", checks(**world))


if __name__ == "__main__":
    from bpe import cli

    cli(main)
