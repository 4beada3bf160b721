"""The group: what stays true of every rotation, at any coordinates, dtype and number of steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from so8t.errors import GroupError
from so8t.so8 import (
    CHUNK_ROWS,
    COORDS,
    DIM,
    MAPS,
    cayley_map,
    commutator_norm,
    determinant_drift,
    exp_map,
    orthogonality_defect,
    rotate,
    skew,
)

ALL_MAPS = pytest.mark.parametrize("name", sorted(MAPS))
SEEDS = st.integers(0, 2**32 - 1)


def coords(seed: int, norm: float, blocks: int = 5) -> torch.Tensor:
    raw = torch.randn(blocks, COORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True) * norm


def taylor(a: torch.Tensor, terms: int = 60) -> torch.Tensor:
    """exp by its series, on a scaled-down matrix squared back up: a reference of our own."""
    a = a / 2**6
    term = total = torch.eye(DIM, dtype=a.dtype).expand_as(a).clone()
    for k in range(1, terms):
        term = term @ a / k
        total = total + term
    for _ in range(6):
        total = total @ total
    return total


def test_skew_is_the_upper_triangle_row_by_row_and_antisymmetric():
    a = skew(torch.arange(1.0, 29.0))
    assert a.dtype == torch.float64
    assert torch.equal(a, -a.mT)
    assert a[0, 1:].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert a[6, 7] == 28
    with pytest.raises(GroupError, match="28"):
        skew(torch.zeros(27))


def test_exp_of_zero_is_the_identity_and_small_coordinates_are_first_order():
    assert torch.equal(exp_map(torch.zeros(COORDS)), torch.eye(DIM, dtype=torch.float64))
    assert torch.allclose(cayley_map(torch.zeros(COORDS)), torch.eye(DIM, dtype=torch.float64), atol=0)
    small = coords(0, 1e-5)
    eye = torch.eye(DIM, dtype=torch.float64)
    assert (exp_map(small) - eye - skew(small)).norm() < 1e-9
    assert (cayley_map(small) - eye + skew(small)).norm() < 1e-9


@given(seed=SEEDS, norm=st.floats(0.001, 10))
@settings(max_examples=40, deadline=None)
def test_exp_agrees_with_its_power_series(seed, norm):
    a = coords(seed, norm)
    assert torch.allclose(exp_map(a), taylor(skew(a)), atol=1e-11)


@ALL_MAPS
@given(seed=SEEDS, size=st.floats(0, 10))
@settings(max_examples=60, deadline=None)
def test_every_rotation_is_in_so8_at_any_coordinates_up_to_ten(name, seed, size):
    raw = torch.randn(7, COORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for a in (raw / raw.abs().amax(-1, keepdim=True) * size, coords(seed, size, 7)):  # |a| by component and as a norm
        rotation = MAPS[name](a)
        assert rotation.dtype == torch.float64
        assert orthogonality_defect(rotation).max() < 1e-12
        assert determinant_drift(rotation).max() < 1e-12
        applied = rotation.float()
        assert orthogonality_defect(applied).max() < 5e-6
        assert determinant_drift(applied).max() < 5e-6


@ALL_MAPS
def test_rotations_stay_in_so8_after_a_thousand_optimiser_steps(name):
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(9, COORDS) * 1e-3)
    optimiser = torch.optim.AdamW([a], lr=1e-2)
    x, target = torch.randn(32, 72), torch.randn(32, 72)
    for _ in range(1000):
        optimiser.zero_grad()
        (rotate(x, MAPS[name](a)) - target).pow(2).mean().backward()
        optimiser.step()
    assert a.abs().max() > 0.1, "the steps moved the coordinates"
    rotation = MAPS[name](a.detach())
    assert orthogonality_defect(rotation).max() < 1e-12
    assert determinant_drift(rotation).max() < 1e-12
    assert orthogonality_defect(rotation.float()).max() < 5e-6
    assert determinant_drift(rotation.float()).max() < 5e-6


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 1e-3), (torch.float32, 1e-5)])
@given(seed=SEEDS, size=st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_norms_are_kept_at_any_activation_dtype(dtype, bar, seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 576, generator=generator).to(dtype)
    y = rotate(x, exp_map(coords(seed, size, 72)))
    assert y.dtype == dtype
    ratio = y.double().norm(dim=-1) / x.double().norm(dim=-1)
    assert (ratio - 1).abs().max() < bar


def test_rounding_the_rotation_itself_to_bf16_breaks_it():
    rotation = exp_map(coords(0, 3.0, 50))
    assert orthogonality_defect(rotation.bfloat16()).mean() > 1e-3


def test_negating_a_reflection_does_not_mend_it_in_even_dimension():
    reflection = torch.eye(DIM, dtype=torch.float64)
    reflection[0, 0] = -1
    assert determinant_drift(reflection) == 2
    assert determinant_drift(-reflection) == 2


def test_rotate_follows_the_column_convention_and_the_order_safe_then_command():
    x = torch.randn(3, 16, dtype=torch.float64)
    safe, cmd = exp_map(coords(1, 1.0, 2)), exp_map(coords(2, 1.0, 2))
    want = torch.stack([torch.cat([cmd[b] @ safe[b] @ row[8 * b : 8 * b + 8] for b in (0, 1)]) for row in x])
    assert torch.allclose(rotate(rotate(x, safe), cmd), want)
    other = rotate(rotate(x, cmd), safe)
    assert (other - want).abs().max() > 0.01, "swapping the two would be seen"
    assert commutator_norm(cmd, safe).min() > 0.01


def test_one_shared_block_turns_every_block():
    x = torch.randn(2, 24)
    shared = exp_map(coords(3, 2.0, 1))
    assert torch.allclose(rotate(x, shared), rotate(x, shared.expand(3, 8, 8).contiguous()), atol=1e-6)


@pytest.mark.parametrize(("blocks", "width"), [(1, 24), (2, 16), (3, 24)], ids=["shared", "pairs", "odd"])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_of_rotate_are_right(blocks, width, in_place):
    x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
    a = coords(4, 1.5, blocks).requires_grad_()

    def run(x, a):
        return rotate(x * 1.0, exp_map(a), in_place=in_place)

    assert gradcheck(run, (x, a), atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 4], ids=["shared", "pairs"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_more_rows_than_are_turned_at_once_give_what_one_sum_of_products_gives(blocks, dtype, bar):
    torch.manual_seed(0)
    shape = (3, CHUNK_ROWS // 2 - 1, 4 * DIM)  # two chunks, the second not full
    assert CHUNK_ROWS < shape[0] * shape[1] < 2 * CHUNK_ROWS
    inputs = torch.randn(shape, dtype=dtype), exp_map(coords(6, 2.0, blocks)).to(dtype)
    up = torch.randn(shape, dtype=dtype)

    def plain(x, rotation):
        whole = rotation.expand(4, DIM, DIM)
        return torch.einsum("nij,btnj->btni", whole, x.unflatten(-1, (4, DIM))).flatten(-2)

    found = []
    for turned in (rotate, plain):
        x, rotation = (tensor.clone().requires_grad_() for tensor in inputs)
        y = turned(x, rotation)
        y.backward(up)
        found.append((y.detach(), x.grad, rotation.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < bar * theirs.norm()


@pytest.mark.parametrize("in_place", [False, True])
def test_rotate_saves_its_output_and_the_rotation_and_nothing_else(in_place):
    x = torch.randn(5, 16).requires_grad_() * 1.0
    rotation = exp_map(coords(5, 1.0, 2)).requires_grad_()
    before = x.data_ptr()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rotate(x, rotation, in_place=in_place)
    assert len(saved) == 2
    assert {t.data_ptr() for t in saved} == {y.data_ptr(), rotation.data_ptr()}
    assert (y.data_ptr() == before) == in_place


def test_the_gradient_of_every_coordinate_is_not_zero():
    a = (torch.randn(3, COORDS) * 1e-3).requires_grad_()
    rotate(torch.randn(10, 24), exp_map(a)).pow(3).sum().backward()
    assert (a.grad != 0).all()


@pytest.mark.parametrize("width", [0, 7, 12, 577])
def test_a_width_that_is_not_a_multiple_of_eight_is_refused(width):
    with pytest.raises(GroupError, match="multiple of 8"):
        rotate(torch.zeros(1, width), torch.eye(8)[None])


def test_a_rotation_of_the_wrong_shape_is_refused_with_both_shapes():
    with pytest.raises(GroupError, match=r"\(3, 8, 8\).*\(2, 16\)"):
        rotate(torch.zeros(2, 16), torch.eye(8).expand(3, 8, 8))
