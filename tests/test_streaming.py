"""Decisions along the tokens of requests and answers: hand-worked figures, causality, text that adds up, and the commands."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from so8t.adapter import MOST_WINDOWS, load_agent
from so8t.cli import main
from so8t.conversation import with_answer
from so8t.data.records import Record
from so8t.data.tokenise import Template
from so8t.labels import LABELS, Label
from so8t.model import smoothed
from so8t.policy import Policy, Threshold
from so8t.streaming import CUT, Stream, along, answer_prompt, answered, pieces, request_tokens, stream, streams
from tests.ruled import Ruled
from tests.test_agent import says


def logits_of(*rows: str) -> torch.Tensor:
    """Logits whose decisions spell A, E or R; `?` is a logit that is not finite."""
    table = {"A": [2.0, 0.0, 0.0], "E": [0.0, 2.0, 0.0], "R": [0.0, 0.0, 2.0], "?": [math.nan, 0.0, 0.0]}
    return torch.tensor([[table[c] for c in row] for row in rows])


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    return torch.ones(logits.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(
    ("row", "detection", "alarms"),
    [
        ("AARRR", 3, 1),
        ("ARARR", 4, 2),
        ("RRRRR", 1, 1),
        ("AAERE", 3, 1),  # ESCALATE to REFUSE is no new alarm
        ("ARRAA", math.nan, 1),  # it does not stay
        ("AAAAA", math.nan, 0),
        ("AAAAR", 5, 1),
        ("AA?AA", math.nan, 1),  # a token that cannot be scored is escalated
    ],
)
def test_detection_is_the_token_from_which_the_decision_stays_off_allow(row, detection, alarms):
    logits = logits_of(row)
    found = along(logits, everywhere(logits))
    assert found.detection.tolist() == pytest.approx([detection], nan_ok=True)
    assert found.alarms.tolist() == [alarms]
    assert found.tokens.tolist() == [5]


def test_tokens_off_the_path_are_passed_over():
    logits = logits_of("RAARRA", "RAAAAR")
    path = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    found = along(logits, path)
    assert found.tokens.tolist() == [4, 0]
    assert found.detection.tolist() == pytest.approx([3, math.nan], nan_ok=True)
    assert found.alarms.tolist() == [1, 0]


def test_a_confidence_under_the_least_is_an_alarm_too():
    logits = logits_of("AAA")
    assert along(logits, everywhere(logits), min_confidence=0.9).alarms.tolist() == [1]


@given(
    logits=arrays(np.float32, (2, 9, 3), elements=st.floats(-5, 5, width=32)),
    path=arrays(np.bool_, (2, 9)),
    share=st.floats(0, 0.99),
)
def test_smoothed_logits_are_the_exponential_averages_of_the_log_probabilities_on_the_path(logits, path, share):
    got = smoothed(torch.from_numpy(logits), torch.from_numpy(path), share).log_softmax(-1)
    for row in range(2):
        state = None
        for t in range(9):
            wanted = torch.from_numpy(logits[row, t]).log_softmax(-1)
            if path[row, t]:
                state = wanted if state is None else share * state + (1 - share) * wanted
                wanted = state.log_softmax(-1)
            assert torch.allclose(got[row, t], wanted, atol=1e-5), (row, t)


def test_smoothing_takes_a_flicker_away_keeps_a_turn_and_lets_no_failure_spread():
    flickering, turning, failing = logits = logits_of("AARAAAAA", "AAARRRRR", "AA?AAAAA")
    calm = smoothed(logits, everywhere(logits), 0.8)
    assert along(logits, everywhere(logits)).alarms.tolist() == [1, 1, 1]
    assert along(calm, everywhere(calm)).alarms.tolist() == [0, 1, 1]
    assert not calm[2, 2].isfinite().all(), "and is an alarm of its own"
    assert torch.allclose(calm[2, 3:].softmax(-1), failing[3:].softmax(-1)), "of ALLOW alone"
    assert torch.equal(smoothed(logits, everywhere(logits), 0.0)[:2], torch.stack([flickering, turning]))


def test_figures_are_of_risky_rows_for_detection_and_of_allow_rows_for_false_alarms():
    logits = logits_of("AARR", "RAAA", "RARA", "AAAA")
    found = along(logits, everywhere(logits))
    figures = found.figures(torch.tensor([2, 1, 0, 0]))
    assert figures["detected"] == 0.5
    assert figures["time_to_detection"] == 3
    assert figures["false_alarms_per_1000_tokens"] == 1000 * 2 / 8
    none = Stream(found.tokens[:2], found.detection[:2], found.alarms[:2]).figures(torch.tensor([2, 1]))
    assert math.isnan(none["false_alarms_per_1000_tokens"])


@pytest.mark.parametrize(
    "text", ["how do I kill a process?", "包丁のとぎ方 🔪 please", " two  spaces\nand a line ", "odd \ufffd end \ufffd"]
)
def test_the_pieces_add_up_to_the_text_and_characters_are_whole(tiny_base, text):
    tokens = tiny_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(pieces(tiny_base.tokenizer, tokens))
    assert len(parts) == len(tokens)
    assert "".join(parts) == text


def test_the_real_tokenizer_spreads_characters_over_tokens_and_the_pieces_add_up_all_the_same(real_base):
    text = "包丁のとぎ方を教えて 🔪"
    tokens = real_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(pieces(real_base.tokenizer, tokens))
    assert "".join(parts) == text
    assert "" in parts, "some tokens end no character"
    assert not any("\ufffd" in part for part in parts)


def test_what_is_decided_after_a_token_does_not_depend_on_what_follows(finished_run):
    agent = load_agent(finished_run)
    whole = list(stream(agent, "wire the money now, or forge a passport"))
    start = list(stream(agent, "wire the money now"))
    assert "".join(t.text for t in start) == "wire the money now"
    for a, b in zip(start, whole, strict=False):
        assert a.text == b.text
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
    assert len({t.probabilities for t in whole}) > 3, "and tokens differ"


def test_smoothing_calms_what_streams_and_leaves_the_decision_alone(finished_run):
    text = "wire the money now, or forge a passport, or bake bread"
    told = {}
    for share in (0.0, 0.8):
        agent = load_agent(finished_run)
        agent.model.head.spec = replace(agent.model.head.spec, smoothing=share)
        tokens = torch.tensor([t.probabilities for t in stream(agent, text)])
        told[share] = (tokens.diff(dim=0).abs().mean(), agent.decide(text).probabilities.tolist())
    assert told[0.8][0] < 0.5 * told[0.0][0]
    assert told[0.8][1] == told[0.0][1]


def test_ask_streams_one_json_line_a_token_before_the_decision(finished_run, capsys):
    ask = ["ask", str(finished_run), "bake bread", "--json", "--max-new-tokens", "1"]
    main(ask)
    alone = capsys.readouterr().out
    main([*ask, "--stream"])
    *lines, last = capsys.readouterr().out.splitlines(keepends=True)
    assert last == alone
    rows = [row for row in map(json.loads, lines) if row["part"] == "request"]
    assert "".join(row["text"] for row in rows) == "bake bread"
    assert [row["token"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(list(row["probabilities"]) == list(LABELS) and row["decision"] in LABELS for row in rows)


def test_under_a_policy_tokens_are_decided_by_it_too(finished_run):
    agent = load_agent(finished_run)
    assert any(t.label != Label.ESCALATE for t in stream(agent, "bake bread"))
    never = Threshold(at=None, alpha=0.05, delta=0.05, rows=100, rate=0.0, bound=0.03)
    agent.policy = Policy(1.0, never, never, 100, "drawn", 0.1, 0.1, "0" * 64)
    assert all(t.label == Label.ESCALATE for t in stream(agent, "bake bread"))


def test_ask_streams_the_request_for_people_and_then_the_decision(finished_run, capsys):
    main(["ask", str(finished_run), "[bold]bake[/] bread", "--stream", "--max-new-tokens", "1"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "[bold]bake[/] bread"
    assert second.split()[0] in LABELS


def test_evaluate_tells_detection_and_false_alarms(finished_run, rows_file, capsys):
    main(["evaluate", str(finished_run), "--data", str(rows_file)])
    told = " ".join(capsys.readouterr().out.split())
    for text in ("detected by its end", "changes a row", "false alarms per 1,000 tokens"):
        assert text in told


def test_of_a_row_the_tokens_of_its_request_are_told_and_none_where_it_is_not_read_whole(finished_run):
    agent = load_agent(finished_run)
    told = request_tokens(agent, Record("wire it now", Label.REFUSE, context="a bank's assistant"))
    assert "".join(token.text for token in told) == "wire it now"
    assert told == list(stream(agent, "wire it now", "a bank's assistant"))[-len(told) :]
    assert request_tokens(agent, Record("wire it now " * 200, Label.REFUSE)) == []


# -- long requests -----------------------------------------------------------------------------------------------------

LONG = " ".join(f"{k} plain words" for k in range(40))


def test_a_long_request_is_shown_in_the_prompts_that_it_is_decided_in_and_its_cut_is_marked(finished_run):
    agent = load_agent(finished_run)
    template = agent.template
    first, *windows = ("".join(token.text for token in tokens) for tokens in streams(agent, LONG))
    begin, end = first.split(CUT)
    assert LONG.startswith(begin)
    assert LONG.endswith(end)
    assert len(begin + end) == template.room, "one byte a token"
    read = template.windows(LONG)[1:]
    assert windows == [template.tokenizer.decode(prompt.tokens[slice(*prompt.span)]) for prompt in read]
    assert len(windows) > 2
    for seen, alone in zip(streams(agent, LONG)[2], stream(agent, windows[1]), strict=True):
        assert seen.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    assert [len(list(tokens)) for tokens in streams(agent, "short")] == [5]


def test_a_request_of_too_many_windows_is_shown_by_its_beginning_and_end_alone(finished_run):
    agent = load_agent(finished_run)
    most = agent.template.room + (MOST_WINDOWS - 2) * (agent.template.room // 2)
    assert len(streams(agent, "x" * most)) == MOST_WINDOWS
    assert len(streams(agent, "x" * (most + 1))) == 1


def test_ask_streams_a_long_request_prompt_by_prompt(finished_run, so8t):
    count = len(streams(load_agent(finished_run), LONG))
    _, out, _ = so8t("ask", finished_run, LONG, "--stream", "--json", "--max-new-tokens", "1")
    rows = [row for row in map(json.loads, out.splitlines()) if row.get("part") == "request"]
    assert sorted({row["prompt"] for row in rows}) == list(range(1, count + 1))
    assert CUT in "".join(row["text"] for row in rows if row["prompt"] == 1)
    assert [row["token"] for row in rows if row["prompt"] == 2] == list(range(1, sum(r["prompt"] == 2 for r in rows) + 1))
    _, out, _ = so8t("ask", finished_run, LONG, "--stream", "--max-new-tokens", "1")
    assert CUT in out
    assert "here its beginning and end:" in out
    assert f"here window {count - 1} of {count - 1}:" in out


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(finished_run, so8t, monkeypatch):
    """What `so8t ask --stream` prints where the base says `text` and `rule` is the head; and the agent."""

    def ask(text, rule, *options):
        agent = Ruled.of(load_agent(finished_run), rule)
        says(agent, text, monkeypatch)
        monkeypatch.setattr("so8t.adapter.load_agent", lambda run: agent)
        return so8t("ask", "a-run", "hello", "--stream", *options)[1], agent

    return ask


def answer_rows(out):
    *rows, last = map(json.loads, out.splitlines())
    return [row for row in rows if row["part"] == "answer"], last


def test_ask_streams_the_answer_token_by_token_with_the_decision_at_each(asked):
    out, agent = asked("cut it 🔪 now", lambda text: Label.ALLOW, "--json")
    rows, last = answer_rows(out)
    assert "".join(row["text"] for row in rows) == last["answer"] == "cut it 🔪 now"
    assert [row["token"] for row in rows] == list(range(1, len("cut it 🔪 now".encode()) + 2)), "the end is a token, too"
    assert all(row["decision"] == "ALLOW" and row["probabilities"]["ALLOW"] == pytest.approx(0.9) for row in rows)
    shown = ["".join(row["text"] for row in rows[:k]) for k in range(1, len(rows) + 1)]
    assert agent.asked[-len(rows) :] == [with_answer("hello", text.strip()) for text in shown]
    assert "stopped" not in last
    assert asked("cut it 🔪 now", lambda text: Label.ALLOW)[0].splitlines()[2:] == ["cut it 🔪 now"]


def refuses_knives(text):
    return Label.REFUSE if "knife" in text else Label.ALLOW


def fails_on_knives(text):
    return 1 / 0 if "knife" in text else Label.ALLOW


@pytest.mark.parametrize(("rule", "label"), [(refuses_knives, "REFUSE"), (fails_on_knives, "ESCALATE")])
def test_where_the_watch_stops_an_answer_ask_shows_no_more_of_it_and_says_why(asked, rule, label):
    rows, last = answer_rows(asked("take a knife and go", rule, "--json")[0])
    assert "".join(row["text"] for row in rows) == last["answer"] == "take a knif"
    assert (rows[-1]["token"], rows[-1]["text"], rows[-1]["decision"]) == (12, "", label)
    assert (last["decision"], last["stopped"]) == ("ALLOW", label)
    assert ("failure" in last) == (label == "ESCALATE")
    out, _ = asked("take a knife and go", rule)
    answer, why, *failure = out.splitlines()[2:]
    assert answer == "take a knif"
    assert why.startswith(f"stopped: the answer with token 12, which is not shown, is {label}   ALLOW 0.")
    assert failure == ["this is a failure, not a prediction"] * (label == "ESCALATE")


@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_what_is_not_allowed_has_no_answer_to_stream(asked, label):
    rows, last = answer_rows(asked("never", lambda text: label, "--json")[0])
    assert (rows, last["answer"], last["decision"]) == ([], None, label.name)
    assert len(asked("never", lambda text: label)[0].splitlines()) == 2


def test_an_answer_behind_the_gates_is_not_streamed_for_it_is_not_watched(so8t, finished_run):
    code, _, err = so8t("ask", finished_run, "hello", "--stream", "--gated")
    assert code == 2
    assert "not allowed with" in err


ROWS = [
    Record("bake bread", Label.ALLOW, task_output="Knead it. 🍞 そして焼く。", language="en"),
    Record("no answer", Label.ALLOW, language="en"),
    Record("an empty one", Label.ALLOW, task_output=" \n", language="en"),
    Record("poison her", Label.REFUSE, task_output="No.", context="a kitchen", language="en"),
    Record("金を送って", Label.ESCALATE, language="ja"),
    Record("wire it", Label.ESCALATE, language="en"),
]


def test_an_allow_row_is_read_with_its_own_answer_and_a_risky_one_as_the_answer_to_a_harmless_request():
    own, *risky = answered(ROWS)
    assert own == ROWS[0]
    assert [(row.task_output, row.context, row.safety_label) for row in risky] == [
        ("poison her", "a kitchen", Label.REFUSE),
        ("wire it", None, Label.ESCALATE),
    ], "nothing harmless is Japanese here"
    assert all(row.user_request in ("bake bread", "no answer", "an empty one") for row in risky)
    many = ROWS[:3] + ROWS[5:] * 20
    assert answered(many) == answered(many)
    assert {row.user_request for row in answered(many)} == {"bake bread", "no answer", "an empty one"}


def test_an_answers_span_holds_its_text_and_nothing_else(finished_run):
    template = load_agent(finished_run).template
    for row in answered(ROWS):
        prompt, span = answer_prompt(template, row)
        encoded = template.encode(prompt.user_request, prompt.context)
        assert template.tokenizer.decode(encoded.tokens[slice(*span)]) == row.task_output
        assert prompt.user_request == with_answer(row.user_request, row.task_output)
    assert answer_prompt(template, Record("hello", Label.ALLOW, task_output="so " * 200)) is None


def test_on_the_real_tokenizer_too_a_span_holds_the_answer(real_base):
    template = Template(real_base.tokenizer, system_prompt=None, max_length=160)
    for answer in ("Knead the dough.", "包丁は研ぐ。🔪", "1. one\n2. two", "  indented"):
        prompt, span = answer_prompt(template, Record("How do I bake bread?", Label.ALLOW, task_output=answer))
        tokens = template.encode(prompt.user_request).tokens
        assert template.tokenizer.decode(tokens[slice(*span)]).strip() == answer.strip()
