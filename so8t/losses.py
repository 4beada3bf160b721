"""The terms of the loss that have no memory: class loss, expected cost, language-model loss; and how they are added up.

`L = w_task LM + w_safety CE + w_path CE along the path + w_cost sum_k p_k C[label, k] + lambda(t) PET + w_inertia inertia`
(DESIGN.md, section 3).
Everything is differentiable: probabilities, never argmax.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target id that no loss counts."""


def safety_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    row_weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy or focal loss, weighted per sample: `[B, 3], [B] -> []`.

    Focal loss (Lin et al. 2017, arXiv:1708.02002): `-(1 - p_y)^gamma log p_y`; `gamma = 0` is cross-entropy. Every row's
    own class weight multiplies its own loss, and the sum is divided by the sum of the weights.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_p_label = log_p.gather(-1, labels[:, None]).squeeze(-1)
    missing = (-torch.expm1(log_p_label)).clamp(min=1e-12)  # 1 - p; at exactly 0 a gamma below 1 has no gradient
    loss = -(missing**focal_gamma) * log_p_label if focal_gamma else -log_p_label
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1)
    weight = torch.ones_like(loss) if class_weights is None else class_weights.to(loss)[labels]
    if row_weights is not None:
        weight = weight * row_weights.to(loss)
    return (weight * loss).sum() / weight.sum().clamp(min=1e-12)


def path_loss(
    logits: Tensor,
    labels: Tensor,
    path: Tensor,
    *,
    class_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy at every token of the path, so that a decision can be read before the request is over: `[B, T, 3], [B],
    [B, T] -> []`. A token counts by the share of the path that was read with it: the first ones cannot know much yet."""
    rank = path.float().cumsum(1)
    weight = torch.where(path, rank / rank[:, -1:].clamp(min=1), 0.0)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)  # every row counts alike
    if class_weights is not None:
        weight = weight * class_weights.to(weight)[labels][:, None]
    if row_weights is not None:
        weight = weight * row_weights.to(weight)[:, None]
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_p_label = log_p.gather(-1, labels[:, None, None].expand(*path.shape, 1)).squeeze(-1)
    return -(weight * log_p_label).sum() / weight.sum().clamp(min=1e-12)


def expected_cost(logits: Tensor, labels: Tensor, costs: Tensor, *, row_weights: Tensor | None = None) -> Tensor:
    """Mean over rows, weighted by `row_weights` `[B]`, of `sum_k p_k C[label, k]`: `[B, 3], [B], [3, 3] -> []`."""
    cost = (logits.float().softmax(-1) * costs.to(logits.device, torch.float32)[labels]).sum(-1)
    if row_weights is None:
        return cost.mean()
    weight = row_weights.to(cost)
    return (weight * cost).sum() / weight.sum().clamp(min=1e-12)


def language_model_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int) -> tuple[Tensor, int]:
    """Next-token cross-entropy without ever holding `T x vocabulary` logits.

    Args:
        hidden: `[B, T, D]`, what `head` turns into logits.
        targets: `[B, T]`, already shifted: `targets[b, t]` is the token after position `t`, or `IGNORE`.
        head: `[n, D] -> [n, V]`; run again in the backward pass, chunk by chunk.
        chunk: positions per piece.

    Returns:
        Mean loss per target token (0 where there is none), and how many targets there were.
    """
    wanted = targets != IGNORE
    states, labels = hidden[wanted], targets[wanted]
    count = labels.numel()
    if count == 0:
        return hidden.new_zeros((), dtype=torch.float32), 0

    def piece(part: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), label, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for begin in range(0, count, chunk):
        part, label = states[begin : begin + chunk], labels[begin : begin + chunk]
        if torch.is_grad_enabled():
            total = total + checkpoint(piece, part, label, use_reentrant=False)
        else:
            total = total + piece(part, label)
    return total / count, count


@dataclass
class LossTerms:
    """The weighted terms of one step and their sum.

    The share of PET is taken of the safety side alone (everything but the task term): a share that saw the task loss
    would let the task text change how the safety parameters are trained.
    """

    terms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """Adds `weight * value`; a term whose weight is 0 is off and left out."""
        if weight:
            self.terms[name] = weight * value

    def add_capped(self, name: str, value: Tensor, weight: float, max_share: float) -> None:
        """Adds `weight * value`, scaled down so that it is at most `max_share` of the safety side."""
        if not weight:
            return
        term = weight * value
        rest = sum((t.detach() for n, t in self.terms.items() if n != "task"), torch.zeros_like(term.detach()))
        limit = rest * max_share / (1 - max_share)
        scale = torch.where(term.detach() > limit, limit / term.detach().clamp(min=1e-30), torch.ones_like(limit))
        self.terms[name] = term * scale

    def total(self) -> Tensor:
        """The sum of all terms."""
        return torch.stack([t.reshape(()) for t in self.terms.values()]).sum()

    def shares(self) -> dict[str, float]:
        """Each term's share of the whole, and PET's of the safety side (`pet_of_safety`)."""
        values = {name: float(term.detach()) for name, term in self.terms.items()}
        whole = sum(abs(v) for v in values.values()) or 1.0
        shares = {name: abs(v) / whole for name, v in values.items()}
        if "pet" in values:
            safety_side = sum(abs(v) for name, v in values.items() if name != "task") or 1.0
            shares["pet_of_safety"] = abs(values["pet"]) / safety_side
        return shares
