"""Which checkpoint a run goes on from, and whether it may: `ckpt_path=last`, a run's folder, or a file."""

import logging
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from omegaconf import DictConfig, OmegaConf

from so8t.adapter import OF_HEAD
from so8t.errors import ArtefactError
from so8t.gates import GateSpec
from so8t.model import HeadSpec

log = logging.getLogger(__name__)

_BASE = [f"base.{key}" for key in ("name", "source", "quantization", "double_quantization", "hidden_size", "layers", "seed")]
_GATE = [f"gate.{field.name}" for field in fields(GateSpec) if field.name != "init_std"]
_HEAD = [f"head.{key}" for key in (*OF_HEAD, "commutator")]
_PROMPTS = ["data.decision_prompt", "data.system_prompt"]
_ABSENT = object()
_NOT_WHOLE = "is no checkpoint of a training run, or not whole"
_BEFORE = {key: getattr(HeadSpec(), key.removeprefix("head.")) for key in _HEAD}
"""What runs from before one of these settings did; of others that a run does not name it is not known."""


def find_checkpoint(asked: str | None, run: Path) -> Path | None:
    """`ckpt_path`: a file, a folder for the newest checkpoint in it, or `last` for the newest of this run or of the runs beside
    it. A job of a sweep goes on from the job of its number in an earlier sweep, never from a neighbour. The newest is the
    newest whole one.

    Raises:
        ArtefactError: there is none, or it is no checkpoint.
    """
    if asked is None:
        return None
    if asked == "last":
        root = next((parent for parent in run.parents if parent.name in ("outputs", "multirun")), run)
        return _newest(root, asked, job=run.name if run.name.isdigit() else None)
    path = Path(asked).absolute()
    if path.is_dir():
        return _newest(path, asked)
    if not path.is_file():
        raise ArtefactError(f"ckpt_path={asked}: no such file")
    if not _whole(path):
        raise ArtefactError(f"ckpt_path={asked}: {path} {_NOT_WHOLE}")
    return path


def _newest(root: Path, asked: str, job: str | None = None) -> Path:
    found = [path for path in root.rglob("checkpoints/*.ckpt") if job in (None, path.parents[1].name)]
    for path in sorted(found, key=lambda p: (p.stat().st_mtime, p.name), reverse=True):
        if _whole(path):
            log.info("continuing from %s", path)
            return path
        log.warning("passed over: %s %s", path, _NOT_WHOLE)
    whole = " is whole" if found else ""
    raise ArtefactError(f"ckpt_path={asked}: no checkpoint under {root}{whole}: train first, or give the file")


def _whole(path: Path) -> bool:
    try:
        return "state_dict" in torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, ValueError, TypeError, EOFError, UnpicklingError):
        return False


def check_continues(checkpoint: Path, composed: DictConfig) -> None:
    """What goes on must be what was begun: the same base, gates, head, and prompt in front of a request. Compared with the
    configuration in the run's folder, where the checkpoint still lies in one.

    Raises:
        ArtefactError: something is set otherwise.
    """
    file = checkpoint.parents[1] / "config.yaml"
    if not file.is_file():
        return
    before = OmegaConf.load(file)
    other = [
        key
        for key in (*_BASE, *_GATE, *_HEAD, *_PROMPTS)
        if OmegaConf.select(before, key, default=_BEFORE.get(key, _ABSENT)) not in (_ABSENT, OmegaConf.select(composed, key))
    ]
    if other:
        raise ArtefactError(
            f"ckpt_path: {checkpoint} is of a run with other settings ({', '.join(other)}): set them as in {file}"
        )
