"""The record, and reading JSONL files of records. A bad row is an error that names file, line and field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from so8t.errors import DataError
from so8t.labels import LABELS, Label

OnBadRow = Literal["error", "skip"]

_ALIASES = {"prompt": "user_request", "response": "task_output", "label": "safety_label"}
_TEXTS = ("context", "task_output", "safety_rationale", "source", "language", "licence", "group", "form")
_FLAGS = ("sounds_dangerous",)


@dataclass(frozen=True)
class Record:
    """One request and what should be decided about it.

    `group` ties rows that must not straddle a split (twins); `form` is question, command or statement; `weight` is how much
    the row counts in training, that of its source in the configuration, and is not read from files.
    """

    user_request: str
    safety_label: Label
    context: str | None = None
    task_output: str | None = None
    safety_rationale: str | None = None
    source: str = "file"
    language: str | None = None
    licence: str | None = None
    group: str | None = None
    form: str | None = None
    sounds_dangerous: bool = False
    weight: float = 1.0


@dataclass
class ReadReport:
    """What was left out of a file, and why; `lines` are those of the file that the records stand in."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class _BadRow(ValueError):
    pass


def parse_record(raw: object, *, default_source: str, require_label: bool = True) -> Record:
    """Validates one decoded JSON value.

    Raises:
        ValueError: with the field in its text.
    """
    if not isinstance(raw, dict):
        raise _BadRow(f"expected a JSON object, got {type(raw).__name__}")
    # beside a field of the same meaning an alias is some other column
    row = raw | {name: raw[alias] for alias, name in _ALIASES.items() if alias in raw and raw.get(name) is None}
    request = row.get("user_request")
    if request is None:
        raise _BadRow("user_request: missing (required; 'prompt' is read too)")
    if not isinstance(request, str) or not request.strip():
        raise _BadRow(f"user_request: expected a text that is not empty, got {request!r:.60}")
    _check_unicode("user_request", request)
    label = row.get("safety_label")
    if label is None and not require_label:
        label = Label.ESCALATE.name
    if label is None:
        raise _BadRow("safety_label: missing (required; 'label' is read too)")
    if not isinstance(label, str) or label.strip().upper() not in LABELS:
        raise _BadRow(f"safety_label: {label!r:.60} is not one of {', '.join(LABELS)}")
    texts: dict[str, str | None] = {}
    for name in _TEXTS:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise _BadRow(f"{name}: expected a text, got {type(value).__name__}")
        _check_unicode(name, value or "")
        texts[name] = value or None
    flags = {name: row.get(name) or False for name in _FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise _BadRow(f"{name}: expected true or false, got {value!r:.60}")
    return Record(
        user_request=request,
        safety_label=Label[label.strip().upper()],
        context=texts["context"],
        task_output=texts["task_output"],
        safety_rationale=texts["safety_rationale"],
        source=texts["source"] or default_source,
        language=texts["language"],
        licence=texts["licence"],
        group=texts["group"],
        form=texts["form"],
        sounds_dangerous=flags["sounds_dangerous"],
    )


def bad_unicode(text: str) -> str | None:
    """What is wrong with a text that JSON spelled half of a surrogate pair in, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not valid Unicode at character {error.start}"
    return None


def _check_unicode(name: str, text: str) -> None:
    if why := bad_unicode(text):
        raise _BadRow(f"{name}: {why}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a BOM is fine; it must not cost row 1
            if line.strip():
                yield number, line


def read_jsonl(
    path: str | Path, *, source: str | None = None, on_bad_row: OnBadRow = "error", require_label: bool = True
) -> tuple[list[Record], ReadReport]:
    """Reads a JSONL file of records in its order; empty lines are passed over.

    Raises:
        DataError: the file is missing, has no rows, or (`on_bad_row=error`) a row is bad: `FILE:LINE: FIELD: why`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    records: list[Record] = []
    report = ReadReport()
    for number, line in _lines(path):
        report.rows += 1
        try:
            raw = json.loads(line.decode("utf-8"))
            records.append(parse_record(raw, default_source=source or path.stem, require_label=require_label))
            report.lines.append(number)
        except (ValueError, RecursionError) as error:
            message = f"{path}:{number}: {_explain(error)}"
            if on_bad_row == "error":
                raise DataError(message + " (on_bad_row=skip leaves bad rows out and counts them)") from None
            report.skipped.append(message)
    if not records:
        raise DataError(f"{path}: no usable rows" + (f" ({len(report.skipped)} bad ones)" if report.skipped else ""))
    return records, report


def _explain(error: Exception) -> str:
    if isinstance(error, _BadRow):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"row: not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"row: not valid UTF-8 at byte {error.start}"
    return f"row: {error}"
