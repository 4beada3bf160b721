"""95 % intervals by bootstrap over rows. They speak of other rows from the same sources."""

from collections.abc import Sequence

import numpy as np

from so8t.curves import Floats, Integers
from so8t.labels import LABELS

Interval = tuple[float, float]


def resampled(labels: Sequence[int], decisions: Sequence[int], *, draws: int = 1000, seed: int = 0) -> Integers:
    """Confusion matrices `[draws, 3, 3]`, labels by decisions, of rows drawn with replacement (Efron 1979).

    The same rows are drawn whatever was decided on them, so that the difference between two classifiers is paired.
    """
    n, size = len(LABELS), len(labels)
    cells = np.asarray(labels) * n + np.asarray(decisions)
    rng = np.random.default_rng(seed)
    counts = [np.bincount(cells[rng.integers(0, size, size)], minlength=n * n) for _ in range(draws)]
    return np.array(counts).reshape(draws, n, n)


def macro_f1(confusion: Integers, present: Integers) -> Floats:
    """Macro-F1 over the classes `present`, of confusion matrices: `[..., 3, 3] -> [...]`."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-2) + confusion.sum(-1)
    return np.asarray((2 * right / np.maximum(both, 1))[..., present].mean(-1))


def interval_95(draws: Floats) -> Interval:
    """Percentile interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def macro_f1_interval(labels: Sequence[int], decisions: Sequence[int], *, draws: int = 1000, seed: int = 0) -> Interval | None:
    """Bootstrap of macro-F1 over the classes that have rows; `None` without rows."""
    if not len(labels):
        return None
    return interval_95(macro_f1(resampled(labels, decisions, draws=draws, seed=seed), np.unique(labels)))
