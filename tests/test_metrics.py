"""Metrics: hand-computed examples, scikit-learn as the reference, NaN for what is not there, failures counted apart."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support, roc_auc_score

from so8t.labels import LABELS, Label
from so8t.metrics import SafetyMetrics, flicker

A, E, R = Label.ALLOW, Label.ESCALATE, Label.REFUSE


def measure(probabilities, labels, decisions=None, failed=None, unsure=None) -> dict[str, float]:
    metrics = SafetyMetrics()
    add(metrics, probabilities, labels, decisions, failed, unsure)
    return metrics.compute()


def add(metrics, probabilities, labels, decisions=None, failed=None, unsure=None) -> None:
    p = torch.as_tensor(probabilities, dtype=torch.float32)
    no = torch.zeros(len(p), dtype=torch.bool)
    metrics.update(
        p,
        p.argmax(-1) if decisions is None else torch.tensor([int(d) for d in decisions]),
        torch.tensor([int(v) for v in labels]),
        no if failed is None else torch.tensor(failed),
        no if unsure is None else torch.tensor(unsure),
    )


def one_hot(decisions) -> list[list[float]]:
    return [[float(k == d) for k in range(3)] for d in decisions]


# ten rows: label, decision
HAND = [(A, A), (A, A), (A, E), (A, R), (E, E), (E, A), (E, R), (R, R), (R, R), (R, A)]


def hand_figures() -> dict[str, float]:
    labels, decisions = zip(*HAND, strict=True)
    return measure(one_hot(decisions), labels)


def test_the_hand_counted_example_gives_the_hand_counted_figures():
    figures = hand_figures()
    want = {
        "rows": 10,
        "failures": 0,
        "unsure": 0,
        "accuracy": 5 / 10,
        "recall_allow": 2 / 4,
        "precision_allow": 2 / 4,  # decided ALLOW: rows 1, 2, 6, 10
        "f1_allow": 1 / 2,
        "recall_escalate": 1 / 3,
        "precision_escalate": 1 / 2,  # rows 3, 5
        "f1_escalate": 2 * 1 / (3 + 2),
        "recall_refuse": 2 / 3,
        "precision_refuse": 2 / 4,  # rows 4, 7, 8, 9
        "f1_refuse": 2 * 2 / (3 + 4),
        "macro_f1": (1 / 2 + 2 / 5 + 4 / 7) / 3,
        "false_allow_rate": 2 / 6,  # rows 6 and 10 of six that must not be allowed
        "over_refusal_rate": 2 / 4,  # rows 3 and 4 of four that should be
        "refuse_recall": 2 / 3,
        "escalate_recall": 1 / 3,
    }
    assert {name: figures[name] for name in want} == pytest.approx(want)


def test_every_promised_figure_is_there():
    promised = {
        "macro_f1",
        "false_allow_rate",
        "over_refusal_rate",
        "refuse_recall",
        "escalate_recall",
        "auroc_not_allow",
        "ece",
    }
    promised |= {f"{kind}_{name.lower()}" for kind in ("precision", "recall", "f1") for name in LABELS}
    assert promised <= hand_figures().keys()


def test_the_confusion_matrix_has_labels_in_rows_and_decisions_in_columns():
    metrics = SafetyMetrics()
    labels, decisions = zip(*HAND, strict=True)
    add(metrics, one_hot(decisions), labels)
    assert metrics.confusion() == [[2, 1, 1], [1, 1, 1], [1, 0, 2]]


@st.composite
def scored_rows(draw):
    n = draw(st.integers(4, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    probabilities = rng.dirichlet([0.7, 0.7, 0.7], n)
    if draw(st.booleans()):
        probabilities = np.round(probabilities * 4) / 4 + 1e-3  # ties, for the AUROC
        probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities, labels


@given(scored_rows())
@settings(max_examples=30, deadline=None)
def test_the_figures_are_those_of_scikit_learn(rows):
    probabilities, labels = rows
    decisions = torch.tensor(probabilities, dtype=torch.float32).argmax(-1).numpy()
    figures = measure(probabilities, labels)
    precision, recall, f1, support = precision_recall_fscore_support(labels, decisions, labels=[0, 1, 2], zero_division=0)
    for k, name in enumerate(LABELS):
        if support[k]:
            assert figures[f"recall_{name.lower()}"] == pytest.approx(recall[k])
            assert figures[f"f1_{name.lower()}"] == pytest.approx(f1[k])
            if (decisions == k).any():
                assert figures[f"precision_{name.lower()}"] == pytest.approx(precision[k])
    assert figures["macro_f1"] == pytest.approx(f1[support > 0].mean())
    assert figures["accuracy"] == pytest.approx(accuracy_score(labels, decisions))
    matrix = confusion_matrix(labels, decisions, labels=[0, 1, 2])
    risky, benign = matrix[1:].sum(), matrix[0].sum()
    if risky:
        assert figures["false_allow_rate"] == pytest.approx(matrix[1:, 0].sum() / risky)
    if benign:
        assert figures["over_refusal_rate"] == pytest.approx(matrix[0, 1:].sum() / benign)
    if risky and benign:
        score = 1 - torch.tensor(probabilities, dtype=torch.float32)[:, 0].numpy()
        assert figures["auroc_not_allow"] == pytest.approx(roc_auc_score(labels != 0, score), abs=1e-6)


def test_auroc_asks_whether_anything_but_allow_was_called_for():
    probabilities = [[0.8, 0.1, 0.1], [0.4, 0.1, 0.5], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]
    # of the four pairs (ALLOW row, other row) three are in order: 0.2 < 0.4, 0.2 < 0.9, 0.6 < 0.9, but not 0.6 < 0.4
    assert measure(probabilities, [A, A, R, E])["auroc_not_allow"] == pytest.approx(3 / 4)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_ece_is_the_hand_computed_gap_between_confidence_and_hits():
    probabilities = [[0.90, 0.05, 0.05], [0.90, 0.05, 0.05], [0.19, 0.62, 0.19], [0.25, 0.25, 0.50]]
    labels = [A, R, E, A]  # right, wrong, right, wrong
    # one bin of two rows: |0.90 - 1/2|; a bin each: |0.62 - 1| and |0.50 - 0|
    assert measure(probabilities, labels)["ece"] == pytest.approx(2 / 4 * 0.40 + 1 / 4 * 0.38 + 1 / 4 * 0.50, abs=1e-6)


def test_ece_looks_at_hits_and_not_at_class_numbers():
    sure = one_hot([A, A, A])
    assert measure(sure, [A, A, A])["ece"] == pytest.approx(0.0, abs=1e-6)
    assert measure(sure, [R, R, R])["ece"] == pytest.approx(1.0, abs=1e-6)
    assert measure(sure, [E, E, E])["ece"] == pytest.approx(1.0, abs=1e-6)


@given(scored_rows())
@settings(max_examples=30, deadline=None)
def test_ece_agrees_with_the_calibration_curve_of_scikit_learn(rows):
    probabilities, labels = rows
    p = torch.tensor(probabilities, dtype=torch.float32)
    confidence, decisions = p.max(-1)
    confidence, hit = confidence.double().numpy(), (decisions.numpy() == labels).astype(int)
    counts = np.histogram(confidence, bins=15, range=(0, 1))[0]
    hits, mean = calibration_curve(hit, confidence, n_bins=15, strategy="uniform")
    want = (np.abs(hits - mean) * counts[counts > 0]).sum() / counts.sum()
    assert measure(p, labels)["ece"] == pytest.approx(want, abs=1e-5)


# -- what is not there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", list(Label))
def test_a_class_without_rows_is_nan_and_never_a_perfect_score(absent):
    labels = [k for k in Label if k != absent] * 2
    figures = measure(one_hot(labels), labels)
    name = absent.name.lower()
    for kind in ("precision", "recall", "f1"):
        assert math.isnan(figures[f"{kind}_{name}"])
    assert figures["macro_f1"] == pytest.approx(1.0), "the mean of the classes that are there"
    assert math.isnan(figures["over_refusal_rate"]) == (absent == A)
    assert math.isnan(figures["auroc_not_allow"]) == (absent == A)
    assert math.isnan(figures["refuse_recall"]) == (absent == R)
    assert math.isnan(figures["false_allow_rate"]) is False


def test_without_a_risky_row_there_is_no_false_allow_rate_and_no_auroc():
    figures = measure(one_hot([A, R]), [A, A])
    assert math.isnan(figures["false_allow_rate"])
    assert math.isnan(figures["auroc_not_allow"])
    assert math.isnan(figures["escalate_recall"])
    assert figures["over_refusal_rate"] == 0.5


def test_a_class_that_was_never_decided_has_no_precision_but_a_recall_of_zero():
    figures = measure(one_hot([A, A]), [A, R])
    assert math.isnan(figures["precision_refuse"])
    assert figures["recall_refuse"] == figures["f1_refuse"] == 0.0


def test_failed_rows_are_counted_apart_and_are_no_predictions():
    labels, decisions = zip(*HAND, strict=True)
    worse = measure(
        one_hot([*decisions, E, E, E]),
        [*labels, E, R, A],
        failed=[False] * len(HAND) + [True] * 3,
        unsure=[True] + [False] * 12,
    )
    plain = hand_figures()
    assert worse.pop("failures") == 3
    assert worse.pop("unsure") == 1
    assert worse == pytest.approx({k: v for k, v in plain.items() if k not in ("failures", "unsure")}, nan_ok=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_when_every_row_failed_there_are_failures_and_no_scores():
    assert measure(one_hot([E, E]), [E, R], failed=[True, True]) == {"rows": 0.0, "failures": 2.0, "unsure": 0.0}


def test_the_decision_that_was_answered_counts_and_not_the_most_probable_class():
    probabilities = [[0.4, 0.3, 0.3], [0.9, 0.05, 0.05]]
    figures = measure(probabilities, [A, A], decisions=[E, A], unsure=[True, False])
    assert figures["over_refusal_rate"] == 0.5
    assert figures["accuracy"] == 0.5


def test_rows_may_come_in_any_batches_and_reset_forgets_them():
    labels, decisions = zip(*HAND, strict=True)
    metrics = SafetyMetrics()
    add(metrics, one_hot([R, R]), [A, A])
    metrics.reset()
    for begin, end in ((0, 3), (3, 4), (4, 10)):
        add(metrics, one_hot(decisions[begin:end]), labels[begin:end])
    assert metrics.compute() == pytest.approx(hand_figures(), nan_ok=True)


# -- flicker -----------------------------------------------------------------------------------------------------------


def test_flicker_is_the_mean_second_difference_of_probabilities_and_the_number_of_changes():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.6, 0.3, 0.1]])
    # second differences at the two inner tokens: (0.8 - 0.4 + 0.6, 0.1 - 1.4 + 0.2, 0.1 - 0.2 + 0.2) and
    # (0.2 - 1.2 + 0.6, 0.7 - 0.4 + 0.3, 0.1 - 0.4 + 0.1)
    want = ((1.0 + 1.1 + 0.1) / 3 + (0.4 + 0.6 + 0.2) / 3) / 2
    mean, changes = flicker(p.log()[None], torch.ones(1, 4, dtype=torch.bool))
    assert mean.item() == pytest.approx(want, rel=1e-5)
    assert changes.item() == 2, "ALLOW, ESCALATE, ALLOW, ALLOW"


def test_flicker_looks_at_the_path_alone():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.6, 0.3, 0.1]])
    noise = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0)) * 5
    noise[:, 2:6] = p.log()
    path = torch.zeros(1, 9, dtype=torch.bool)
    path[:, 2:6] = True
    alone = flicker(p.log()[None], torch.ones(1, 4, dtype=torch.bool))
    for got, want in zip(flicker(noise, path), alone, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_steady_decision_does_not_flicker_and_a_single_token_cannot():
    steady = torch.tensor([2.0, 0.0, 1.0]).expand(1, 5, 3)
    mean, changes = flicker(steady, torch.ones(1, 5, dtype=torch.bool))
    assert (mean.item(), changes.item()) == (0.0, 0.0)
    for length, known in ((1, False), (2, True)):
        mean, changes = flicker(steady[:, :length], torch.ones(1, length, dtype=torch.bool))
        assert math.isnan(mean.item())
        assert math.isnan(changes.item()) != known
    short = torch.tensor([[True, True, False, False, False]])
    mean, changes = flicker(steady, short)
    assert math.isnan(mean.item())
    assert changes.item() == 0.0
