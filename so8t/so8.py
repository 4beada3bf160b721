"""The group SO(8): coordinates, the two maps from so(8), defects, and the rotation of activations.

One rotation block is 28 numbers `a`, the strict upper triangle of a skew matrix `A` in so(8) (row by row). Maps are
computed in float64; activations are rotated in float32. Column convention: `y = R x`, so a row-major activation is
multiplied by `R^T`. This file knows torch and its compiled twin (fused.py), and nothing else.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from so8t import fused
from so8t.errors import GroupError

DIM = 8
COORDS = DIM * (DIM - 1) // 2  # dim so(8) = 28
CHUNK_ROWS = 512
"""Positions that are rotated at once: at hidden size 3,584 their float32 copy is 7 MB."""

_ROWS, _COLS = torch.triu_indices(DIM, DIM, offset=1)


def skew(coords: Tensor) -> Tensor:
    """Skew matrices of so(8): `[..., 28] -> [..., 8, 8]` in float64, `A[i, j] = a`, `A[j, i] = -a` for `i < j`.

    Raises:
        GroupError: the last dimension is not 28.
    """
    if coords.shape[-1] != COORDS:
        raise GroupError(f"so(8) has {COORDS} coordinates, got a tensor of shape {tuple(coords.shape)}")
    upper = coords.new_zeros(*coords.shape[:-1], DIM, DIM, dtype=torch.float64)
    upper[..., _ROWS, _COLS] = coords.double()
    return upper - upper.mT


def exp_map(coords: Tensor) -> Tensor:
    """`R = exp(A)`: `[..., 28] -> [..., 8, 8]` in float64. Covers all of SO(8)."""
    return torch.linalg.matrix_exp(skew(coords))


def cayley_map(coords: Tensor) -> Tensor:
    """`R = (I + A/2)^-1 (I - A/2)`: `[..., 28] -> [..., 8, 8]` in float64.

    Cheaper than `exp_map`; misses the rotations that have an eigenvalue -1. To first order it is `exp(-A)`.
    """
    half = skew(coords) / 2
    eye = torch.eye(DIM, dtype=half.dtype, device=half.device)
    return torch.linalg.solve(eye + half, eye - half)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {"exp": exp_map, "cayley": cayley_map}


def orthogonality_defect(rotation: Tensor) -> Tensor:
    """`||R^T R - I||_F` per block: `[..., 8, 8] -> [...]`, measured in float64."""
    rotation = rotation.double()
    eye = torch.eye(DIM, dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.matrix_norm(rotation.mT @ rotation - eye)


def determinant_drift(rotation: Tensor) -> Tensor:
    """`|det R - 1|` per block: `[..., 8, 8] -> [...]`, measured in float64."""
    return (torch.linalg.det(rotation.double()) - 1).abs()


def commutator_norm(a: Tensor, b: Tensor) -> Tensor:
    """`||A B - B A||_F` per block: two `[..., 8, 8] -> [...]`, measured in float64."""
    a, b = a.double(), b.double()
    return torch.linalg.matrix_norm(a @ b - b @ a)


def block_count(width: int) -> int:
    """How many blocks of eight a hidden size holds.

    Raises:
        GroupError: the width is not a positive multiple of 8; no remainder is ever cut out of a rotation.
    """
    if width <= 0 or width % DIM:
        raise GroupError(f"hidden size {width} is not a multiple of {DIM}: choose a base whose hidden size is")
    return width // DIM


def _compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for everything but float64 (which gradcheck needs)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _paired(rotation: Tensor) -> Tensor:
    """Neighbouring blocks as one of twice the size, with zeros between them: `[n, 8, 8] -> [n/2, 16, 16]`. Batched products of
    8 x 8 are bound by their number, not by arithmetic (`benchmarks/cost.py`). An odd number of blocks stays as it is."""
    if rotation.shape[0] % 2:
        return rotation
    pairs = rotation.new_zeros(rotation.shape[0] // 2, 2 * DIM, 2 * DIM)
    pairs[:, :DIM, :DIM] = rotation[::2]
    pairs[:, DIM:, DIM:] = rotation[1::2]
    return pairs


def _apply(x: Tensor, rotation: Tensor) -> Tensor:
    """`y = R x` on every block of the last dimension, in the compute dtype and back: `[..., D] -> [..., D]`.

    Rows go in chunks, so that copies in the compute dtype stay in a processor's cache and are never as large as `x`.
    """
    done = fused.turned(x, rotation)
    if done is not None:
        return done
    turn = _paired(rotation.to(_compute_dtype(x))).mT
    rows = x.reshape(-1, x.shape[-1] // turn.shape[-1], turn.shape[-1])
    turned = torch.empty_like(rows)
    for source, target in zip(torch.split(rows, CHUNK_ROWS), torch.split(turned, CHUNK_ROWS), strict=True):
        # blocks become the batch dimension of one batched product: [n, N, 16] @ [n or 1, 16, 16]
        target.copy_((source.transpose(0, 1).to(turn.dtype) @ turn).transpose(0, 1))
    return turned.reshape(x.shape)


def _rotation_gradient(grad: Tensor, y: Tensor, rotation: Tensor) -> Tensor:
    """`dL/dR = sum_t g_t x_t^T` per block, with `x_t = R^T y_t`: two `[..., D] -> [n, 8, 8]` in the compute dtype."""
    turn = _paired(rotation.to(_compute_dtype(y)))
    shape = (-1, y.shape[-1] // turn.shape[-1], turn.shape[-1])
    total = turn.new_zeros(shape[1], *turn.shape[1:])
    for up, out in zip(torch.split(grad.reshape(shape), CHUNK_ROWS), torch.split(y.reshape(shape), CHUNK_ROWS), strict=True):
        x = out.transpose(0, 1).to(turn.dtype) @ turn
        total += up.transpose(0, 1).to(turn.dtype).mT @ x
    if turn.shape[-1] > DIM:  # the blocks on the diagonal of each pair
        total = torch.stack([total[:, :DIM, :DIM], total[:, DIM:, DIM:]], dim=1).flatten(0, 1)
    return total.sum(0, keepdim=True) if rotation.shape[0] == 1 else total


class _Rotate(torch.autograd.Function):
    """Saves the output instead of the input: backward needs `x` only for `dR`, and `x = R^T y`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rotation: Tensor, in_place: bool) -> Tensor:
        turned = _apply(x, rotation)
        if in_place:
            x.copy_(turned)
            ctx.mark_dirty(x)
            y = x
        else:
            y = turned
        ctx.save_for_backward(y, rotation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, rotation = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_rotation, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = _apply(grad, rotation.mT) if needs_x else None
        grad_rotation = _rotation_gradient(grad, y, rotation).to(rotation.dtype) if needs_rotation else None
        return grad_x, grad_rotation, None


def rotate(x: Tensor, rotation: Tensor, *, in_place: bool = False) -> Tensor:
    """`y = R x`, block by block: `[..., D] x [D/8 or 1, 8, 8] -> [..., D]`, in the dtype of `x`.

    Applied in float32 whatever the dtype of `x` (float64 stays float64). Only the output and `R` are kept for the
    backward pass. `in_place` overwrites `x`: use it for tensors that nothing else reads, never for a leaf.

    Raises:
        GroupError: `D` is not a multiple of 8, or `R` has neither one block nor `D/8`.
    """
    blocks = block_count(x.shape[-1])
    if rotation.shape[-2:] != (DIM, DIM) or rotation.dim() != 3 or rotation.shape[0] not in (1, blocks):
        raise GroupError(
            f"rotation of shape {tuple(rotation.shape)} does not fit an activation of shape {tuple(x.shape)}: "
            f"expected [{blocks}, {DIM}, {DIM}] or [1, {DIM}, {DIM}]"
        )
    y: Tensor = _Rotate.apply(x, rotation, in_place)  # type: ignore[no-untyped-call]
    return y
