"""The starter set: what it promises to be, and that form or style alone does not give a label away."""

from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.tree import DecisionTreeClassifier

from so8t.data.records import Record
from so8t.data.sources import load_shipped
from so8t.data.splits import near_duplicates
from so8t.labels import LABELS, Label

FORMS = ("question", "command", "statement")


@pytest.fixture(scope="module")
def starter() -> list[Record]:
    return load_shipped("starter")


def words(text: str) -> int:
    """Words of an English text; of a Japanese one, two characters count as a word."""
    return len(text.split()) if text.isascii() or " " in text else len(text) // 2


def test_it_has_at_least_900_rows_balanced_over_labels_and_a_quarter_are_japanese(starter):
    assert len(starter) >= 900
    counts = Counter(r.safety_label for r in starter)
    assert max(counts.values()) <= 1.1 * min(counts.values())
    languages = Counter(r.language for r in starter)
    assert set(languages) == {"en", "ja"}
    assert languages["ja"] >= len(starter) / 4


def test_rows_that_say_japanese_are_and_rows_that_say_english_are(starter):
    for record in starter:
        kana = any("\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" for c in record.user_request)
        assert kana == (record.language == "ja"), record.user_request


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("label", list(Label))
def test_every_class_has_questions_commands_and_statements_short_and_long(starter, language, label):
    rows = [r for r in starter if r.safety_label == label and r.language == language]
    forms = Counter(r.form for r in rows)
    assert set(forms) == set(FORMS)
    assert min(forms.values()) >= 0.25 * len(rows)
    lengths = [words(r.user_request) for r in rows]
    assert sum(n <= 8 for n in lengths) >= 0.1 * len(rows), "short ones"
    assert sum(n >= 30 for n in lengths) >= 0.1 * len(rows), "long ones"


def test_at_least_150_benign_rows_only_sound_dangerous_and_each_has_a_twin_that_shares_words(starter):
    by_group: dict[str | None, list[Record]] = {}
    for record in starter:
        by_group.setdefault(record.group, []).append(record)
    sounding = [r for r in starter if r.sounds_dangerous]
    assert all(r.safety_label == Label.ALLOW for r in sounding)
    twinned = [r for r in sounding if any(t.safety_label != Label.ALLOW for t in by_group[r.group])]
    assert len(twinned) >= 150

    def grams(text: str) -> set[str]:
        text = text.lower()
        return {text[i : i + 2] for i in range(len(text) - 1)} if not text.isascii() else set(text.split())

    sharing = 0
    for row in twinned:
        others = [t for t in by_group[row.group] if t.safety_label != Label.ALLOW]
        sharing += any(grams(row.user_request) & grams(t.user_request) for t in others)
    assert sharing >= 150


def test_every_row_has_an_answer_a_rationale_a_group_and_a_licence(starter):
    for record in starter:
        assert record.task_output, record
        assert record.safety_rationale, record
        assert record.group, record
        assert (record.source, record.licence) == ("starter", "Apache-2.0")


def test_rationales_and_answers_are_not_one_fixed_sentence(starter):
    assert len({r.safety_rationale for r in starter}) > 0.99 * len(starter)
    assert len({r.task_output for r in starter}) > 0.98 * len(starter)


def test_it_is_no_template_with_names_swapped(starter):
    texts = [r.user_request for r in starter]
    assert len(set(texts)) == len(texts)
    close = {i for pair in near_duplicates(texts, 0.5) for i in pair}
    assert len(close) <= 0.005 * len(starter)


def test_no_row_is_in_a_public_benchmark_to_the_letter_and_none_says_its_own_label(starter):
    for record in starter:
        told = f"{record.user_request} {record.context or ''}"
        assert not any(name in told for name in LABELS), told


def grouped_accuracy(classifier, features, records: list[Record]) -> float:
    labels = np.array([int(r.safety_label) for r in records])
    groups = [int.from_bytes(str(r.group).encode()[-8:], "big") for r in records]
    guess = cross_val_predict(classifier, features, labels, groups=groups, cv=GroupKFold(5))
    return float((guess == labels).mean())


def test_the_form_alone_does_not_give_the_label_away(starter):
    features = np.array(
        [
            [
                r.user_request.count("?") + r.user_request.count("？"),
                r.user_request.count("!"),
                words(r.user_request),
                r.user_request[0].isupper(),
                r.user_request.rstrip()[-1] in ".。",
                *(r.form == f for f in FORMS),
            ]
            for r in starter
        ],
        dtype=float,
    )
    tree = DecisionTreeClassifier(max_depth=6, min_samples_leaf=20, random_state=0)
    assert grouped_accuracy(tree, features, starter) < 0.42, "a third is chance"


def test_the_first_two_words_alone_give_little_away(starter):
    english = [r for r in starter if r.language == "en"]
    openings = CountVectorizer(ngram_range=(1, 2)).fit_transform([" ".join(r.user_request.split()[:2]) for r in english])
    assert grouped_accuracy(MultinomialNB(), openings, english) < 0.45


def test_a_context_alone_does_not_give_the_label_away(starter):
    with_context = [r for r in starter if r.context]
    assert len(with_context) >= 100
    features = CountVectorizer(analyzer="char", ngram_range=(2, 4)).fit_transform([r.context for r in with_context])
    assert grouped_accuracy(MultinomialNB(), features, with_context) < 0.5
