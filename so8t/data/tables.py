"""Rows out of files of data sets: lines, JSON, JSONL, CSV, Parquet, and PyRIT's YAML; `.gz` and `.xz` are unpacked.

A row is a plain dictionary. Nothing in a file is executed; Parquet is read by pyarrow. Knows nothing of labels.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import PurePath

import yaml

from so8t.errors import DataError

_UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress}
_FORMS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json", ".csv": "csv"}

Row = dict[str, object]


def stem(name: str) -> str:
    """A file's name without folders and endings."""
    path = PurePath(name)
    return PurePath(path.stem if path.suffix in _UNPACK else path.name).stem


def read_rows(data: bytes, name: str, where: str) -> Iterator[tuple[int, Row]]:
    """The rows of a file by the endings of its name, each with its number (JSONL: the line).

    Raises:
        DataError: the ending is none we read, or the content is not what the ending says; told with `where`.
    """
    path = PurePath(name)
    if unpack := _UNPACK.get(path.suffix):
        try:
            data = unpack(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{where}: cannot be unpacked: {error}") from None
        path = PurePath(path.stem)
    if (form := _FORMS.get(path.suffix)) is None:
        raise DataError(f"{where}: {path.suffix or 'no ending'} is not one of {', '.join(_FORMS)} (.gz and .xz may follow)")
    yield from _parquet(data, where) if form == "parquet" else decoded(data, form, where)


def decoded(data: bytes, form: str, where: str) -> Iterator[tuple[int, Row]]:
    """The rows of a text file in one of the forms `lines`, `jsonl`, `json`, `csv` and `yaml_seeds`.

    Raises:
        DataError: the content is not of this form.
    """
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
        elif form == "csv":
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1):
                if None in row:
                    raise ValueError(f"row {number} has more values than there are columns")
                yield number, {name: value or None for name, value in row.items()}
        else:
            yield from enumerate(yaml.safe_load(text)["seeds"], 1)
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise DataError(f"{where}: cannot be read as {form}: {error}") from None


def _parquet(data: bytes, where: str) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{where}: Parquet files need pyarrow: pip install 'so8t[hub]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(pa.BufferReader(data)).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:  # Arrow tells some damage as an OSError
        raise DataError(f"{where}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def reach(row: object, path: str) -> object:
    """The value at a path of keys and list places (`turns.0`), or `None`."""
    for part in path.split("."):
        if isinstance(row, list) and part.isdigit() and int(part) < len(row):
            row = row[int(part)]
        elif isinstance(row, dict):
            row = row.get(part)
        else:
            return None
    return row


def check_columns(row: object, paths: set[str], where: str) -> None:
    """Raises DataError where a row lacks a column, or a key within one, that a path needs; says what is there."""
    for path in sorted(paths):
        parts = path.split(".")
        inner = row
        for depth, part in enumerate(parts, 1):
            if isinstance(inner, list):  # as long as each row's happens to be
                break
            if not isinstance(inner, dict) or part not in inner:
                raise DataError(f"{where}: no column {'.'.join(parts[:depth])!r}; there is {_told(inner)}")
            inner = inner[part]


def _told(row: object) -> str:
    return ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)[:60]
