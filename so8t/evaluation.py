"""Evaluating decisions on any records: predictions in the order of the rows, figures by source, baselines beside them."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from so8t.base import shared_lead
from so8t.baselines import Baselines, Floats
from so8t.curves import Integers, auprc_not_allow, risk_coverage
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import LengthSampler, RecordDataset
from so8t.data.records import Record
from so8t.data.store import PrefixStore, row_key
from so8t.data.tokenise import Template
from so8t.files import write_text
from so8t.groupings import rows_by_group
from so8t.intervals import ENOUGH, Interval, along_intervals, decision_intervals, number, score_intervals
from so8t.labels import LABELS, Label
from so8t.metrics import SafetyMetrics, flicker
from so8t.mistakes import worst_mistakes
from so8t.model import Decisions, SO8TModel, at_position
from so8t.policy import Policy
from so8t.streaming import Stream, TokenDecision, along, answer_prompt, answered

SHOWN = (
    ("macro_f1", "macro-F1"),
    ("false_allow_rate", "false allow"),
    ("over_refusal_rate", "over-refusal"),
    ("refuse_recall", "refuse recall"),
    ("escalate_recall", "escalate recall"),
    ("auroc_not_allow", "AUROC"),
    ("auprc_not_allow", "AUPRC"),
    ("aurc", "AURC"),
    ("ece", "ECE"),
)
ALONG = (
    ("detected", "risky rows detected by the end", 3),
    ("time_to_detection", "tokens until then", 1),
    ("decision_changes", "changes a row", 2),
    ("false_alarms_per_1000_tokens", "false alarms in 1,000 tokens of ALLOW rows", 1),
)
"""Of what is decided along a request's tokens, with the digits that are shown."""
GROUPED = SHOWN[:3]
"""What a terminal is told of groups of rows; a report is told `SCORED` of them, too. All with intervals."""
SCORED = SHOWN[5:]
DIGITS = 6
"""Of a probability in a file."""


def told_perplexity(gated: float, alone: float) -> str:
    """What the gates cost the base in language, in words."""
    return f"perplexity {gated:.1f} a token of answers behind all gates, {alone:.1f} of the base alone"


@dataclass
class Predictions:
    """One row per record, in the records' order: `probabilities` `[N, 3]`, the others `[N]`. `stream` is what was decided
    along the tokens, where there are tokens; `strangeness`, how strange a row was to the head, is NaN where there are none."""

    probabilities: Tensor
    decisions: Tensor
    failed: Tensor
    unsure: Tensor
    flicker: Tensor
    changes: Tensor
    strangeness: Tensor
    stream: Stream | None = None

    def metrics(self, records: Sequence[Record], rows: Sequence[int] | None = None) -> dict[str, float]:
        """Figures over all rows or some of them."""
        chosen = torch.tensor(range(len(records)) if rows is None else list(rows), dtype=torch.long)
        labels = torch.tensor([int(r.safety_label) for r in records])[chosen]
        metrics = SafetyMetrics()
        metrics.update(self.probabilities[chosen], self.decisions[chosen], labels, self.failed[chosen], self.unsure[chosen])
        figures = metrics.compute()
        kept = chosen[~self.failed[chosen]]
        probabilities = self.probabilities[kept].double().numpy()
        truth = np.array([int(records[i].safety_label) for i in kept], dtype=np.int64)
        risk = risk_coverage(probabilities, truth)
        figures["auprc_not_allow"] = auprc_not_allow(probabilities, truth)
        figures["aurc"] = math.nan if risk is None else risk.aurc
        figures["flicker"] = float(self.flicker[kept].nanmean())
        figures["decision_changes"] = float(self.changes[kept].nanmean())
        if self.stream is not None:
            figures |= self.stream.chosen(kept).figures(labels[~self.failed[chosen]])
        return figures

    @property
    def decided(self) -> Decisions:
        """Without what was seen along the tokens."""
        return Decisions(self.probabilities, self.decisions, self.failed, self.unsure)

    def under(self, policy: Policy) -> "Predictions":
        """Decided by a policy; `flicker`, `changes` and `stream` stay those of the head's own."""
        new = policy.apply(self.decided)
        return replace(self, probabilities=new.probabilities, decisions=new.labels, failed=new.failed, unsure=new.unsure)

    def worst(self, records: Sequence[Record]) -> list[int]:
        """The worst mistakes among rows that did not fail."""
        labels = torch.tensor([int(r.safety_label) for r in records])
        taken = torch.where(self.failed, labels, self.decisions)  # a failure is no mistake
        written = self.probabilities.double().numpy().round(DIGITS)  # as a report reads them, so that ties are the same
        return worst_mistakes(written, taken.numpy(), labels.numpy())

    @classmethod
    def of_probabilities(cls, probabilities: Tensor) -> "Predictions":
        """Of a classifier that has nothing but probabilities."""
        n = len(probabilities)
        no, nan = torch.zeros(n, dtype=torch.bool), torch.full((n,), math.nan)
        return cls(probabilities, probabilities.argmax(-1), no, no, nan, nan, nan)


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
    tokens = [torch.tensor(encoded.tokens) for encoded in dataset.encoded]
    keys = [cache.key(row) for row in tokens]
    console = Console(stderr=True)
    most = min(PREFIX_TOKENS, batch_size * template.max_length)
    with store.filling():
        todo = sorted((i for i, key in enumerate(keys) if key not in store), key=dataset.length)
        if not todo:
            return
        size = sum(len(tokens[i]) - cache.shared(tokens[i]) for i in todo) * cache.width * store.dtype.itemsize
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
    model: SO8TModel,
    records: Sequence[Record],
    template: Template,
    *,
    batch_size: int,
    cache: PrefixCache,
    title: str = "",
    spans: Sequence[tuple[int, int]] | None = None,
) -> Predictions:
    """Decides every record. An exception inside is not swallowed: it is a bug, not a prediction. `spans`: the tokens of each
    row's prompt that it is watched along, if not all of its request, and unsmoothed, as the watch at work looks."""
    model.eval()
    dataset = RecordDataset(records, template)
    if spans is not None:
        dataset.paths = [[span] for span in spans]
    sampler = LengthSampler([dataset.length(i) for i in range(len(dataset))], batch_size, seed=0, shuffle=False)
    n = len(records)
    nan = torch.full((n,), math.nan)
    out = Predictions(
        torch.zeros(n, len(LABELS)), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool), nan, nan.clone(), nan.clone(),
    )  # fmt: skip
    out.stream = Stream(torch.zeros(n), nan.clone(), torch.zeros(n))
    for rows in track(sampler, description=title, console=Console(stderr=True), disable=not title, transient=True):
        batch = dataset[rows]
        tokens, mask = batch.tokens.to(model.base.device), batch.mask.to(model.base.device)
        result = model(cache.prefix(tokens, mask), tokens, mask)
        decisions = model.decide(result, batch.position.to(model.base.device))
        out.probabilities[rows] = decisions.probabilities.cpu()
        out.decisions[rows] = decisions.labels.cpu()
        out.failed[rows] = decisions.failed.cpu()
        out.unsure[rows] = decisions.unsure.cpu()
        if result.strangeness is not None:
            out.strangeness[rows] = at_position(result.strangeness.cpu(), batch.position)
        path = batch.path.to(model.base.device)
        logits = (model.smoothed_logits(result, path) if spans is None else result.logits).cpu()
        streamed = along(logits, batch.path, min_confidence=model.head.spec.min_confidence)
        out.stream.tokens[rows] = streamed.tokens
        out.stream.detection[rows] = streamed.detection
        out.stream.alarms[rows] = streamed.alarms
        restless, changes = flicker(logits, batch.path)
        out.flicker[rows] = restless
        out.changes[rows] = changes
    return out


@dataclass(frozen=True)
class Along:
    """Figures of what is decided along tokens, and the intervals of those that are means or shares."""

    figures: dict[str, float]
    intervals_95: dict[str, Interval | None]

    def as_json(self) -> dict[str, object]:
        """Plain values; NaN becomes null."""
        return {**_no_nan(self.figures), "intervals_95": self.intervals_95}

    def number(self, key: str, *, digits: int) -> str:
        """A figure with its interval, as people read it."""
        return number(self.figures[key], self.intervals_95.get(key), digits=digits)


def along_answers(
    model: SO8TModel, records: Sequence[Record], template: Template, *, batch_size: int, cache: PrefixCache, title: str = ""
) -> Along:
    """What is decided along the tokens of answers (`answered`): of ALLOW rows how often it changes and is a false alarm, of
    risky ones how many are detected and when. One pass a row reads every token where it stands, and not behind the end of a
    prompt as the watch at work does. Rows that are not read whole are `left_out`, and so are failures."""
    rows = answered(records)
    read = [found for found in (answer_prompt(template, row) for row in rows) if found is not None]
    prompts, spans = [row for row, _ in read], [span for _, span in read]
    seen = predict(model, prompts, template, batch_size=batch_size, cache=cache, title=title, spans=spans)
    assert seen.stream is not None
    labels = torch.tensor([int(row.safety_label) for row in prompts], dtype=torch.long)
    kept = (~seen.failed).nonzero()[:, 0]
    labels, stream = labels[kept], seen.stream.chosen(kept)
    benign = labels == Label.ALLOW
    changes = seen.changes[kept].where(benign, torch.nan)
    figures = {
        "allow_rows": float(benign.sum()),
        "risky_rows": float((~benign).sum()),
        "left_out": float(len(rows) - len(kept)),
        "decision_changes": float(changes.nanmean()),
        **stream.figures(labels),
    }
    return Along(figures, _intervals(stream, changes, labels.numpy()))


@torch.no_grad()
def frozen_features(
    model: SO8TModel,
    records: Sequence[Record],
    template: Template,
    *,
    batch_size: int,
    cache: PrefixCache,
    store: PrefixStore | None = None,
    title: str = "",
) -> Floats:
    """States of the frozen base, gates off, after its final norm at the decision position: `[N, D]`. What `store` holds of them
    (`PrefixStore.of_last_states`) is not computed again."""
    dataset = RecordDataset(records, template)
    features = np.zeros((len(records), model.base.hidden_size))
    keys = [row_key(torch.tensor(encoded.tokens)) for encoded in dataset.encoded]
    with model.without_gates(), nullcontext() if store is None else store.filling():
        todo = [i for i, key in enumerate(keys) if store is None or key not in store]
        sampler = LengthSampler([dataset.length(i) for i in todo], batch_size, seed=0, shuffle=False)
        for picked in track(sampler, description=title, console=Console(stderr=True), disable=not title, transient=True):
            rows = [todo[k] for k in picked]
            batch = dataset[rows]
            tokens, mask = batch.tokens.to(model.base.device), batch.mask.to(model.base.device)
            at_cut = cache.prefix(tokens, mask)[..., : model.base.hidden_size]
            top, _ = model.base.suffix(at_cut, mask, lead=shared_lead(tokens, mask))
            states = at_position(model.base.final_norm(top), batch.position.to(model.base.device)).cpu()
            features[rows] = states.double().numpy()
            if store is not None:
                for i, state in zip(rows, states, strict=True):
                    store.put(keys[i], state[None])
        for i, key in enumerate(keys):
            if store is not None and key in store:  # as it rounds, the first time too
                features[i] = store.get(key)[0].double().numpy()
    return features


Groups = dict[str, dict[str, dict[str, float]]]
"""Figures by group of rows and classifier."""


@dataclass
class Evaluation:
    """Figures of one set: overall by classifier, and by source, language and form.

    `intervals_95` are by kind of group (`source`, `language`, `form`), group and figure, SO8T's; under `all` they are each
    classifier's over all rows, and of what is decided along the tokens too.
    """

    name: str
    overall: dict[str, dict[str, float]]
    groups: dict[str, Groups]
    confusion: list[list[int]]
    intervals_95: dict[str, dict[str, dict[str, Interval | None]]]
    answers: Along | None = None
    """What `along_answers` found, where it was asked for."""

    @property
    def by_source(self) -> Groups:
        """Figures by source."""
        return self.groups["source"]

    def as_json(self) -> dict[str, object]:
        """Plain values; NaN becomes null."""
        return {
            "name": self.name,
            "labels": list(LABELS),
            "metrics": _no_nan(self.overall["SO8T"]),
            "confusion": self.confusion,
            "macro_f1_95": {who: intervals["macro_f1"] for who, intervals in self.intervals_95["all"].items()},
            "intervals_95": self.intervals_95,
            "baselines": {k: _no_nan(v) for k, v in self.overall.items() if k != "SO8T"},
            **{
                f"by_{kind}": {group: {who: _no_nan(v) for who, v in table.items()} for group, table in groups.items()}
                for kind, groups in self.groups.items()
            },
            **({} if self.answers is None else {"answers": self.answers.as_json()}),
        }


def _no_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {k: (None if math.isnan(v) else v) for k, v in figures.items()}


def _scored_groups(records: Sequence[Record]) -> dict[str, dict[str, list[int]]]:
    """Row numbers by kind of group and group; benign rows that sound dangerous are one beside the sources."""
    found = rows_by_group(records)
    if dangerous := [i for i, r in enumerate(records) if r.sounds_dangerous]:
        found["source"]["(benign, sounds dangerous)"] = dangerous
    return found


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
    overall = {who: p.metrics(records) for who, p in tables.items()}
    for label, constant in enumerate(LABELS):
        always = torch.eye(len(LABELS))[label].expand(len(records), -1)
        overall[f"always {constant}"] = Predictions.of_probabilities(always).metrics(records)
    scored = _scored_groups(records)
    groups = {
        kind: {
            group: {who: p.metrics(records, rows) for who, p in tables.items() if who != "context only"}
            for group, rows in found.items()
        }
        for kind, found in scored.items()
    }

    def intervals(p: Predictions, rows: Sequence[int]) -> dict[str, Interval | None]:
        kept = [i for i in rows if not p.failed[i]]
        truth = [labels[i] for i in kept]
        of_scores = score_intervals(p.probabilities[kept].double().numpy(), np.array(truth, dtype=np.int64))
        return decision_intervals(truth, p.decisions[kept].tolist()) | of_scores

    everything = {who: intervals(p, range(len(records))) for who, p in tables.items()}
    if predictions.stream is not None:
        everything["SO8T"] |= _along(predictions, labels)
    intervals_95 = {"all": everything}
    for kind, found in scored.items():
        intervals_95[kind] = {group: intervals(predictions, rows) for group, rows in found.items()}
    confusion = torch.zeros(len(LABELS), len(LABELS), dtype=torch.long)
    for label, decision, failed in zip(labels, predictions.decisions.tolist(), predictions.failed.tolist(), strict=True):
        if not failed:
            confusion[label, decision] += 1
    return Evaluation(name, overall, groups, confusion.tolist(), intervals_95)


def _along(predictions: Predictions, labels: Sequence[int]) -> dict[str, Interval | None]:
    """Intervals of what was decided along the tokens of rows that did not fail."""
    kept = (~predictions.failed).nonzero()[:, 0]
    assert predictions.stream is not None
    return _intervals(predictions.stream.chosen(kept), predictions.changes[kept], np.array(labels)[kept.numpy()])


def _intervals(stream: Stream, changes: Tensor, labels: Integers) -> dict[str, Interval | None]:
    of_rows = (stream.tokens, stream.detection, stream.alarms, changes)
    return along_intervals(labels, *(values.double().numpy() for values in of_rows))


def _table(title: str, first: str, *columns: str) -> Table:
    """Without lines between columns, so that nine figures fit into 80 columns."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column.replace(" ", "\n").replace("-refusal", "-\nrefusal"), justify="right")
    return table


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Overall by classifier; accuracy by source, baselines beside; SO8T's figures by source, language and form."""
    figures = evaluation.overall["SO8T"]
    head = f"{evaluation.name}: {int(figures['rows'])} rows"
    if figures["failures"] or figures["unsure"]:
        head += f", {int(figures['failures'])} failures (not counted as predictions), {int(figures['unsure'])} unsure"
    table = _table(head, "classifier", *(title for _, title in SHOWN))
    for who, values in evaluation.overall.items():
        table.add_row(who, *(number(values.get(key)) for key, _ in SHOWN), style="bold" if who == "SO8T" else "")
    console.print(table)
    if "detected" in figures:
        intervals = evaluation.intervals_95["all"]["SO8T"]
        told = {key: number(figures[key], intervals.get(key), digits=digits) for key, _, digits in ALONG}
        console.print(
            f"along a request's tokens, by the head alone: {told['detected']} of the risky rows detected by its end, "
            f"after {told['time_to_detection']} tokens on average; {told['decision_changes']} changes a row; "
            f"{told['false_alarms_per_1000_tokens']} false alarms per 1,000 tokens of ALLOW rows",
            markup=False,
        )
    if (answers := evaluation.answers) is not None:
        console.print(
            "along an answer's tokens, read where they stand and not behind a prompt's end as the watch reads them: of "
            f"{answers.figures['allow_rows']:.0f} ALLOW rows with their own, "
            f"{answers.number('false_alarms_per_1000_tokens', digits=1)} false alarms per 1,000 tokens, "
            f"{answers.number('decision_changes', digits=2)} changes a row; of {answers.figures['risky_rows']:.0f} risky "
            f"requests in the place of an answer, {answers.number('detected', digits=3)} detected by its end, after "
            f"{answers.number('time_to_detection', digits=1)} tokens on average"
            + (f"; {left:.0f} too long to be read whole are left out" if (left := answers.figures["left_out"]) else ""),
            markup=False,
        )
    names = list(next(iter(evaluation.by_source.values())))
    table = _table(f"{evaluation.name}: accuracy by source", "source", "rows", *names)
    for source, by_name in evaluation.by_source.items():
        accuracies = [number(by_name[who].get("accuracy")) for who in names]
        table.add_row(escape(source), str(int(by_name["SO8T"]["rows"])), *accuracies)
    console.print(table)
    title = f"{evaluation.name}: 95 % intervals, from {ENOUGH} rows; groups are decided by SO8T"
    table = _table(title, "rows of", "rows", *(title for _, title in GROUPED))
    for kind, by_group in evaluation.intervals_95.items():
        for group, intervals in by_group.items():
            own = evaluation.overall[group] if kind == "all" else evaluation.groups[kind][group]["SO8T"]
            name = {"all": f"all, {group}", "source": group}.get(kind, f"{kind} {group}")
            table.add_row(escape(name), str(int(own["rows"])), *(number(own.get(key), intervals[key]) for key, _ in GROUPED))
    console.print(table)


def write_predictions(
    path: Path,
    records: Sequence[Record],
    predictions: Predictions,
    tokens: Mapping[int, Sequence[TokenDecision]] | None = None,
) -> None:
    """JSONL in the order of the rows: `user_request`, any `context`, `decision`, `probabilities` by label, `safety_label`,
    `source`, any `language` and `form`, what failed. Rows that are in `tokens` tell what was decided after each of theirs."""
    lines = []
    for i, record in enumerate(records):
        row: dict[str, object] = {
            "user_request": record.user_request,
            **({} if record.context is None else {"context": record.context}),
            "decision": Label(int(predictions.decisions[i])).name,
            "probabilities": {name: round(float(predictions.probabilities[i, k]), DIGITS) for k, name in enumerate(LABELS)},
            "safety_label": record.safety_label.name,
            "source": record.source,
            **({} if record.language is None else {"language": record.language}),
            **({} if record.form is None else {"form": record.form}),
        }
        if predictions.failed[i]:
            row["failure"] = "a logit was not finite"
        if predictions.unsure[i]:
            row["unsure"] = True
        if tokens is not None and tokens.get(i):
            row["tokens"] = [[token.text, token.label.name] for token in tokens[i]]
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
