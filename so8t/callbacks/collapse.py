"""`SafetyCollapseGuard`: when the safety behaviour collapses, the best gates come back, or the run stops."""

import logging
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from so8t.specs import Count, Fraction, Positive

log = logging.getLogger(__name__)


class SafetyCollapseGuard(L.Callback):
    """Watches safety recall, the mean of refuse recall and escalate recall, against its best.

    The mean of both, each of its own class: a constant REFUSE or ESCALATE reaches 0.5 and is seen as a collapse too.

    Args:
        tolerance: how far below the best it may fall.
        action: `restore` brings back gates and head of the best validation and multiplies the learning rates by
            `lr_factor`; `stop` ends the run.
        max_restores: a run that collapses more often stops.
    """

    def __init__(
        self,
        tolerance: Fraction = 0.2,
        action: Literal["restore", "stop"] = "restore",
        lr_factor: Positive = 0.3,
        max_restores: Count = 3,
    ):
        self.tolerance = tolerance
        self.action = action
        self.lr_factor = lr_factor
        self.max_restores = max_restores
        self.best = float("-inf")
        self.restores = 0
        self.restored_at = -1
        self._best_state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares with the best and acts."""
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or not {"val/refuse_recall", "val/escalate_recall"} <= metrics.keys():
            return
        recall = float(metrics["val/refuse_recall"] + metrics["val/escalate_recall"]) / 2
        if not recall < self.best - self.tolerance:  # NaN (a class without rows) is no collapse
            if recall >= self.best:
                self.best = recall
                self._best_state = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}
            return
        what = f"step {trainer.global_step}: safety recall {recall:.3f} fell from its best {self.best:.3f}"
        if self.action == "stop" or self.restores >= self.max_restores:
            log.error("%s: stopping", what)
            trainer.should_stop = True
            self._restore(trainer, pl_module)
            return
        self.restores += 1
        self._restore(trainer, pl_module)
        self._lower_learning_rates(trainer)
        log.warning("%s: best gates restored, learning rates times %g (%d)", what, self.lr_factor, self.restores)
        for logger in trainer.loggers:
            logger.log_metrics({"guard/restores": float(self.restores)}, step=trainer.global_step)

    def _restore(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.load_state_dict(self._best_state)
        self.restored_at = trainer.global_step  # these weights are not the ones that this validation measured

    def _lower_learning_rates(self, trainer: L.Trainer) -> None:
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # moments of the collapsed run would push the gates back where they came from
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_factor
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            schedule.base_lrs = [lr * self.lr_factor for lr in schedule.base_lrs]

    def state_dict(self) -> dict[str, float | int | dict[str, Tensor]]:
        """Travels with the checkpoint, so a resumed run knows its best."""
        return {"best": self.best, "restores": self.restores, "best_state": self._best_state}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """The counterpart of `state_dict`."""
        self.best = float(state_dict["best"])  # type: ignore[arg-type]
        self.restores = int(state_dict["restores"])  # type: ignore[call-overload]
        states = state_dict["best_state"]
        self._best_state = {k: torch.as_tensor(v) for k, v in states.items()}  # type: ignore[attr-defined]
