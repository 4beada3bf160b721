"""What a score has to beat: baselines that are fitted fairly, and that a run's folder gives back as they were."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from so8t.baselines import Baselines, Linear, ProbeBaseline, TfidfBaseline, fit_linear, full_text
from so8t.data.records import Record
from so8t.labels import Label

TEXTS = [
    "bake rye bread", "bake a cake", "sort a python list", "plan a trip", "explain a derivative",
    "wire the money", "drop the table", "is this mole cancer", "stop my heart pills",
    "write a virus", "forge a passport", "stalk my ex", "poison the dog",
]  # fmt: skip
LABELS = [0] * 5 + [1] * 4 + [2] * 4
UNSEEN = ["bake a python", "write the money", "zzz", "", "drop my pills"]


def features(count: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) * [1, 5, 0.1, 2, 1, 1][:width] + 3


def test_tfidf_with_logistic_regression_is_that_of_scikit_learn():
    ours = TfidfBaseline.fit(TEXTS, LABELS, c=3.0)
    reference = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+"),
        LogisticRegression(C=3.0, max_iter=1000, class_weight="balanced"),
    ).fit(TEXTS, LABELS)
    assert np.allclose(ours.probabilities(UNSEEN), reference.predict_proba(UNSEEN), atol=1e-6)
    assert (ours.probabilities(TEXTS).argmax(-1) == LABELS).all()


def test_the_probe_is_logistic_regression_on_standardised_features():
    x = features(len(LABELS))
    ours = ProbeBaseline.fit(x, LABELS, c=0.5)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000, class_weight="balanced"))
    other = features(4, seed=1)
    assert np.allclose(ours.probabilities(other), reference.fit(x, LABELS).predict_proba(other), atol=1e-4)


def test_a_linear_model_is_a_softmax_worked_out_by_hand():
    model = Linear(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.array([0.0, 0.0, np.log(2.0)]))
    # scores log 3, log 5 and log 2
    assert np.allclose(model.probabilities(np.log([[3.0, 5.0]])), [[0.3, 0.5, 0.2]])
    assert np.allclose(model.probabilities(np.array([[1e4, 0.0]])), [[1.0, 0.0, 0.0]]), "large scores do not overflow"


@given(
    labels=st.lists(st.sampled_from([0, 1, 2]), min_size=3, max_size=13),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20, deadline=None)
def test_classes_without_rows_get_no_chance_and_the_others_are_those_of_scikit_learn(labels, seed):
    x = features(len(labels), seed=seed)
    p = fit_linear(x, labels, c=0.1).probabilities(x)
    seen = sorted(set(labels))
    assert np.allclose(p.sum(-1), 1)
    assert np.isfinite(p).all()
    assert (p[:, [k for k in range(3) if k not in seen]] == 0).all()
    if len(seen) > 1:
        reference = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced").fit(x, labels)
        assert np.allclose(p[:, seen], reference.predict_proba(x), atol=1e-6)
    else:
        assert (p[:, seen[0]] == 1).all()


def test_japanese_is_read_character_by_character_and_other_scripts_word_by_word():
    def words(text: str) -> list[str]:
        return TfidfBaseline._empty().build_tokenizer()(text)

    assert words("包丁をとぐ") == ["包", "丁", "を", "と", "ぐ"]
    assert words("kill a Prozess, naïve") == ["kill", "a", "Prozess", "naïve"]
    assert words("Pythonのprocessを終了") == ["Python", "の", "process", "を", "終", "了"]
    assert words("コーヒー") == ["コ", "ー", "ヒ", "ー"]


def test_the_japanese_tokens_can_be_learnt_from():
    texts = ["パンを焼く方法", "ケーキを焼く", "毒を盛る方法", "毒を作る", "薬をやめるべきか", "薬の量"]
    baseline = TfidfBaseline.fit(texts, [0, 0, 2, 2, 1, 1])
    assert baseline.probabilities(["肉を焼く", "犬に毒", "薬"]).argmax(-1).tolist() == [0, 2, 1]


RECORDS = [
    Record(text, Label(label), context="The agent can delete files." if i % 2 else None)
    for i, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))
]


def test_what_is_saved_predicts_the_same_after_loading(tmp_path):
    x = features(len(RECORDS))
    fitted = Baselines.fit(RECORDS, x)
    fitted.save(tmp_path / "run" / "baselines")
    loaded = Baselines.load(tmp_path / "run" / "baselines")
    others = [Record(text or "-", Label.ALLOW, context=c) for text in UNSEEN for c in (None, "包丁 and more")]
    for rows, states in ((RECORDS, x), (others, features(len(others), seed=2))):
        before, after = fitted.probabilities(rows, states), loaded.probabilities(rows, states)
        assert before.keys() == after.keys() == {"TF-IDF", "frozen probe", "context only"}
        for name in before:
            assert before[name].shape == (len(rows), 3)
            assert torch.equal(before[name], after[name]), name
    assert not list(tmp_path.rglob("*.pkl")), "no pickles: safetensors and JSON"
    assert {p.suffix for p in (tmp_path / "run" / "baselines").iterdir()} == {".json", ".safetensors"}


def test_baselines_of_training_rows_without_a_class_can_be_saved_too(tmp_path):
    fitted = Baselines.fit(RECORDS[:9], features(9))
    fitted.save(tmp_path)
    p = Baselines.load(tmp_path).probabilities(RECORDS, features(len(RECORDS)))
    assert all((table[:, Label.REFUSE] == 0).all() and torch.isfinite(table).all() for table in p.values())


def test_the_baseline_reads_what_the_model_reads():
    assert full_text(Record("delete it", Label.ALLOW, context="You can delete.")) == "You can delete.\n\ndelete it"
    assert full_text(Record("delete it", Label.ALLOW)) == "delete it"


def test_the_context_only_baseline_sees_the_context_and_nothing_else():
    leaky = [Record(f"r{i}", Label(i % 3), context=f"this one is label{i % 3}") for i in range(12)]
    x = features(12)
    p = Baselines.fit(leaky, x).probabilities(leaky, x)["context only"]
    assert p.argmax(-1).tolist() == [i % 3 for i in range(12)], "it finds a context that spells the label out"
    fair = [Record(f"r{i} label{i % 3}", Label(i % 3), context="the same for all") for i in range(12)]
    p = Baselines.fit(fair, x).probabilities(fair, x)["context only"]
    assert torch.allclose(p, torch.full((12, 3), 1 / 3), atol=1e-4), "and is at chance where it does not"


@pytest.mark.parametrize("width", [1, 6])
def test_a_feature_that_never_varies_does_no_harm(width):
    x = features(len(LABELS), width)
    x[:, 0] = 7.0
    assert np.isfinite(ProbeBaseline.fit(x, LABELS).probabilities(x)).all()
