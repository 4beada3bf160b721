"""Remembers the prefix's output per tokenised row: the prefix is frozen, so later epochs and later runs pay for K layers alone.

In memory up to a bound, or in a `PrefixStore` on disk; rows that do not fit are computed each time. Knows nothing of labels
or losses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from so8t.base import SplitBase
from so8t.data.store import PrefixStore, row_key


class PrefixCache:
    """`prefix(tokens, mask)` with a memory: of up to `memory_gib` in the base's own dtype, or what `store` keeps. `keep` names
    the layers below the cut whose outputs go along. The states of `lead`, the tokens that the chat template puts before every
    request, are kept once and not with each row."""

    def __init__(
        self,
        base: SplitBase,
        memory_gib: float = 0.0,
        store: PrefixStore | None = None,
        *,
        keep: tuple[int, ...] = (),
        lead: Sequence[int] = (),
    ):
        self.base = base
        self.keep = keep
        self.lead = torch.tensor(lead, dtype=torch.long)
        self._of_lead: Tensor | None = None
        self.store = store
        self.room = int(memory_gib * 2**30)
        self._rows: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows) + (0 if self.store is None else len(self.store))

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows or (self.store is not None and key in self.store)

    @property
    def width(self) -> int:
        """Numbers a token: `(1 + n) D`."""
        return (1 + len(self.keep)) * self.base.hidden_size

    @torch.no_grad()
    def prefix(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The prefix's output for right-padded rows: `[B, T], [B, T] -> [B, T, (1 + n) D]`. A row is the same the first time
        and later, also where the store rounds it."""
        lengths = mask.sum(-1).tolist()
        rows = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        leads = [self.shared(row) for row in rows]
        keys = [row_key(row, without=lead) for row, lead in zip(rows, leads, strict=True)]
        todo = [i for i, key in enumerate(keys) if key not in self]
        hidden = torch.zeros(*tokens.shape, self.width, dtype=self.base.dtype, device=tokens.device)
        if todo:
            longest = max(lengths[i] for i in todo)
            fresh = self.base.prefix(tokens[todo, :longest], mask[todo, :longest], self.keep)
            for row, i in zip(fresh, todo, strict=True):
                self._put(keys[i], row[leads[i] : lengths[i]])
                hidden[i, : lengths[i]] = row[: lengths[i]]
        for i, key in enumerate(keys):
            if key in self:
                hidden[i, leads[i] : lengths[i]] = self._get(key)
            if leads[i]:  # the same states whoever was first
                hidden[i, : leads[i]] = self._states_of_lead()
        return hidden

    def shared(self, tokens: Tensor) -> int:
        """How many tokens `[n]` of a row are the lead's, and not kept with it."""
        count = len(self.lead)
        return count if count < len(tokens) and torch.equal(tokens[:count].cpu(), self.lead) else 0

    def key(self, tokens: Tensor) -> bytes:
        """What a row's states are found by."""
        return row_key(tokens, without=self.shared(tokens))

    def _states_of_lead(self) -> Tensor:
        if self._of_lead is None:
            tokens = self.lead[None].to(self.base.device)
            self._of_lead = self.prefix(tokens, torch.ones_like(tokens))[0]  # a row as any other
        return self._of_lead

    def flush(self) -> None:
        """Writes to disk what is not there yet."""
        if self.store is not None:
            self.store.flush()

    def _get(self, key: bytes) -> Tensor:
        return self._rows[key] if self.store is None else self.store.get(key)

    def _put(self, key: bytes, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        if self.store is not None:
            self.store.put(key, states)
        elif size <= self.room:
            self._rows[key] = states.cpu().clone()
            self.room -= size
