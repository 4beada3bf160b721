"""`benchmarks.persona`: what benign fine-tuning does to an agent, measured on the tiny base."""

import json
import sys

from benchmarks import persona


def test_an_agent_is_measured_before_and_after_benign_steps_and_its_base_stays_intact(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(persona, "RESULTS", tmp_path)
    options = ["--seeds=0", "--steps=2", "--validate-every=1", "--rows=2", "--variants=neither", "--losses=lm"]
    monkeypatch.setattr(sys, "argv", ["persona", str(finished_run), *options, "optim.gate_lr=1.0"])
    persona.main()  # the base behind no gates is compared with one that never had any
    told = json.loads((tmp_path / "persona.json").read_text())
    before, after = told["runs"]
    assert (before["variant"], after["variant"]) == ("before", "neither")
    assert before["perplexity_base"] == after["perplexity_base"]
    assert before["perplexity_gated"] != after["perplexity_gated"], "the steps turned the gates"
    assert told["overrides"] == [*persona.LM, "optim.gate_lr=1.0"]
    assert (tmp_path / "persona.png").read_bytes().startswith(b"\x89PNG")
