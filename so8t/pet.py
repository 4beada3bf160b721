"""PET: temporal consistency along tokens, group inertia over steps, and the three-phase schedule.

Trap (DESIGN.md, section 2): a second difference taken straight after a rotation does not depend on it, because rotations
keep norms and the base is frozen. So the temporal term acts on what the gates do change: the safety logits, or the final
hidden states behind gated layers.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t.gates import GateSet
from so8t.specs import Fraction, NotNegative, ProperFraction, spec


@spec
class PetSpec:
    """What `conf/pet` says. `weight = 0` turns the temporal term off, `inertia_weight = 0` the inertia."""

    weight: NotNegative = 0.1
    target: Literal["logits", "hidden"] = "logits"
    penalty: Literal["squared", "huber"] = "squared"
    path: Literal["request", "request_and_answer"] = "request"
    max_share: ProperFraction = 0.2
    inertia_weight: NotNegative = 0.01
    inertia_decay: ProperFraction = 0.99
    exploration_end: Fraction = 0.2
    transition_end: Fraction = 0.6
    exploration: NotNegative = 0.0
    transition: NotNegative = 0.1
    stabilisation: NotNegative = 1.0

    def factor(self, progress: float) -> float:
        """The schedule: about 0 while exploring, a tenth in transition, 1 while stabilising; `progress` in [0, 1]."""
        if progress < self.exploration_end:
            return self.exploration
        if progress < self.transition_end:
            return self.transition
        return self.stabilisation


def temporal_consistency(path: Tensor, mask: Tensor, penalty: Literal["squared", "huber"] = "squared") -> Tensor:
    """Mean second difference along tokens over the mean square of the path: `[B, T, C], [B, T] -> []`.

    `mean ||z[t+1] - 2 z[t] + z[t-1]||^2 / mean ||z||^2` over runs of three neighbouring positions that are all inside
    `mask`. Multiplying the path by a number changes nothing. Fewer than three such tokens give exactly 0. With
    `huber`, differences beyond the path's root mean square count linearly.
    """
    path = path.float()
    mask = mask.bool()
    inside = mask[:, 2:] & mask[:, 1:-1] & mask[:, :-2]
    if path.shape[1] < 3 or not inside.any():
        return path.new_zeros(())
    second = (path[:, 2:] - 2 * path[:, 1:-1] + path[:, :-2])[inside]
    mean_square = path[mask].pow(2).mean().clamp(min=1e-12)
    if penalty == "huber":
        scaled = second / mean_square.sqrt()
        return 2 * F.huber_loss(scaled, torch.zeros_like(scaled), delta=1.0)
    return second.pow(2).mean() / mean_square


def centred(logits: Tensor) -> Tensor:
    """Logits without their mean over classes, which no decision depends on: `[..., 3] -> [..., 3]`."""
    return logits - logits.mean(-1, keepdim=True)


class GroupInertia(nn.Module):
    """Chordal distance `||R - R_ema||_F^2` of each block to its moving average over optimiser steps.

    The averages are buffers: they are saved and resumed with the gates.
    """

    def __init__(self, gates: GateSet, decay: float):
        super().__init__()
        self.decay = decay
        for name, rotation in gates.rotations():
            self.register_buffer(name.replace(".", "__"), rotation.matrix().detach().float())

    def _average(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "__"))

    def forward(self, gates: GateSet) -> Tensor:
        """Mean over all blocks of all gates, of which there is one at least: `-> []`."""
        parts = [(rotation.matrix().float() - self._average(name)).pow(2).sum((-2, -1)) for name, rotation in gates.rotations()]
        return torch.cat(parts).mean()

    @torch.no_grad()
    def update(self, gates: GateSet) -> None:
        """Moves every average a step towards its rotation; call once per optimiser step."""
        for name, rotation in gates.rotations():
            self._average(name).lerp_(rotation.matrix().float(), 1 - self.decay)
