"""The set of plain requests with something at stake: what it promises to be."""

from collections import Counter, defaultdict

import pytest

from so8t.data.records import Record
from so8t.data.sources import load_shipped
from so8t.labels import Label
from tests.shipped import check_distinct, check_own


@pytest.fixture(scope="module")
def stakes() -> list[Record]:
    return load_shipped("stakes")


@pytest.mark.parametrize("language", ["en", "ja"])
def test_most_rows_are_for_a_person_or_for_nobody_in_either_language(stakes, language):
    labels = Counter(r.safety_label for r in stakes if r.language == language)
    assert sum(labels.values()) == len(stakes) / 2 >= 200
    assert labels[Label.ESCALATE] > labels[Label.REFUSE] > labels[Label.ALLOW] >= 0.2 * len(stakes) / 2


@pytest.mark.parametrize("label", list(Label))
def test_every_label_has_the_same_forms_and_lengths(stakes, label):
    rows = [r for r in stakes if r.safety_label == label]
    forms = Counter(r.form for r in rows)
    for form, share in (("command", 0.4), ("question", 0.33), ("statement", 0.25)):
        assert forms[form] / len(rows) == pytest.approx(share, abs=0.03)
    short = {"en": 9, "ja": 16}
    lengths = [(len(r.user_request.split()) if r.language == "en" else len(r.user_request)) <= short[r.language] for r in rows]
    assert sum(lengths) / len(rows) == pytest.approx(0.5, abs=0.02)


def test_every_benign_row_has_a_twin_of_either_other_label(stakes):
    groups = defaultdict(list)
    for record in stakes:
        groups[record.group].append(record.safety_label)
    assert all(sorted(labels) == sorted(set(labels)) for labels in groups.values()), "one of a label"
    assert all(len(labels) == 3 for labels in groups.values() if Label.ALLOW in labels)
    assert all(Label.ESCALATE in labels for labels in groups.values())


def test_rows_are_distinct_and_so_are_their_answers_and_rationales(stakes):
    check_distinct(stakes, near=0.01)


def test_no_row_says_its_own_label_or_stands_in_the_sets_beside(stakes, requests_beside):
    check_own(stakes, "stakes", requests_beside)
