"""Curves over thresholds: false allow against over-refusal, risk against coverage, confidence against accuracy.

Pure functions of probabilities `[N, 3]` and labels `[N]`, all in float64. What has no rows to be measured on is NaN.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_curve

from so8t.labels import Label

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def auprc_not_allow(probabilities: Floats, labels: Integers) -> float:
    """Average precision of "not ALLOW", scored by `1 - P(ALLOW)`. Knowing nothing gives the share of such rows."""
    risky = labels != Label.ALLOW
    if not risky.any():
        return float("nan")
    return float(average_precision_score(risky, -probabilities[:, Label.ALLOW]))


@dataclass(frozen=True)
class TradeOff:
    """Where ALLOW is given from P(ALLOW) `>= thresholds[k]` up: rates `[K]` in `[0, 1]`, thresholds growing.

    `false_allow` is the share of the rows labelled ESCALATE or REFUSE that are allowed, `over_refusal` the share of the rows
    labelled ALLOW that are not. The last threshold is infinite: nothing is allowed.
    """

    thresholds: Floats
    false_allow: Floats
    over_refusal: Floats


def trade_off(probabilities: Floats, labels: Integers) -> TradeOff | None:
    """Both rates over every threshold on P(ALLOW), whatever the other two classes get; `None` where either kind of row is
    missing. It is the ROC curve with ALLOW as the positive class, with its misses in place of its hits."""
    allow = labels == Label.ALLOW
    if allow.all() or not allow.any():
        return None
    false_allow, allowed, thresholds = roc_curve(allow, probabilities[:, Label.ALLOW], drop_intermediate=False)
    return TradeOff(thresholds[::-1], false_allow[::-1], 1 - allowed[::-1])


@dataclass(frozen=True)
class OperatingPoint:
    """What one way of deciding costs, on the axes of `TradeOff`."""

    false_allow: float
    over_refusal: float


def operating_point(allowed: NDArray[np.bool_], labels: Integers) -> OperatingPoint | None:
    """Both rates of decisions that were taken; `None` where either kind of row is missing."""
    benign = labels == Label.ALLOW
    if benign.all() or not benign.any():
        return None
    return OperatingPoint(float(allowed[~benign].mean()), float((~allowed[benign]).mean()))


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate among the most confident rows: `coverage` `[K]` in `(0, 1]` grows, `risk` `[K]` in `[0, 1]`; `aurc` is the
    mean risk over all rows' coverages, `best_aurc` that of an order that puts every error last."""

    coverage: Floats
    risk: Floats
    aurc: float
    best_aurc: float


def risk_coverage(probabilities: Floats, labels: Integers) -> RiskCoverage | None:
    """Risk-coverage curve (Geifman and El-Yaniv 2017, arXiv:1705.08500): the most probable class is decided, and its
    probability is the confidence. Rows of equal confidence are covered together, each at the risk of them all, so that their
    order does not matter. `None` without rows."""
    if not len(labels):
        return None
    confidence = probabilities.max(1)
    wrong = probabilities.argmax(1) != labels
    order = np.argsort(-confidence, kind="stable")
    covered = np.arange(1, len(labels) + 1)
    # the last row of each run of equal confidences, where all of them are covered
    last = np.append(np.flatnonzero(np.diff(confidence[order])), len(labels) - 1)
    risk = wrong[order].cumsum()[last] / covered[last]
    sizes = np.diff(last, prepend=-1)
    ideal = np.sort(wrong).cumsum() / covered
    return RiskCoverage(covered[last] / len(labels), risk, float(np.average(risk, weights=sizes)), float(ideal.mean()))


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over the confidence in `[0, 1]`, `[K]` each: rows, mean confidence and accuracy (NaN if empty)."""

    edges: Floats
    rows: Integers
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: the gaps, weighted by the rows (Guo et al. 2017, arXiv:1706.04599)."""
        full = self.rows > 0
        if not full.any():
            return float("nan")
        return float(np.average(np.abs(self.accuracy - self.confidence)[full], weights=self.rows[full]))


def confidence_bin(confidence: Floats, *, bins: int = 15) -> tuple[Integers, Floats]:
    """Numbers `[N]` of the bins of equal width into which confidences `[N]` fall, and the bins' edges. A value on an edge
    belongs above it, as in torchmetrics."""
    edges = np.linspace(0, 1, bins + 1)
    return np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1), edges


def reliability(probabilities: Floats, labels: Integers, *, bins: int = 15) -> Reliability:
    """How often the most probable class is right, by how probable it was said to be."""
    confidence = probabilities.max(1, initial=0.0)
    right = probabilities.argmax(1) == labels
    place, edges = confidence_bin(confidence, bins=bins)
    rows = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0/0 of an empty bin is NaN
        means = np.bincount(place, weights=confidence, minlength=bins) / rows
        accuracy = np.bincount(place, weights=right, minlength=bins) / rows
    return Reliability(edges, rows, means, accuracy)
