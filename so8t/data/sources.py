"""Named sources of records: what is shipped, files, public sets that ride in PyPI wheels, and public sets on a hub.

Every source's mapping from its own labels to ALLOW / ESCALATE / REFUSE is a table in `conf/data`, open to argument: rules
are tried in order and the first that fits decides. A row whose rule says SKIP is left out and counted.
"""

import fnmatch
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from so8t.data.records import OnBadRow, ReadReport, Record, bad_unicode, read_jsonl
from so8t.data.tables import Row, check_columns, decoded, reach, read_rows, stem
from so8t.errors import DataError, FetchError
from so8t.fetch import Wheel, read_member
from so8t.hub import dataset_file
from so8t.labels import Label
from so8t.specs import NotNegative, PositiveInt, spec

log = logging.getLogger(__name__)

LabelOrSkip = Literal["ALLOW", "ESCALATE", "REFUSE", "SKIP"]
Shipped = Literal["starter", "everyday", "stakes", "detailed"]
"""Sets that were written for this project and lie beside this file, a folder each."""


@spec
class Rule:
    """`label` for rows of files that match `member` whose `field` (`a.b` reaches into `a`) has a value that is in `equals` or
    starts with one of `startswith`; values are compared as Python prints them (`True`, `1`, `None` for none). A rule without
    conditions fits every row. `sounds_dangerous` marks benign rows that do."""

    label: LabelOrSkip
    member: str = "*"
    field: str | None = None
    equals: tuple[str, ...] = ()
    startswith: tuple[str, ...] = ()
    sounds_dangerous: bool = False

    def fits(self, member: str, row: dict[str, object]) -> bool:
        """Whether this rule decides the row."""
        if not fnmatch.fnmatch(member, self.member):
            return False
        if self.field is None:
            return True
        value = reach(row, self.field)
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        return any(v in self.equals or v.startswith(self.startswith) for v in values)


@spec
class WheelSpec:
    """A pinned wheel."""

    name: str
    version: str
    sha256: str


@spec
class HubSpec:
    """Files of a data set's repository on a hub; `gated` ones are given to accounts that accepted the set's terms."""

    repo: str
    files: tuple[str, ...]
    revision: str
    gated: bool = False


@spec
class SourceSpec:
    """One source. `kind=starter`, `everyday`, `stakes` and `detailed` need nothing else; `kind=wheel` needs `wheel`,
    `members`, `format`, `text` and `rules`; `kind=hub` needs `hub`, `text` and `rules`, and reads `path` instead of the hub's
    files where it is set; `kind=file` needs `path`.

    `text` names the field of the request, `turns.0` reaches into lists; `weight` multiplies the loss of its rows (0 leaves
    the source out); `max_rows` draws that many of them; `test_only` ones may not be trained on.
    """

    kind: Shipped | Literal["file", "wheel", "hub"]
    weight: NotNegative = 1.0
    max_rows: PositiveInt | None = None
    test_only: bool = False
    path: str | None = None
    wheel: WheelSpec | None = None
    hub: HubSpec | None = None
    members: tuple[str, ...] = ()
    format: Literal["jsonl", "json", "csv", "lines", "yaml_seeds"] = "jsonl"
    text: str = "prompt"
    rules: tuple[Rule, ...] = ()
    language: str | None = None
    languages: dict[str, str] | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Loaded:
    """Records of one source and what was left out."""

    records: list[Record]
    skipped: int


def load_source(name: str, source: SourceSpec, *, on_bad_row: OnBadRow) -> Loaded:
    """Reads one source.

    Raises:
        FetchError: a wheel or a hub's file is neither cached nor to be had.
        DataError: a file is missing or malformed.
    """
    if source.kind == "hub":
        return _load_hub(name, source, on_bad_row)
    if source.kind == "file":
        if not source.path:
            raise DataError(f"data.sources.{name}.path is not set: give the JSONL file, e.g. data=jsonl data.path=FILE")
        records, report = read_jsonl(source.path, on_bad_row=on_bad_row)
        report_skipped(name, report)
        return Loaded([_fill(r, source) for r in records], len(report.skipped))
    if source.kind == "wheel":
        return _load_wheel(name, source, on_bad_row)
    return Loaded(load_shipped(source.kind), 0)


def report_skipped(name: str, report: ReadReport) -> None:
    """Tells the first bad rows that were left out, and how many there are."""
    for line in report.skipped[:5]:
        log.warning("left out: %s", line)
    if report.skipped:
        log.warning("%s: %d of %d rows left out", name, len(report.skipped), report.rows)


def _fill(record: Record, source: SourceSpec) -> Record:
    return replace(record, language=record.language or source.language, licence=record.licence or source.licence)


def load_shipped(name: Shipped) -> list[Record]:
    """A shipped set (Apache-2.0), its parts in the order of their names."""
    records: list[Record] = []
    for part in sorted((resources.files("so8t.data") / name).iterdir(), key=lambda p: p.name):
        if part.name.endswith(".jsonl"):
            with resources.as_file(part) as path:
                rows, _ = read_jsonl(path)
            records += [replace(row, source=name, licence="Apache-2.0") for row in rows]
    return records


def _load_wheel(name: str, source: SourceSpec, on_bad_row: OnBadRow) -> Loaded:
    if source.wheel is None or not source.members or not source.rules:
        raise DataError(f"data.sources.{name}: a wheel source needs wheel, members and rules")
    wheel = Wheel(source.wheel.name, source.wheel.version, source.wheel.sha256)
    labelled = _Labelled(name, source, on_bad_row)
    for member in source.members:
        where = f"{wheel.requirement}:{member}"
        labelled.take(Path(member).stem, where, decoded(read_member(wheel, member), source.format, where))
    return labelled.loaded()


def _load_hub(name: str, source: SourceSpec, on_bad_row: OnBadRow) -> Loaded:
    """Each request once: many sets tell one with several answers. Where its rows differ, the strictest label holds."""
    if source.hub is None or not source.hub.files or not source.rules:
        raise DataError(f"data.sources.{name}: a hub source needs hub.repo, hub.files and rules")
    labelled = _Labelled(name, source, on_bad_row)
    needed = {source.text, *(rule.field for rule in source.rules if rule.field is not None)}
    for where, path in _hub_files(source.hub, source.path):
        labelled.take(stem(path.name), where, _checked(read_rows(path.read_bytes(), path.name, where), needed, where))
    loaded = labelled.loaded()
    strictest: dict[str, Record] = {}
    for record in loaded.records:
        before = strictest.setdefault(record.user_request, record)
        if record.safety_label > before.safety_label:
            strictest[record.user_request] = record
    return Loaded(list(strictest.values()), loaded.skipped + len(loaded.records) - len(strictest))


def _hub_files(hub: HubSpec, local: str | None) -> Iterator[tuple[str, Path]]:
    if local is not None:
        if not Path(local).is_file():
            raise DataError(f"{local}: no such file")
        yield local, Path(local)
        return
    for file in hub.files:
        yield f"{hub.repo}/{file}", dataset_file(hub.repo, file, revision=hub.revision, gated=hub.gated)


def _checked(rows: Iterator[tuple[int, Row]], needed: set[str], where: str) -> Iterator[tuple[int, Row]]:
    for number, row in rows:
        check_columns(row, needed, f"{where}:{number}")
        yield number, row


class _Labelled:
    """Records out of a public set's rows, by the source's rules."""

    def __init__(self, name: str, source: SourceSpec, on_bad_row: OnBadRow):
        if any((rule.equals or rule.startswith) and rule.field is None for rule in source.rules):
            raise DataError(f"data.sources.{name}.rules: a rule with equals or startswith needs a field")
        self.name, self.source, self.on_bad_row = name, source, on_bad_row
        self.records: list[Record] = []
        self.skipped = 0
        self.report = ReadReport()

    def take(self, member: str, where: str, rows: Iterable[tuple[int, Row]]) -> None:
        """One file's rows."""
        source = self.source
        for number, row in rows:
            self.report.rows += 1
            rule = next((rule for rule in source.rules if rule.fits(member, row)), None)
            if rule is None:
                raise DataError(f"{where}:{number}: no rule of data.sources.{self.name}.rules fits")
            if rule.label == "SKIP":
                self.skipped += 1
                continue
            text = reach(row, source.text)
            why = "no text" if not isinstance(text, str) or not text.strip() else bad_unicode(text)
            if why:
                message = f"{where}:{number}: {source.text}: {why}"
                if self.on_bad_row == "error":
                    raise DataError(message + " (data.on_bad_row=skip leaves bad rows out and counts them)")
                self.report.skipped.append(message)
                continue
            self.records.append(
                Record(
                    user_request=str(text).strip(),
                    safety_label=Label[rule.label],
                    source=self.name,
                    language=(source.languages or {}).get(member, source.language),
                    licence=source.licence,
                    sounds_dangerous=rule.sounds_dangerous,
                )
            )

    def loaded(self) -> Loaded:
        """All of it."""
        report_skipped(self.name, self.report)
        return Loaded(self.records, self.skipped + len(self.report.skipped))


def sample(records: list[Record], count: int, seed: int) -> list[Record]:
    """`count` of the records, in their order: those whose hash with the seed is smallest, so that more rows are these and
    others. It is not the hash that deals rows out to the splits: those of the smallest all go to the test."""
    digests = [hashlib.sha256(f"rows\0{seed}\0{r.user_request}".encode()).digest() for r in records]
    chosen = sorted(sorted(range(len(records)), key=digests.__getitem__)[:count])
    return [records[i] for i in chosen]


def load_sources(sources: dict[str, SourceSpec], *, on_bad_row: OnBadRow, seed: int = 0) -> tuple[dict[str, Loaded], list[str]]:
    """Reads every source whose weight is not 0; its records carry it. Public ones that cannot be fetched are left out and said
    so. `seed` draws `max_rows`.

    Returns:
        The sources by name, and a line for each that was left out.

    Raises:
        DataError: no source is left, or one is malformed.
    """
    loaded: dict[str, Loaded] = {}
    missing: list[str] = []
    for name, source in sources.items():
        if not source.weight:
            continue
        try:
            whole = load_source(name, source, on_bad_row=on_bad_row)
        except FetchError as error:
            missing.append(f"source {name} is left out: {error}")
            log.warning(missing[-1])
            continue
        some = whole.records if source.max_rows is None else sample(whole.records, source.max_rows, seed)
        loaded[name] = Loaded([replace(record, weight=source.weight) for record in some], whole.skipped)
    if not loaded:
        raise DataError("; ".join(["data.sources: no source is left to train on", *missing]))
    return loaded, missing
