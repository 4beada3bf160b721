"""Decisions along a request's tokens: hand-worked figures, causality, text that adds up to the request, and the command."""

import json
import math

import pytest
import torch

from so8t.adapter import load_agent
from so8t.calibration import Policy, Threshold
from so8t.cli import main
from so8t.data.records import Record
from so8t.labels import LABELS, Label
from so8t.streaming import Stream, along, pieces, request_tokens, stream


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


def test_ask_streams_one_json_line_a_token_before_the_decision(finished_run, capsys):
    ask = ["ask", str(finished_run), "bake bread", "--json", "--max-new-tokens", "1"]
    main(ask)
    alone = capsys.readouterr().out
    main([*ask, "--stream"])
    *lines, last = capsys.readouterr().out.splitlines(keepends=True)
    assert last == alone
    rows = [json.loads(line) for line in lines]
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
