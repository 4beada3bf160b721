"""The policy beside an adapter, which turns its probabilities into decisions with a promise. `calibration.py` fits it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Interval
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from so8t.errors import ArtefactError
from so8t.files import write_json
from so8t.labels import FAIL_CLOSED, LABELS, Label
from so8t.model import Decisions
from so8t.specs import Count, Fraction, Positive, PositiveInt, spec

FORMAT = 1
FILE = "calibration.json"

Inside = Annotated[float, Interval(gt=0, lt=1)]


@spec
class Threshold:
    """One label is given from the probability `at` up (`None`: never). `rate` is the share of `rows`, all of another label,
    that got it; `bound` is the upper Clopper-Pearson bound of the true rate at confidence `1 - delta`."""

    at: Fraction | None
    alpha: Inside
    delta: Inside
    rows: PositiveInt
    rate: Fraction
    bound: Fraction


@spec
class Policy:
    """How one adapter's probabilities become decisions, and what was measured when it was made.

    `allow` bounds the rows labelled ESCALATE or REFUSE that are answered ALLOW; `refuse` those labelled ALLOW that are refused.
    Each promise has its own `delta`; both hold together except with probability `allow.delta + refuse.delta`. The errors
    `ece_*` are of the rows that the thresholds were tested on, which the temperature has not seen.
    """

    temperature: Positive
    allow: Threshold
    refuse: Threshold
    temperature_rows: Count
    rows_from: str
    ece_before: Fraction
    ece_after: Fraction
    adapter_sha256: str

    def apply(self, decided: Decisions) -> Decisions:
        """The calibrated probabilities and the policy's decisions, failing closed.

        ALLOW and REFUSE are given where they are the most probable label and reach their threshold; everything else is
        ESCALATE, and counts as unsure where another label was the most probable one. What had failed or was unsure before
        stays so.
        """
        probabilities = calibrated(decided.probabilities, self.temperature)
        labels = decided.labels.clone()
        for label, threshold in ((Label.ALLOW, self.allow), (Label.REFUSE, self.refuse)):
            reached = probabilities[:, label] >= (np.inf if threshold.at is None else threshold.at)
            labels[(labels == label) & ~reached] = int(FAIL_CLOSED)
        unsure = decided.unsure | (labels != decided.labels)
        return Decisions(probabilities.float(), labels, decided.failed, unsure)

    def describe(self) -> str:
        """In words: what is promised, in percent."""
        promises = [
            f"{what} alpha {100 * threshold.alpha:g} %, delta {100 * threshold.delta:g} %"
            for what, threshold in (("false allow", self.allow), ("false refusal", self.refuse))
        ]
        return "under a policy: " + "; ".join(promises)

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return dataclasses.asdict(self)


def calibrated(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature: `softmax(log p / T)`, which is `softmax(logits / T)`: `[N, 3] -> [N, 3]`, float64."""
    return (probabilities.double().log() / temperature).softmax(-1)


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors."""
    return hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


def save_policy(folder: Path, policy: Policy) -> Path:
    """Writes `calibration.json` beside the adapter, atomically."""
    path = folder / FILE
    write_json(path, {"format": FORMAT, "labels": list(LABELS), **policy.as_json()})
    return path


def load_policy(folder: Path) -> Policy | None:
    """The policy beside an adapter; `None` where it was never calibrated.

    Raises:
        ArtefactError: it is damaged, of other labels, or of another adapter.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version, labels = told.pop("format"), told.pop("labels")
        if version != FORMAT:
            raise ArtefactError(f"{path}: format {version} of another version of SO8T, expected {FORMAT}: calibrate again")
        if tuple(labels) != LABELS:
            raise ArtefactError(f"{path}: labels are {labels}, expected {list(LABELS)}")
        policy = TypeAdapter(Policy).validate_python(told)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ArtefactError(f"{path}: the policy is damaged: {str(error).splitlines()[0]}; calibrate again") from None
    if policy.adapter_sha256 != adapter_digest(folder):
        raise ArtefactError(
            f"{path}: was made for another adapter than the one beside it, so it promises nothing here: "
            "run `so8t calibrate` again, or delete it"
        )
    return policy
