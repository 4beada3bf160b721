"""How much rows count: a language says nothing of the label, and no weight is lost or made."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data.records import Record
from so8t.data.weights import row_weights
from so8t.labels import Label

ROWS = st.lists(
    st.builds(
        Record,
        user_request=st.just("a request"),
        safety_label=st.sampled_from(list(Label)),
        language=st.sampled_from(["en", "ja", None]),
        source=st.sampled_from(["one", "two", "unnamed"]),
    ),
    min_size=1,
    max_size=60,
)
BY_SOURCE = {"one": 0.5, "two": 3.0}


def mass(records, weights, **wanted) -> float:
    return sum(w for r, w in zip(records, weights, strict=True) if all(getattr(r, k) == v for k, v in wanted.items()))


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_in_a_language_with_all_labels_they_have_the_shares_that_they_have_overall(records):
    plain = row_weights(records, BY_SOURCE, reweigh_languages=False)
    weights = row_weights(records, BY_SOURCE, reweigh_languages=True)
    assert all(w > 0 for w in weights)
    for language in {r.language for r in records}:
        if {r.safety_label for r in records if r.language == language} != {r.safety_label for r in records}:
            continue
        assert mass(records, weights, language=language) == pytest.approx(mass(records, plain, language=language))
        for label in Label:
            share = mass(records, weights, language=language, safety_label=label) / mass(records, weights, language=language)
            assert share == pytest.approx(mass(records, plain, safety_label=label) / sum(plain))


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_rows_of_one_language_count_as_their_sources_do(records):
    same = [r for r in records if r.language == records[0].language]
    wanted = [BY_SOURCE.get(r.source, 1.0) for r in same]
    assert row_weights(same, BY_SOURCE, reweigh_languages=True) == pytest.approx(wanted)
    assert row_weights(same, BY_SOURCE, reweigh_languages=False) == wanted


def test_by_hand():
    labels = [("en", Label.ALLOW), ("en", Label.REFUSE), ("ja", Label.ALLOW), ("ja", Label.ALLOW), ("ja", Label.REFUSE)]
    records = [Record("a", label, language=language) for language, label in labels]
    # P(ja) P(ALLOW) / P(ja, ALLOW) = (3/5)(3/5) / (2/5) = 0.9; ja REFUSE (3/5)(2/5) / (1/5) = 1.2; en ALLOW 1.2, en REFUSE 0.8
    assert row_weights(records, {}, reweigh_languages=True) == pytest.approx([1.2, 0.8, 0.9, 0.9, 1.2])
