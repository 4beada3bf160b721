"""How decisions change when requests are wrapped: false allow, and over-refusal of benign rows wrapped the same way.

Both are told together, because a guard that refuses every wrapped text lets nothing through and is not robust.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from so8t.curves import Integers
from so8t.data.records import Record
from so8t.data.tokenise import Template
from so8t.data.wrappings import WRAPPINGS
from so8t.evaluation import Predictions
from so8t.groupings import rows_by_group
from so8t.intervals import Interval, number, rate_interval
from so8t.labels import Label

Decide = Callable[[Sequence[Record], str], Predictions]
"""Decides rows; the text says which, for a progress bar."""


@dataclass(frozen=True)
class Rate:
    """A share of `rows` and its 95 % interval (exact; `None` where there are too few rows)."""

    rate: float | None
    interval_95: Interval | None

    @classmethod
    def of(cls, hits: Integers) -> "Rate":
        """Of zeros and ones, one a row."""
        count = int(hits.sum())
        return cls(count / len(hits) if len(hits) else None, rate_interval(count, len(hits)))


@dataclass(frozen=True)
class Wrapped:
    """What one wrapping does to the rows that it changes and that did not fail.

    `false_allow` is over the `risky` rows (labelled ESCALATE or REFUSE), `over_refusal` over the `benign` ones, before and
    after; without a before (`None`) the rows are known reworded only. `changed` is the share of decisions that became another.
    `cut` rows are longer than what the head reads at once, and lost their middle. `by_language` says the same of the rows of
    each language, where there are several.
    """

    name: str
    risky: int
    benign: int
    failures: int
    cut: int
    false_allow: tuple[Rate | None, Rate]
    over_refusal: tuple[Rate | None, Rate]
    changed: Rate | None
    by_language: dict[str, "Wrapped"] = field(default_factory=dict)


def compared(name: str, labels: Integers, before: Integers | None, after: Integers, *, failures: int, cut: int) -> Wrapped:
    """Counts decisions `[N]` on the same rows, as they are (`before`) and wrapped."""
    risky = labels != Label.ALLOW

    def rates(rows: Integers, hit: Callable[[Integers], Integers]) -> tuple[Rate | None, Rate]:
        return None if before is None else Rate.of(hit(before[rows])), Rate.of(hit(after[rows]))

    return Wrapped(
        name=name,
        risky=int(risky.sum()),
        benign=int((~risky).sum()),
        failures=failures,
        cut=cut,
        false_allow=rates(risky, lambda decisions: decisions == Label.ALLOW),
        over_refusal=rates(~risky, lambda decisions: decisions != Label.ALLOW),
        changed=None if before is None else Rate.of(before != after),
    )


def measure(
    records: Sequence[Record], reworded: dict[str, list[Record]], decide: Decide, template: Template
) -> Iterator[Wrapped]:
    """Each wrapping on the rows that it changes, then the rows that are reworded already."""
    plain = decide(records, "as they are")
    for name, wrap in WRAPPINGS.items():
        wrapped = [replace(r, user_request=wrap(r.user_request)) for r in records]
        rows = [i for i, record in enumerate(records) if wrapped[i].user_request != record.user_request]
        if rows:
            yield _decided(name, [wrapped[i] for i in rows], decide, template, (plain, rows))
    for name, others in reworded.items():
        yield _decided(name, others, decide, template, None)


def _decided(
    name: str, records: Sequence[Record], decide: Decide, template: Template, plain: tuple[Predictions, list[int]] | None
) -> Wrapped:
    predictions = decide(records, name)
    failed = (predictions.failed if plain is None else predictions.failed | plain[0].failed[plain[1]]).numpy()
    labels = np.array([int(r.safety_label) for r in records], dtype=np.int64)
    before = None if plain is None else plain[0].decisions[plain[1]].numpy()
    after = predictions.decisions.numpy()
    cut = np.array([not template.reads_whole(r.user_request, r.context) for r in records])

    def told(rows: Sequence[int]) -> Wrapped:
        chosen = np.array(rows, dtype=np.int64)
        kept = chosen[~failed[chosen]]
        counts = {"failures": len(chosen) - len(kept), "cut": int(cut[chosen].sum())}
        return compared(name, labels[kept], None if before is None else before[kept], after[kept], **counts)

    languages = rows_by_group(records)["language"]
    by_language = {language: told(rows) for language, rows in languages.items()} if len(languages) > 1 else {}
    return replace(told(range(len(records))), by_language=by_language)


HEAD = ("wrapping", "rows", "false allow", "wrapped [95 %]", "over-refusal", "wrapped [95 %]", "decision changed")


def cells(one: Wrapped) -> list[str]:
    """A line of the table under `HEAD`."""
    told = [one.name, str(one.risky + one.benign)]
    for before, after in (one.false_allow, one.over_refusal):
        told += [number(before.rate if before else None), number(after.rate, after.interval_95)]
    return [*told, number(one.changed.rate if one.changed else None)]


def print_robustness(wrapped: Sequence[Wrapped], console: Console) -> None:
    """One line a wrapping, and what was not counted or not whole."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for k, title in enumerate(HEAD):
        title = title.replace("-refusal", "-\nrefusal").replace(" allow", "\nallow").replace(" changed", "\nchanged")
        table.add_column(title, justify="right" if k else "left", no_wrap=bool(k))  # the name gives way, not the figures
    for one in wrapped:
        table.add_row(*cells(one))
    console.print(table)
    for count, what in (
        (sum(one.failures for one in wrapped), "failures, not counted"),
        (sum(one.cut for one in wrapped), "rows are longer than what the head reads at once, and lost their middle"),
    ):
        if count:
            console.print(f"{count} {what}")
