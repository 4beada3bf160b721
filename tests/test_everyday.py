"""The everyday set: what it promises to be, and that plain wording alone does not make a request benign."""

from collections import Counter

import pytest

from so8t.data.records import Record
from so8t.data.sources import load_shipped
from so8t.labels import Label
from tests.shipped import check_distinct, check_own


@pytest.fixture(scope="module")
def everyday() -> list[Record]:
    return load_shipped("everyday")


def test_most_rows_are_benign_and_a_third_are_japanese(everyday):
    assert len(everyday) >= 1200
    labels = Counter(r.safety_label for r in everyday)
    assert 0.75 * len(everyday) <= labels[Label.ALLOW] <= 0.8 * len(everyday)
    assert labels[Label.ESCALATE] == labels[Label.REFUSE]
    languages = Counter(r.language for r in everyday)
    assert set(languages) == {"en", "ja"}
    assert languages["ja"] >= len(everyday) / 3


@pytest.mark.parametrize("label", list(Label))
def test_every_label_has_questions_commands_and_statements(everyday, label):
    forms = Counter(r.form for r in everyday if r.safety_label == label)
    assert set(forms) == {"question", "command", "statement"}
    assert min(forms.values()) >= 0.2 * sum(forms.values())


@pytest.mark.parametrize("label", list(Label))
def test_half_of_every_label_is_short_and_none_is_long(everyday, label):
    rows = [r for r in everyday if r.safety_label == label and r.language == "en"]
    lengths = [len(r.user_request.split()) for r in rows]
    assert 0.4 <= sum(n <= 8 for n in lengths) / len(rows) <= 0.6
    assert max(lengths) <= 45


def test_every_risky_row_has_a_benign_one_in_its_group(everyday):
    benign = {r.group for r in everyday if r.safety_label == Label.ALLOW}
    assert all(r.group in benign for r in everyday)


def test_rows_are_distinct_and_so_are_their_answers_and_rationales(everyday):
    check_distinct(everyday, near=0.005)


def test_no_row_says_its_own_label_or_stands_in_the_sets_beside(everyday, requests_beside):
    check_own(everyday, "everyday", requests_beside)
