"""95 % intervals: of macro-F1 by bootstrap over rows, of rates exact. They speak of other rows from the same sources."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from so8t.curves import Floats, Integers
from so8t.labels import LABELS, Label

Interval = tuple[float, float]

ENOUGH = 20
"""Fewer rows than this get no interval: it would span most of what is possible."""


def rate_interval(hits: int, rows: int) -> Interval | None:
    """Of a share (Clopper and Pearson 1934); `None` under `ENOUGH` rows. Unlike a bootstrap's, it is no point at 0 hits."""
    if rows < ENOUGH:
        return None
    interval = binomtest(hits, rows).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


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


def macro_f1_interval(labels: Sequence[int], decisions: Sequence[int]) -> Interval | None:
    """Bootstrap of macro-F1 over the classes that have rows; `None` under `ENOUGH` rows."""
    if len(labels) < ENOUGH:
        return None
    return interval_95(macro_f1(resampled(labels, decisions), np.unique(labels)))


def decision_intervals(labels: Sequence[int], decisions: Sequence[int]) -> dict[str, Interval | None]:
    """Of macro-F1, and of both rates over the rows that they are shares of."""
    allowed = [decision == Label.ALLOW for label, decision in zip(labels, decisions, strict=True) if label != Label.ALLOW]
    refused = [decision != Label.ALLOW for label, decision in zip(labels, decisions, strict=True) if label == Label.ALLOW]
    return {
        "macro_f1": macro_f1_interval(labels, decisions),
        "false_allow_rate": rate_interval(sum(allowed), len(allowed)),
        "over_refusal_rate": rate_interval(sum(refused), len(refused)),
    }


def conformal_quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that a new one from where they came from stays under with probability `share` at least, or
    infinity, if they are too few to say (split conformal prediction: Vovk et al. 2005; Lei et al. 2018, arXiv:1604.04173)."""
    rank = math.ceil((len(values) + 1) * share)
    return sorted(values)[rank - 1] if rank <= len(values) else math.inf


def number(value: float | None, interval: Interval | None = None, *, digits: int = 3) -> str:
    """A figure and its interval, for tables; `-` where there is none."""
    told = "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
    return told if interval is None else f"{told} [{interval[0]:.2f}, {interval[1]:.2f}]"
