"""Callbacks that a test adds to a real run, to see what really happens in it, or to break one part of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import lightning as L
import torch

from so8t.base import stored_tensors
from so8t.data.datamodule import Batch
from so8t.lightning_module import SO8TModule


def copied(module: SO8TModule) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Spy(L.Callback):
    """Writes down every optimiser step of the newest run: `python train.py +callbacks.spy._target_=tests.spies.Spy`."""

    last: ClassVar["Spy"]

    def __init__(self) -> None:
        Spy.last = self
        self.module: SO8TModule
        self.base: dict[str, torch.Tensor] = {}
        self.start: dict[str, torch.Tensor] = {}
        self.rates: list[dict[str, float]] = []
        """Learning rate of each group, as each optimiser step used it."""
        self.raw: list[dict[str, torch.Tensor]] = []
        """Gradients of each optimiser step before clipping."""
        self.clipped: list[dict[str, torch.Tensor]] = []
        """Gradients of each optimiser step as AdamW saw them."""
        self.rows: list[int] = []
        """Training rows in each micro-batch."""
        self.steps_at: list[int] = []
        """Optimiser steps done before each micro-batch."""
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.validations: list[tuple[int, dict[str, float], dict[str, torch.Tensor]]] = []
        """Step, metrics, and gates and head after all other callbacks, of each validation."""

    def _gradients(self) -> dict[str, torch.Tensor]:
        named = self.module.named_parameters()
        return {name: p.grad.detach().clone() for name, p in named if p.requires_grad and p.grad is not None}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SO8TModule)
        self.module = pl_module
        self.base = {name: tensor.clone() for name, tensor in stored_tensors(pl_module.model.base)}
        self.start = copied(pl_module)
        trainer.optimizers[0].register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        self.clipped.append(self._gradients())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.raw.append(self._gradients())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self.rows.append(len(batch.labels))
        self.steps_at.append(trainer.global_step)
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.validations.append((trainer.global_step, figures, copied(pl_module)))


class Scripted(L.Callback):
    """Validations end with these figures instead of the measured ones: a hand-made sequence."""

    def __init__(self, sequence: list[dict[str, float]]):
        self.sequence = list(sequence)

    def on_validation_start(self, trainer: L.Trainer, pl_module: SO8TModule) -> None:
        figures = {name.removeprefix("val/"): value for name, value in self.sequence.pop(0).items()}
        pl_module._results = lambda: figures


class At(L.Callback):
    """Calls `act(trainer, module)` once, after optimiser step `step`."""

    def __init__(self, step: int, act: Callable[[L.Trainer, SO8TModule], object]):
        self.step, self.act, self.done = step, act, False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.act(trainer, pl_module)


class PowerCut(Exception):
    """The run was interrupted."""


class Interrupt(L.Callback):
    """Ends the process's training as a power cut would, after optimiser step `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:
            raise PowerCut


class WriteWeights(L.Callback):
    """Every process writes its gates and head, the rows it saw and how it was told about the others."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self.seen.append(batch.rows.tolist())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {
            "state": pl_module.state_dict(),
            "seen": self.seen,
            "world": trainer.world_size,
            "backend": torch.distributed.get_backend(),
            "process": os.getpid(),
            "steps": trainer.global_step,
        }
        torch.save(report, self.folder / f"rank{trainer.global_rank}.pt")
