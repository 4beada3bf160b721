"""Keeps the prefix's output per tokenised row in memory: the prefix is frozen, so later epochs pay for K layers alone.

Bounded in size: rows that do not fit any more are computed each time. Knows nothing of labels or losses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from so8t.base import SplitBase


@dataclass(frozen=True)
class SharedRows:
    """Cached rows in one tensor `[tokens, D]` in shared memory, for the processes of one benchmark or sweep."""

    keys: list[bytes]
    ends: list[int]
    states: Tensor


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
        lengths, keys = _lengths_and_keys(tokens, mask)
        todo = [i for i, key in enumerate(keys) if key not in self._rows]
        hidden = torch.zeros(*tokens.shape, self.base.hidden_size, dtype=self.base.dtype, device=tokens.device)
        if todo:
            longest = max(lengths[i] for i in todo)
            fresh = self.base.prefix(tokens[todo, :longest], mask[todo, :longest])
            self.put(tokens[todo], mask[todo], fresh)
            for j, i in enumerate(todo):
                hidden[i, : lengths[i]] = fresh[j, : lengths[i]]
        for i, key in enumerate(keys):
            if i not in todo:
                hidden[i, : lengths[i]] = self._rows[key].to(hidden.device)
        return hidden

    def put(self, tokens: Tensor, mask: Tensor, hidden: Tensor) -> None:
        """Keeps states that were computed elsewhere, as far as there is room: `[B, T], [B, T], [B, T, D]`."""
        lengths, keys = _lengths_and_keys(tokens, mask)
        for key, row, length in zip(keys, hidden, lengths, strict=True):
            size = length * row.shape[-1] * row.element_size()
            if size <= self.room:
                self._rows[key] = row[:length].cpu().clone()
                self.room -= size

    def shared(self) -> SharedRows:
        """All rows that are kept, in shared memory."""
        rows = list(self._rows.values())
        ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
        states = torch.cat(rows)
        states.share_memory_()  # type: ignore[no-untyped-call]
        return SharedRows(list(self._rows), ends, states)

    def adopt(self, shared: SharedRows) -> None:
        """Takes over rows that another process computed with the same base and cut; they do not count as kept here."""
        for key, begin, end in zip(shared.keys, [0, *shared.ends], shared.ends, strict=False):
            self._rows[key] = shared.states[begin:end]


def _lengths_and_keys(tokens: Tensor, mask: Tensor) -> tuple[list[int], list[bytes]]:
    lengths = mask.sum(-1).tolist()
    return lengths, [tokens[i, :n].cpu().numpy().tobytes() for i, n in enumerate(lengths)]
