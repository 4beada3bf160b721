"""Turning probabilities into decisions with a promise: a temperature, and two thresholds found by testing.

*Temperature* (Guo et al. 2017, arXiv:1706.04599): one number that all logits are divided by, fitted by likelihood on held-out
rows. *Thresholds* (learn then test, Angelopoulos et al. 2021, arXiv:2110.01052): from the strictest downwards, each is tested
with an exact binomial test (Clopper and Pearson 1934), until the first that fails. So the false-allow rate of the one chosen
is above `alpha` with probability at most `delta` over the draw of the rows, as long as later requests come from where they came
from.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import beta, binom
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from so8t.errors import DataError
from so8t.labels import LABELS, Label
from so8t.model import Decisions
from so8t.policy import Policy, Threshold, calibrated

TEMPERATURES = (0.05, 20.0)
"""Where the temperature is looked for: rows that are all decided rightly have no finite best one."""

GRID: NDArray[np.float64] = expit(np.linspace(16.0, logit(1 / len(LABELS)), 2001))
"""Thresholds in the order in which they are tested, even in log-odds: from 1 - 1e-7 to 1/3, below which no label is the most
probable one. Fixed beforehand, as the test demands."""


@dataclass(frozen=True)
class Target:
    """What is to be promised: a rate of at most `alpha`, except with probability `delta`."""

    alpha: float
    delta: float

    @property
    def least_rows(self) -> int:
        """Rows without a single error that would be just enough: the smallest `n` with `(1 - alpha)^n <= delta`."""
        n = max(1, int(np.log(self.delta) / np.log1p(-self.alpha)))
        while binom.cdf(0, n, self.alpha) > self.delta:
            n += 1
        return n


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature under which the labels are most likely: `[N, 3], [N]`. The likelihood has one maximum, for its negative
    logarithm is convex in `1 / T`."""
    log_p = probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(log_p / np.exp(log_temperature), labels))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the most probable label, 15 bins: `[N, 3], [N]`."""
    return float(multiclass_calibration_error(probabilities, labels, num_classes=len(LABELS), n_bins=15))


def upper_bound(errors: int, rows: int, delta: float) -> float:
    """One-sided Clopper-Pearson: the largest rate under which so few errors still have probability `delta`."""
    return 1.0 if errors == rows else float(beta.ppf(1 - delta, errors + 1, rows - errors))


def find_threshold(scores: NDArray[np.float64], target: Target) -> Threshold:
    """Fixed-sequence test over `GRID` on rows that should *not* get a label: `scores` `[n]` is its probability, 0 where it
    would not be given at any threshold. Scores that are equal pass a threshold together."""
    rows = len(scores)
    errors = rows - np.searchsorted(np.sort(scores), GRID, side="left")
    # P(Bin(n, alpha) <= errors) <= delta is the same as upper_bound(errors) <= alpha, and quicker over a whole grid
    passed = binom.cdf(errors, rows, target.alpha) <= target.delta
    tested = len(GRID) if passed.all() else int(np.argmin(passed))
    at = float(GRID[tested - 1]) if tested else None
    wrong = int(errors[tested - 1]) if tested else 0
    return Threshold(at, target.alpha, target.delta, rows, wrong / rows, upper_bound(wrong, rows, target.delta))


def halves(labels: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Row numbers for the temperature and for the thresholds: of the rows labelled ALLOW and of the others, half each at
    random; of an odd number, the thresholds get one more."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for benign in (True, False):
        rows = ((labels == Label.ALLOW) == benign).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, chosen in zip(parts, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True):
            part.append(chosen)
    return torch.cat(parts[0]), torch.cat(parts[1])


def _check_enough(rows: int, target: Target, what: str, option: str) -> None:
    least = target.least_rows
    if rows < least:
        raise DataError(
            f"{rows} rows {what} are left to test thresholds on, too few to promise a rate of at most {target.alpha:g} with "
            f"delta {target.delta:g}: {least} are needed even if none goes wrong, and as half of the rows go to the "
            f"temperature, {2 * least - 1} in all. Give more with --data, or raise {option}; nothing was written"
        )


def fit_policy(
    decided: Decisions,
    labels: Tensor,
    *,
    split: tuple[Tensor, Tensor],
    allow: Target,
    refuse: Target,
    rows_from: str,
    adapter_sha256: str,
) -> Policy:
    """Fits the temperature on the first part of the `split`, and tests both thresholds on the second.

    Rows that failed are left out: they are never answered ALLOW, so without them the promise is only harder to give.

    Raises:
        DataError: there are too few rows to promise anything.
    """
    first, second = (rows[~decided.failed[rows]] for rows in split)
    risky = labels[second] != Label.ALLOW
    _check_enough(int(risky.sum()), allow, "labelled ESCALATE or REFUSE", "--alpha")
    _check_enough(int((~risky).sum()), refuse, "labelled ALLOW", "--refuse-alpha")
    if not len(first):
        raise DataError("no rows are left to fit the temperature on: give more with --data; nothing was written")
    temperature = fit_temperature(decided.probabilities[first], labels[first])
    probabilities = calibrated(decided.probabilities[second], temperature)

    def tested(label: Label, rows: Tensor, target: Target) -> Threshold:
        given = (decided.labels[second] == label)[rows]
        return find_threshold(torch.where(given, probabilities[rows, label], 0.0).numpy(), target)

    return Policy(
        temperature=temperature,
        allow=tested(Label.ALLOW, risky, allow),
        refuse=tested(Label.REFUSE, ~risky, refuse),
        temperature_rows=len(first),
        rows_from=rows_from,
        ece_before=calibration_error(decided.probabilities[second], labels[second]),
        ece_after=calibration_error(probabilities, labels[second]),
        adapter_sha256=adapter_sha256,
    )
