"""Runs beside each other: grouped by what they differ in, seeds apart, with paired intervals of what each variant gains.

Reads only the runs' folders. An interval draws rows, the same for all variants, and a variant's seeds, the same for two
variants that have as many; with one seed it knows nothing of what another would give.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from so8t.curves import Floats, Integers
from so8t.errors import ArtefactError, SO8TError
from so8t.intervals import Interval, interval_95, macro_f1, resampled
from so8t.labels import Label
from so8t.run_folder import CONFIG, SETS, PredictedRows, RunFolder, read_run

DRAWS = 1000
SAME_DATA = ("path", "test_path", "holdout_sources", "split_seed", "val_fraction", "test_fraction")
"""Keys of `data` that decide which rows are tests, compared where the rows themselves are not in the folders."""
IGNORED = (
    "seed", "tags", "paths", "logger", "objective", "ckpt_path", "cache.folder", "cache.max_gib",
    "callbacks.progress", "trainer.enable_progress_bar", "trainer.plugins",
)  # fmt: skip
"""Settings that make no variant."""


@dataclass(frozen=True)
class Figure:
    """One column: what it is called, on which set, and whether more is better; `paired` ones can be drawn again, the others are
    compared seed by seed. `digits` are shown."""

    title: str
    part: str
    key: str
    more: bool = False
    paired: bool = False
    digits: int = 3


FIGURES = (
    Figure("macro-F1, mixed", "test", "macro_f1", more=True, paired=True),
    Figure("macro-F1, unseen", "unseen", "macro_f1", more=True, paired=True),
    Figure("false allow, mixed", "test", "false_allow_rate", paired=True),
    Figure("false allow, unseen", "unseen", "false_allow_rate", paired=True),
    Figure("over-refusal, mixed", "test", "over_refusal_rate", paired=True),
    Figure("over-refusal, unseen", "unseen", "over_refusal_rate", paired=True),
    Figure("escalate recall, mixed", "test", "escalate_recall", more=True, paired=True),
    Figure("escalate recall, unseen", "unseen", "escalate_recall", more=True, paired=True),
    Figure("refuse recall, mixed", "test", "refuse_recall", more=True, paired=True),
    Figure("refuse recall, unseen", "unseen", "refuse_recall", more=True, paired=True),
    Figure("AUPRC, mixed", "test", "auprc_not_allow", more=True),
    Figure("AUPRC, unseen", "unseen", "auprc_not_allow", more=True),
    Figure("sounds dangerous, allowed", "test", "sounds_dangerous_allowed", more=True),
    Figure("flicker", "test", "flicker"),
    Figure("ECE", "test", "ece"),
    Figure("risky rows detected along the tokens", "test", "detected", more=True),
    Figure("tokens to detection", "test", "time_to_detection", digits=1),
    Figure("decision changes a row", "test", "decision_changes", digits=2),
    Figure("false alarms per 1,000 tokens", "test", "false_alarms_per_1000_tokens", digits=1),
    Figure("perplexity of answers, all gates", "test", "task_perplexity", digits=1),
)
PAIRED = tuple(figure for figure in FIGURES if figure.paired)
RECALLS = {"escalate_recall": Label.ESCALATE, "refuse_recall": Label.REFUSE}


@dataclass(frozen=True)
class LeftOut:
    """A folder that could not be compared, and why."""

    folder: Path
    why: str


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in its order; `differences` are the settings in which variants differ."""

    name: str
    differences: dict[str, str]
    runs: list[RunFolder]

    @property
    def seeds(self) -> list[object]:
        """One a run."""
        return [run.setting("seed") for run in self.runs]

    @property
    def trained(self) -> int | None:
        """Trainable parameters, head included."""
        counts = self.runs[0].trained
        return None if counts is None else sum(counts.values())

    def values(self, figure: Figure) -> list[float]:
        """One a run, in the order of `runs`; none where a run lacks it."""
        found = [_value(run, figure) for run in self.runs]
        return [value for value in found if value is not None] if None not in found else []

    @cached_property
    def drawn(self) -> dict[Figure, Floats]:
        """Bootstrap draws of the mean over seeds, `[DRAWS]`, of every figure that can be told from predictions."""
        chosen = np.random.default_rng(1).integers(0, len(self.runs), (DRAWS, len(self.runs)))
        table: dict[Figure, Floats] = {}
        for part in SETS:
            told = [rows for run in self.runs if (rows := run.predictions[part]) is not None and rows.rows]
            if len(told) < len(self.runs):
                continue
            confusions = [resampled(rows.labels.tolist(), rows.decisions.tolist(), draws=DRAWS) for rows in told]
            for figure in PAIRED:
                if figure.part == part:
                    by_run = np.stack([_rate(figure.key, c, np.unique(told[0].labels)) for c in confusions], axis=1)
                    table[figure] = np.take_along_axis(by_run, chosen, axis=1).mean(1)
        return table

    def interval(self, figure: Figure) -> Interval | None:
        """95 %, of the mean over seeds."""
        return _interval(self.drawn.get(figure))

    def gain(self, figure: Figure, baseline: "Variant") -> tuple[float, Interval] | None:
        """Difference of the means to a baseline, and its paired 95 % interval."""
        ours, theirs = self.drawn.get(figure), baseline.drawn.get(figure)
        values, others = self.values(figure), baseline.values(figure)
        if ours is None or theirs is None or not values or not others:
            return None
        interval = _interval(ours - theirs)
        return None if interval is None else (statistics.mean(values) - statistics.mean(others), interval)

    def verdict(self, figure: Figure, baseline: "Variant") -> str | None:
        """`better`, `worse`, or `no difference shown` where the interval holds zero."""
        gain = self.gain(figure, baseline)
        if gain is None:
            return None
        low, high = gain[1]
        if low <= 0 <= high:
            return "no difference shown"
        return "better" if (low > 0) == figure.more else "worse"

    def gain_by_seed(self, figure: Figure, baseline: "Variant") -> list[float]:
        """Differences to a baseline's runs with the same seeds; none where the seeds are not the same."""
        values, others = self.values(figure), baseline.values(figure)
        if self.seeds != baseline.seeds or not values or not others:
            return []
        return [value - other for value, other in zip(values, others, strict=True)]

    def _verdicts(self, key: str, baseline: "Variant") -> set[str]:
        """On one figure, over the sets where there is one."""
        return {told for figure in PAIRED if figure.key == key and (told := self.verdict(figure, baseline)) is not None}

    def more_right(self, baseline: "Variant") -> bool | None:
        """Whether macro-F1 is shown to be better on one set at least and worse on none; `None` where nothing can be told."""
        verdicts = self._verdicts("macro_f1", baseline)
        return "better" in verdicts and "worse" not in verdicts if verdicts else None

    def more_harm(self, baseline: "Variant") -> bool:
        """Whether false allow is shown to be worse on any set."""
        return "worse" in self._verdicts("false_allow_rate", baseline)

    def helps(self, baseline: "Variant") -> bool | None:
        """Whether it is shown to be more right, and not to allow more harm; `None` where nothing can be told."""
        right = self.more_right(baseline)
        return right and not self.more_harm(baseline)


@dataclass(frozen=True)
class Comparison:
    """All variants in the order of their first run, the one that the others are measured against, and what was left out."""

    variants: list[Variant]
    baseline: Variant
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def others(self) -> list[Variant]:
        """All but the baseline."""
        return [variant for variant in self.variants if variant is not self.baseline]


def sweep_folders(folder: Path) -> list[Path]:
    """The runs' folders of a multirun, in the order of their numbers.

    Raises:
        ArtefactError: there is none.
    """
    found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []
    if not found:
        raise ArtefactError(f"{folder}: no runs in it; give the folder of a multirun, such as multirun/<date>/<time>")
    return sorted(found, key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdigit() else 0, p.name))


def compare(runs: Sequence[Path], *, of_sweep: Sequence[Path] = (), baseline: str | None = None) -> Comparison:
    """Reads, groups and checks. Of a sweep, runs that did not finish are left out; a run that was named must be whole.

    Raises:
        ArtefactError: a run is not whole, or runs were tested on different rows.
        SO8TError: no variant or several fit `baseline`.
    """
    read = [_whole(folder) for folder in runs]
    left_out: list[LeftOut] = []
    for folder in of_sweep:
        try:
            read.append(_whole(folder))
        except ArtefactError as error:
            left_out.append(LeftOut(folder, str(error).removeprefix(f"{folder}: ")))
    if not read:
        raise ArtefactError(f"{of_sweep[0].parent}: none of its {len(left_out)} runs can be compared: {left_out[0].why}")
    _same_rows(read)
    variants, twins = _grouped(read)
    chosen = variants[0]
    if baseline is not None:
        fitting = [v for v in variants if baseline == v.name] or [v for v in variants if baseline in v.name]
        if len(fitting) != 1:
            names = "; ".join(v.name for v in fitting or variants)
            raise SO8TError(
                f"--baseline {baseline}: {'several variants fit' if fitting else 'no variant is named so'}: {names}"
            )
        chosen = fitting[0]
    return Comparison(variants, chosen, left_out + twins)


def _whole(folder: Path) -> RunFolder:
    """A run that has its settings and at least one set's figures, without failures.

    Raises:
        ArtefactError: it has not.
    """
    run = read_run(folder)
    if run.config is None:
        raise ArtefactError(f"{folder}: no {CONFIG}, so its settings are not known")
    if not any(run.scores.values()):
        raise ArtefactError(f"{folder}: neither {' nor '.join(f'{part}.json' for part in SETS)}: the run was not evaluated")
    for part, title in SETS.items():
        scores, told = run.scores[part], run.predictions[part]
        failures = int((scores.metrics.get("failures") if scores else 0) or 0)
        if failures or (told is not None and told.failures):
            raise ArtefactError(f"{folder}: {failures} rows of the {title} failed, so its figures are of fewer rows")
        if scores is not None and told is not None and _counts(told) != scores.confusion:
            raise ArtefactError(f"{folder}: {part}.json and {part}_predictions.jsonl are not of the same decisions")
    return run


def _counts(told: PredictedRows) -> list[list[int]]:
    n = len(Label)
    return np.bincount(told.labels * n + told.decisions, minlength=n * n).reshape(n, n).tolist()


def _same_rows(runs: list[RunFolder]) -> None:
    """Every set has the same rows in every run.

    Raises:
        ArtefactError: two runs differ.
    """
    first = runs[0]
    for run in runs[1:]:
        for part, title in SETS.items():
            ours, theirs = run.predictions[part], first.predictions[part]
            if ours is not None and theirs is not None:
                same = _rows(ours) == _rows(theirs)
            else:
                same = _split(run, part) == _split(first, part)
            if not same:
                raise ArtefactError(
                    f"{run.folder} and {first.folder} were tested on different rows ({title}): their figures cannot be compared"
                )


def _rows(told: PredictedRows) -> list[tuple[str, str, str]]:
    return [(row.user_request, row.safety_label, row.source) for row in told.rows]


def _split(run: RunFolder, part: str) -> object:
    """What tells a set's rows where there are no predictions: rows by label, and how the data was split."""
    scores = run.scores[part]
    return scores and [sum(row) for row in scores.confusion], [run.setting(f"data.{key}") for key in SAME_DATA]


def _grouped(runs: list[RunFolder]) -> tuple[list[Variant], list[LeftOut]]:
    """Variants by their settings; of two runs with the same settings and seed the first counts."""
    groups: dict[str, list[RunFolder]] = {}
    settings: dict[str, dict[str, str]] = {}
    twins: list[LeftOut] = []
    for run in runs:
        flat = flat_settings(run.config or {})
        key = json.dumps(flat, sort_keys=True)
        group = groups.setdefault(key, [])
        settings[key] = flat
        twin = next((other for other in group if other.setting("seed") == run.setting("seed")), None)
        if twin is None:
            group.append(run)
        else:
            twins.append(LeftOut(run.folder, f"the same settings and seed as {twin.folder}"))
    names = list(dict.fromkeys(name for flat in settings.values() for name in flat))
    differing = [name for name in names if len({flat.get(name) for flat in settings.values()}) > 1]
    tags = {key: {_told(run.setting("tags")) for run in group} for key, group in groups.items()}
    by_tags = len({min(told) for told in tags.values()}) == len(tags) and all(
        len(told) == 1 and told != {"[]"} for told in tags.values()
    )
    variants = []
    for key, group in groups.items():
        differences = {name: settings[key].get(name, "(absent)") for name in differing}
        name = min(tags[key]).strip("[]") if by_tags else " ".join(f"{k}={v}" for k, v in differences.items())
        variants.append(Variant(name or "all runs", differences, sorted(group, key=lambda run: _seed(run))))
    return variants, twins


def _seed(run: RunFolder) -> int:
    seed = run.setting("seed")
    return seed if isinstance(seed, int) else 0


def flat_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys of a resolved `config.yaml` and their values, as an override would say them, without those in `IGNORED`; the
    run's own folder is taken out."""
    flat: dict[str, str] = {}
    own = str((config.get("paths") or {}).get("output_dir"))

    def walk(prefix: str, value: object) -> None:
        if any(prefix == ignored or prefix.startswith(f"{ignored}.") for ignored in IGNORED):
            return
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = _told(value).replace(own, ".")

    walk("", config)
    return flat


def _told(value: object) -> str:
    """A value as an override would say it."""
    if isinstance(value, list):
        return f"[{','.join(map(_told, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def _value(run: RunFolder, figure: Figure) -> float | None:
    scores = run.scores[figure.part]
    if scores is None:
        return None
    if figure.key == "sounds_dangerous_allowed":
        return scores.by_source.get("(benign, sounds dangerous)", {}).get("SO8T", {}).get("accuracy")
    return scores.metrics.get(figure.key)


def _rate(key: str, confusion: Integers, present: Integers) -> Floats:
    """A figure of confusion matrices, `[..., 3, 3] -> [...]`; NaN without the rows that it counts."""
    if key == "macro_f1":
        return macro_f1(confusion, present)
    allow = confusion[..., Label.ALLOW, :]
    with np.errstate(invalid="ignore"):
        if key in RECALLS:
            own = confusion[..., RECALLS[key], :]
            return np.asarray(own[..., RECALLS[key]] / own.sum(-1))
        if key == "over_refusal_rate":
            return np.asarray(1 - allow[..., Label.ALLOW] / allow.sum(-1))
        risky = confusion.sum(-2) - allow
        return np.asarray(risky[..., Label.ALLOW] / risky.sum(-1))


def _interval(draws: Floats | None) -> Interval | None:
    """95 % of the draws that had rows to count."""
    if draws is None or not np.isfinite(draws).any():
        return None
    return interval_95(draws[np.isfinite(draws)])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; NaN of nothing, and for one seed's spread."""
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
