"""Which rows were decided worst: wrongly, and with the most probability."""

import numpy as np

from so8t.curves import Floats, Integers

MOST = 15
"""Rows of a set that are looked at token by token."""


def worst_mistakes(probabilities: Floats, decisions: Integers, labels: Integers) -> list[int]:
    """Rows whose decision is not their label, those with the most probable decision first, at most `MOST`: `[N, 3]`, `[N]` and
    `[N]`. Ties keep the rows' order."""
    wrong = np.flatnonzero(decisions != labels)
    sure = probabilities[wrong, decisions[wrong]]
    return [int(row) for row in wrong[np.argsort(-sure, kind="stable")][:MOST]]
