"""Rotations in one pass over memory: the inner product of `rotate`, compiled by torch (C++ on a CPU, Triton on a GPU).

Without it a rotation is three passes, two casts and a batched product of small matrices. Compiling takes seconds, once per
process, so it is for long runs and wide bases: `compile=true`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from so8t.errors import GroupError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_kernel: Callable[[Tensor, Tensor], Tensor] | None = None


def _turned(rows: Tensor, columns: Tensor) -> Tensor:
    """`y_i = sum_j R_ij x_j` in float32 with the sum written out: `[N, D] x [8, D/8 or 1, 8] -> [N, D]`; `columns[j]` holds
    `R[:, :, j]`."""
    blocks = rows.view(rows.shape[0], -1, 8).float()
    total = blocks[..., :1] * columns[0]
    for j in range(1, 8):
        total = total + blocks[..., j : j + 1] * columns[j]
    return total.to(rows.dtype).view(rows.shape)


def turned(x: Tensor, rotation: Tensor) -> Tensor | None:
    """`R x` on every block, `[..., D] x [D/8 or 1, 8, 8] -> [..., D]`; None where rotations are not fused: outside
    `fused_rotations`, in float64, and for tensors without storage."""
    if _kernel is None or x.dtype not in _DTYPES or x.device.type == "meta" or x.numel() == 0:
        return None
    rows = x.reshape(-1, x.shape[-1])
    torch._dynamo.maybe_mark_dynamic(rows, 0)  # batches differ in length: one kernel for all
    try:
        return _kernel(rows, rotation.float().permute(2, 0, 1).contiguous()).view(x.shape)
    except TorchDynamoException as error:
        needed = "Triton" if x.device.type == "cuda" else "a C++ compiler such as g++"
        raise GroupError(
            f"compile=true needs {needed}, and compiling failed ({type(error).__name__}): install it, or set compile=false"
        ) from error


@contextmanager
def fused_rotations() -> Iterator[None]:
    """Rotations inside are compiled, the first of each dtype when it is met; `GroupError` there if there is no compiler."""
    global _kernel
    before, _kernel = _kernel, torch.compile(_turned)
    try:
        yield
    finally:
        _kernel = before
