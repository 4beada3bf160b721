"""A run whose head reads requests behind a prompt of decisions: what is loaded reads them behind the same one."""

import json

import pytest

from so8t.adapter import load_agent


def test_what_is_loaded_reads_as_the_run_was_tested(tiny_run):
    _, run = tiny_run("data.decision_prompt=Judge it.", "data.max_length=200", "head.words=64", "trainer.max_epochs=1")
    agent = load_agent(run)
    assert agent.template.tokenizer.decode(agent.template.before).count("Judge it.") == 1
    assert agent.model.head.words.opening == len(agent.template.before)
    assert agent.model.base.opening.tokens.tolist() == agent.template.before
    told = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert told
    for row in told:
        found = agent.decide(row["user_request"], row.get("context")).probabilities[0].tolist()
        assert found == pytest.approx(list(row["probabilities"].values()), abs=1e-4)


def test_an_adapter_from_before_there_was_one_reads_behind_the_system_turn(tiny_run):
    _, run = tiny_run("data.system_prompt=Be brief.", "data.max_length=200", "evaluate=false", "trainer.max_epochs=1")
    path = run / "adapter" / "adapter.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    del meta["template"]["decision_prompt"]
    path.write_text(json.dumps(meta), encoding="utf-8")
    agent = load_agent(run)
    assert agent.template.tokenizer.decode(agent.template.before).count("Be brief.") == 1
