"""
Answers whose true worth is known, so that what a preference method or a reward model makes of them can be checked.

world() is small enough for exact sums: one question, 64 answers of three letters out of four, a random reward for each.
The best policy at a price of β per nat of divergence from the reference is a formula (Korbak et al. 2022),

    π*(y) = π_ref(y) e^{r(y)/β} / Z,    max E[r] - β KL(π ‖ π_ref) = β log Z.

reward(text) is a taste over strings of letters: a model of them can be trained, judged by a reward model that has only
seen comparisons, and fooled.
"""
import itertools
import math
import random
from typing import NamedTuple

import numpy as np

from bpe import replace_file

LETTERS = "abcdefgh"
LENGTH = 12  # of a string that the taste is about


def bigram_tables(seed=7):
    """
    (8, 8) worth of each pair of neighbouring letters, standard normals, and the text's (8, 8) transition probabilities.
    """
    rng = random.Random(seed)
    normal = lambda: math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
    worth = [[normal() for _ in LETTERS] for _ in LETTERS]
    odds = [[math.exp(0.5 * normal()) for _ in LETTERS] for _ in LETTERS]
    return worth, [[x / sum(row) for x in row] for row in odds]


WORTH, TRANSITIONS = bigram_tables()


def reward(text):
    """
    The worth of the pairs of neighbours in a string of LETTERS, each kind counted once; a repeated one costs 1/2, as
    does each letter missing from or beyond LENGTH. Who has seen only everyday strings, where few pairs come twice,
    takes a good pair for good however often it comes.
    """
    pairs = list(zip(text, text[1:]))
    known = {(a, b) for a, b in pairs if a in LETTERS and b in LETTERS}
    worth = sum(WORTH[LETTERS.index(a)][LETTERS.index(b)] for a, b in known)
    return worth - 0.5 * (len(pairs) - len(known)) - 0.5 * abs(len(text) - LENGTH)


def problems(split, n=None):
    """
    n rows {"prompt": "c", "answer": a string of LENGTH letters that goes on from c}: everyday text, to start from.
    """
    rng = random.Random(f"tastes {split}")
    for _ in range(20_000 if n is None else n):
        at = first = int(rng.random() * len(LETTERS))
        text = ""
        for _ in range(LENGTH):
            u = rng.random()
            at = next((i for i, p in enumerate(itertools.accumulate(TRANSITIONS[at])) if u < p), len(LETTERS) - 1)
            text += LETTERS[at]
        yield {"prompt": LETTERS[first], "answer": text}


def preferred(a, b, rng, temperature=1.0):
    """
    Is the first reward's answer the one that a person of this taste picks? Bradley & Terry, p = σ((a - b) /
    temperature).
    """
    return rng.random() < 1 / (1 + math.exp(min(50, (b - a) / temperature)))


class World(NamedTuple):
    letters: np.ndarray  # (64, 3) letters 0 … 3 of each answer
    states: np.ndarray   # (64, 3) row of a table (21, 4) that each letter is drawn from: which letters came before
    table: np.ndarray    # (21, 4) logits of the reference
    reward: np.ndarray   # (64,)

    def ref(self):
        """log π_ref of each answer, (64,)."""
        logp = self.table - np.log(np.exp(self.table).sum(1, keepdims=True))
        return logp[self.states, self.letters].sum(1)

    def optimum(self, beta):
        """log π*, (64,), and the objective's maximum β log Z."""
        logits = self.ref() + self.reward / beta
        top = logits.max()
        log_z = top + math.log(np.exp(logits - top).sum())
        return logits - log_z, beta * log_z


def world(seed=0):
    """The reference's logits and the rewards are standard normals."""
    rng = np.random.default_rng(seed)
    letters = np.array(list(itertools.product(range(4), repeat=3)))
    a, b, _ = letters.T
    states = np.stack((np.zeros(64, int), 1 + a, 5 + 4 * a + b), 1)
    return World(letters, states, rng.standard_normal((21, 4)), rng.standard_normal(64))


def best_of(world, n):
    """log-probabilities of the best of n independent draws from the reference, (64,)."""
    order = np.argsort(world.reward)
    below = np.concatenate(([0.0], np.exp(world.ref()[order]).cumsum()))
    logp = np.empty(len(order))
    logp[order] = np.log(np.maximum(below[1:] ** n - below[:-1] ** n, 1e-300))
    return logp


COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")


def plot(path, curves, xlabel, ylabel, lines=(), width=640, height=400):
    """{name: [(x, y), …]} as an .svg: points, and for the names in `lines` a line through them."""
    xs, ys = zip(*(point for points in curves.values() for point in points))
    left, right, top, bottom = min(xs), max(xs), max(ys), min(ys)
    at = lambda x, y: (60 + (x - left) / (right - left or 1) * (width - 230),
                       20 + (top - y) / (top - bottom or 1) * (height - 70))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
             f'font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>']
    for k in range(5):
        x, y = left + (right - left) * k / 4, bottom + (top - bottom) * k / 4
        (u, _), (_, v) = at(x, bottom), at(left, y)
        parts += [f'<line x1="60" x2="{width - 170}" y1="{v:.1f}" y2="{v:.1f}" stroke="#dddddd"/>',
                  f'<text x="54" y="{v + 4:.1f}" text-anchor="end">{y:.2g}</text>',
                  f'<text x="{u:.1f}" y="{height - 32}" text-anchor="middle">{x:.2g}</text>']
    parts += [f'<text x="{60 + (width - 230) / 2:.0f}" y="{height - 10}" text-anchor="middle">{xlabel}</text>',
              f'<text x="14" y="{height / 2:.0f}" text-anchor="middle" '
              f'transform="rotate(-90 14 {height / 2:.0f})">{ylabel}</text>']
    for k, (name, points) in enumerate(curves.items()):
        colour, places = COLOURS[k % len(COLOURS)], [at(*point) for point in points]
        if name in lines:
            joined = " ".join(f"{u:.1f},{v:.1f}" for u, v in places)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if name not in lines or len(points) < 20:
            parts += [f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.5" fill="{colour}"/>' for u, v in places]
        parts += [f'<circle cx="{width - 155}" cy="{30 + 20 * k}" r="4" fill="{colour}"/>',
                  f'<text x="{width - 145}" y="{34 + 20 * k}">{name}</text>']
    with replace_file(path, "w") as f:
        f.write("\n".join([*parts, "</svg>"]))
