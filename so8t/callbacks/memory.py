"""`MemoryMonitor`: the run's own peak, against the profile's budget."""

import logging
import resource
from typing import Literal

import lightning as L
import torch

from so8t.specs import Positive, PositiveInt

log = logging.getLogger(__name__)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: allocated by torch on a GPU, resident set size on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


class MemoryMonitor(L.Callback):
    """Logs `memory/peak_gib`; past `budget_gib` it warns once, or stops the run with what was saved intact."""

    def __init__(
        self, budget_gib: Positive | None = None, on_exceed: Literal["warn", "stop"] = "warn", every_n_steps: PositiveInt = 10
    ):
        self.budget_gib = budget_gib
        self.on_exceed = on_exceed
        self.every_n_steps = every_n_steps
        self.peak = 0.0
        self._told = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The peak of this run, not of the one before it."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Reads the peak every few steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last reading, validation included."""
        self._look(trainer, pl_module, over=True)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, *, over: bool = False) -> None:
        self.peak = peak_gib(pl_module.device)
        for logger in trainer.loggers:
            logger.log_metrics({"memory/peak_gib": self.peak}, step=trainer.global_step)
        if self.budget_gib is not None and self.peak > self.budget_gib and not self._told:
            self._told = True
            what = f"peak memory {self.peak:.2f} GiB is over hw.memory_budget_gib={self.budget_gib:g}"
            if self.on_exceed == "stop" and not over:
                log.error("%s: stopping", what)
                trainer.should_stop = True
            else:
                log.warning("%s: lower data.max_length, data.batch_size or gate.top_layers", what)
