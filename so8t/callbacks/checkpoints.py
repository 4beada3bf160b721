"""Checkpoints: how they are written, and the best by validation macro-F1 under a false-allow ceiling."""

import io
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from so8t.callbacks.collapse import SafetyCollapseGuard
from so8t.files import write_bytes
from so8t.specs import Fraction

SELECTION = "val/selection"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name, flushes it to disk and renames it. Lightning writes into the temporary folder and
    moves: where that is on another file system this is a copy, which leaves half a file under the name if it is cut short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """A checkpoint of kilobytes, as a file on this machine: `storage_options`, for other places, change nothing."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getvalue())


class BestUnderCeiling(ModelCheckpoint):
    """Keeps the best by validation macro-F1 among those whose false-allow rate is at most `false_allow_ceiling`.

    Logged as `val/selection`: macro-F1, or macro-F1 - 1 where the ceiling is broken, so that any candidate under the
    ceiling beats any above it. Lightning runs checkpoints after all other callbacks: where the guard has just restored
    earlier gates, the metrics are not theirs, and the score is -2, below all others.
    """

    def __init__(self, false_allow_ceiling: Fraction = 0.15, **checkpoint: Any):  # noqa: ANN401
        super().__init__(monitor=SELECTION, mode="max", **checkpoint)
        self.false_allow_ceiling = false_allow_ceiling

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores this validation, then lets Lightning decide what to keep."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and "val/macro_f1" in metrics:
            score = float(metrics["val/macro_f1"])
            rate = float(metrics.get("val/false_allow_rate", torch.tensor(float("nan"))))
            if not rate <= self.false_allow_ceiling + 1e-6:  # metrics are float32; NaN is no proof of being under it
                score -= 1
            guards = [c for c in trainer.callbacks if isinstance(c, SafetyCollapseGuard)]  # type: ignore[attr-defined]
            if any(guard.restored_at == trainer.global_step for guard in guards):
                score = -2.0
            metrics[SELECTION] = torch.tensor(score)
            for logger in trainer.loggers:
                logger.log_metrics({SELECTION: score}, step=trainer.global_step)
        super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A run that goes on in a folder of its own takes the best so far along; Lightning would forget it there."""
        best, score = Path(state_dict["best_model_path"]), state_dict["best_model_score"]
        if self.dirpath is not None and Path(self.dirpath) != best.parent:
            kept = ""
            if best.is_file():
                kept = str(Path(self.dirpath) / best.name)
                write_bytes(Path(kept), best.read_bytes())
                shutil.copystat(best, kept)  # it is no newer than it was: `ckpt_path=last` goes by that
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": kept,
                "best_model_score": score if kept else None,
                "best_k_models": {kept: score} if kept else {},
                "kth_best_model_path": kept,
                "kth_value": score if kept else torch.tensor(float("-inf")),
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)
