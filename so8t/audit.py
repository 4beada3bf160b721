"""The audit log: one JSON object a line, append-only, each with the hash of the one before; nothing is ever overwritten.

`hash = SHA-256(canonical JSON of the line without "hash")`, and that JSON holds the hash of the previous line: a line that was
changed, removed from the middle or put elsewhere breaks the chain (`verify`). Lines cut off at the very end leave a shorter
chain that is whole: keep the last hash, which `verify` tells, somewhere else to see that too. Knows nothing of models.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from so8t.errors import ArtefactError

FIRST = "0" * 64
"""What stands for the hash before the first line."""

MAX_BYTES = 64 * 2**20
TAIL_BYTES = 64 * 2**10
"""What is read at once in search of the last line: one is a kilobyte or less, but for kept texts."""


def digest_of(entry: Mapping[str, object]) -> str:
    """SHA-256 over a line's canonical JSON: sorted keys, no spaces, UTF-8, `hash` left out."""
    told = {key: value for key, value in entry.items() if key != "hash"}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def line_of(entry: Mapping[str, object]) -> bytes:
    """A line as it stands in the file."""
    return (json.dumps(entry, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def files_of(folder: Path) -> list[Path]:
    """The log's files, oldest first."""
    return sorted(folder.glob("audit-*.jsonl"))


class AuditLog:
    """Appends to `folder/audit-000001.jsonl` and, past `max_bytes`, to the next number. Several processes may share a folder.

    Every line is on disk (fsync) when `append` or `extend` returns. A line that a killed process left half-written is moved
    into a file of its own, `*.torn-*`, before the next one is added.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")
        self._seen: tuple[Path, int, str, int] | None = None  # file, its size, last hash, last number

    def append(self, event: Mapping[str, object]) -> str:
        """Adds one line and returns its hash.

        Raises:
            ArtefactError: the last line of the log is damaged, so there is nothing to chain to.
        """
        return self.extend([event])

    def extend(self, events: Sequence[Mapping[str, object]]) -> str:
        """Adds a line an event, all on disk together, and returns the last hash.

        Raises:
            ArtefactError: the last line of the log is damaged, so there is nothing to chain to.
        """
        with self._lock:
            path, size, previous, number = self._end()
            waiting = b""
            for event in events:
                number += 1
                entry: dict[str, object] = {**event, "number": number, "time": time.time(), "previous": previous}
                previous = entry["hash"] = digest_of(entry)
                line = line_of(entry)
                if size + len(waiting) and size + len(waiting) + len(line) > self.max_bytes:
                    self._flush(path, size, waiting)
                    path, size, waiting = _following(path), 0, b""
                waiting += line
            self._flush(path, size, waiting)
            self._seen = (path, size + len(waiting), previous, number)
            return previous

    def _flush(self, path: Path, size: int, lines: bytes) -> None:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if not size:
            _sync_folder(self.folder)

    def _end(self) -> tuple[Path, int, str, int]:
        """The file to go on with, its size, the last hash and the last number."""
        found = files_of(self.folder)
        if not found:
            return self.folder / "audit-000001.jsonl", 0, FIRST, 0
        if self._seen is not None and self._seen[:2] == (found[-1], found[-1].stat().st_size):
            return self._seen
        _set_torn_aside(found[-1])
        for path in reversed(found):  # the newest file may have held nothing but a torn line
            line = _last_line(path).rstrip(b"\n")
            if line:
                try:
                    last = json.loads(line)
                    return found[-1], found[-1].stat().st_size, str(last["hash"]), int(last["number"])
                except (ValueError, KeyError, TypeError):
                    with path.open("rb") as file:
                        number = sum(1 for _ in file)
                    raise ArtefactError(
                        f"{path}:{number}: the last line of the audit log is damaged: look at it with `so8t audit verify`, "
                        "move the folder aside and begin a new one"
                    ) from None
        return found[-1], 0, FIRST, 0


def _last_line(path: Path) -> bytes:
    """What follows the last line end but the one that ends the file; reads no more of the file than that needs."""
    with path.open("rb") as file:
        begin, tail = file.seek(0, os.SEEK_END), b""
        while begin and b"\n" not in tail[:-1]:
            step = min(begin, TAIL_BYTES)
            begin -= step
            file.seek(begin)
            tail = file.read(step) + tail
    return tail[tail.rfind(b"\n", 0, -1) + 1 :]


def _following(path: Path) -> Path:
    return path.with_name(f"audit-{int(path.stem.removeprefix('audit-')) + 1:06d}.jsonl")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _set_torn_aside(path: Path) -> None:
    """A last line without its end goes into a file of its own; what is before it stays as it is."""
    torn = _last_line(path)
    if not torn or torn.endswith(b"\n"):
        return
    path.with_name(f"{path.stem}.torn-{time.time_ns()}").write_bytes(torn)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - len(torn))
        file.flush()
        os.fsync(file.fileno())


@dataclass
class Verified:
    """What `verify` found: whole lines, the last hash, and problems with their place."""

    lines: int = 0
    last: str = FIRST
    problems: list[str] = field(default_factory=list)


def verify(folder: Path) -> Verified:
    """Walks the chain through all files and tells every line that is torn, changed, missing before or out of its place.

    Raises:
        ArtefactError: there is no audit log in `folder`.
    """
    if not files_of(folder):
        raise ArtefactError(f"{folder}: no audit log here (audit-*.jsonl)")
    result = Verified()
    expected = 1
    for place, line in _lines(folder):
        if not line.endswith(b"\n"):
            result.problems.append(f"{place}: torn: the line has no end")
            continue
        try:
            entry = json.loads(line)
            number, previous, told = int(entry["number"]), entry["previous"], entry["hash"]
            # another way to write the same number (the last digit of a time) is a change, too
            right = digest_of(entry) if line_of(entry) == line else None
        except (ValueError, KeyError, TypeError):
            result.problems.append(f"{place}: damaged: not a line of an audit log")
            continue
        if told != right:
            result.problems.append(f"{place}: changed: its hash is not that of its content")
        if number != expected:
            gap = "missing or moved lines before it" if number > expected else "out of its place"
            result.problems.append(f"{place}: number {number} where {expected} was expected: {gap}")
        elif previous != result.last:
            result.problems.append(f"{place}: does not follow the line before it")
        expected, result.last = number + 1, told
        result.lines += 1
    return result


def hashes(folder: Path) -> set[str]:
    """Every hash that a whole line of the log has."""
    found = set()
    for _, line in _lines(folder):
        try:
            found.add(str(json.loads(line)["hash"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in files_of(folder):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path.name}:{number}", line
