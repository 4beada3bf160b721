"""`ByteTracker`: the tensor bytes that are alive while code runs under it, by what they are for, and their peak.

Works on real tensors and on those of the `meta` device, which have none, and sees every storage that an
operation hands back. What a kernel takes and gives back inside one operation is invisible to it, but for the product with
a 4-bit weight, which is taken apart here as bitsandbytes computes it. Knows nothing of bases, gates or losses.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, GRADIENTS, LOGITS, DEQUANTISED = "activations", "gradients", "logits", "dequantised"

_DEQUANTISE_4BIT = torch.ops.bitsandbytes.dequantize_4bit.default
_DEQUANTISE_SCALES = torch.ops.bitsandbytes.dequantize_blockwise.default


class ByteTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes by label; `peak` and `at_peak` hold the largest sum so far and what it was made of.

    An operation's result is `logits` when its last dimension is `vocabulary`, `dequantised` when it comes out of a 4-bit
    weight, `gradients` when the backward pass made it, `activations` otherwise (recomputation in the backward pass, too).

    Args:
        vocabulary: width of logits; 0 labels none.
        granularity: sizes are rounded up to multiples of this many bytes (512 in PyTorch's CUDA allocator).
        assume: on `meta`, stand in for what only real numbers could tell: a condition is true, a mask selects all,
            or as many as `selected` says for masks of its shape.
    """

    def __init__(self, *, vocabulary: int = 0, granularity: int = 1, assume: bool = False):
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.granularity, self.assume = vocabulary, granularity, assume
        self.selected: dict[torch.Size, int] = {}
        self.live: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._storages: dict[int, weakref.ref] = {}
        self._inside: str | None = None

    # -- what is counted -----------------------------------------------------------------------------------------------

    def add(self, tensors: Iterable[Tensor], label: str) -> None:
        """Counts tensors that existed before; a storage counts once, under its first label."""
        for tensor in tensors:
            self._see(tensor, label)
        self._mark()

    def add_copies(self, tensor: Tensor, copies: int, label: str) -> None:
        """Counts tensors that are not there but would be, as large as this one, and stay alive for good."""
        self.live[label] = self.live.get(label, 0) + copies * self._size(tensor)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These tensors live elsewhere (on the host): they and their views are never counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, every new tensor has this label (dequantised weights keep theirs)."""
        before, self._inside = self._inside, label
        try:
            yield
        finally:
            self._inside = before

    def restart(self) -> None:
        """Forgets the peak: the next one is counted from what is alive now."""
        self.peak, self.at_peak = 0, {}
        self._mark()

    def _see(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = self._size(tensor)
        self.live[label] = self.live.get(label, 0) + size

        def gone(_: object) -> None:
            del self._storages[key]
            self.live[label] -= size

        self._storages[key] = weakref.ref(storage, gone)

    def _size(self, tensor: Tensor) -> int:
        return -(-tensor.untyped_storage().nbytes() // self.granularity) * self.granularity

    def _mark(self) -> None:
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.live)

    # -- watching ------------------------------------------------------------------------------------------------------

    def _label(self, func: object, result: Tensor) -> str:
        if func in (_DEQUANTISE_4BIT, _DEQUANTISE_SCALES):
            return DEQUANTISED
        if self._inside is not None:
            return self._inside
        if self.vocabulary and result.dim() and result.shape[-1] == self.vocabulary:
            return LOGITS
        # a checkpoint that recomputes runs inside the backward pass, but under hooks that collect what it saves
        recomputes = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return GRADIENTS if torch._C._current_graph_task_id() != -1 and not recomputes else ACTIVATIONS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            with self:
                return _gemm_4bit(*args, **(kwargs or {}))
        result = self._assumed(func, args) if self.assume else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, self._label(func, leaf))
        self._mark()
        return result

    def _assumed(self, func: object, args: Any) -> Any:  # noqa: ANN401
        """What an operation without data cannot know; `None` where only shapes matter."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            values, mask = args[0], args[1][0]
            return values.new_empty(self.selected.get(mask.shape, mask.numel()), *values.shape[mask.dim() :])
        if func is _DEQUANTISE_4BIT:
            return torch.empty(args[4], dtype=args[5], device=args[0].device)
        if func is _DEQUANTISE_SCALES:
            return torch.empty(args[0].shape, dtype=args[4], device=args[0].device)
        return None


def _gemm_4bit(
    x: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """The product as bitsandbytes 0.50 computes it from more than a few rows on (backends/default and backends/cuda): scales,
    then the whole weight, then an ordinary product. Its fused kernels for few rows need less."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = ops.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return F.linear(x, weight, bias)


__all__ = ["ACTIVATIONS", "DEQUANTISED", "GRADIENTS", "LOGITS", "ByteTracker"]
