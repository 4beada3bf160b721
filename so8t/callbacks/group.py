"""`GroupMonitor`: proves along the way that every rotation is still in SO(8), and that the pairs do not commute."""

import lightning as L

from so8t.errors import GroupError
from so8t.lightning_module import SO8TModule
from so8t.specs import Positive, PositiveInt


class GroupMonitor(L.Callback):
    """Logs both defects of every rotation and the commutator of every pair; stops a run that has left the group.

    Args:
        every_n_steps: optimiser steps between looks.
        tolerance: bound of both defects of the float64 matrices.
        tolerance_float32: bound of both defects as applied.

    Raises:
        GroupError: a defect is past its bound, or (after the first step) a pair commutes.
    """

    def __init__(self, every_n_steps: PositiveInt = 10, tolerance: Positive = 1e-12, tolerance_float32: Positive = 5e-6):
        self.every_n_steps = every_n_steps
        self.tolerance = tolerance
        self.tolerance_float32 = tolerance_float32
        self._last = -1

    def check(self, module: SO8TModule, step: int) -> dict[str, float]:
        """All invariants as `group/GATE/WHAT`; see the class for what is raised."""
        table = module.model.gates.invariants()
        bounds = {
            "orthogonality": self.tolerance,
            "determinant": self.tolerance,
            "orthogonality_float32": self.tolerance_float32,
            "determinant_float32": self.tolerance_float32,
        }
        for gate, values in table.items():
            for name, bound in bounds.items():
                if name in values and not values[name] < bound:
                    raise GroupError(
                        f"step {step}: {gate} has left SO(8): {name} defect {values[name]:.3g}, allowed {bound:g}; "
                        "the last checkpoint is intact, lower optim.gate_lr and continue with ckpt_path=last"
                    )
            if step > 0 and "commutator" in values and not values["commutator_mean"] > 0:
                raise GroupError(f"step {step}: R_safe and R_cmd of {gate} commute: something resets the gates")
        return {f"group/{gate}/{name}": value for gate, values in table.items() for name, value in values.items()}

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module, SO8TModule) or trainer.sanity_checking or trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        figures = self.check(module, trainer.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks before the first step."""
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Looks every `every_n_steps` optimiser steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks after the last step."""
        self._look(trainer, pl_module)
