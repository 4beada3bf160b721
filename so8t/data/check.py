"""What is in files of records before anyone trains on them: counts, lengths, duplicates, label conflicts, leaks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from so8t.data.records import Record, read_jsonl
from so8t.data.splits import folded, near_duplicates
from so8t.labels import LABELS

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Upper ends of the bins of request lengths, in characters."""


@dataclass(frozen=True)
class FileCheck:
    """One file: usable rows, what was wrong with the others, and counts `[ALLOW, ESCALATE, REFUSE]` by source, language and
    form (`-` where a row tells none); `lengths` counts requests by length in characters."""

    name: str
    rows: int
    bad_rows: list[str]
    by_source: dict[str, list[int]]
    by_language: dict[str, list[int]]
    by_form: dict[str, list[int]]
    lengths: dict[str, int]


@dataclass(frozen=True)
class Pair:
    """Two rows whose requests are the same or nearly so; each named as `FILE:LINE`."""

    first: str
    second: str
    same_text: bool
    same_label: bool
    request: str


@dataclass(frozen=True)
class DataCheck:
    """All files; `within` are pairs in one file, `leaks` pairs across two. A `conflict` is a pair with different labels whose
    texts are the same."""

    files: list[FileCheck]
    within: list[Pair]
    leaks: list[Pair]

    @property
    def conflicts(self) -> list[Pair]:
        """Same request, same context, another label."""
        return [pair for pair in [*self.within, *self.leaks] if pair.same_text and not pair.same_label]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {**asdict(self), "conflicts": [asdict(pair) for pair in self.conflicts]}


def check_files(paths: Sequence[Path]) -> DataCheck:
    """Reads every file, bad rows included in the report, and compares all requests with each other.

    Raises:
        DataError: a file is missing or has no usable row.
    """
    files, records, places = [], [], []
    for turn, path in enumerate(paths):
        rows, report = read_jsonl(path, on_bad_row="skip")
        files.append(_counted(str(path), rows, report.skipped))
        records += rows
        places += [(turn, f"{path}:{line}") for line in report.lines]
    within: list[Pair] = []
    leaks: list[Pair] = []
    for i, j in near_duplicates([r.user_request for r in records]):
        (one, first), (other, second) = places[i], places[j]
        pair = Pair(
            first,
            second,
            _text(records[i]) == _text(records[j]),
            records[i].safety_label == records[j].safety_label,
            records[i].user_request,
        )
        (within if one == other else leaks).append(pair)
    return DataCheck(files, within, leaks)


def _text(record: Record) -> tuple[str, str]:
    return folded(record.user_request), record.context or ""


def _counted(name: str, rows: Sequence[Record], bad_rows: list[str]) -> FileCheck:
    def table(values: Sequence[str]) -> dict[str, list[int]]:
        found = Counter((value, int(row.safety_label)) for value, row in zip(values, rows, strict=True))
        return {value: [found[value, label] for label in range(len(LABELS))] for value in sorted(set(values))}

    ends = [next((end for end in LENGTHS if len(row.user_request) <= end), None) for row in rows]
    lengths = Counter(f"up to {end}" if end else f"over {LENGTHS[-1]}" for end in ends)
    order = [*(f"up to {end}" for end in LENGTHS), f"over {LENGTHS[-1]}"]
    return FileCheck(
        name,
        len(rows),
        bad_rows,
        table([row.source for row in rows]),
        table([row.language or "-" for row in rows]),
        table([row.form or "-" for row in rows]),
        {name: lengths[name] for name in order if lengths[name]},
    )
