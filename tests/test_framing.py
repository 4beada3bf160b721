"""Framed training rows: what is asked and the label stay, test rows are never framed, no wrapping is trained on."""

import re
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t.config import validate
from so8t.data.framing import FRAMES, framed
from so8t.data.records import Record
from so8t.data.wrappings import WRAPPINGS
from so8t.labels import Label
from so8t.training import load_data
from tests.conftest import composed

records = st.builds(
    Record,
    user_request=st.text(st.characters(codec="utf-8"), min_size=1),
    safety_label=st.sampled_from(Label),
    task_output=st.none() | st.just("An answer."),
    safety_rationale=st.just("A reason."),
    language=st.sampled_from(["en", "ja", "fi", None]),
)


@given(st.lists(records, max_size=40), st.floats(0, 1), st.integers(0, 3))
def test_a_framed_row_still_asks_what_it_asked_and_keeps_its_label_and_place(rows, share, seed):
    made = framed(rows, share, seed=seed)
    assert made == framed(rows, share, seed=seed)
    assert len(made) == len(rows)
    assert sum(new != old for new, old in zip(made, rows, strict=True)) <= round(share * len(rows))
    for new, old in zip(made, rows, strict=True):
        assert old.user_request in new.user_request
        assert replace(new, user_request="", task_output=None, safety_rationale=None) == replace(
            old, user_request="", task_output=None, safety_rationale=None
        )


@given(st.lists(records, max_size=40), st.randoms())
def test_which_row_stands_in_which_frame_does_not_depend_on_labels(rows, random):
    """Without a short ALLOW row there is nothing to stand behind, so every chosen row is in a frame."""
    risky = [replace(row, safety_label=random.choice([Label.ESCALATE, Label.REFUSE])) for row in rows]
    others = [replace(row, safety_label=random.choice([Label.ESCALATE, Label.REFUSE])) for row in rows]
    texts = [[row.user_request for row in framed(some, 0.5, seed=0)] for some in (risky, others)]
    assert texts[0] == texts[1]


def test_an_answer_in_the_place_of_a_request_is_no_text_to_learn_to_write():
    rows = [Record(f"what is {k} plus {k}?", Label.ALLOW, task_output=f"{2 * k}.", language="en") for k in range(200)]
    made = framed(rows, 1.0, seed=0)
    texts = [f"{row.user_request}\n\n{row.task_output}" for row in rows]
    answers = [new for new, text in zip(made, texts, strict=True) if new.user_request == text]
    assert 20 < len(answers) < 60  # two in ten
    assert all(row.task_output is None and row.safety_rationale is None for row in answers)


def words(text: str) -> set[tuple[str, ...]]:
    """Runs of four words, or of eight Japanese characters."""
    said = re.findall(r"[a-z']+", text.lower())
    runs = {tuple(said[k : k + 4]) for k in range(len(said) - 3)}
    return runs | {tuple(text[k : k + 8]) for k in range(len(text) - 7) if not text.isascii()}


@pytest.mark.parametrize("name", sorted(WRAPPINGS))
def test_no_frame_shares_four_words_in_a_row_with_a_wrapping(name):
    wrapped = words(WRAPPINGS[name]("X"))
    assert not [frame for frames in FRAMES.values() for frame in frames if words(frame.replace("{request}", "X")) & wrapped]


def test_frames_are_many_and_each_holds_its_request_once():
    assert {len(frames) >= 12 for frames in FRAMES.values()} == {True}
    assert all(frame.count("{request}") == 1 for frames in FRAMES.values() for frame in frames)


def test_training_rows_alone_are_framed_as_many_as_the_setting_says(tmp_path):
    plain, some = (
        load_data(validate(composed("data=starter", f"data.framed={share}", output_dir=tmp_path / str(share))))
        for share in (0.0, 0.2)
    )
    assert (some.val, some.test, some.unseen) == (plain.val, plain.test, plain.unseen)
    changed = Counter(
        old.safety_label for new, old in zip(some.train, plain.train, strict=True) if new.user_request != old.user_request
    )
    total = sum(changed.values())
    assert 0.15 * len(plain.train) < total <= 0.2 * len(plain.train) + 1
    for label, of in product(Label, [Counter(row.safety_label for row in plain.train)]):
        assert changed[label] / total == pytest.approx(of[label] / len(plain.train), abs=0.08)
