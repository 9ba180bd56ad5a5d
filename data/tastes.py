"""
Answers whose true worth is known, so that what a preference method or a reward model makes of them can be checked.

world() is small enough for exact sums: one question, 64 answers of three letters out of four, a random reward for each.
The best policy at a price of β per nat of divergence from the reference is a formula (Korbak et al. 2022),

    π*(y) = π_ref(y) e^{r(y)/β} / Z,    max E[r] - β KL(π ‖ π_ref) = β log Z.

reward(text) is a taste over strings of letters: a model of them can be trained, judged by a reward model that has only
seen comparisons, and fooled.
"""
import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np

LETTERS = "abcdefgh"
LENGTH = 12  # of a string that the taste is about


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
