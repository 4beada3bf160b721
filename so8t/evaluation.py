"""Evaluating decisions on any records: predictions in the order of the rows, figures by source, baselines beside them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from so8t.base import shared_lead
from so8t.baselines import Baselines, Floats
from so8t.calibration import Policy
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import LengthSampler, RecordDataset
from so8t.data.records import Record
from so8t.data.store import row_key
from so8t.data.tokenise import Template
from so8t.files import write_text
from so8t.intervals import macro_f1_interval
from so8t.labels import LABELS, Label
from so8t.metrics import SafetyMetrics, constant_baselines, flicker
from so8t.model import Decisions, SO8TModel, at_position
from so8t.streaming import Stream, along

SHOWN = (
    ("macro_f1", "macro-F1 [95 %]"),
    ("false_allow_rate", "false allow"),
    ("over_refusal_rate", "over-refusal"),
    ("refuse_recall", "refuse recall"),
    ("escalate_recall", "escalate recall"),
    ("auroc_not_allow", "AUROC"),
    ("ece", "ECE"),
)


@dataclass
class Predictions:
    """One row per record, in the records' order: `probabilities` `[N, 3]`, the others `[N]`. `stream` is what was decided
    along the tokens, where there are tokens."""

    probabilities: Tensor
    decisions: Tensor
    failed: Tensor
    unsure: Tensor
    flicker: Tensor
    changes: Tensor
    stream: Stream | None = None

    def metrics(self, records: Sequence[Record], rows: Sequence[int] | None = None) -> dict[str, float]:
        """Figures over all rows or some of them."""
        chosen = torch.tensor(range(len(records)) if rows is None else list(rows), dtype=torch.long)
        labels = torch.tensor([int(r.safety_label) for r in records])[chosen]
        metrics = SafetyMetrics()
        metrics.update(self.probabilities[chosen], self.decisions[chosen], labels, self.failed[chosen], self.unsure[chosen])
        figures = metrics.compute()
        figures["flicker"] = float(self.flicker[chosen].nanmean())
        figures["decision_changes"] = float(self.changes[chosen].nanmean())
        if self.stream is not None:
            figures |= self.stream.chosen(chosen).figures(labels)
        return figures

    @property
    def decided(self) -> Decisions:
        """Without what was seen along the tokens."""
        return Decisions(self.probabilities, self.decisions, self.failed, self.unsure)

    def under(self, policy: Policy) -> "Predictions":
        """Decided by a policy; `flicker`, `changes` and `stream` stay those of the head's own."""
        new = policy.apply(self.decided)
        return replace(self, probabilities=new.probabilities, decisions=new.labels, failed=new.failed, unsure=new.unsure)

    @classmethod
    def of_probabilities(cls, probabilities: Tensor) -> "Predictions":
        """Of a classifier that has nothing but probabilities."""
        n = len(probabilities)
        no, nan = torch.zeros(n, dtype=torch.bool), torch.full((n,), math.nan)
        return cls(probabilities, probabilities.argmax(-1), no, no, nan, nan)


PREFIX_TOKENS = 2048
"""Tokens of one batch, padding included, that only passes the prefix: large enough for full speed, small beside the weights."""


def fill_cache(
    model: SO8TModel, records: Sequence[Record], template: Template, *, batch_size: int, cache: PrefixCache, title: str
) -> None:
    """Runs the prefix once over all records that the cache does not hold, and says so before, if they will not fit. No batch
    is larger than `batch_size` of the longest rows."""
    store = cache.store
    if store is None:
        return
    dataset = RecordDataset(records, template)
    keys = [row_key(torch.tensor(encoded.tokens)) for encoded in dataset.encoded]
    console = Console(stderr=True)
    most = min(PREFIX_TOKENS, batch_size * template.max_length)
    with store.filling():
        todo = sorted((i for i, key in enumerate(keys) if key not in store), key=dataset.length)
        if not todo:
            return
        size = sum(map(dataset.length, todo)) * cache.width * store.dtype.itemsize
        console.print(
            f"{title}: {len(keys) - len(todo):,} of {len(keys):,} rows are in {store.folder}, the others take "
            f"{size / 2**30:.2f} GiB of {max(0, store.room) / 2**30:.2f} that are left"
        )
        if size > store.room:
            console.print(
                "[yellow]that is too little: what does not fit is computed again in every epoch. Raise cache.max_gib, store "
                "less with cache.dtype=bfloat16, or free room with `so8t cache clear`[/]"
            )
        for rows in track(token_batches(todo, dataset, most), description=title, console=console, transient=True):
            batch = dataset[rows]
            cache.prefix(batch.tokens.to(model.base.device), batch.mask.to(model.base.device))
            if keys[rows[-1]] not in store:  # full
                break


def token_batches(rows: list[int], dataset: RecordDataset, most: int = PREFIX_TOKENS) -> list[list[int]]:
    """Rows in the order of their length, as many together as `most` tokens hold."""
    batches: list[list[int]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * dataset.length(row) > most:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def predict(
    model: SO8TModel, records: Sequence[Record], template: Template, *, batch_size: int, cache: PrefixCache, title: str = ""
) -> Predictions:
    """Decides every record. An exception inside is not swallowed: it is a bug, not a prediction."""
    model.eval()
    dataset = RecordDataset(records, template)
    sampler = LengthSampler([dataset.length(i) for i in range(len(dataset))], batch_size, seed=0, shuffle=False)
    n = len(records)
    nan = torch.full((n,), math.nan)
    out = Predictions(
        torch.zeros(n, len(LABELS)), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool), nan, nan.clone(),
    )  # fmt: skip
    out.stream = Stream(torch.zeros(n), nan.clone(), torch.zeros(n))
    for rows in track(sampler, description=title, console=Console(stderr=True), disable=not title, transient=True):
        batch = dataset[rows]
        tokens, mask = batch.tokens.to(model.base.device), batch.mask.to(model.base.device)
        result = model(cache.prefix(tokens, mask), mask, lead=shared_lead(tokens, mask))
        decisions = model.decide(result, batch.position.to(model.base.device))
        out.probabilities[rows] = decisions.probabilities.cpu()
        out.decisions[rows] = decisions.labels.cpu()
        out.failed[rows] = decisions.failed.cpu()
        out.unsure[rows] = decisions.unsure.cpu()
        logits = result.logits.cpu()
        streamed = along(logits, batch.path, min_confidence=model.head.spec.min_confidence)
        out.stream.tokens[rows] = streamed.tokens
        out.stream.detection[rows] = streamed.detection
        out.stream.alarms[rows] = streamed.alarms
        restless, changes = flicker(logits, batch.path)
        out.flicker[rows] = restless
        out.changes[rows] = changes
    return out


@torch.no_grad()
def frozen_features(
    model: SO8TModel, records: Sequence[Record], template: Template, *, batch_size: int, cache: PrefixCache, title: str = ""
) -> Floats:
    """States of the frozen base, gates off, after its final norm at the decision position: `[N, D]`."""
    dataset = RecordDataset(records, template)
    sampler = LengthSampler([dataset.length(i) for i in range(len(dataset))], batch_size, seed=0, shuffle=False)
    features = np.zeros((len(records), model.base.hidden_size))
    with model.without_gates():
        for rows in track(sampler, description=title, console=Console(stderr=True), disable=not title, transient=True):
            batch = dataset[rows]
            tokens, mask = batch.tokens.to(model.base.device), batch.mask.to(model.base.device)
            at_cut = cache.prefix(tokens, mask)[..., : model.base.hidden_size]
            top, _ = model.base.suffix(at_cut, mask, lead=shared_lead(tokens, mask))
            state = at_position(model.base.final_norm(top), batch.position.to(model.base.device))
            features[rows] = state.double().cpu().numpy()
    return features


@dataclass
class Evaluation:
    """Figures of one set: overall by classifier, and by source; `intervals` are 95 % bootstrap ones of macro-F1."""

    name: str
    overall: dict[str, dict[str, float]]
    by_source: dict[str, dict[str, dict[str, float]]]
    confusion: list[list[int]]
    intervals: dict[str, tuple[float, float] | None]

    def as_json(self) -> dict[str, object]:
        """Plain values; NaN becomes null."""
        return {
            "name": self.name,
            "labels": list(LABELS),
            "metrics": _no_nan(self.overall["SO8T"]),
            "confusion": self.confusion,
            "macro_f1_95": self.intervals,
            "baselines": {k: _no_nan(v) for k, v in self.overall.items() if k != "SO8T"},
            "by_source": {s: {k: _no_nan(v) for k, v in table.items()} for s, table in self.by_source.items()},
        }


def _no_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {k: (None if math.isnan(v) else v) for k, v in figures.items()}


def evaluate(
    name: str,
    records: Sequence[Record],
    predictions: Predictions,
    baselines: Baselines | None,
    features: Floats | None,
) -> Evaluation:
    """Figures of SO8T, of the baselines fitted on the same training rows, and of the constant classifiers."""
    labels = [int(r.safety_label) for r in records]
    tables = {"SO8T": predictions}
    if baselines is not None and features is not None:
        for other, probabilities in baselines.probabilities(records, features).items():
            tables[other] = Predictions.of_probabilities(probabilities)
    overall = {who: p.metrics(records) for who, p in tables.items()} | constant_baselines(labels)
    sources = sorted({r.source for r in records})
    by_source = {
        source: {
            who: p.metrics(records, [i for i, r in enumerate(records) if r.source == source])
            for who, p in tables.items()
            if who != "context only"
        }
        for source in sources
    }
    dangerous = [i for i, r in enumerate(records) if r.sounds_dangerous]
    if dangerous:
        by_source["(benign, sounds dangerous)"] = {
            who: p.metrics(records, dangerous) for who, p in tables.items() if who != "context only"
        }
    confusion = torch.zeros(len(LABELS), len(LABELS), dtype=torch.long)
    for label, decision, failed in zip(labels, predictions.decisions.tolist(), predictions.failed.tolist(), strict=True):
        if not failed:
            confusion[label, decision] += 1
    intervals = {}
    for who, p in tables.items():
        kept = [i for i, failed in enumerate(p.failed.tolist()) if not failed]
        intervals[who] = macro_f1_interval([labels[i] for i in kept], p.decisions[kept].tolist())
    return Evaluation(name, overall, by_source, confusion.tolist(), intervals)


def _cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Both tables: overall by classifier, and by source with SO8T, TF-IDF and the frozen probe side by side."""
    figures = evaluation.overall["SO8T"]
    head = f"{evaluation.name}: {int(figures['rows'])} rows"
    if figures["failures"] or figures["unsure"]:
        head += f", {int(figures['failures'])} failures (not counted as predictions), {int(figures['unsure'])} unsure"
    table = Table(title=head, title_justify="left")
    table.add_column("classifier")
    for _, title in SHOWN:
        table.add_column(title, justify="right")
    for who, values in evaluation.overall.items():
        cells = [_cell(values.get(key)) for key, _ in SHOWN]
        if interval := evaluation.intervals.get(who):
            cells[0] += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        table.add_row(who, *cells, style="bold" if who == "SO8T" else "")
    console.print(table)
    if "detected" in figures:
        console.print(
            f"along a request's tokens, by the most probable label: {_cell(figures['detected'])} of the risky rows detected by "
            f"its end, after {_cell(figures['time_to_detection'], 1)} tokens on average; "
            f"{_cell(figures['decision_changes'], 2)} changes a row; "
            f"{_cell(figures['false_alarms_per_1000_tokens'], 1)} false alarms per 1,000 tokens of ALLOW rows"
        )
    table = Table(title=f"{evaluation.name}, by source (accuracy; false allow and over-refusal of SO8T)", title_justify="left")
    table.add_column("source")
    table.add_column("rows", justify="right")
    names = list(next(iter(evaluation.by_source.values())))
    for who in names:
        table.add_column(who, justify="right")
    for title in ("macro-F1", "false allow", "over-refusal"):
        table.add_column(title, justify="right")
    for source, by_name in evaluation.by_source.items():
        ours = by_name["SO8T"]
        table.add_row(
            source,
            str(int(ours["rows"])),
            *(_cell(by_name[who].get("accuracy")) for who in names),
            *(_cell(ours.get(key)) for key in ("macro_f1", "false_allow_rate", "over_refusal_rate")),
        )
    console.print(table)


def write_predictions(path: Path, records: Sequence[Record], predictions: Predictions) -> None:
    """JSONL in the order of the rows: `user_request`, `decision`, `probabilities` by label, and what failed."""
    lines = []
    for i, record in enumerate(records):
        row: dict[str, object] = {
            "user_request": record.user_request,
            "decision": Label(int(predictions.decisions[i])).name,
            "probabilities": {name: round(float(predictions.probabilities[i, k]), 6) for k, name in enumerate(LABELS)},
            "safety_label": record.safety_label.name,
            "source": record.source,
        }
        if predictions.failed[i]:
            row["failure"] = "a logit was not finite"
        if predictions.unsure[i]:
            row["unsure"] = True
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
