"""What a run's folder holds, read and checked: figures, predictions, gates. A file that is not there is `None` and is named."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from so8t.curves import Floats, Integers
from so8t.errors import ArtefactError
from so8t.files import write_json
from so8t.gates import matrix_angle
from so8t.intervals import Interval
from so8t.labels import LABELS, Label
from so8t.plots import Series, read_metrics
from so8t.policy import Policy, load_policy
from so8t.robustness import Wrapped
from so8t.so8 import MAPS
from so8t.triality import D_SIGMA_MINUS, D_SIGMA_PLUS, carry

CONFIG, METRICS, TENSORS, ADAPTER = "config.yaml", "csv/metrics.csv", "adapter/adapter.safetensors", "adapter/adapter.json"
ROBUSTNESS, DATA = "robustness.json", "data.json"
SETS = {"test": "mixed test split", "unseen": "unseen sources"}
"""The two sets that a run is evaluated on, by the names of their files."""

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Scores:
    """`test.json` or `unseen.json`, as `so8t.evaluation` writes it; files of earlier versions lack what has a default."""

    metrics: Figures
    confusion: list[list[int]]
    macro_f1_95: dict[str, Interval | None]
    baselines: dict[str, Figures]
    by_source: dict[str, dict[str, Figures]]
    by_language: dict[str, dict[str, Figures]] = field(default_factory=dict)
    by_form: dict[str, dict[str, Figures]] = field(default_factory=dict)
    intervals_95: dict[str, dict[str, dict[str, Interval | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Predicted:
    """One line of the predictions. `tokens`: of the worst mistakes, each token's text and what was decided after it. Files of
    earlier versions tell no `language` and no `form`."""

    user_request: str
    decision: Literal["ALLOW", "ESCALATE", "REFUSE"]
    probabilities: dict[Literal["ALLOW", "ESCALATE", "REFUSE"], float]
    safety_label: Literal["ALLOW", "ESCALATE", "REFUSE"]
    source: str
    failure: str = ""
    unsure: bool = False
    tokens: list[tuple[str, Literal["ALLOW", "ESCALATE", "REFUSE"]]] = field(default_factory=list)
    language: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class PredictedRows:
    """Rows that did not fail, in the file's order; `probabilities` `[N, 3]`, `labels` and `decisions` `[N]`."""

    rows: list[Predicted]
    failures: int
    probabilities: Floats = field(init=False)
    labels: Integers = field(init=False)
    decisions: Integers = field(init=False)

    def __post_init__(self) -> None:
        table = [[row.probabilities[name] for name in ("ALLOW", "ESCALATE", "REFUSE")] for row in self.rows]
        object.__setattr__(self, "probabilities", np.array(table, dtype=np.float64).reshape(-1, len(LABELS)))
        for name, values in (
            ("labels", [Label[row.safety_label] for row in self.rows]),
            ("decisions", [Label[row.decision] for row in self.rows]),
        ):
            object.__setattr__(self, name, np.array(values, dtype=np.int64))


@dataclass(frozen=True)
class DataRows:
    """What a run's rows were: how many by part (train, val, test, unseen) and `source/LABEL`, how many were left out of what,
    and which sources could not be had, a line each."""

    rows: dict[str, dict[str, int]]
    skipped: dict[str, int]
    missing: list[str]

    def by_source(self) -> list[list[str]]:
        """A row a source, and all together last: its name, and its ALLOW / ESCALATE / REFUSE rows in each part."""
        counted: dict[str, dict[str, Counter[str]]] = {}
        for part, counts in self.rows.items():
            for key, count in counts.items():
                source, _, label = key.rpartition("/")
                for name in (source, "all"):
                    counted.setdefault(name, {}).setdefault(part, Counter())[label] += count
        return [
            [name, *(" / ".join(str(parts[part][label]) for label in LABELS) if part in parts else "-" for part in self.rows)]
            for name, parts in sorted(counted.items(), key=lambda item: (item[0] == "all", item[0]))
        ]


def write_data(folder: Path, data: DataRows) -> None:
    """Writes `data.json` into a run's folder, atomically."""
    write_json(folder / DATA, asdict(data))


@dataclass(frozen=True)
class RunFolder:
    """All that a report can tell of."""

    folder: Path
    config: dict[str, object] | None
    data: DataRows | None
    series: Series | None
    scores: dict[str, Scores | None]
    predictions: dict[str, PredictedRows | None]
    angles: dict[str, Floats] | None
    trained: dict[str, int] | None
    policy: Policy | None
    robustness: list[Wrapped] | None

    def setting(self, key: str) -> object:
        """The value of a dotted key of `config.yaml`, `None` where it has none."""
        value: object = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> RunFolder:
    """Reads everything; files that were left out of the folder are `None`.

    Raises:
        ArtefactError: the folder is not a run's, or a file in it is damaged.
    """
    known = [CONFIG, METRICS, TENSORS, *(f"{part}{tail}" for part in SETS for tail in (".json", "_predictions.jsonl"))]
    if not any((folder / name).is_file() for name in known):
        raise ArtefactError(
            f"{folder}: not a run's folder, none of {', '.join(known)} is in it; give one such as outputs/<date>/<time>"
        )
    angles, trained = _gates(folder)
    return RunFolder(
        folder=folder,
        config=_config(folder / CONFIG),
        data=_data(folder / DATA),
        series=_series(folder / METRICS),
        scores={part: _scores(folder / f"{part}.json") for part in SETS},
        predictions={part: _predictions(folder / f"{part}_predictions.jsonl") for part in SETS},
        angles=angles,
        trained=trained,
        policy=load_policy(folder / "adapter") if (folder / TENSORS).is_file() else None,
        robustness=_robustness(folder / ROBUSTNESS),
    )


def _damaged(path: Path, error: Exception, line: int | None = None) -> ArtefactError:
    where = f"{path}:{line}" if line else str(path)
    return ArtefactError(
        f"{where}: is damaged: {'; '.join(str(error).splitlines()[:3])}; mend it, or move it out of the folder"
    )


def _config(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(dict[str, object]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None


def _data(path: Path) -> DataRows | None:
    """The rows; `None` of runs of earlier versions."""
    if not path.is_file():
        return None
    try:
        return TypeAdapter(DataRows).validate_json(path.read_bytes())
    except ValidationError as error:
        raise _damaged(path, error) from None


def _series(path: Path) -> Series | None:
    if not path.is_file():
        return None
    try:
        return read_metrics(path)
    except ValueError as error:
        raise _damaged(path, error) from None


def _scores(path: Path) -> Scores | None:
    if not path.is_file():
        return None
    try:
        scores = TypeAdapter(Scores).validate_json(path.read_bytes())
    except ValidationError as error:
        raise _damaged(path, error) from None
    if len(scores.confusion) != len(LABELS) or any(len(row) != len(LABELS) for row in scores.confusion):
        raise _damaged(path, ValueError(f"confusion is not {len(LABELS)} rows of {len(LABELS)}"))
    return scores


def _predictions(path: Path) -> PredictedRows | None:
    if not path.is_file():
        return None
    adapter = TypeAdapter(Predicted)
    rows: list[Predicted] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = adapter.validate_json(line)
            except ValidationError as error:
                raise _damaged(path, error, number) from None
            if len(row.probabilities) != len(LABELS):
                raise _damaged(path, ValueError(f"probabilities of {len(row.probabilities)} labels, not {len(LABELS)}"), number)
            if not row.failure and not all(0 <= p <= 1 for p in row.probabilities.values()):
                raise _damaged(path, ValueError("a probability is not between 0 and 1"), number)
            rows.append(row)
    kept = [row for row in rows if not row.failure]
    return PredictedRows(kept, len(rows) - len(kept))


def _robustness(path: Path) -> list[Wrapped] | None:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(list[Wrapped]).validate_python(json.loads(path.read_bytes())["wrappings"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _gates(folder: Path) -> tuple[dict[str, Floats] | None, dict[str, int] | None]:
    """`||R - I||_F` of every block by gate, `[blocks]`, and how many numbers were trained, by part; needs no base."""
    path = folder / TENSORS
    if not path.is_file() or not (folder / ADAPTER).is_file():
        return None, None
    try:
        told = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        to_rotation = MAPS[told["gate"]["map"]]
        tensors = load(path.read_bytes())
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(path.parent, error) from None
    angles: dict[str, Floats] = {}
    trained = {"R_safe": 0, "R_cmd": 0, "head": 0}
    for name, tensor in sorted(tensors.items(), key=lambda item: _by_depth(item[0])):
        if found := re.fullmatch(r"gates\.([\w.]+)\.(safe|cmd)\.coords", name):
            angles[f"{found[1]} {found[2]}".removeprefix("interior.")] = matrix_angle(to_rotation(tensor)).numpy()
            trained[f"R_{found[2]}"] += tensor.numel()
            if found[1] == "last" and told["gate"].get("triality"):
                for name, d_sigma in (("safe", D_SIGMA_PLUS), ("authority", D_SIGMA_MINUS)):
                    angles[f"last {name}"] = matrix_angle(to_rotation(carry(tensor, d_sigma))).numpy()
        elif name.startswith("head.linear."):  # what else is in the head was measured or fitted before
            trained["head"] += tensor.numel()
    return angles, trained


def _by_depth(name: str) -> tuple[int, str]:
    """Gates of deeper layers after those of shallower ones, the last gate at the end."""
    layer = re.search(r"\.(\d+)_", name)
    return (int(layer[1]) if layer else torch.iinfo(torch.int32).max, name)


__all__ = [
    "ADAPTER", "CONFIG", "DATA", "METRICS", "ROBUSTNESS", "SETS", "TENSORS", "DataRows", "PredictedRows", "RunFolder", "Scores",
    "read_run", "write_data",
]  # fmt: skip
