"""Writing files so that a reader sees the old one or the new one, never a torn one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from so8t.errors import SO8TError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes beside the target, flushes to disk, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Indented JSON, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_free(folder: Path) -> None:
    """Raises SO8TError where a folder cannot be written without touching something that is there."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise SO8TError(f"{folder} exists and is not an empty folder: name another one, nothing is overwritten")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and is deleted when it does not. For
    files without folders among them.

    Raises:
        SO8TError: something is there already.
    """
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield part
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part)
        raise
