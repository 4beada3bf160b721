"""An evaluation: predictions in the order of the file, figures by source, and what a score has to beat beside it."""

import itertools
import json
import math
import re
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binom

from so8t.adapter import Agent
from so8t.base import SplitBase
from so8t.baselines import Baselines
from so8t.conversation import with_answer
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import RecordDataset
from so8t.data.records import Record
from so8t.data.store import CacheSpec, PrefixStore
from so8t.data.tokenise import Template
from so8t.evaluation import (
    Along,
    Predictions,
    along_answers,
    evaluate,
    frozen_features,
    predict,
    print_evaluation,
    write_predictions,
)
from so8t.gates import GateSpec
from so8t.labels import LABELS, Label
from so8t.model import HeadSpec, SO8TModel
from so8t.streaming import answered, stream
from tests.test_gates import turned

# lengths go up and down, so that sorting by length shuffles them
RECORDS = [
    Record("x" * n, Label(k % 3), source=source, context=context, sounds_dangerous=danger)
    for k, (n, source, context, danger) in enumerate(
        [
            (40, "a", None, True), (3, "b", None, False), (25, "a", "c", False), (1, "a", None, True), (60, "b", None, False),
            (12, "a", None, False), (33, "b", "c", True), (2, "b", None, False), (18, "c", None, False), (50, "c", None, False),
        ]
    )
]  # fmt: skip


@pytest.fixture
def model(tiny_base) -> SO8TModel:
    """Gates that turn visibly and a head whose decisions differ from row to row."""
    torch.manual_seed(0)
    model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec())
    turned(model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def template(model) -> Template:
    return Template(model.base.tokenizer, system_prompt="", max_length=160)


def run(model, template, records=RECORDS, batch_size=4, memory_gib=0.0) -> Predictions:
    return predict(model, records, template, batch_size=batch_size, cache=PrefixCache(model.base, memory_gib))


def by_hand(probabilities, failed=()) -> Predictions:
    p = torch.tensor(probabilities)
    n = len(p)
    fail = torch.tensor([i in failed for i in range(n)])
    labels = torch.where(fail, int(Label.ESCALATE), p.argmax(-1))
    return Predictions(p, labels, fail, torch.zeros(n, dtype=torch.bool), torch.full((n,), 0.25), torch.ones(n), torch.ones(n))


def printed(evaluation, width=200) -> str:
    out = StringIO()
    print_evaluation(evaluation, Console(file=out, width=width))
    return out.getvalue()


# -- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_are_in_the_order_of_the_rows_whatever_the_batches(model, template):
    alone = [run(model, template, [record], batch_size=1) for record in RECORDS]
    assert len({tuple(p.probabilities[0].tolist()) for p in alone}) == len(RECORDS), "rows can be told apart"
    for batch_size in (1, 3, 100):
        together = run(model, template, batch_size=batch_size)
        for i, one in enumerate(alone):
            assert torch.allclose(together.probabilities[i], one.probabilities[0], atol=2e-5)
            assert together.decisions[i] == one.decisions[0]
            assert together.changes[i].item() == pytest.approx(one.changes[0].item(), nan_ok=True)
            assert together.flicker[i].item() == pytest.approx(one.flicker[0].item(), abs=1e-4, nan_ok=True)


def test_a_cached_prefix_changes_no_prediction(model, template):
    cache = PrefixCache(model.base, 1.0)
    first = predict(model, RECORDS, template, batch_size=4, cache=cache)
    assert len(cache) == len(RECORDS)
    again = predict(model, RECORDS, template, batch_size=3, cache=cache)
    none = run(model, template, memory_gib=0.0)
    for other in (again, none):
        assert torch.allclose(first.probabilities, other.probabilities, atol=2e-5)


def test_prediction_runs_without_dropout(tiny_base):
    torch.manual_seed(0)
    model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(dropout=0.5))
    model.train()
    template = Template(model.base.tokenizer, system_prompt="", max_length=160)
    assert torch.equal(run(model, template).probabilities, run(model, template).probabilities)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_row_that_cannot_be_scored_is_a_failure_and_no_prediction(model, template):
    with torch.no_grad():
        model.gates.last.safe.coords[3, 5] = float("nan")
    predictions = run(model, template)
    assert predictions.failed.all()
    assert (predictions.decisions == Label.ESCALATE).all()
    result = evaluate("set", RECORDS, predictions, None, None)
    assert result.overall["SO8T"]["failures"] == len(RECORDS)
    assert result.overall["SO8T"]["rows"] == 0
    assert result.confusion == [[0] * 3] * 3
    assert not {"detected", "false_alarms_per_1000_tokens", "decision_changes"} & {
        key for key, value in result.overall["SO8T"].items() if value is not None and not math.isnan(value)
    }, "what was seen along the tokens of a failure is no detection and no alarm"
    assert f"{len(RECORDS)} failures (not counted as predictions)" in printed(result)
    json.dumps(result.as_json(), allow_nan=False)


def test_a_source_is_printed_as_it_is_called(model, template):
    records = [replace(r, source="a[/b] [web]", language="[red]") for r in RECORDS]
    told = printed(evaluate("set", records, run(model, template, records), None, None))
    assert "a[/b] [web]" in told
    assert "language [red]" in told


def test_an_exception_inside_is_a_bug_and_not_a_decision(model, template):
    model.gates.detach()

    def broken(*_):
        raise RuntimeError("out of memory")

    model.base.suffix_layers[0].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, template)


def test_written_predictions_follow_the_file_and_every_line_parses(tmp_path, model, template):
    records = [*RECORDS, Record("包丁\u2028を\nとぐ", Label.ALLOW)]
    predictions = run(model, template, records)
    predictions.failed[2] = True
    write_predictions(tmp_path / "out" / "p.jsonl", records, predictions)
    lines = (tmp_path / "out" / "p.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line) for line in lines]
    assert [row["user_request"] for row in rows] == [r.user_request for r in records]
    assert [row["safety_label"] for row in rows] == [r.safety_label.name for r in records]
    for i, row in enumerate(rows):
        assert row["decision"] == LABELS[int(predictions.decisions[i])]
        assert list(row["probabilities"]) == list(LABELS)
        assert list(row["probabilities"].values()) == pytest.approx(predictions.probabilities[i].tolist(), abs=1e-6)
        assert ("failure" in row) == (i == 2)
        assert row.get("context") == records[i].context


VARIED = [Record(text, Label.ALLOW) for text in ("wire all the money now", "bake bread: flour, salt", "Knead the dough well.")]


def test_what_is_seen_along_a_request_is_what_streams_and_smoothed(model, template, tmp_path):
    batch = RecordDataset(VARIED, template)[[0, 1, 2]]
    with torch.no_grad():  # so that decisions vary along the rows
        logits = model(model.prefix(batch.tokens, batch.mask), batch.tokens, batch.mask).logits
        model.head.linear.bias -= logits[batch.path].median(0).values
    changes = {}
    for share in (0.0, 0.8):
        model.head.spec = replace(model.head.spec, smoothing=share)
        seen, agent = run(model, template, VARIED), Agent(model, template, tmp_path)
        for i, record in enumerate(VARIED):
            decided = [token.label for token in stream(agent, record.user_request)]
            assert seen.stream.tokens[i] == len(decided)
            assert seen.changes[i] == sum(a != b for a, b in itertools.pairwise(decided)), (share, i)
        changes[share] = seen
    assert changes[0.8].changes.nansum() < changes[0.0].changes.nansum()
    assert changes[0.8].stream.alarms.sum() < changes[0.0].stream.alarms.sum()
    assert torch.equal(changes[0.8].probabilities, changes[0.0].probabilities), "the decision proper is not smoothed"


# -- along answers -----------------------------------------------------------------------------------------------------

OPENER = Record("bake", Label.ALLOW, task_output="Knead the dough well.")
ANSWERED = [
    OPENER,
    replace(OPENER, user_request="sort a list", task_output="sorted(them)"),
    Record("poison", Label.REFUSE),
    Record("wire all the money now", Label.ESCALATE, context="a bank"),
    replace(OPENER, user_request="too long", task_output="x" * 200),
]


def test_along_answers_decisions_are_those_on_the_answers_tokens_alone(model, template, tmp_path):
    found = along_answers(model, ANSWERED, template, batch_size=3, cache=PrefixCache(model.base)).figures
    assert (found["allow_rows"], found["risky_rows"], found["left_out"]) == (2, 2, 1)
    agent, read = Agent(model, template, tmp_path), {}
    for row in answered(ANSWERED)[:2] + answered(ANSWERED)[3:]:
        text = with_answer(row.user_request, row.task_output)
        decided = [token.label for token in stream(agent, text, row.context)]
        read[row.task_output] = decided[-len(row.task_output) :]  # one byte a token
    allow, risky = ([read[text] for text in texts] for texts in (list(read)[:2], list(read)[2:]))

    def alarms(decided):
        return sum(now != Label.ALLOW and before == Label.ALLOW for before, now in zip([Label.ALLOW, *decided], decided))  # noqa: B905

    assert found["false_alarms_per_1000_tokens"] == pytest.approx(1000 * sum(map(alarms, allow)) / sum(map(len, allow)))
    assert sum(map(alarms, allow)) > 0
    changes = [sum(a != b for a, b in itertools.pairwise(decided)) for decided in allow]
    assert found["decision_changes"] == pytest.approx(sum(changes) / 2)
    detected = [decided for decided in risky if decided[-1] != Label.ALLOW]
    assert found["detected"] == len(detected) / 2
    since = [max([k for k, label in enumerate(decided) if label == Label.ALLOW], default=-1) + 2 for decided in detected]
    assert found["time_to_detection"] == pytest.approx(sum(since) / len(since) if since else math.nan, nan_ok=True)


def test_without_answers_and_harmless_requests_there_is_nothing_to_measure_along_them(model, template):
    found = along_answers(
        model, [Record("poison", Label.REFUSE)], template, batch_size=3, cache=PrefixCache(model.base)
    ).figures
    assert (found["allow_rows"], found["risky_rows"], found["left_out"]) == (0, 0, 0)
    assert all(math.isnan(found[name]) for name in ("detected", "false_alarms_per_1000_tokens", "decision_changes"))


def test_figures_along_answers_are_told_and_printed_only_where_they_were_asked_for():
    result = evaluate("set", SIX, by_hand(SCORES), None, None)
    assert "answers" not in result.as_json()
    assert "along an answer" not in printed(result)
    figures = {
        "allow_rows": 0.0, "risky_rows": 70.0, "left_out": 2.0, "decision_changes": math.nan,
        "detected": 0.5, "time_to_detection": 3.25, "false_alarms_per_1000_tokens": math.nan,
    }  # fmt: skip
    result.answers = Along(figures, {"detected": (0.38, 0.62), "false_alarms_per_1000_tokens": None})
    told = {key: None if math.isnan(value) else value for key, value in figures.items()}
    intervals = {"detected": (0.38, 0.62), "false_alarms_per_1000_tokens": None}
    assert result.as_json()["answers"] == {**told, "intervals_95": intervals}
    text = printed(result, width=500)
    assert "0 ALLOW rows with their own, - false alarms per 1,000 tokens, - changes a row" in text
    assert "70 risky requests in the place of an answer, 0.500 [0.38, 0.62] detected by its end, after 3.2 tokens" in text
    assert "2 too long to be read whole are left out" in text


# -- features of the frozen base ---------------------------------------------------------------------------------------


def test_frozen_features_are_the_base_without_gates_at_the_decision_position_row_by_row(model, template):
    features = frozen_features(model, RECORDS, template, batch_size=4, cache=PrefixCache(model.base, 0.0))
    assert model.gates.attached, "and afterwards the gates are back"
    with model.without_gates(), torch.no_grad():
        for i, record in enumerate(RECORDS):
            tokens = torch.tensor([template.encode(record.user_request, record.context).tokens])
            want = model.base.decoder(input_ids=tokens).last_hidden_state[0, -1]
            assert torch.allclose(torch.tensor(features[i]).float(), want, atol=1e-4), i


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_the_frozen_base_are_computed_once_for_all_runs(model, template, tmp_path, monkeypatch, dtype):
    def features(records):
        store = PrefixStore.of_last_states(model.base, CacheSpec(folder=str(tmp_path), dtype=dtype))
        return frozen_features(model, records, template, batch_size=4, cache=PrefixCache(model.base), store=store)

    assert np.array_equal(features(RECORDS[:5])[:5], first := features(RECORDS)[:5])
    monkeypatch.setattr(SplitBase, "suffix", lambda *_, **__: pytest.fail("it was computed again"))
    assert np.array_equal(features(RECORDS[:5]), first)


# -- figures -----------------------------------------------------------------------------------------------------------

SIX = [Record(f"r{i}", Label(k), source="xxy"[i % 3], sounds_dangerous=i < 2) for i, k in enumerate([0, 0, 0, 1, 2, 2])]
# decided: ALLOW, REFUSE, ALLOW, ESCALATE, ALLOW, REFUSE
SCORES = [[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.5, 0.2, 0.3], [0.0, 0.1, 0.9]]


def test_figures_are_given_over_all_rows_and_by_source():
    result = evaluate("set", SIX, by_hand(SCORES), None, None)
    assert result.overall["SO8T"]["accuracy"] == pytest.approx(4 / 6)
    assert set(result.by_source) == {"x", "y", "(benign, sounds dangerous)"}
    x, y = result.by_source["x"]["SO8T"], result.by_source["y"]["SO8T"]
    assert (x["rows"], y["rows"]) == (4, 2)  # rows 0, 1, 3, 4 and rows 2, 5
    assert x["accuracy"] == pytest.approx(2 / 4)
    assert y["accuracy"] == 1.0
    assert x["false_allow_rate"] == pytest.approx(1 / 2)
    assert x["over_refusal_rate"] == pytest.approx(1 / 2)
    benign = result.by_source["(benign, sounds dangerous)"]["SO8T"]
    assert (benign["rows"], benign["over_refusal_rate"]) == (2, 0.5)
    assert result.confusion == [[2, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_failures_are_in_no_figure_of_any_source():
    result = evaluate("set", SIX, by_hand(SCORES, failed={0, 5}), None, None)
    assert result.overall["SO8T"]["rows"] == 4
    assert result.overall["SO8T"]["failures"] == 2
    assert result.by_source["x"]["SO8T"]["failures"] == result.by_source["y"]["SO8T"]["failures"] == 1
    assert sum(map(sum, result.confusion)) == 4


def test_a_single_class_in_a_source_gives_nan_figures_that_become_null():
    records = [Record("a", Label.REFUSE, source="only"), Record("b", Label.ALLOW, source="other")]
    result = evaluate("set", records, by_hand([[0.1, 0.1, 0.8], [0.9, 0.05, 0.05]]), None, None)
    only = result.by_source["only"]["SO8T"]
    assert math.isnan(only["over_refusal_rate"])
    assert math.isnan(only["recall_escalate"])
    text = json.dumps(result.as_json(), allow_nan=False)
    assert json.loads(text)["by_source"]["only"]["SO8T"]["over_refusal_rate"] is None
    assert json.loads(text)["labels"] == ["ALLOW", "ESCALATE", "REFUSE"]


@pytest.fixture
def full(model, template):
    """Everything that a run prints, on the tiny base."""
    cache = PrefixCache(model.base, 1.0)
    features = frozen_features(model, RECORDS, template, batch_size=4, cache=cache)
    baselines = Baselines.fit(RECORDS, features)
    predictions = predict(model, RECORDS, template, batch_size=4, cache=cache)
    return evaluate("the set", RECORDS, predictions, baselines, features)


def test_baselines_and_constant_classifiers_stand_beside_every_evaluation(full):
    beside = ["SO8T", "TF-IDF", "frozen probe", "context only", "always ALLOW", "always ESCALATE", "always REFUSE"]
    assert list(full.overall) == beside
    text = printed(full)
    assert "the set: 10 rows" in text
    for title in ("macro-F1", "false", "allow", "refusal", "recall", "AUROC", "AUPRC", "AURC", "ECE"):
        assert title in text
    for name in beside:
        assert re.search(rf"^{name} +{full.overall[name]['macro_f1']:.3f} ", text, re.MULTILINE), name
    assert "(benign, sounds dangerous)" in text


def test_by_source_the_baselines_are_printed_too(full):
    assert set(full.by_source) == {"a", "b", "c", "(benign, sounds dangerous)"}
    assert all({"SO8T", "TF-IDF", "frozen probe"} <= set(table) for table in full.by_source.values())
    assert sum(full.by_source[s]["SO8T"]["rows"] for s in "abc") == len(RECORDS)


def test_the_baselines_are_judged_on_the_same_rows_by_the_same_figures(full):
    assert {figures["rows"] for figures in full.overall.values()} == {10.0}
    assert full.overall["TF-IDF"]["macro_f1"] > full.overall["always ALLOW"]["macro_f1"]
    assert full.overall["always ALLOW"]["false_allow_rate"] == 1.0
    assert full.overall["always REFUSE"]["over_refusal_rate"] == 1.0
    assert set(full.as_json()["baselines"]) == set(full.overall) - {"SO8T"}


def test_without_fitted_baselines_the_constants_are_there_still():
    result = evaluate("set", SIX, by_hand(SCORES), None, None)
    assert list(result.overall) == ["SO8T", "always ALLOW", "always ESCALATE", "always REFUSE"]
    assert "always REFUSE" in printed(result)


def constants(labels) -> dict[str, dict[str, float]]:
    records = [Record(f"r{i}", label) for i, label in enumerate(labels)]
    overall = evaluate("set", records, by_hand([[1 / 3] * 3] * len(labels)), None, None).overall
    return {who: figures for who, figures in overall.items() if who != "SO8T"}


def test_constant_classifiers_get_the_figures_that_a_constant_deserves():
    table = constants([Label.ALLOW, Label.ALLOW, Label.ESCALATE, Label.REFUSE])
    assert list(table) == ["always ALLOW", "always ESCALATE", "always REFUSE"]
    allow, refuse = table["always ALLOW"], table["always REFUSE"]
    # recall 1, precision 2/4: F1 = 2/3, and two zeros beside it
    assert allow["macro_f1"] == pytest.approx((2 / 3) / 3)
    assert (allow["false_allow_rate"], allow["over_refusal_rate"]) == (1.0, 0.0)
    # recall 1, precision 1/4: F1 = 2/5
    assert refuse["macro_f1"] == pytest.approx((2 / 5) / 3)
    assert (refuse["false_allow_rate"], refuse["over_refusal_rate"], refuse["refuse_recall"]) == (0.0, 1.0, 1.0)
    assert all(figures["auroc_not_allow"] == pytest.approx(0.5) for figures in table.values())
    assert all(figures["auprc_not_allow"] == pytest.approx(0.5) for figures in table.values()), "the share of such rows"
    assert (allow["aurc"], refuse["aurc"]) == (0.5, 0.75), "at every coverage the share of rows with another label"
    assert allow["ece"] == pytest.approx(0.5)


@given(st.lists(st.sampled_from(list(Label)), min_size=3, max_size=30).filter(lambda v: len(set(v)) == 3))
@settings(max_examples=20, deadline=None)
def test_no_constant_reaches_more_than_a_third_of_macro_f1_when_all_classes_are_there(labels):
    assert all(figures["macro_f1"] <= 1 / 3 for figures in constants(labels).values())


def test_auprc_and_aurc_are_those_of_the_rows_that_did_not_fail():
    figures = evaluate("set", SIX, by_hand(SCORES, failed={0}), None, None).overall["SO8T"]
    # by 1 - P(ALLOW): REFUSE, ALLOW (row 1) and ESCALATE together, REFUSE, ALLOW; so precision 1, 2/3, 3/4 at each third
    assert figures["auprc_not_allow"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # by confidence: right (0.9), right (0.8), wrong (0.7), right (0.6), wrong (0.5)
    assert figures["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4 + 2 / 5) / 5)


def test_languages_and_forms_have_figures_of_their_own_and_rows_that_tell_none_are_unknown():
    told = [("en", "question"), ("ja", "question"), ("en", None), (None, "command"), ("en", None), ("ja", "statement")]
    records = [replace(r, language=language, form=form) for r, (language, form) in zip(SIX, told, strict=True)]
    result = evaluate("set", records, by_hand(SCORES), None, None)
    rows = {kind: {group: table["SO8T"]["rows"] for group, table in groups.items()} for kind, groups in result.groups.items()}
    assert rows["language"] == {"en": 3, "ja": 2, "unknown": 1}
    assert rows["form"] == {"question": 2, "command": 1, "statement": 1, "unknown": 2}
    # en: row 0 allowed rightly, row 2 allowed rightly, row 4 allowed wrongly
    assert result.groups["language"]["en"]["SO8T"]["false_allow_rate"] == 1.0
    assert result.groups["language"]["ja"]["SO8T"]["over_refusal_rate"] == 1.0
    plain = result.as_json()
    assert {kind for kind in plain if kind.startswith("by_")} == {"by_source", "by_language", "by_form"}
    text = printed(result)
    assert "language ja" in text
    assert "form unknown" in text


def test_a_group_has_intervals_from_twenty_rows_up_each_over_the_rows_that_it_is_a_share_of():
    records = [Record(f"r{i}", Label.REFUSE if i < 25 else Label.ALLOW, source="large") for i in range(40)]
    records += [Record(f"s{i}", Label.REFUSE, source="small") for i in range(19)]
    result = evaluate("set", records, by_hand([[0.8, 0.1, 0.1]] * 5 + [[0.1, 0.1, 0.8]] * 54), None, None)
    large, small, everything = (
        result.intervals_95[kind][group] for kind, group in (("source", "large"), ("source", "small"), ("all", "SO8T"))
    )
    low, high = large["false_allow_rate"]
    assert low < 5 / 25 < high
    assert binom.cdf(5, 25, high) == pytest.approx(0.025), "Clopper and Pearson"
    assert large["over_refusal_rate"] is None, "15 ALLOW rows"
    assert large["macro_f1"] is not None
    assert set(small.values()) == {None}
    assert everything["false_allow_rate"][1] - everything["false_allow_rate"][0] < high - low, "44 rows tell more than 25"
    assert "0.200 [0.07, 0.41]" in printed(result)


def test_every_classifier_has_intervals_of_its_scores_over_the_rows_that_did_not_fail():
    rng = np.random.default_rng(0)
    labels = [Label(i % 3) for i in range(150)]
    records = [Record(f"r{i}", label, source="a") for i, label in enumerate(labels)]
    probabilities = rng.dirichlet([1, 1, 1], 150)
    probabilities[np.arange(150), labels] += 0.5
    probabilities /= probabilities.sum(1, keepdims=True)
    kept = list(range(1, 150))
    told = evaluate("set", records, by_hand(probabilities.tolist(), failed={0}), None, None)
    without = evaluate("set", [records[i] for i in kept], by_hand(probabilities[kept].tolist()), None, None)
    found = told.as_json()["intervals_95"]["all"]["SO8T"]
    assert found == without.as_json()["intervals_95"]["all"]["SO8T"]
    for key in ("macro_f1", "auroc_not_allow", "auprc_not_allow", "aurc", "ece"):
        low, high = found[key]
        assert low < told.overall["SO8T"][key] < high, key
    assert told.intervals_95["source"]["a"] == told.intervals_95["all"]["SO8T"], "of a group as of all"


def test_no_line_of_an_evaluation_is_wider_than_eighty_columns_or_cut(full):
    text = printed(full, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "always ESCALATE" in text
