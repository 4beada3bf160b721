"""95 % intervals: of rates exact, of all else by bootstrap over rows. They speak of other rows from the same sources."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from so8t.curves import Floats, Integers, confidence_bin
from so8t.labels import LABELS, Label

Interval = tuple[float, float]

ENOUGH = 20
"""Fewer rows than this get no interval: it would span most of what is possible."""
BLOCK = 2**20
"""Numbers of a block of draws, about: draws of many rows need not be in memory together."""


def rate_interval(hits: int, rows: int) -> Interval | None:
    """Of a share (Clopper and Pearson 1934); `None` under `ENOUGH` rows. Unlike a bootstrap's, it is no point at 0 hits."""
    if rows < ENOUGH:
        return None
    interval = binomtest(hits, rows).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap_counts(rows: int, *, draws: int = 1000, seed: int = 0) -> Iterator[Floats]:
    """How often each row comes when as many are drawn with replacement (Efron 1979): `[block, rows]`, `draws` in all.

    The same rows are drawn whatever is measured on them, so that the difference between two classifiers is paired.
    """
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK // rows)
    for begin in range(0, draws, size):
        block = [np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in range(min(size, draws - begin))]
        yield np.array(block, dtype=np.float64)


def resampled(labels: Sequence[int], decisions: Sequence[int], *, draws: int = 1000, seed: int = 0) -> Integers:
    """Confusion matrices `[draws, 3, 3]`, labels by decisions, of rows drawn with replacement."""
    n = len(LABELS)
    of_cell = np.eye(n * n)[np.asarray(labels) * n + np.asarray(decisions)]
    counts = [weights @ of_cell for weights in bootstrap_counts(len(labels), draws=draws, seed=seed)]
    return np.concatenate(counts).astype(np.int64).reshape(draws, n, n)


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


def score_intervals(probabilities: Floats, labels: Integers) -> dict[str, Interval | None]:
    """Bootstrap of AUROC and AUPRC of "not ALLOW", from `ENOUGH` rows of each kind, and of AURC and ECE: `[N, 3], [N]`.

    Drawing adds noise, and noise counts as calibration error: of well calibrated probabilities, ECE's interval may begin above
    the figure.
    """
    risky = int((labels != Label.ALLOW).sum())
    kinds, rows = min(risky, len(labels) - risky), len(labels)
    least = {"auroc_not_allow": kinds, "auprc_not_allow": kinds, "aurc": rows, "ece": rows}
    told = [key for key, count in least.items() if count >= ENOUGH]
    draws = [scores_drawn(probabilities, labels, weights) for weights in bootstrap_counts(rows)] if told else []
    return {key: interval_95(np.concatenate([block[key] for block in draws])) if key in told else None for key in least}


def scores_drawn(probabilities: Floats, labels: Integers, weights: Floats) -> dict[str, Floats]:
    """AUROC, AUPRC, AURC and ECE of rows that come `weights` `[draws, N]` times: `[N, 3], [N] -> [draws]` each; NaN where a
    kind of row is missing. Rows of equal scores are taken together, as in `so8t.curves`."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    found, others = _from_the_top(-probabilities[:, Label.ALLOW], labels != Label.ALLOW, weights)
    wrong, hits = _from_the_top(confidence, ~right, weights)
    with np.errstate(invalid="ignore"):  # 0/0 without such rows is NaN
        steps, above = np.diff(others, prepend=0), found - np.diff(found, prepend=0) / 2
        auroc = (steps * above).sum(1) / (found[:, -1] * others[:, -1])
        auprc = (np.diff(found, prepend=0) * found / np.maximum(found + others, 1)).sum(1) / found[:, -1]
    covered = wrong + hits
    aurc = (np.diff(covered, prepend=0) * wrong / np.maximum(covered, 1)).sum(1) / covered[:, -1]
    ece = _ece_drawn(probabilities, labels, weights)
    return {"auroc_not_allow": auroc, "auprc_not_allow": auprc, "aurc": aurc, "ece": ece}


def ece_interval(probabilities: Floats, labels: Integers) -> Interval | None:
    """Bootstrap of ECE alone, as `score_intervals` tells it with the others: `[N, 3], [N]`; `None` under `ENOUGH` rows."""
    if len(labels) < ENOUGH:
        return None
    draws = [_ece_drawn(probabilities, labels, weights) for weights in bootstrap_counts(len(labels))]
    return interval_95(np.concatenate(draws))


def _ece_drawn(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """ECE of rows that come `weights` `[draws, N]` times: `[draws]`."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place, _ = confidence_bin(confidence)
    gaps = np.zeros((len(labels), place.max() + 1))
    gaps[np.arange(len(labels)), place] = right - confidence
    return np.asarray(np.abs(weights @ gaps).sum(1) / weights.sum(1))


def _from_the_top(scores: Floats, marked: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """How many rows that are marked, and that are not, score as high or higher: `[draws, distinct scores]`, highest first."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    sorted_weights = weights[:, order]
    hits = (sorted_weights * marked[order]).cumsum(1)[:, last]
    return hits, sorted_weights.cumsum(1)[:, last] - hits


def along_intervals(
    labels: Integers, tokens: Floats, detection: Floats, alarms: Floats, changes: Floats
) -> dict[str, Interval | None]:
    """Of what is decided along tokens, `[N]` each as in `so8t.streaming.Stream`: exact of the share of risky rows detected,
    by bootstrap over rows of the mean tokens until then, of the changes a row and of the false alarms."""
    risky = labels != Label.ALLOW
    found = detection[risky & np.isfinite(detection)]
    changes = changes[np.isfinite(changes)]
    one = np.ones_like
    return {
        "detected": rate_interval(len(found), int(risky.sum())),
        "time_to_detection": _ratio_interval(found, one(found)),
        "decision_changes": _ratio_interval(changes, one(changes)),
        "false_alarms_per_1000_tokens": _ratio_interval(1000 * alarms[~risky], tokens[~risky]),
    }


def _ratio_interval(above: Floats, below: Floats) -> Interval | None:
    """Bootstrap over rows of a sum by another, `[N]` each; `None` under `ENOUGH` rows."""
    if len(above) < ENOUGH:
        return None
    return interval_95(np.concatenate([(w @ above) / np.maximum(w @ below, 1) for w in bootstrap_counts(len(above))]))


def conformal_quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that a new one from where they came from stays under with probability `share` at least, or
    infinity, if they are too few to say (split conformal prediction: Vovk et al. 2005; Lei et al. 2018, arXiv:1604.04173)."""
    rank = math.ceil((len(values) + 1) * share)
    return sorted(values)[rank - 1] if rank <= len(values) else math.inf


def number(value: float | None, interval: Interval | None = None, *, digits: int = 3) -> str:
    """A figure and its interval, for tables; `-` where there is none."""
    told = "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
    return told if interval is None else f"{told} [{interval[0]:.2f}, {interval[1]:.2f}]"
