"""Curves over thresholds, against examples worked by hand and against reference libraries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional.classification import binary_average_precision, multiclass_calibration_error

from so8t.curves import auprc_not_allow, operating_point, reliability, risk_coverage, trade_off
from so8t.labels import LABELS, Label

A, E, R = Label


def rows(*p_allow: float) -> np.ndarray:
    """Probabilities with the rest on ESCALATE."""
    return np.array([[p, 1 - p, 0.0] for p in p_allow])


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    """Coarse probabilities, so that many are equal, and labels; both kinds of row are there."""
    n = draw(st.integers(2, 40))
    weights = draw(arrays(np.int64, (n, 3), elements=st.integers(0, 4)))
    weights[:, 1] += weights.sum(1) == 0
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 2)))
    labels[0], labels[1] = A, R
    return weights / weights.sum(1, keepdims=True), labels


# -- false allow against over-refusal ----------------------------------------------------------------------------------


def test_the_trade_off_of_four_rows_is_the_one_worked_by_hand():
    curve = trade_off(rows(0.9, 0.6, 0.4, 0.1), np.array([A, R, A, E]))
    assert curve.thresholds.tolist() == [0.1, 0.4, 0.6, 0.9, math.inf]
    assert curve.false_allow.tolist() == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert curve.over_refusal.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_point_of_the_trade_off_is_what_counting_at_its_threshold_gives(case):
    probabilities, labels = case
    curve = trade_off(probabilities, labels)
    assert (np.diff(curve.thresholds) > 0).all()
    assert set(curve.thresholds[:-1]) == set(probabilities[:, A]), "every threshold that changes a decision, and no other"
    for threshold, false_allow, over_refusal in zip(curve.thresholds, curve.false_allow, curve.over_refusal, strict=True):
        allowed = probabilities[:, A] >= threshold
        assert false_allow == pytest.approx(allowed[labels != A].mean(), abs=1e-12)
        assert over_refusal == pytest.approx((~allowed)[labels == A].mean(), abs=1e-12)


@pytest.mark.parametrize("labels", [[A, A], [E, R], []])
def test_there_is_no_trade_off_where_one_kind_of_row_is_missing(labels):
    assert trade_off(rows(*[0.5] * len(labels)), np.array(labels, dtype=np.int64)) is None


def test_the_operating_point_counts_the_decisions_that_were_taken():
    point = operating_point(np.array([True, True, False, False, False]), np.array([A, R, A, A, E]))
    assert (point.false_allow, point.over_refusal) == pytest.approx((1 / 2, 2 / 3))
    assert operating_point(np.array([True]), np.array([A])) is None


# -- AUPRC -------------------------------------------------------------------------------------------------------------


def test_the_average_precision_of_four_rows_is_the_one_worked_by_hand():
    # by 1 - P(ALLOW): E (0.9), A (0.6), R (0.4), A (0.1): precision 1 at recall 1/2, 2/3 at recall 1
    assert auprc_not_allow(rows(0.9, 0.6, 0.4, 0.1), np.array([A, R, A, E])) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_average_precision_is_that_of_torchmetrics(case):
    probabilities, labels = case
    reference = binary_average_precision(torch.tensor(1 - probabilities[:, A]), torch.tensor(labels != A).long())
    # 1 - p may tear equal scores apart or join different ones only within rounding; these are fifths and the like
    assert auprc_not_allow(probabilities, labels) == pytest.approx(float(reference), abs=1e-6)


def test_a_classifier_that_knows_nothing_has_the_share_of_risky_rows_as_its_average_precision():
    assert auprc_not_allow(rows(*[0.5] * 8), np.array([A] * 6 + [R, E])) == 0.25
    assert math.isnan(auprc_not_allow(rows(0.5), np.array([A])))


# -- risk against coverage ---------------------------------------------------------------------------------------------


def test_the_risk_coverage_curve_of_four_rows_is_the_one_worked_by_hand():
    curve = risk_coverage(rows(0.6, 0.95, 0.8, 0.7), np.array([R, A, R, A]))  # right, wrong, right, wrong by confidence
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert curve.best_aurc == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)


def test_rows_of_equal_confidence_are_covered_together_at_the_risk_of_them_all():
    curve = risk_coverage(rows(0.9, 0.7, 0.7, 0.7), np.array([A, R, A, A]))
    assert curve.coverage.tolist() == [0.25, 1.0]
    assert curve.risk.tolist() == [0.0, 0.25]
    assert curve.aurc == pytest.approx((0 + 3 * 0.25) / 4)


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_risk_coverage_curve_depends_on_no_order_and_ends_at_the_error_rate(case, random):
    probabilities, labels = case
    curve = risk_coverage(probabilities, labels)
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx((probabilities.argmax(1) != labels).mean())
    order = random.sample(range(len(labels)), len(labels))
    other = risk_coverage(probabilities[order], labels[order])
    assert other.aurc == pytest.approx(curve.aurc)
    assert other.risk == pytest.approx(curve.risk)
    assert curve.aurc >= curve.best_aurc - 1e-12


def test_there_is_no_risk_without_rows():
    assert risk_coverage(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) is None


# -- reliability -------------------------------------------------------------------------------------------------------


def test_the_reliability_of_three_rows_is_the_one_worked_by_hand():
    bins = reliability(rows(0.9, 0.8, 0.55), np.array([A, R, A]), bins=4)
    assert bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert bins.rows.tolist() == [0, 0, 1, 2]
    assert bins.confidence[2:].tolist() == pytest.approx([0.55, 0.85])
    assert bins.accuracy[2:].tolist() == [1.0, 0.5]
    assert np.isnan(bins.accuracy[:2]).all()
    assert bins.error == pytest.approx((0.45 + 2 * 0.35) / 3)


def test_certain_rows_fall_into_the_last_bin():
    bins = reliability(rows(1.0, 1.0), np.array([A, A]))
    assert bins.rows.tolist() == [0] * 14 + [2]
    assert bins.error == 0


def test_the_error_of_the_bins_is_the_calibration_error_of_torchmetrics():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([1, 1, 1], size=400)
    labels = generator.integers(0, 3, 400)
    reference = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=len(LABELS), n_bins=15
    )
    assert reliability(probabilities, labels).error == pytest.approx(float(reference), abs=1e-5)


def test_without_rows_every_bin_is_empty_and_the_error_is_not_a_number():
    bins = reliability(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
    assert bins.rows.sum() == 0
    assert math.isnan(bins.error)
