"""Keeps the prefix's output per tokenised row in memory: the prefix is frozen, so later epochs pay for K layers alone.

Bounded in size: rows that do not fit any more are computed each time. Knows nothing of labels or losses.
"""

import torch
from torch import Tensor

from so8t.base import SplitBase


class PrefixCache:
    """`prefix(tokens, mask)` with a memory of up to `max_gib`, in the base's own dtype (so that results are the same)."""

    def __init__(self, base: SplitBase, max_gib: float):
        self.base = base
        self.room = int(max_gib * 2**30)
        self._rows: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def prefix(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The prefix's output for right-padded rows: `[B, T], [B, T] -> [B, T, D]`."""
        lengths = mask.sum(-1).tolist()
        keys = [tokens[i, :n].cpu().numpy().tobytes() for i, n in enumerate(lengths)]
        todo = [i for i, key in enumerate(keys) if key not in self._rows]
        hidden = torch.zeros(*tokens.shape, self.base.hidden_size, dtype=self.base.dtype, device=tokens.device)
        if todo:
            longest = max(lengths[i] for i in todo)
            fresh = self.base.prefix(tokens[todo, :longest], mask[todo, :longest])
            for j, i in enumerate(todo):
                hidden[i, : lengths[i]] = fresh[j, : lengths[i]]
                self._keep(keys[i], fresh[j, : lengths[i]])
        for i, key in enumerate(keys):
            if i not in todo:
                hidden[i, : lengths[i]] = self._rows[key].to(hidden.device)
        return hidden

    def _keep(self, key: bytes, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if size <= self.room:
            self._rows[key] = row.cpu().clone()
            self.room -= size
