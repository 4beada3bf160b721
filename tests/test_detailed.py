"""The set of requests told in detail: what it promises to be."""

from collections import Counter, defaultdict
from statistics import mean

import pytest

from so8t.data.records import Record
from so8t.data.sources import load_shipped
from so8t.labels import Label
from tests.shipped import check_distinct, check_own


@pytest.fixture(scope="module")
def detailed() -> list[Record]:
    return load_shipped("detailed")


@pytest.mark.parametrize("language", ["en", "ja"])
def test_as_many_are_benign_as_harmful_and_the_rest_is_for_a_person(detailed, language):
    labels = Counter(r.safety_label for r in detailed if r.language == language)
    assert sum(labels.values()) >= {"en": 380, "ja": 100}[language]
    assert labels[Label.ALLOW] == pytest.approx(labels[Label.REFUSE], rel=0.05)
    assert 0.2 <= labels[Label.ESCALATE] / sum(labels.values()) <= 0.3


@pytest.mark.parametrize("label", list(Label))
def test_every_label_has_the_same_forms(detailed, label):
    forms = Counter(r.form for r in detailed if r.safety_label == label)
    for form, share in (("command", 0.55), ("question", 0.25), ("statement", 0.2)):
        assert forms[form] / forms.total() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("language", "least"), [("en", 15), ("ja", 30)])
def test_rows_are_long_and_those_of_every_label_as_long(detailed, language, least):
    lengths = defaultdict(list)
    for row in detailed:
        if row.language == language:
            lengths[row.safety_label].append(len(row.user_request.split() if language == "en" else row.user_request))
    assert min(min(found) for found in lengths.values()) >= least
    means = [mean(found) for found in lengths.values()]
    assert max(means) <= 1.1 * min(means)


def test_every_group_has_a_benign_row_and_twins_with_other_labels(detailed):
    groups = defaultdict(list)
    for record in detailed:
        groups[record.group].append(record.safety_label)
    assert all(sorted(labels) == sorted(set(labels)) for labels in groups.values()), "one of a label"
    assert all(len(labels) >= 2 and Label.ALLOW in labels for labels in groups.values())
    assert sum(Label.REFUSE in labels for labels in groups.values()) >= 0.97 * len(groups)


def test_rows_are_distinct_and_so_are_their_answers_and_rationales(detailed):
    check_distinct(detailed, near=0.005)


def test_no_row_says_its_own_label_or_stands_in_the_sets_beside(detailed, requests_beside):
    check_own(detailed, "detailed", requests_beside)
