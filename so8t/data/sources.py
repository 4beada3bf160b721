"""Named sources of records: the starter set, files, and public sets that ride in PyPI wheels.

Every source's mapping from its own labels to ALLOW / ESCALATE / REFUSE is a table in `conf/data`, open to argument: rules
are tried in order and the first that fits decides. A row whose rule says SKIP is left out and counted.
"""

import fnmatch
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from so8t.data.records import OnBadRow, ReadReport, Record, read_jsonl
from so8t.errors import DataError, FetchError
from so8t.fetch import Wheel, read_member
from so8t.labels import Label
from so8t.specs import NotNegative, spec

log = logging.getLogger(__name__)

LabelOrSkip = Literal["ALLOW", "ESCALATE", "REFUSE", "SKIP"]


@spec
class Rule:
    """`label` for rows of files that match `member` whose `field` has a value that is in `equals` or starts with one of
    `startswith`. A rule without conditions fits every row."""

    label: LabelOrSkip
    member: str = "*"
    field: str | None = None
    equals: tuple[str, ...] = ()
    startswith: tuple[str, ...] = ()

    def fits(self, member: str, row: dict[str, object]) -> bool:
        """Whether this rule decides the row."""
        if not fnmatch.fnmatch(member, self.member):
            return False
        if self.field is None:
            return True
        value = row.get(self.field)
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        return any(v in self.equals or v.startswith(self.startswith) for v in values)


@spec
class WheelSpec:
    """A pinned wheel."""

    name: str
    version: str
    sha256: str


@spec
class SourceSpec:
    """One source. `kind=wheel` needs `wheel`, `members`, `format`, `text` and `rules`; `kind=file` needs `path`.

    `text` names the field of the request, `turns.0` reaches into lists; `weight` multiplies the loss of its rows (0 leaves
    the source out).
    """

    kind: Literal["starter", "file", "wheel"]
    weight: NotNegative = 1.0
    path: str | None = None
    wheel: WheelSpec | None = None
    members: tuple[str, ...] = ()
    format: Literal["jsonl", "json", "lines", "yaml_seeds"] = "jsonl"
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
        FetchError: a wheel is neither cached nor to be had.
        DataError: a file is missing or malformed.
    """
    if source.kind == "starter":
        return Loaded(load_starter(), 0)
    if source.kind == "file":
        if not source.path:
            raise DataError(f"data.sources.{name}.path is not set: give the JSONL file, e.g. data=jsonl data.path=FILE")
        records, report = read_jsonl(source.path, on_bad_row=on_bad_row)
        _report_skipped(name, report)
        return Loaded([_fill(r, source) for r in records], len(report.skipped))
    return _load_wheel(name, source)


def _report_skipped(name: str, report: ReadReport) -> None:
    for line in report.skipped[:5]:
        log.warning("left out: %s", line)
    if report.skipped:
        log.warning("%s: %d of %d rows left out", name, len(report.skipped), report.rows)


def _fill(record: Record, source: SourceSpec) -> Record:
    return replace(record, language=record.language or source.language, licence=record.licence or source.licence)


def load_starter() -> list[Record]:
    """The starter set, written for this project and shipped with it (Apache-2.0)."""
    records: list[Record] = []
    folder = resources.files("so8t.data") / "starter"
    for part in sorted(folder.iterdir(), key=lambda p: p.name):
        if part.name.endswith(".jsonl"):
            with resources.as_file(part) as path:
                rows, _ = read_jsonl(path, source="starter")
            records += [replace(row, licence="Apache-2.0") for row in rows]
    return [replace(r, source="starter") for r in records]


def _decoded(data: bytes, form: str, where: str) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        text = data.decode("utf-8-sig")
        lines = text.split("\n")  # not splitlines: U+2028 and its like are part of a text
        if form == "lines":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, {"prompt": line.strip()}
        elif form == "jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
        elif form == "json":
            yield from enumerate(json.loads(text), 1)
        else:
            yield from enumerate(yaml.safe_load(text)["seeds"], 1)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{where}: cannot be read as {form}: {error}") from None


def _reach(row: dict[str, object], path: str) -> object:
    value: object = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
    return value


def _load_wheel(name: str, source: SourceSpec) -> Loaded:
    if source.wheel is None or not source.members or not source.rules:
        raise DataError(f"data.sources.{name}: a wheel source needs wheel, members and rules")
    if any((rule.equals or rule.startswith) and rule.field is None for rule in source.rules):
        raise DataError(f"data.sources.{name}.rules: a rule with equals or startswith needs a field")
    wheel = Wheel(source.wheel.name, source.wheel.version, source.wheel.sha256)
    records: list[Record] = []
    skipped = 0
    for member in source.members:
        short = Path(member).stem
        language = (source.languages or {}).get(short, source.language)
        for number, row in _decoded(read_member(wheel, member), source.format, f"{wheel.requirement}:{member}"):
            text = _reach(row, source.text)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{wheel.requirement}:{member}:{number}: {source.text}: no text")
            rule = next((rule for rule in source.rules if rule.fits(short, row)), None)
            if rule is None:
                raise DataError(f"{wheel.requirement}:{member}:{number}: no rule of data.sources.{name}.rules fits")
            if rule.label == "SKIP":
                skipped += 1
                continue
            records.append(
                Record(
                    user_request=text.strip(),
                    safety_label=Label[rule.label],
                    source=name,
                    language=language,
                    licence=source.licence,
                )
            )
    return Loaded(records, skipped)


def load_sources(
    sources: dict[str, SourceSpec], *, on_bad_row: OnBadRow, required: frozenset[str] = frozenset()
) -> tuple[dict[str, Loaded], list[str]]:
    """Reads every source whose weight is not 0; public ones that cannot be fetched are left out and said so.

    Returns:
        The sources by name, and a line for each that was left out.

    Raises:
        FetchError: a source in `required` cannot be fetched.
        DataError: no source is left, or one is malformed.
    """
    loaded: dict[str, Loaded] = {}
    missing: list[str] = []
    for name, source in sources.items():
        if not source.weight:
            continue
        try:
            loaded[name] = load_source(name, source, on_bad_row=on_bad_row)
        except FetchError as error:
            if name in required:
                raise
            missing.append(f"source {name} is left out: {error}")
            log.warning(missing[-1])
    if not loaded:
        raise DataError("; ".join(["data.sources: no source is left to train on", *missing]))
    return loaded, missing
