"""Triality: three representations of so(8), none of which is another in a new basis, and the form that links them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.so8 import COORDS, DIM, determinant_drift, exp_map, orthogonality_defect, skew
from so8t.triality import D_SIGMA_MINUS, D_SIGMA_PLUS, FORM, carry, half_spin, octonion_table, trilinear_form

SEEDS = st.integers(0, 2**32 - 1)
EYE = torch.eye(DIM, dtype=torch.float64)
MAPS = {"plus": D_SIGMA_PLUS, "minus": D_SIGMA_MINUS}
BOTH = pytest.mark.parametrize("name", sorted(MAPS))
ROWS, COLS = torch.triu_indices(DIM, DIM, offset=1)


def coords(seed: int, norm: float = 1.0, count: int = 5) -> torch.Tensor:
    raw = torch.randn(count, COORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True) * norm


def units(seed: int, count: int = 5) -> torch.Tensor:
    raw = torch.randn(3, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True)


def bracket(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[A, B] = AB - BA`, in coordinates."""
    a, b = skew(a), skew(b)
    return (a @ b - b @ a)[..., ROWS, COLS]


def plane(i: int, j: int, angle: float) -> torch.Tensor:
    """Coordinates of the rotation of one plane."""
    a = torch.zeros(DIM, DIM, dtype=torch.float64)
    a[i, j] = angle
    return a[ROWS, COLS]


# -- the octonions and the Clifford generators -------------------------------------------------------------------------


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_octonions_are_a_division_algebra_that_is_alternative_and_not_associative(seed):
    table = octonion_table()

    def times(x, y):
        return torch.einsum("...i,...j,ijk->...k", x, y, table)

    x, y, z = units(seed)
    assert (times(x, y).norm(dim=-1) - 1).abs().max() < 1e-14, "|xy| = |x| |y|"
    assert (times(x, times(x, y)) - times(times(x, x), y)).abs().max() < 1e-14
    assert (times(times(y, x), x) - times(y, times(x, x))).abs().max() < 1e-14
    assert (times(times(x, y), z) - times(x, times(y, z))).abs().max() > 1e-3
    assert (trilinear_form(x, y, z) - times(x, times(y, z))[..., 0]).abs().max() < 1e-14, "Re(xyz), whatever the brackets"


def test_the_generators_satisfy_the_clifford_relations_exactly():
    for i in range(DIM):
        for j in range(DIM):
            assert torch.equal(FORM[i] @ FORM[j].T + FORM[j] @ FORM[i].T, 2 * EYE * (i == j))
            assert torch.equal(FORM[i].T @ FORM[j] + FORM[j].T @ FORM[i], 2 * EYE * (i == j))


# -- the two maps ------------------------------------------------------------------------------------------------------


@BOTH
@given(seed=SEEDS, size=st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_both_maps_carry_the_bracket(name, seed, size):
    d = MAPS[name]
    a, b = coords(seed, size), coords(seed + 1, 1.0)
    left, right = bracket(carry(a, d), carry(b, d)), carry(bracket(a, b), d)
    assert right.norm() > 0.01 * size
    assert (left - right).abs().max() < 1e-12


@BOTH
def test_both_maps_are_orthogonal_with_entries_zero_and_half_exactly(name):
    d = MAPS[name]
    assert d.dtype == torch.float64
    assert d.shape == (COORDS, COORDS)
    assert set((2 * d).flatten().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(d @ d.T, torch.eye(COORDS, dtype=torch.float64))


def test_the_maps_are_the_half_spin_representations_in_coordinates():
    a = coords(0, 3.0)
    plus, minus = half_spin(skew(a))
    assert torch.allclose(skew(carry(a, D_SIGMA_PLUS)), plus, atol=1e-14)
    assert torch.allclose(skew(carry(a, D_SIGMA_MINUS)), minus, atol=1e-14)
    assert (plus - minus).abs().max() > 0.1
    assert carry(a.float(), D_SIGMA_PLUS).dtype == torch.float64


def test_the_map_into_s_plus_has_order_three_and_its_square_is_the_map_into_s_minus():
    eye = torch.eye(COORDS, dtype=torch.float64)
    assert torch.equal(D_SIGMA_PLUS @ D_SIGMA_PLUS, D_SIGMA_MINUS)
    assert torch.equal(D_SIGMA_PLUS @ D_SIGMA_MINUS, eye)
    assert torch.equal(D_SIGMA_PLUS @ D_SIGMA_PLUS @ D_SIGMA_PLUS, eye)
    assert not torch.equal(D_SIGMA_PLUS, eye)


def test_what_the_map_leaves_as_it_is_are_the_14_derivations_of_the_octonions():
    """g2, where all three representations agree; elsewhere they do not."""
    moves = D_SIGMA_PLUS - torch.eye(COORDS, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moves.T @ moves)
    fixed = vectors[:, values.abs() < 1e-12].T
    assert len(fixed) == 14
    table = octonion_table()
    for a in skew(fixed):  # A(xy) = A(x) y + x A(y)
        whole = torch.einsum("ijk,lk->ijl", table, a)
        parts = torch.einsum("mi,mjk->ijk", a, table) + torch.einsum("mj,imk->ijk", a, table)
        assert (whole - parts).abs().max() < 1e-12


# -- not inner ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("i", "j"), [(0, 1), (2, 5), (6, 7)])
def test_a_plane_turned_by_theta_turns_four_planes_by_half_of_it_in_the_spinors(name, i, j):
    theta = 0.7
    a = plane(i, j, theta)

    def angles(coordinates):
        return torch.linalg.eigvals(skew(coordinates)).imag.sort().values

    zero = [0.0] * 6
    assert torch.allclose(angles(a), torch.tensor([-theta, *zero, theta], dtype=torch.float64), atol=1e-12)
    halves = torch.tensor([-theta / 2] * 4 + [theta / 2] * 4, dtype=torch.float64)
    assert torch.allclose(angles(carry(a, MAPS[name])), halves, atol=1e-12)
    trace = torch.trace(exp_map(carry(a, MAPS[name])))
    assert abs(trace - 8 * torch.cos(torch.tensor(theta / 2, dtype=torch.float64))) < 1e-12
    assert abs(torch.trace(exp_map(a)) - trace) > 0.01, "no conjugation turns one into the other"


def test_the_two_half_spin_representations_differ_from_each_other():
    """Four planes turned by theta: S+ and S- have different spectra, so neither is the other in another basis."""
    a = sum(plane(2 * k, 2 * k + 1, 2.0) for k in range(4))
    traces = {name: torch.trace(exp_map(carry(a, d))).item() for name, d in MAPS.items()}
    assert abs(traces["plus"] - traces["minus"]) > 0.1


@BOTH
def test_a_full_turn_is_the_identity_on_vectors_and_minus_one_on_spinors(name):
    full = plane(0, 1, 2 * torch.pi)
    assert (exp_map(full) - EYE).abs().max() < 1e-12
    assert (exp_map(carry(full, MAPS[name])) + EYE).abs().max() < 1e-12
    assert (exp_map(carry(2 * full, MAPS[name])) - EYE).abs().max() < 1e-12


# -- the form ----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, size=st.floats(0, 10))
@settings(max_examples=60, deadline=None)
def test_the_trilinear_form_is_invariant_under_the_three_linked_rotations(seed, size):
    a = coords(seed, size)
    v, plus, minus = units(seed + 1)
    linked = [exp_map(a), exp_map(carry(a, D_SIGMA_PLUS)), exp_map(carry(a, D_SIGMA_MINUS))]
    for rotation in linked:
        assert orthogonality_defect(rotation).max() < 1e-12
        assert determinant_drift(rotation).max() < 1e-12
    turned = [(r @ x[..., None])[..., 0] for r, x in zip(linked, (v, plus, minus), strict=True)]
    assert (trilinear_form(*turned) - trilinear_form(v, plus, minus)).abs().max() < 1e-12


def test_the_form_is_not_invariant_when_one_rotation_is_not_the_linked_one():
    a = coords(3, 2.0, 50)
    v, plus, minus = units(4, 50)
    before = trilinear_form(v, plus, minus)

    def after(for_v, for_plus, for_minus):
        rotations = (exp_map(for_v), exp_map(for_plus), exp_map(for_minus))
        turned = [(r @ x[..., None])[..., 0] for r, x in zip(rotations, (v, plus, minus), strict=True)]
        return (trilinear_form(*turned) - before).abs().mean()

    right = carry(a, D_SIGMA_PLUS), carry(a, D_SIGMA_MINUS)
    assert after(a, *right) < 1e-13
    assert after(a, *reversed(right)) > 0.1, "S+ and S- in each other's place"
    assert after(a, a, a) > 0.1, "one rotation for all three"
    assert after(-a, *right) > 0.1


def test_the_form_is_bounded_by_the_lengths_reaches_the_bound_and_is_linear_in_each_argument():
    v, plus, minus = units(5, 400)
    values = trilinear_form(v, plus, minus)
    assert values.abs().max() <= 1
    assert values.abs().mean() > 0.1, "it is not zero"
    best = torch.einsum("kab,...a,...b->...k", FORM, plus, minus)
    assert (trilinear_form(best, plus, minus) - 1).abs().max() < 1e-12
    other = units(6, 400)
    for k in range(3):
        mixed = [2 * x + 3 * y if i == k else x for i, (x, y) in enumerate(zip((v, plus, minus), other, strict=True))]
        moved = [y if i == k else x for i, (x, y) in enumerate(zip((v, plus, minus), other, strict=True))]
        assert (trilinear_form(*mixed) - 2 * values - 3 * trilinear_form(*moved)).abs().max() < 1e-12
