"""Intervals: they hold what they should, narrow with the rows, and are left out where there are too few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import f1_score, roc_auc_score

from so8t.curves import auprc_not_allow, reliability, risk_coverage
from so8t.intervals import (
    ENOUGH,
    along_intervals,
    bootstrap_counts,
    ece_interval,
    macro_f1_interval,
    number,
    rate_interval,
    score_intervals,
    scores_drawn,
)
from so8t.labels import Label
from tests.test_curves import cases


def test_the_interval_of_macro_f1_holds_the_score_narrows_with_rows_and_is_a_point_where_nothing_varies():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    decisions = np.where(rng.random(600) < 0.7, labels, rng.integers(0, 3, 600))
    widths = []
    for rows in (150, 600):
        low, high = macro_f1_interval(labels[:rows].tolist(), decisions[:rows].tolist())
        assert low < f1_score(labels[:rows], decisions[:rows], average="macro") < high
        widths.append(high - low)
    assert 0.35 < widths[1] / widths[0] < 0.7, "about 1 / sqrt(4)"
    assert macro_f1_interval([0, 1, 2] * 50, [0, 1, 2] * 50) == (1.0, 1.0)


@given(st.integers(ENOUGH, 400).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_at_the_ends_of_the_interval_of_a_rate_such_a_count_is_one_in_forty(case):
    hits, rows = case
    low, high = rate_interval(hits, rows)
    assert 0 <= low <= hits / rows <= high <= 1
    assert hits == 0 or binom.sf(hits - 1, rows, low) == pytest.approx(0.025)
    assert hits == rows or binom.cdf(hits, rows, high) == pytest.approx(0.025)


def test_the_calibration_error_alone_has_the_interval_that_it_has_with_the_others():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet((1, 1, 1), 2 * ENOUGH), rng.integers(0, 3, 2 * ENOUGH)
    assert ece_interval(probabilities, labels) == score_intervals(probabilities, labels)["ece"]
    assert ece_interval(probabilities[: ENOUGH - 1], labels[: ENOUGH - 1]) is None


def test_too_few_rows_have_no_interval():
    few = ENOUGH - 1
    assert rate_interval(0, few) is None
    assert macro_f1_interval([0] * few, [0] * few) is None
    assert rate_interval(0, ENOUGH) == (0.0, pytest.approx(1 - 0.025 ** (1 / ENOUGH)))


def test_rows_are_drawn_with_replacement_and_the_same_ones_however_many_fit_into_memory(monkeypatch):
    whole = np.concatenate(list(bootstrap_counts(50, draws=40)))
    assert (whole.sum(1) == 50).all()
    assert whole.var() == pytest.approx(49 / 50, rel=0.1), "of a binomial of 50 and 1/50"
    monkeypatch.setattr("so8t.intervals.BLOCK", 120)
    parts = list(bootstrap_counts(50, draws=40))
    assert len(parts) == 20
    assert np.array_equal(np.concatenate(parts), whole)


@given(cases(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_scores_of_drawn_rows_are_those_of_the_rows_written_out(case, seed):
    probabilities, labels = case
    drawn = np.random.default_rng(seed).integers(0, len(labels), len(labels))
    weights = np.stack([np.ones(len(labels)), np.bincount(drawn, minlength=len(labels))])
    found = scores_drawn(probabilities, labels, weights)
    for k, rows in enumerate((np.arange(len(labels)), drawn)):
        p, truth = probabilities[rows], labels[rows]
        risky = truth != Label.ALLOW
        want = {
            "auroc_not_allow": roc_auc_score(risky, -p[:, Label.ALLOW]) if len(set(risky)) == 2 else np.nan,
            "auprc_not_allow": auprc_not_allow(p, truth),
            "aurc": risk_coverage(p, truth).aurc,
            "ece": reliability(p, truth).error,
        }
        assert {key: draws[k] for key, draws in found.items()} == pytest.approx(want, abs=1e-9, nan_ok=True)


def scored(rows: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from calibrated probabilities; those told are made `sharpness` times as sure."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.6, 0.6, 0.6], rows)
    labels = (rng.random((rows, 1)) > probabilities.cumsum(1)).sum(1)
    told = probabilities**sharpness
    return told / told.sum(1, keepdims=True), labels


def test_intervals_of_scores_hold_the_scores_and_narrow_with_rows():
    widths = []
    for rows in (250, 1000):
        probabilities, labels = scored(rows, sharpness=3)
        found = score_intervals(probabilities, labels)
        points = scores_drawn(probabilities, labels, np.ones((1, rows)))
        for key, (low, high) in found.items():
            assert low < points[key][0] < high, key
        widths.append([high - low for low, high in found.values()])
    for wide, narrow in zip(*widths, strict=True):
        assert 0.3 < narrow / wide < 0.75, "about 1 / sqrt(4)"


def test_of_well_calibrated_probabilities_the_interval_of_ece_lies_above_the_figure_as_is_told():
    probabilities, labels = scored(2000)
    low, high = score_intervals(probabilities, labels)["ece"]
    figure = reliability(probabilities, labels).error
    assert high - figure > 2 * (figure - low)


def test_scores_have_no_interval_where_the_rows_that_they_tell_apart_are_too_few():
    probabilities, labels = scored(100)
    labels[:] = Label.REFUSE
    labels[: ENOUGH - 1] = Label.ALLOW
    found = score_intervals(probabilities, labels)
    assert [key for key, interval in found.items() if interval is None] == ["auroc_not_allow", "auprc_not_allow"]
    labels[:ENOUGH] = Label.ALLOW
    assert None not in score_intervals(probabilities, labels).values()
    assert set(score_intervals(probabilities[: ENOUGH - 1], labels[: ENOUGH - 1]).values()) == {None}
    assert set(score_intervals(probabilities[:0], labels[:0]).values()) == {None}


def test_intervals_along_tokens_hold_the_figures_and_are_left_out_where_rows_are_too_few():
    rng = np.random.default_rng(0)
    labels = np.repeat([Label.ALLOW, Label.REFUSE], [300, 100])
    tokens = rng.integers(5, 40, 400).astype(float)
    alarms, changes = rng.poisson(1, 400).astype(float), rng.poisson(3, 400).astype(float)
    detection = np.where(rng.random(400) < 0.8, np.minimum(tokens, rng.integers(1, 20, 400)), np.nan)
    changes[7] = np.nan
    found = detection[300:][~np.isnan(detection[300:])]
    figures = {
        "detected": len(found) / 100,
        "time_to_detection": found.mean(),
        "decision_changes": np.nanmean(changes),
        "false_alarms_per_1000_tokens": 1000 * alarms[:300].sum() / tokens[:300].sum(),
    }
    wide = along_intervals(labels, tokens, detection, alarms, changes)
    assert wide.keys() == figures.keys()
    for key, (low, high) in wide.items():
        assert low < figures[key] < high, key
        assert high - low < figures[key], "and tell something"
    spread = changes[~np.isnan(changes)].std() / 399**0.5
    assert wide["decision_changes"][1] - wide["decision_changes"][0] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    few = slice(290, 300 + ENOUGH - 1)
    less = along_intervals(labels[few], tokens[few], detection[few], alarms[few], changes[few])
    assert less["detected"] is less["time_to_detection"] is less["false_alarms_per_1000_tokens"] is None
    assert less["decision_changes"] is not None, "of all rows"


def test_a_figure_that_is_not_there_is_a_dash():
    assert [number(v) for v in (None, float("nan"), 0.25)] == ["-", "-", "0.250"]
    assert number(0.25, (0.1, 0.5)) == "0.250 [0.10, 0.50]"
