"""PET: three phases, no scale, no reach over masks and borders, and a gradient on what it claims to shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.gates import GateSet, GateSpec
from so8t.model import HeadSpec, SO8TModel
from so8t.pet import GroupInertia, PetSpec, centred, temporal_consistency
from so8t.so8 import exp_map, rotate

SEEDS = st.integers(0, 2**32 - 1)
PENALTIES = pytest.mark.parametrize("penalty", ["squared", "huber"])


def random_path(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(path: torch.Tensor) -> torch.Tensor:
    return torch.ones(path.shape[:2], dtype=torch.bool)


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_the_schedule_explores_then_passes_over_then_stabilises():
    spec = PetSpec()
    assert [spec.factor(p) for p in (0.0, 0.1, 0.199)] == [0.0] * 3
    assert [spec.factor(p) for p in (0.2, 0.4, 0.599)] == [0.1] * 3
    assert [spec.factor(p) for p in (0.6, 0.8, 1.0)] == [1.0] * 3


def test_phases_and_factors_are_settings():
    spec = PetSpec(exploration_end=0.5, transition_end=0.5, exploration=0.3, transition=9.0, stabilisation=2.0)
    assert spec.factor(0.49) == 0.3
    assert spec.factor(0.5) == 2.0, "a transition of no length is passed over"


# -- temporal consistency ----------------------------------------------------------------------------------------------


def test_the_value_is_the_mean_squared_second_difference_over_the_mean_square():
    path = torch.tensor([[[1.0], [2.0], [4.0], [4.0]]])
    # second differences: 4 - 4 + 1 = 1 and 4 - 8 + 2 = -2; squares of the path: 1, 4, 16, 16
    assert temporal_consistency(path, ones(path)).item() == pytest.approx(((1 + 4) / 2) / ((1 + 4 + 16 + 16) / 4))


def test_huber_counts_differences_beyond_the_root_mean_square_linearly():
    path = torch.tensor([[[0.0], [0.0], [10.0], [0.0], [0.0], [1.0], [1.0]]])
    mean_square = (100 + 1 + 1) / 7
    second = [10.0, -20.0, 10.0, 1.0, -1.0]
    scaled = [abs(s) / math.sqrt(mean_square) for s in second]
    want = sum(s**2 if s < 1 else 2 * s - 1 for s in scaled) / 5  # twice Huber, so that small ones are squared
    assert temporal_consistency(path, ones(path), "huber").item() == pytest.approx(want, rel=1e-5)
    assert want < temporal_consistency(path, ones(path)).item(), "one jump weighs less"


@PENALTIES
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_pet_has_no_scale(penalty, seed, scale):
    path = random_path(seed, 2, 9, 3)
    for factor in (scale, -scale):
        value = temporal_consistency(path * factor, ones(path), penalty)
        assert value.item() == pytest.approx(temporal_consistency(path, ones(path), penalty).item(), rel=1e-4)


@PENALTIES
def test_pet_does_not_grow_with_the_number_of_dimensions_or_tokens(penalty):
    values = [
        temporal_consistency(path, ones(path), penalty).item()
        for path in (random_path(0, 8, 400, 3), random_path(1, 8, 40, 576), random_path(2, 64, 40, 3))
    ]
    # white noise: E(z[t+1] - 2 z[t] + z[t-1])^2 = (1 + 4 + 1) E z^2
    assert max(values) / min(values) < 1.1
    if penalty == "squared":
        assert values[0] == pytest.approx(6.0, rel=0.05)


@PENALTIES
@pytest.mark.parametrize("length", [1, 2])
def test_fewer_than_three_real_tokens_give_exactly_zero(penalty, length):
    path = random_path(0, 3, length, 3)
    assert temporal_consistency(path, ones(path), penalty).item() == 0.0
    longer = random_path(0, 3, 8, 3)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 2 : 2 + length] = True
    assert temporal_consistency(longer, mask, penalty).item() == 0.0
    mask[:, 2 + length] = length == 1  # two neighbours; the third is still missing
    mask[:, 7] = True  # and a third that is no neighbour
    assert temporal_consistency(longer, mask, penalty).item() == 0.0


@PENALTIES
def test_zero_and_a_straight_line_are_perfectly_consistent(penalty):
    line = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, -2.0, 0.5]) + 3.0
    assert temporal_consistency(line, ones(line), penalty).item() == pytest.approx(0.0, abs=1e-10)
    zero = torch.zeros(1, 6, 3, requires_grad=True)
    value = temporal_consistency(zero, ones(zero), penalty)
    value.backward()
    assert value.item() == 0.0
    assert torch.isfinite(zero.grad).all()


@PENALTIES
@given(seed=SEEDS, left=st.integers(0, 4), right=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_padding_and_template_tokens_do_not_count(penalty, seed, left, right):
    path = random_path(seed, 1, 6, 3)
    padded = random_path(seed + 1, 1, left + 6 + right, 3) * 100
    padded[:, left : left + 6] = path
    mask = torch.zeros(1, left + 6 + right, dtype=torch.bool)
    mask[:, left : left + 6] = True
    got = temporal_consistency(padded, mask, penalty).item()
    assert got == pytest.approx(temporal_consistency(path, ones(path), penalty).item(), rel=1e-5)


def test_no_difference_is_taken_over_a_border_of_samples_or_of_masked_tokens():
    line = torch.arange(4.0)[None, :, None]
    jump = torch.cat([line, line + 100], dim=1)
    assert temporal_consistency(torch.cat([line, line + 100]), torch.ones(2, 4)).item() == pytest.approx(0.0, abs=1e-10)
    assert temporal_consistency(jump, torch.ones(1, 8)).item() > 0.1
    mask = torch.ones(1, 8)
    mask[0, 4] = 0  # a token between request and answer: neither side's differences reach over it
    assert temporal_consistency(jump, mask).item() == pytest.approx(0.0, abs=1e-10)


def test_logits_are_centred_because_no_decision_depends_on_their_mean():
    logits = random_path(0, 2, 5, 3)
    shifted = logits + torch.arange(5.0)[None, :, None] ** 2
    assert torch.allclose(centred(logits), centred(shifted), atol=1e-5)
    assert torch.equal(centred(logits).argmax(-1), logits.argmax(-1))


# -- trap 3 ------------------------------------------------------------------------------------------------------------


def test_trap_3_straight_after_a_rotation_pet_has_no_gradient():
    """The temptation is to put PET on `R h`: with a frozen `h` it cannot act, whatever its weight, because rotations keep
    the norms of second differences. The same term on what a *linear map* reads does act."""
    frozen = random_path(0, 2, 12, 64)
    coords = (random_path(1, 8, 28) * 0.5).requires_grad_()
    rotated = rotate(frozen, exp_map(coords))
    value = temporal_consistency(rotated, ones(frozen))
    assert value.item() == pytest.approx(temporal_consistency(frozen, ones(frozen)).item(), rel=1e-5)
    (trapped,) = torch.autograd.grad(value, coords, retain_graph=True)
    (acting,) = torch.autograd.grad(temporal_consistency(rotated @ random_path(2, 64, 3), ones(frozen)), coords)
    assert trapped.abs().max() < 1e-5 * acting.abs().max()
    assert (acting != 0).all()


@pytest.mark.parametrize("interior", ["safe", "both"])
@PENALTIES
def test_pet_on_safety_logits_behind_gates_reaches_every_coordinate_that_decisions_depend_on(tiny_base, interior, penalty):
    torch.manual_seed(0)
    model = SO8TModel(tiny_base, GateSpec(top_layers=2, interior=interior), HeadSpec())
    tokens = torch.randint(4, 200, (4, 12))
    mask = torch.ones_like(tokens)
    output = model(model.base.prefix(tokens, mask), tokens, mask)
    temporal_consistency(centred(output.logits), mask, penalty).backward()
    for name, rotation in model.gates.rotations():
        if name == "last.cmd":
            assert rotation.coords.grad is None, "the command side is no safety matter"
        else:
            assert (rotation.coords.grad != 0).all(), name


def test_pet_on_hidden_states_reaches_the_gates_inside_but_not_the_last_rotation(tiny_model):
    tokens = torch.randint(4, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    output = tiny_model(tiny_model.base.prefix(tokens, mask), tokens, mask)
    temporal_consistency(output.safe_view, mask).backward()
    grads = {name: r.coords.grad.abs().max() for name, r in tiny_model.gates.rotations() if name != "last.cmd"}
    trapped = grads.pop("last.safe")
    assert all((r.coords.grad != 0).all() for name, r in tiny_model.gates.rotations() if name in grads)
    assert trapped < 1e-3 * min(grads.values()), "trap 3 again: nothing but the rotation is between PET and the norm"


# -- group inertia -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gates(tiny_base) -> GateSet:
    torch.manual_seed(0)
    return GateSet(GateSpec(top_layers=1, sites=("o_proj",)), tiny_base)


def turn_first_plane(gates: GateSet, angle: float) -> None:
    """Every block turns by `angle` in the plane of its first two dimensions: one coordinate, the others 0."""
    with torch.no_grad():
        for _, rotation in gates.rotations():
            rotation.coords.zero_()
            rotation.coords[:, 0] = angle


def test_inertia_is_exactly_zero_at_the_start(gates):
    assert GroupInertia(gates, 0.99)(gates).item() == 0.0


@pytest.mark.parametrize("angle", [0.1, 1.0, math.pi])
def test_inertia_is_the_chordal_distance_to_the_average(gates, angle):
    turn_first_plane(gates, 0.0)
    inertia = GroupInertia(gates, 0.9)
    turn_first_plane(gates, angle)
    # ||R - I||_F^2 of one plane: 2 (cos a - 1)^2 + 2 sin^2 a = 4 (1 - cos a)
    assert inertia(gates).item() == pytest.approx(4 * (1 - math.cos(angle)), rel=1e-5)


def test_a_block_that_moves_alone_counts_as_one_of_all_blocks(gates):
    turn_first_plane(gates, 0.0)
    inertia = GroupInertia(gates, 0.9)
    with torch.no_grad():
        gates.last.safe.coords[3, 0] = 1.0
    blocks = sum(r.coords.shape[0] for _, r in gates.rotations())
    assert blocks == 3 * 8, "an interior R_safe and the last pair, eight blocks each"
    assert inertia(gates).item() == pytest.approx(4 * (1 - math.cos(1.0)) / blocks, rel=1e-5)


def test_the_averages_follow_the_rotations_by_their_decay(gates):
    turn_first_plane(gates, 0.0)
    inertia = GroupInertia(gates, 0.75)
    turn_first_plane(gates, 1.0)
    gap = inertia(gates).item()
    for step in range(1, 5):
        inertia.update(gates)
        # R - ema shrinks by the decay at every step, so its square by the decay squared
        assert inertia(gates).item() == pytest.approx(gap * 0.75 ** (2 * step), rel=1e-4)


def test_inertia_pulls_every_moved_coordinate_back(gates):
    turn_first_plane(gates, 0.0)
    inertia = GroupInertia(gates, 0.9)
    with torch.no_grad():
        for _, rotation in gates.rotations():
            rotation.coords.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    before = inertia(gates)
    before.backward()
    assert all((r.coords.grad != 0).all() for _, r in gates.rotations())
    with torch.no_grad():
        for _, rotation in gates.rotations():
            rotation.coords -= 0.5 * rotation.coords.grad
    assert inertia(gates) < before


def test_the_averages_are_saved_and_loaded_and_are_no_parameters(gates):
    inertia = GroupInertia(gates, 0.9)
    assert not list(inertia.parameters())
    assert len(inertia.state_dict()) == len(list(gates.rotations()))
    turn_first_plane(gates, 1.0)
    inertia.update(gates)
    fresh = GroupInertia(gates, 0.9)
    assert fresh(gates).item() != pytest.approx(inertia(gates).item(), abs=1e-3), "a fresh one starts at the rotations"
    fresh.load_state_dict(inertia.state_dict())
    assert torch.equal(fresh(gates), inertia(gates))
