"""Which checkpoint a run goes on from, and whether it may: `ckpt_path=last`, a run's folder, or a file."""

import logging
from pathlib import Path
from pickle import UnpicklingError

import torch
from omegaconf import DictConfig, OmegaConf

from so8t.errors import ArtefactError

log = logging.getLogger(__name__)

_OF_BASE = [f"base.{key}" for key in ("name", "source", "quantization", "double_quantization", "hidden_size", "layers", "seed")]
_PROMPTS = ("data.decision_prompt", "data.system_prompt")
_ABSENT = object()


def find_checkpoint(asked: str | None, run: Path) -> Path | None:
    """`ckpt_path`: a file, a run's folder, or `last` for the newest checkpoint of this run or of the runs beside it. A job of a
    sweep goes on from the job of its number in an earlier sweep, never from a neighbour.

    Raises:
        ArtefactError: there is none, or it is no checkpoint.
    """
    if asked is None:
        return None
    if asked == "last":
        root = next((parent for parent in run.parents if parent.name in ("outputs", "multirun")), run)
        found = sorted(root.rglob("checkpoints/*.ckpt"), key=lambda p: (p.stat().st_mtime, p.name))
        if root.name == "multirun":
            found = [path for path in found if path.parents[1].name == run.name]
        if not found:
            raise ArtefactError(f"ckpt_path=last: no checkpoint under {root}: train first, or give the file")
        log.info("continuing from %s", found[-1])
        return found[-1]
    path = Path(asked)
    if path.is_dir():
        return find_checkpoint("last", path)
    if not path.is_file():
        raise ArtefactError(f"ckpt_path={asked}: no such file")
    try:
        known = "state_dict" in torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, ValueError, TypeError, EOFError, UnpicklingError):
        known = False
    if not known:
        raise ArtefactError(f"ckpt_path={asked}: this is no checkpoint of a training run")
    return path


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
        for key in (
            *_OF_BASE,
            *(f"{part}.{key}" for part in ("gate", "head") for key in OmegaConf.select(before, part) or ()),
            *_PROMPTS,
        )
        if OmegaConf.select(before, key, default=_ABSENT) not in (_ABSENT, OmegaConf.select(composed, key))
    ]
    if other:
        raise ArtefactError(
            f"ckpt_path: {checkpoint} is of a run with other settings ({', '.join(other)}): set them as in {file}"
        )
