"""Intervals: they hold what they should, narrow with the rows, and are left out where there are too few."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import f1_score

from so8t.intervals import ENOUGH, macro_f1_interval, number, rate_interval


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


def test_too_few_rows_have_no_interval():
    few = ENOUGH - 1
    assert rate_interval(0, few) is None
    assert macro_f1_interval([0] * few, [0] * few) is None
    assert rate_interval(0, ENOUGH) == (0.0, pytest.approx(1 - 0.025 ** (1 / ENOUGH)))


def test_a_figure_that_is_not_there_is_a_dash():
    assert [number(v) for v in (None, float("nan"), 0.25)] == ["-", "-", "0.250"]
    assert number(0.25, (0.1, 0.5)) == "0.250 [0.10, 0.50]"
