"""Learning rates, clipping and the cosine schedule with warm-up. Everything is counted in optimiser steps."""

import math
from typing import Annotated

import torch
from annotated_types import Interval

from so8t.specs import Count, Fraction, NotNegative, Positive, spec


@spec
class OptimSpec:
    """What `conf/optim` says. `clip` is a gradient norm per group, 0 turns clipping off."""

    gate_lr: Positive = 2e-3
    head_lr: Positive = 3e-5
    weight_decay: NotNegative = 0.01
    gate_weight_decay: NotNegative = 0.0
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.99)
    clip: NotNegative = 1.0
    warmup_steps: Count = 10
    final_lr_fraction: Fraction = 0.0


def lr_factor(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Multiplier of the learning rate at optimiser step `step` (from 0): linear warm-up, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, *, warmup: int, total: int, floor: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of all groups; the first step already has a learning rate above 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup=warmup, total=total, floor=floor))
