"""The prefix's output on disk: one folder per frozen prefix, filled once, shared by all runs and by several processes. In
folders of their own lie what the whole frozen base makes of each row's last token, which the probe beside every evaluation
reads, and what of it a head reads where it decides, on which it begins.

A folder's name comes from everything that the states depend on: the weights below the cut as they are stored (quantisation
included), the cut and the number format; a row is found by its tokens, the chat template's among them. States lie in segments,
safetensors files that appear by a rename and are memory-mapped. A segment that is torn or does not match its sum is deleted and
its rows are computed again. Knows nothing of labels or losses.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from so8t.errors import ConfigError
from so8t.fetch import cache_dir
from so8t.files import write_json
from so8t.specs import NotNegative, spec

if TYPE_CHECKING:
    from so8t.base import SplitBase

log = logging.getLogger(__name__)

SEGMENT_BYTES = 32 * 2**20
"""What is kept in memory before it becomes a segment: the most that a killed run loses."""

SPARE_BYTES = 2**28
"""Free disk that is never filled."""

_FORMAT = 1
_MARKER = "store.json"
_PART = ".part-"
_STALE_SECONDS = 3600


@spec
class CacheSpec:
    """What `conf/cache` says. `max_gib` bounds all stores together; `dtype=auto` is the base's compute dtype; `folder` is where
    the stores are, `prefix` in the cache folder by default."""

    max_gib: NotNegative = 4.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    folder: str | None = None


def store_root(folder: str | None = None) -> Path:
    """Where all stores are: `prefix` in the cache folder, or a folder of our own in the one asked for."""
    return cache_dir() / "prefix" if folder is None else Path(folder).expanduser() / "so8t-prefix"


def used_bytes(root: Path) -> int:
    """What the segments of all stores in a folder take on disk."""
    return sum(_size(path) for path in root.glob("*/*.safetensors"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # cleared by another process meanwhile
        return 0


def row_key(tokens: Tensor, *, without: int = 0) -> bytes:
    """16 bytes that stand for one row's tokens `[n]`, and for states that leave the first of them out."""
    told = f"-{without}" if without else ""
    return hashlib.sha256(tokens.cpu().numpy().tobytes() + told.encode()).digest()[:16]


class PrefixStore:
    """Rows of one prefix, `[n, width]` each, by their key.

    Args:
        folder: this prefix's folder.
        dtype: how states are stored.
        max_bytes: bound for this folder and those beside it together; what does not fit is not kept.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, max_bytes: int):
        self.folder, self.dtype, self.max_bytes = folder, dtype, max_bytes
        self.room = 0
        self._rows: dict[bytes, Tensor] = {}
        self._fresh: dict[bytes, Tensor] = {}
        self._fresh_bytes = 0
        self._known: set[str] = set()
        self._broken = False
        try:
            self._make()
        except OSError as error:
            raise ConfigError(
                f"cache.folder: cannot write into {folder.parent} ({error.strerror}): choose another, or set cache.max_gib=0"
            ) from None
        self.refresh()

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / _MARKER
        if not marker.exists():
            write_json(marker, {"format": _FORMAT})

    @classmethod
    def of(cls, base: "SplitBase", spec: CacheSpec, keep: tuple[int, ...] = ()) -> "PrefixStore":
        """The store of a base's prefix, with the layers below the cut that are kept beside it."""
        below = nn.ModuleList([base.decoder.embed_tokens, *base.prefix_layers])
        return cls._of(base, spec, below, cut=base.cut, keep=keep)

    @classmethod
    def of_last_states(cls, base: "SplitBase", spec: CacheSpec) -> "PrefixStore":
        """The store of what the whole frozen base, its final norm included, makes of a row's last token: `[1, D]` a row."""
        return cls._of(base, spec, base.decoder, cut=0, keep=())

    @classmethod
    def of_head(cls, base: "SplitBase", spec: CacheSpec, facts: tuple[object, ...]) -> "PrefixStore":
        """The store of what a head finds in the whole frozen base where it decides: `[1, features]` a row, in float32, from a
        prefix that was stored as `spec` says. `facts` are what its features depend on besides the base."""
        return cls._of(base, spec, base.decoder, cut=base.cut, keep=facts, kept_as=torch.float32, kind="-head")

    @classmethod
    def _of(
        cls,
        base: "SplitBase",
        spec: CacheSpec,
        frozen: nn.Module,
        *,
        cut: int,
        keep: tuple[object, ...],
        kept_as: torch.dtype | None = None,
        kind: str = "",
    ) -> "PrefixStore":
        from so8t.base import weights_digest  # transformers takes seconds, and a store without a base does not need it

        dtype = {"auto": base.dtype, "bfloat16": torch.bfloat16, "float32": torch.float32}[spec.dtype]
        config = base.causal_lm.config.get_text_config().to_dict()
        for place_or_version in ("_name_or_path", "transformers_version"):
            config.pop(place_or_version, None)
        facts = {
            "format": _FORMAT,
            "weights": weights_digest(frozen),
            "quantization": base.spec.quantization,
            "cut": cut,
            "keep": keep,
            "compute": str(base.dtype),
            "dtype": str(dtype),
            "config": config,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
        name = f"{base.spec.name}-k{cut}{kind}-{str(dtype).removeprefix('torch.')}-{digest}"
        return cls(store_root(spec.folder) / name, dtype=kept_as or dtype, max_bytes=int(spec.max_gib * 2**30))

    def __len__(self) -> int:
        return len(self._rows) + len(self._fresh)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows or key in self._fresh

    def get(self, key: bytes) -> Tensor:
        """One row's states: `[n, width]`."""
        return self._fresh[key] if key in self._fresh else self._rows[key]

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keeps one row `[n, width]`; false where there is no room."""
        if key in self:
            return True
        size = states.numel() * self.dtype.itemsize
        if size + self._fresh_bytes > self.room:
            return False
        self._fresh[key] = states.to("cpu", self.dtype, copy=True)
        self._fresh_bytes += size
        if self._fresh_bytes >= SEGMENT_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Writes what is new as one segment. Where that fails (a full disk), this run keeps it in memory and stores no more."""
        if not self._fresh:
            return
        try:
            self._write()
        except (OSError, SafetensorError) as error:
            log.warning("cannot write into %s (%s): this run stores no more rows there", self.folder, error)
            self._rows |= self._fresh
            self._broken = True
        self._fresh, self._fresh_bytes = {}, 0
        self.refresh()

    def _write(self) -> None:
        rows = list(self._fresh.values())
        content = {
            "states": torch.cat(rows),
            "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
            "keys": torch.frombuffer(bytearray(b"".join(self._fresh)), dtype=torch.uint8).reshape(len(rows), 16),
        }
        self._make()
        handle, part = tempfile.mkstemp(dir=self.folder, prefix=_PART)
        os.close(handle)
        try:
            save_file(content, part, metadata={"sum": str(_sum(content))})
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
            os.replace(part, self.folder / f"{Path(part).name.removeprefix(_PART)}.safetensors")
        finally:
            Path(part).unlink(missing_ok=True)

    def refresh(self) -> None:
        """Takes notice of segments that this or other processes have written, and of the room that they leave."""
        root = self.folder.parent
        left = min(self.max_bytes - used_bytes(root), shutil.disk_usage(root).free - SPARE_BYTES)
        self.room = 0 if self._broken else left
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._known:
                self._known.add(path.name)
                self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                expected = (file.metadata() or {}).get("sum")
                content = {name: file.get_tensor(name) for name in ("keys", "ends", "states")}
        except OSError as error:  # cleared by another process meanwhile, or not ours to read
            log.info("%s is not read: %s", path, error)
            return
        except SafetensorError as error:
            reason = str(error).splitlines()[0]
        else:
            if str(_sum(content)) == expected:
                ends = content["ends"].tolist()
                for key, begin, end in zip(content["keys"].numpy(), [0, *ends], ends, strict=False):
                    self._rows[key.tobytes()] = content["states"][begin:end]
                return
            reason = "its sum is wrong"
        log.warning("%s is damaged (%s): it is deleted and its rows are computed again", path, reason)
        path.unlink(missing_ok=True)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """One process fills at a time; the others wait here and then find its rows."""
        lock = FileLock(self.folder.parent / f"{self.folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process fills %s: waiting for its rows", self.folder)
            lock.acquire()
        try:
            for part in self.folder.glob(f"{_PART}*"):  # of writers that were killed
                if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                    part.unlink(missing_ok=True)
            self.refresh()
            yield
            self.flush()
        finally:
            lock.release()


def _sum(content: dict[str, Tensor]) -> int:
    total = 0
    for name in ("keys", "ends", "states"):
        total = zlib.crc32(content[name].contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


@dataclass(frozen=True)
class StoreInfo:
    """One folder, for `so8t cache info`."""

    name: str
    rows: int
    bytes: int


def stores(root: Path) -> list[StoreInfo]:
    """Every store in a folder."""
    found = []
    for folder in sorted(marker.parent for marker in root.glob(f"*/{_MARKER}")):
        rows = 0
        for path in folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                    rows += file.get_slice("ends").get_shape()[0]
            except (SafetensorError, OSError):
                continue
        size = sum(_size(path) for path in folder.glob("*.safetensors"))
        found.append(StoreInfo(folder.name, rows, size))
    return found


def clear_stores(root: Path) -> int:
    """Deletes every store in a folder and nothing else there; says how many bytes that freed."""
    freed = 0
    for info in stores(root):
        freed += info.bytes
        shutil.rmtree(root / info.name, ignore_errors=True)
        (root / f"{info.name}.lock").unlink(missing_ok=True)
    return freed
