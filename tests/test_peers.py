"""benchmarks.peers: the command that its docstring advertises for a GPU, with the smallest base on a CPU."""

import json
import sys
from functools import cache

import pytest

import benchmarks.gates
from benchmarks import peers


def test_every_peer_takes_its_steps_where_the_head_reads_layers_below_the_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.gates, "RESULTS", tmp_path)
    composed = cache(lambda *overrides: benchmarks.gates.composed(list(overrides), tmp_path))
    monkeypatch.setattr(peers, "composed", lambda overrides, _: composed(*overrides))  # some peers have the same settings
    monkeypatch.setattr(peers, "allocated", lambda _: 1)  # PyTorch's profiler takes longer than ten steps
    monkeypatch.setattr(peers, "plot", lambda *_: None)
    small = ["trainer.accelerator=cpu", "data.max_length=16", "gate.top_layers=2"]
    command = ["peers", "--shape", "tiny", "--steps", "0", "--batches", "2", "+hw=rtx3060", *small]
    monkeypatch.setattr(sys, "argv", command)
    peers.main()
    (file,) = tmp_path.glob("peers_tiny_cpu_*.json")
    found = json.loads(file.read_text())["measured"]
    assert list(found) == list(peers.PEERS)
    for name, figures in found.items():
        assert len(figures["step_seconds"]) == 2, name
        assert figures["trained_beside_the_head"] > 0, name
        assert figures["peak_gib"] > 0, name
    assert found[peers.REFERENCE]["ratio_median"] == pytest.approx(1)
