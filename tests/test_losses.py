"""Losses: hand figures, differentiable everywhere, no `T x vocabulary` logits, and shares that are capped."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.labels import Label
from so8t.losses import IGNORE, LossTerms, expected_cost, language_model_loss, path_loss, safety_loss

# logits are log-probabilities, so that softmax gives these rows back
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
LOGITS = PROBABILITIES.log()
LABELS = torch.tensor([Label.ALLOW, Label.REFUSE])
WEIGHTS = torch.tensor([1.0, 2.0, 4.0])


# -- the class loss along the path -------------------------------------------------------------------------------------


def test_a_token_counts_by_the_share_of_the_path_that_was_read_and_every_row_alike():
    p = torch.tensor(
        [[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], [[0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]]]
    )
    path = torch.tensor([[True, True, False], [False, True, False]])
    first = (-math.log(0.5) * 1 / 2 - math.log(0.8)) / 1.5
    second = -math.log(0.7)
    assert path_loss(p.log(), LABELS, path).item() == pytest.approx((first + second) / 2)
    weighted = path_loss(p.log(), LABELS, path, class_weights=WEIGHTS, row_weights=torch.tensor([3.0, 0.5])).item()
    assert weighted == pytest.approx((3 * first + 2 * second) / 5)


def test_only_tokens_on_the_path_are_taught_the_later_the_more_and_a_row_without_any_is_not_there():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, requires_grad=True)
    path = torch.tensor([[False, True, True, True, False], [False] * 5])
    path_loss(logits, LABELS, path).backward()
    taught = logits.grad.abs().sum(-1)
    assert torch.equal(taught > 0, path)
    alone = path_loss(logits[:1], LABELS[:1], path[:1])
    assert path_loss(logits, LABELS, path).item() == pytest.approx(alone.item())
    same = torch.zeros(1, 5, 3, requires_grad=True)
    path_loss(same, LABELS[:1], path[:1]).backward()
    size = same.grad[0].norm(dim=-1)[1:4]
    assert size.tolist() == pytest.approx([float(size[2]) / 3, float(size[2]) * 2 / 3, float(size[2])])
    assert path_loss(logits, LABELS, torch.zeros_like(path)).item() == 0.0


# -- class loss --------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_of_minus_log_p_of_the_label():
    assert safety_loss(LOGITS, LABELS).item() == pytest.approx((-math.log(0.5) - math.log(0.7)) / 2)


def test_every_row_is_multiplied_by_the_weight_of_its_own_class():
    want = (1 * -math.log(0.5) + 4 * -math.log(0.7)) / (1 + 4)
    got = safety_loss(LOGITS, LABELS, class_weights=WEIGHTS).item()
    assert got == pytest.approx(want)
    assert got == pytest.approx(F.cross_entropy(LOGITS, LABELS, weight=WEIGHTS).item())


def test_focal_loss_weighs_each_sample_and_not_the_mean():
    rows = [1 * (1 - 0.5) ** 2 * -math.log(0.5), 4 * (1 - 0.7) ** 2 * -math.log(0.7)]
    got = safety_loss(LOGITS, LABELS, class_weights=WEIGHTS, focal_gamma=2.0).item()
    assert got == pytest.approx(sum(rows) / 5)
    mean_weight = 2.5 * (0.5**2 * -math.log(0.5) + 0.3**2 * -math.log(0.7)) / 5
    assert got != pytest.approx(mean_weight, rel=0.05), "what a mean class weight would give"


def test_focal_loss_makes_easy_rows_count_less():
    easy, hard = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.2, 0.4, 0.4]]).log()
    label = torch.tensor([0])
    plain = safety_loss(easy, label) / safety_loss(hard, label)
    focal = safety_loss(easy, label, focal_gamma=2.0) / safety_loss(hard, label, focal_gamma=2.0)
    assert focal / plain == pytest.approx((0.02 / 0.8) ** 2, rel=1e-3)


def test_row_weights_multiply_class_weights_and_a_row_of_weight_zero_is_not_there():
    rows = torch.tensor([3.0, 0.5])
    want = (3 * 1 * -math.log(0.5) + 0.5 * 4 * -math.log(0.7)) / (3 + 2)
    assert safety_loss(LOGITS, LABELS, class_weights=WEIGHTS, row_weights=rows).item() == pytest.approx(want)
    alone = safety_loss(LOGITS, LABELS, row_weights=torch.tensor([1.0, 0.0])).item()
    assert alone == pytest.approx(-math.log(0.5))
    assert safety_loss(LOGITS, LABELS, row_weights=torch.zeros(2)).item() == 0.0


def test_label_smoothing_is_that_of_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 3), torch.randint(3, (9,))
    want = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(safety_loss(logits, labels, smoothing=0.1), want)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_the_gradient_is_finite_and_points_to_the_label_however_sure_the_head_is(gamma, size):
    logits = (torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) * size).requires_grad_()
    safety_loss(logits, torch.tensor([0, 0]), focal_gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1, 0] < 0 < logits.grad[1, 2], "the wrong row is pulled towards its label"


@given(seed=st.integers(0, 2**32 - 1), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]))
@settings(max_examples=30, deadline=None)
def test_the_loss_of_many_rows_is_the_weighted_mean_of_their_own_losses(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(7, 3, generator=generator) * 3, torch.randint(3, (7,), generator=generator)
    p = logits.double().softmax(-1)
    total = weight = 0.0
    for row, label in zip(p.tolist(), labels.tolist(), strict=True):
        w = WEIGHTS[label].item()
        total += w * (1 - row[label]) ** gamma * -math.log(row[label])
        weight += w
    got = safety_loss(logits, labels, class_weights=WEIGHTS, focal_gamma=gamma).item()
    assert got == pytest.approx(total / weight, rel=1e-4, abs=1e-6)


# -- expected cost -----------------------------------------------------------------------------------------------------

COSTS = torch.tensor([[0.0, 0.5, 1.0], [1.5, 0.0, 0.5], [3.0, 0.5, 0.0]])


def test_expected_cost_is_the_cost_of_every_decision_times_its_probability():
    first = 0.5 * 0.0 + 0.25 * 0.5 + 0.25 * 1.0  # the label is ALLOW: row 0 of the costs
    second = 0.1 * 3.0 + 0.2 * 0.5 + 0.7 * 0.0  # the label is REFUSE: row 2
    assert expected_cost(LOGITS, LABELS, COSTS).item() == pytest.approx((first + second) / 2)


def test_the_costs_are_indexed_by_label_first_and_decision_second():
    sure_allow = torch.tensor([[100.0, 0.0, 0.0]])
    assert expected_cost(sure_allow, torch.tensor([Label.REFUSE]), COSTS).item() == pytest.approx(3.0)
    sure_refuse = torch.tensor([[0.0, 0.0, 100.0]])
    assert expected_cost(sure_refuse, torch.tensor([Label.ALLOW]), COSTS).item() == pytest.approx(1.0)


def test_the_cost_moves_with_the_probabilities_while_the_decision_stays():
    logits = LOGITS.clone().requires_grad_()
    cost = expected_cost(logits, LABELS, COSTS)
    cost.backward()
    # d/dz_j sum_k p_k C_k = p_j (C_j - sum_k p_k C_k), halved by the mean over two rows
    rows = COSTS[LABELS]
    want = PROBABILITIES * (rows - (PROBABILITIES * rows).sum(-1, keepdim=True)) / 2
    assert torch.allclose(logits.grad, want, atol=1e-6)
    assert (logits.grad != 0).all()
    moved = LOGITS - 0.1 * logits.grad
    assert torch.equal(moved.argmax(-1), LOGITS.argmax(-1))
    assert expected_cost(moved, LABELS, COSTS) < cost, "a penalty through argmax would not have changed"


# -- language-model loss -----------------------------------------------------------------------------------------------

VOCABULARY = 97


def task_setting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator)
    targets = torch.randint(VOCABULARY, (3, 11), generator=generator)
    targets[0, :5] = targets[1, 7:] = targets[2, ::2] = IGNORE
    weight = torch.randn(VOCABULARY, 16, generator=generator) / 4
    return hidden.requires_grad_(), targets, weight.requires_grad_()


@pytest.mark.parametrize("chunk", [1, 3, 4, 1000])
def test_the_chunked_loss_is_the_whole_one_in_value_and_gradient(chunk):
    hidden, targets, weight = task_setting()
    loss, count = language_model_loss(hidden, targets, lambda x: x @ weight.T, chunk=chunk)
    grads = torch.autograd.grad(loss, (hidden, weight))
    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    wanted = torch.autograd.grad(whole, (hidden, weight))
    assert count == int((targets != IGNORE).sum())
    assert torch.allclose(loss, whole, rtol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_no_more_logits_exist_at_once_than_one_chunk_has_neither_forward_nor_backward(chunk):
    hidden, targets, weight = task_setting()
    seen: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return x @ weight.T

    kept: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    count = int((targets != IGNORE).sum())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss, _ = language_model_loss(hidden, targets, head, chunk=chunk)
    assert max(seen) == chunk
    assert sum(seen) == count, "only target positions are turned into logits"
    assert max(kept) < count * VOCABULARY
    assert all(n != c * VOCABULARY for n in kept for c in range(1, chunk + 1)), "no chunk's logits wait for the backward pass"
    loss.backward()
    assert max(seen) == chunk
    assert sum(seen) == 2 * count, "the backward pass makes them again, chunk by chunk"


def test_the_language_model_loss_without_targets_is_zero_of_nothing():
    hidden, targets, weight = task_setting()
    loss, count = language_model_loss(hidden, torch.full_like(targets, IGNORE), lambda x: x @ weight.T, chunk=4)
    assert (loss.item(), count) == (0.0, 0)


def test_positions_that_are_no_targets_change_nothing():
    hidden, targets, weight = task_setting()
    other = torch.where((targets == IGNORE)[..., None], torch.tensor(1e3), hidden.detach())
    for states in (hidden, other):
        loss, _ = language_model_loss(states, targets, lambda x: x @ weight.T, chunk=4)
        assert loss.item() == pytest.approx(language_model_loss(hidden, targets, lambda x: x @ weight.T, chunk=4)[0].item())
    (grad,) = torch.autograd.grad(language_model_loss(hidden, targets, lambda x: x @ weight.T, chunk=4)[0], hidden)
    assert (grad[targets == IGNORE] == 0).all()
    assert (grad[targets != IGNORE] != 0).any(-1).all()


# -- the sum and the shares --------------------------------------------------------------------------------------------


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def test_a_row_that_weighs_nothing_costs_nothing_and_equal_weights_change_nothing():
    alone = expected_cost(LOGITS[:1], LABELS[:1], COSTS)
    assert torch.allclose(expected_cost(LOGITS, LABELS, COSTS, row_weights=torch.tensor([2.5, 0.0])), alone)
    equal = expected_cost(LOGITS, LABELS, COSTS, row_weights=torch.tensor([2.5, 2.5]))
    assert torch.allclose(equal, expected_cost(LOGITS, LABELS, COSTS))


def test_the_total_is_the_sum_of_weight_times_value_and_a_weight_of_zero_turns_a_term_off():
    terms = LossTerms()
    terms.add("safety", one(2.0), 1.0)
    terms.add("cost", one(3.0), 0.5)
    terms.add("task", one(float("nan")), 0.0)
    terms.add_capped("pet", one(float("nan")), 0.0, 0.2)
    assert terms.terms.keys() == {"safety", "cost"}
    assert terms.total().item() == pytest.approx(2.0 + 1.5)
    assert terms.shares() == pytest.approx({"safety": 2.0 / 3.5, "cost": 1.5 / 3.5})


def test_pet_is_cut_to_its_share_of_the_safety_side_and_its_gradient_with_it():
    value = one(10.0)
    terms = LossTerms()
    terms.add("safety", one(2.0), 1.0)
    terms.add("inertia", one(1.0), 1.0)
    terms.add("task", one(100.0), 1.0)
    terms.add_capped("pet", value, 0.1, 0.2)
    # the rest of the safety side is 3, so PET may be 3 * 0.2 / 0.8 = 0.75, not 0.1 * 10 = 1
    assert terms.terms["pet"].item() == pytest.approx(0.75)
    assert terms.shares()["pet_of_safety"] == pytest.approx(0.2)
    assert terms.shares()["pet"] == pytest.approx(0.75 / 103.75)
    terms.total().backward()
    assert value.grad.item() == pytest.approx(0.1 * 0.75), "weight times the scale of the cap: not 0, and not through the rest"


def test_the_task_loss_does_not_move_the_cap():
    cut = {}
    for task in (0.0, 1.0, 1e6):
        terms = LossTerms()
        terms.add("safety", one(1.0), 1.0)
        terms.add("task", one(task), 1.0)
        terms.add_capped("pet", one(50.0), 1.0, 0.2)
        cut[task] = terms.terms["pet"].item()
    assert len(set(cut.values())) == 1


@given(
    safety=st.floats(1e-3, 1e3),
    cost=st.floats(0, 1e3),
    task=st.floats(0, 1e3),
    pet=st.floats(0, 1e6),
    max_share=st.floats(0.0, 0.9),
)
@settings(max_examples=60, deadline=None)
def test_the_share_of_pet_is_never_above_the_cap_and_below_it_nothing_changes(safety, cost, task, pet, max_share):
    terms = LossTerms()
    for name, value in (("safety", safety), ("cost", cost), ("task", task)):
        terms.add(name, one(value), 1.0)
    terms.add_capped("pet", one(pet), 1.0, max_share)
    shares = terms.shares()
    assert shares["pet_of_safety"] <= max_share + 1e-5
    if pet / (pet + safety + cost) < max_share - 1e-5:
        assert terms.terms["pet"].item() == pytest.approx(pet, rel=1e-5)
    assert sum(v for name, v in shares.items() if name != "pet_of_safety") == pytest.approx(1.0)
