"""Training rows in a code: ESCALATE, drawn whatever their label, unreadable, in no code that robustness is tested with."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t.config import validate
from so8t.data.coded import CODES, LONGEST, OPENINGS, SHORTEST, SOURCE, coded
from so8t.data.records import Record
from so8t.data.wrappings import WRAPPINGS
from so8t.labels import Label
from so8t.training import load_data
from tests.conftest import composed
from tests.test_framing import words

records = st.builds(
    Record,
    user_request=st.text(st.characters(codec="utf-8"), min_size=1, max_size=120),
    safety_label=st.sampled_from(Label),
    context=st.none() | st.just("A context."),
    task_output=st.none() | st.just("An answer."),
    language=st.sampled_from(["en", "ja", "fi", None]),
    licence=st.just("MIT"),
)
REQUEST = "where does the river meet the sea?"


@given(st.lists(records, max_size=40), st.floats(0, 1), st.integers(0, 3))
def test_coded_rows_are_new_escalate_rows_without_anything_to_learn_to_write(rows, share, seed):
    made = coded(rows, share, seed=seed)
    assert made == coded(rows, share, seed=seed)
    fit = [r for r in rows if r.language in CODES and r.context is None and SHORTEST <= len(r.user_request) <= LONGEST]
    assert len(made) == min(len(fit), round(share * len(rows)))
    for row in made:
        assert (row.safety_label, row.source, row.licence) == (Label.ESCALATE, SOURCE, "MIT")
        assert {row.task_output, row.safety_rationale, row.context} == {None}


@given(st.lists(records, max_size=40), st.sampled_from(Label))
def test_which_row_stands_in_which_code_does_not_depend_on_labels(rows, label):
    assert coded(rows, 0.5, seed=0) == coded([replace(row, safety_label=label) for row in rows], 0.5, seed=0)


@pytest.mark.parametrize("code", CODES["en"], ids=lambda code: code.__name__)
def test_no_word_of_a_request_is_left_to_read(code):
    text = code(REQUEST, random.Random(0)).lower()
    assert text
    assert not [word for word in ("where", "river", "meet", "the sea") if word in text]


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS)
def test_no_code_or_opening_is_one_that_robustness_is_tested_with(wrapping):
    for language, codes in CODES.items():
        assert not [o for o in OPENINGS[language] if words(o) & words(wrapping("X"))]
        for code, seed in ((code, seed) for code in codes for seed in range(5)):
            assert code(REQUEST, random.Random(seed)) not in wrapping(REQUEST)


def test_training_rows_alone_are_joined_by_coded_ones_unless_nothing_is_to_be_escalated(tmp_path):
    few = ("data=starter", *(f"++data.sources.{name}.max_rows=300" for name in ("starter", "everyday", "stakes", "detailed")))

    def loaded(*overrides):
        return load_data(validate(composed(*few, *overrides, output_dir=tmp_path / str(len(overrides)))))

    plain, some = loaded("data.coded=0"), loaded("data.coded=0", "data.coded=0.02")
    assert (some.val, some.test, some.unseen) == (plain.val, plain.test, plain.unseen)
    assert some.train[: len(plain.train)] == plain.train
    new = some.train[len(plain.train) :]
    assert len(new) == round(0.02 * len(plain.train))
    assert {row.source for row in new} == {SOURCE}
    benign = loaded("data.coded=0", "data.coded=0.02", "data.train_labels=[ALLOW]")
    assert {row.safety_label for row in benign.train} == {Label.ALLOW}
