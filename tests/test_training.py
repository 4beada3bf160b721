"""Training: what is trained and what is not, the schedule as it ran, checkpoints and resuming, and non-interference."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf

from so8t.adapter import Agent
from so8t.base import load_base, stored_tensors
from so8t.callbacks.checkpoints import AtomicCheckpointIO
from so8t.conversation import Prompt
from so8t.data.datamodule import RecordDataset
from so8t.data.records import Record
from so8t.data.tokenise import RATIONALE_INSTRUCTION, Template
from so8t.errors import ArtefactError, ConfigError
from so8t.gates import GateSpec
from so8t.labels import LABELS, Label
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.losses import LossTerms
from so8t.model import HeadSpec, SO8TModel
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from so8t.resume import check_continues, find_checkpoint
from tests.conftest import QUICK, ROOT, TINY, composed, synthetic_rows, trained, write_rows
from tests.spies import PowerCut, Spy, copied

SPY = "+callbacks.spy._target_=tests.spies.Spy"
SHORT = (
    "evaluate=false", "data.batch_size=4", "data.task_rows=2", "trainer.max_epochs=1", "trainer.limit_train_batches=5", SPY,
)  # fmt: skip


def table(run: Path) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -- what is trained, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("gate.interior=safe",),
        ("gate.interior=both", "gate.map=cayley", "head.pooling=both", "head.reads=[0.25,0.5,last]"),
        ("gate.blocks=leading", "loss.task_reaches=all"),
        ("gate.blocks=shared", "gate.sites=[down_proj]"),
    ],
    ids=lambda s: s[0],
)
def test_every_trainable_number_gets_a_gradient_is_in_one_group_and_has_moved(tiny_run, settings):
    tiny_run(*SHORT, *settings, "pet.exploration=1")
    module, spy = Spy.last.module, Spy.last
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert trainable
    assert {name.split(".")[1] for name in trainable} == {"gates", "head"}, "and nothing of the base"
    optimizer = module.optimizers().optimizer
    groups = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    clipped = Counter(id(p) for parameters in module.parameter_groups().values() for p in parameters)
    for name, parameter in trainable.items():
        assert groups[id(parameter)] == 1, f"{name} is in {groups[id(parameter)]} optimiser groups"
        assert clipped[id(parameter)] == 1, f"{name} is in {clipped[id(parameter)]} clip groups"
        seen = sum(step[name].abs() for step in spy.raw)
        assert (seen > 0).all(), f"{name}: {(seen == 0).sum()} of {seen.numel()} numbers never got a gradient"
        assert (parameter.detach() != spy.start[name]).all(), f"{name} has not moved"
    assert set(groups) == set(clipped) == {id(p) for p in trainable.values()}, "and nothing else is in a group"


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_is_bit_for_bit_what_it_was_before_training(tiny_run, quantization):
    tiny_run(*SHORT, f"base.quantization={quantization}", "loss.task_reaches=all", "optim.gate_lr=0.1")
    after = dict(stored_tensors(Spy.last.module.model.base))
    assert after.keys() == Spy.last.base.keys()
    for name, before in Spy.last.base.items():
        assert after[name].dtype == before.dtype, name
        assert torch.equal(after[name], before), name
    codes = [name for name, tensor in after.items() if name.endswith("proj.weight") and tensor.dtype == torch.uint8]
    states = {name.rsplit(".", 1)[1] for name in after if ".weight." in name}
    if quantization == "nf4":
        assert len(codes) == 4 * 7, "four layers of seven projections, as 4-bit codes"
        assert {"absmax", "nested_absmax", "quant_map", "nested_quant_map"} <= states
    else:
        assert not codes
        assert not states
    assert all(p.grad is None for p in Spy.last.module.model.base.parameters())


# -- non-interference --------------------------------------------------------------------------------------------------


def safety_side(module: SO8TModule) -> dict[str, torch.Tensor]:
    """By hand: every gate and average but those of the last `R_cmd`, and the head."""
    return {n: t for n, t in copied(module).items() if n not in ("model.gates.last.cmd.coords", "inertia.last__cmd")}


@pytest.fixture
def other_texts(tmp_path) -> dict[str, Path]:
    """The same requests with longer answers, and with none; files of the same name, so that the source is the same."""
    rows = synthetic_rows(120)
    texts = {
        "longer": [
            {**r, "task_output": "zzz " * (i % 9 + 1), "safety_rationale": "!" * (i % 5 + 1)} for i, r in enumerate(rows)
        ],
        "none": [{k: r[k] for k in ("user_request", "safety_label")} for r in rows],
    }
    for name in texts:
        (tmp_path / name).mkdir()
    return {name: write_rows(tmp_path / name / "rows.jsonl", changed) for name, changed in texts.items()}


def test_the_task_loss_and_its_texts_change_no_bit_of_the_safety_side(tiny_run, other_texts, tmp_path):
    # everything through which one side could reach the other: the cap of PET binds, clipping binds, dropout draws numbers
    settings = (
        "gate.interior=both", "data.batch_size=8", "data.task_rows=2", "trainer.max_epochs=1",
        "trainer.limit_train_batches=6", SPY, "~callbacks.guard",
        "pet.weight=50", "pet.exploration=1", "pet.transition=1", "pet.max_share=0.05", "pet.inertia_weight=1",
        "optim.clip=0.05", "optim.gate_lr=0.05", "optim.gate_weight_decay=0.1", "head.dropout=0.1",
    )  # fmt: skip

    def trained(name: str, *more: str):
        _, run = tiny_run(*settings, *more, output_dir=tmp_path / name)
        module = Spy.last.module
        with torch.no_grad():
            logits = module.eval()(Spy.last.batches[0]).logits
        return {**safety_side(module), "logits": logits}, (run / "test_predictions.jsonl").read_bytes(), copied(module)

    sides = {
        "with": trained("with", "loss.task_weight=1"),
        "without": trained("without", "loss.task_weight=0"),
        "other texts": trained("other", "loss.task_weight=1", f"data.path={other_texts['longer']}", "data.task_rows=5"),
        "no texts": trained("none", "loss.task_weight=1", f"data.path={other_texts['none']}"),
    }
    reference, decisions, whole = sides["with"]
    assert any(name.endswith("cmd.coords") for name in reference), "an interior R_cmd is on the safety side"
    for name, (side, predictions, everything) in sides.items():
        for key, tensor in reference.items():
            assert torch.equal(side[key], tensor), f"{name}: {key} differs"
        assert predictions == decisions, f"{name}: a decision differs"
        if name != "with":
            key = "model.gates.last.cmd.coords"
            assert not torch.equal(everything[key], whole[key]), "the task loss does train R_cmd"


def test_a_task_loss_that_reaches_all_gates_does_change_the_safety_side(tiny_run):
    tiny_run(*SHORT, "loss.task_weight=0")
    without = safety_side(Spy.last.module)
    tiny_run(*SHORT, "loss.task_weight=1", "loss.task_reaches=all")
    differs = {name for name, tensor in safety_side(Spy.last.module).items() if not torch.equal(tensor, without[name])}
    assert {"model.gates.last.safe.coords", "model.gates.interior.2_o_proj.safe.coords"} <= differs


# -- learning rate, accumulation, clipping -----------------------------------------------------------------------------


def test_the_learning_rate_of_every_step_is_the_formulas(tiny_run):
    # 11 micro-batches an epoch, accumulated by 4: 4 + 4 + 3, so 3 optimiser steps an epoch and 6 in two
    tiny_run(
        "evaluate=false", SPY, "data.batch_size=4", "trainer.limit_train_batches=11", "trainer.accumulate_grad_batches=4",
        "trainer.max_epochs=2", "optim.warmup_steps=2", "optim.gate_lr=0.03", "optim.head_lr=0.002",
        "optim.final_lr_fraction=0.1", "~callbacks.guard",
    )  # fmt: skip
    steps, warmup = 6, 2
    for group, top in (("gates", 0.03), ("head", 0.002)):
        expected = []
        for step in range(steps):
            if step < warmup:
                expected.append(top * (step + 1) / (warmup + 1))
            else:
                cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
                expected.append(top * (0.1 + 0.9 * cosine))
        assert [step[group] for step in Spy.last.rates] == pytest.approx(expected, rel=1e-12)
        assert expected[0] == pytest.approx(top / 3), "the first step already learns"
        assert expected[2] == pytest.approx(top), "the top right after warm-up"


def test_micro_batches_add_up_to_the_effective_batch_and_clipping_acts_on_the_sum(tiny_run):
    clip = 0.001
    tiny_run(
        *SHORT, "trainer.limit_train_batches=7", "trainer.accumulate_grad_batches=3", f"optim.clip={clip}", "head.dropout=0"
    )
    spy = Spy.last
    assert spy.rows == [4] * 7
    assert spy.steps_at == [0, 0, 0, 1, 1, 1, 2], "an optimiser step after every third micro-batch, and one for the rest"
    assert len(spy.rates) == len(spy.clipped) == 3
    # reference: the mean of the three micro-batches' gradients, from the initial parameters
    module = spy.module
    module.load_state_dict(spy.start)
    module.zero_grad()
    module.train()  # where the words are silent
    for batch in spy.batches[:3]:
        (module.loss_terms(batch, module(batch), progress=0.0).total() / 3).backward()
    for name, gradient in spy.raw[0].items():
        wanted = dict(module.named_parameters())[name].grad
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-8), name
    for raw, clipped in zip(spy.raw, spy.clipped, strict=True):
        for parameters in module.parameter_groups().values():
            names = [n for n, p in module.named_parameters() if any(p is q for q in parameters)]
            norm = math.sqrt(sum(float(raw[n].pow(2).sum()) for n in names))
            assert norm > clip, "so that clipping has something to do"
            for n in names:
                assert torch.allclose(clipped[n], raw[n] * (clip / norm), rtol=1e-3, atol=1e-10), n


def test_clip_zero_leaves_gradients_alone(tiny_run):
    tiny_run(*SHORT, "optim.clip=0")
    for raw, clipped in zip(Spy.last.raw, Spy.last.clipped, strict=True):
        assert all(torch.equal(raw[n], clipped[n]) for n in raw)


def test_dropout_acts_while_training_and_not_while_deciding(tiny_run):
    losses = {}
    for dropout in (0.0, 0.5):
        tiny_run(*SHORT, f"head.dropout={dropout}", "trainer.limit_train_batches=2")
        losses[dropout] = Spy.last.losses
        module, batch = Spy.last.module.eval(), Spy.last.batches[0]
        with torch.no_grad():
            assert torch.equal(module(batch).logits, module(batch).logits)
    assert losses[0.0][0] != losses[0.5][0]


def test_weight_decay_and_betas_reach_adamw(tiny_run):
    tiny_run(*SHORT, "optim.weight_decay=0.3", "optim.gate_weight_decay=0.2", "optim.betas=[0.5,0.7]")
    groups = {g["name"]: g for g in Spy.last.module.optimizers().optimizer.param_groups}
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"gates": 0.2, "head": 0.3}
    assert all(tuple(g["betas"]) == (0.5, 0.7) for g in groups.values())


# -- overfitting -------------------------------------------------------------------------------------------------------


def test_debug_overfit_drives_the_loss_of_one_batch_to_almost_nothing(rows_file, tmp_path):
    trained(composed(
        *QUICK, f"data.path={rows_file}", "debug=overfit", SPY, "trainer.overfit_batches=1", "data.batch_size=24",
        "optim.head_lr=0.1", "optim.gate_lr=0.03", "loss.task_weight=0", "head.dropout=0", "head.probe=0", "head.words=0",
        output_dir=tmp_path / "run",
    ))  # fmt: skip
    spy = Spy.last
    assert len({tuple(batch.rows.tolist()) for batch in spy.batches}) == 1, "the same rows every time"
    assert len(set(spy.batches[0].labels.tolist())) > 1, "that do not all have one label"
    assert spy.losses[0] > 1.0
    assert spy.losses[-1] < 0.03


def test_the_language_model_loss_overfits_to_almost_nothing_and_then_the_agent_says_the_targets(tmp_path):
    # prompt and answer concatenated, shifted and masked: if any of it were off, generate could not repeat the targets.
    # Rotations alone cannot make a random base speak, so here the base trains as well.
    base = load_base(replace(TINY, quantization="none"), cut=4)
    torch.manual_seed(0)
    model = SO8TModel(base, GateSpec(top_layers=4), HeadSpec())
    base.requires_grad_(True)
    loss = LossSpec(task_reaches="all", task_chunk=16)
    module = SO8TModule(model, loss, PetSpec(), OptimSpec(), class_counts=(1, 1, 1))
    records = [
        Record("bake bread", Label.ALLOW, task_output="mix flour", safety_rationale="it is food"),
        Record("forge a pass", Label.REFUSE, task_output="no, sorry", safety_rationale="a crime"),
    ]
    template = Template(base.tokenizer, system_prompt=None, max_length=200)
    batch = RecordDataset(records, template, task_rows=4)[[0, 1]]
    assert batch.task.tokens.shape[0] == 4, "two answers and two rationales"
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(90):
        optimizer.zero_grad()
        value, count = module.task_loss(batch.task)
        value.backward()
        optimizer.step()
    texts = [r.task_output for r in records] + [r.safety_rationale for r in records]
    assert count == sum(len(text) + 1 for text in texts), "each byte of the targets, and the end of the turn, once"
    assert value.item() < 0.02
    agent = Agent(model.eval(), template, tmp_path)
    for record in records:
        assert agent.answer(record.user_request, gated=True) == record.task_output
        tokens = template.encode_conversation(Prompt(record.user_request + RATIONALE_INSTRUCTION))
        with model.task_path(), torch.no_grad():
            out = base.causal_lm.generate(torch.tensor([tokens]), max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert base.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True) == record.safety_rationale


# -- checkpoints and resuming ------------------------------------------------------------------------------------------


def test_checkpoints_hold_gates_and_head_alone_in_kilobytes_and_load_without_pickle(tiny_run):
    _, run = tiny_run(*SHORT, "callbacks.by_step.every_n_train_steps=2")
    files = sorted((run / "checkpoints").glob("*.ckpt"))
    assert len(files) == 3, "best, and two by step"
    assert type(Spy.last.module.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    numbers = sum(p.numel() for p in Spy.last.module.parameters() if p.requires_grad)
    for file in files:
        checkpoint = torch.load(file, weights_only=True)  # refuses pickled objects
        assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"model", "inertia"}
        assert {name.split(".")[1] for name in checkpoint["state_dict"] if name.startswith("model")} == {"gates", "head"}
        assert checkpoint["so8t_labels"] == list(LABELS)
        assert file.stat().st_size < 150_000
        # parameters, AdamW's two moments, the guard's best and the averages: nothing of the base's 170,000 numbers
        total = sum(t.numel() for t in _tensors(checkpoint))
        assert total < 20 * numbers


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", ["killed", "interrupted"])
def test_a_save_that_is_cut_short_leaves_the_older_checkpoint_whole_and_nothing_under_a_new_name(tmp_path, monkeypatch, end):
    old, new = tmp_path / "step-step=1.ckpt", tmp_path / "step-step=2.ckpt"
    save = AtomicCheckpointIO().save_checkpoint
    save({"state_dict": {"w": torch.ones(9)}}, old)
    whole = old.read_bytes()
    for path in (old, new):
        if end == "killed":
            if not (child := os.fork()):
                os.fsync = killed
                save({"state_dict": {"w": torch.zeros(9)}}, path)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        else:
            monkeypatch.setattr(os, "fsync", lambda _: [].pop())
            with pytest.raises(IndexError):
                save({"state_dict": {"w": torch.zeros(9)}}, path)
            assert list(tmp_path.iterdir()) == [old], "what was written is gone, too"
        assert list(tmp_path.glob("*.ckpt")) == [old]
        assert old.read_bytes() == whole


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


@pytest.mark.parametrize(
    ("step", "newest", "settings"),
    [(5, 4, ()), (6, 5, ("trainer.accumulate_grad_batches=2",))],
    ids=["in the middle of an epoch", "between epochs, with accumulation"],
)
def test_an_interrupted_run_that_is_resumed_ends_bit_for_bit_like_one_that_was_not(tiny_run, tmp_path, step, newest, settings):
    # without the cache: with it, a row's prefix may come from other company and differ in the last bit
    run = (
        "evaluate=false", "data.batch_size=8", "cache.max_gib=0", "trainer.limit_train_batches=10", "optim.warmup_steps=3",
        "pet.exploration=1", "head.dropout=0.2", "trainer.max_epochs=2", "callbacks.by_step.every_n_train_steps=2", SPY,
        *settings,
    )  # fmt: skip
    tiny_run(*run, output_dir=tmp_path / "whole")
    whole = Spy.last
    end = copied(whole.module)
    cut = ("+callbacks.cut._target_=tests.spies.Interrupt", f"+callbacks.cut.step={step}")
    with pytest.raises(PowerCut):
        tiny_run(*run, *cut, output_dir=tmp_path / "cut")
    done = len(Spy.last.rates)
    tiny_run(*run, "ckpt_path=last", output_dir=tmp_path / "cut")
    resumed = Spy.last
    assert done == step
    assert resumed.steps_at[0] == newest, "it went on from the newest checkpoint and did not begin again"
    assert len(resumed.rates) == len(whole.rates) - newest
    rest = len(resumed.batches)
    assert [b.rows.tolist() for b in resumed.batches] == [b.rows.tolist() for b in whole.batches[-rest:]]
    assert resumed.rates == whole.rates[-len(resumed.rates) :]
    assert resumed.module.inertia._average("last.safe").equal(whole.module.inertia._average("last.safe"))
    assert end.keys() == copied(resumed.module).keys()
    for name, tensor in copied(resumed.module).items():
        assert torch.equal(tensor, end[name]), name


def test_the_cache_of_the_prefix_changes_nothing_but_the_last_bits(tiny_run, tmp_path):
    ends = []
    for gib in (0, 1):
        tiny_run(*SHORT, "trainer.max_epochs=2", f"cache.max_gib={gib}", output_dir=tmp_path / str(gib))
        ends.append(copied(Spy.last.module))
        assert (len(Spy.last.module.cache) > 0) == (gib > 0)
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-5), name


def test_resuming_with_nothing_to_resume_or_other_gates_or_other_labels_is_told(tiny_run, tmp_path):
    with pytest.raises(ArtefactError, match="no checkpoint under"):
        tiny_run(*SHORT, "ckpt_path=last", output_dir=tmp_path / "outputs" / "none")
    with pytest.raises(ArtefactError, match="no such file"):
        tiny_run(*SHORT, f"ckpt_path={tmp_path}/none.ckpt")
    _, run = tiny_run(*SHORT, output_dir=tmp_path / "one")
    with pytest.raises(ArtefactError, match=r"other settings \(gate\.interior\): set them as in"):
        tiny_run(*SHORT, f"ckpt_path={run}", "gate.interior=none", output_dir=tmp_path / "two")
    with pytest.raises(ArtefactError, match=r"other settings \(data\.decision_prompt\)"):
        tiny_run(*SHORT, f"ckpt_path={run}", "data.decision_prompt=Judge.", output_dir=tmp_path / "two")
    file = next((run / "checkpoints").glob("best*.ckpt"))
    alone = tmp_path / "alone" / "best.ckpt"
    alone.parent.mkdir()
    shutil.copy(file, alone)  # without its run's configuration
    with pytest.raises(ArtefactError, match="does not fit"):
        tiny_run(*SHORT, f"ckpt_path={alone}", "gate.interior=none", output_dir=tmp_path / "two")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(ArtefactError, match=r"notes\.txt is no checkpoint"):
        tiny_run(*SHORT, f"ckpt_path={tmp_path}/notes.txt", output_dir=tmp_path / "two")
    checkpoint = torch.load(file, weights_only=True)
    swapped = tmp_path / "swapped.ckpt"
    torch.save({**checkpoint, "so8t_labels": ["ALLOW", "REFUSE", "ESCALATE"]}, swapped)
    with pytest.raises(ArtefactError, match="labels are"):
        tiny_run(*SHORT, f"ckpt_path={swapped}", output_dir=tmp_path / "three")


def checkpoint(*parts: object) -> Path:
    file = Path(*map(str, parts), "checkpoints", "step-step=1.ckpt")
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {}}, file)
    return file


@pytest.mark.parametrize("kind", ["multirun", "outputs"])
def test_a_job_of_a_sweep_goes_on_from_the_job_of_its_number_and_from_no_neighbour(tmp_path, kind):
    first = checkpoint(tmp_path, kind, "monday", 1)
    checkpoint(tmp_path, kind, "tuesday", 0)
    assert find_checkpoint("last", tmp_path / kind / "tuesday" / "1") == first
    with pytest.raises(ArtefactError, match="no checkpoint under"):
        find_checkpoint("last", tmp_path / kind / "tuesday" / "2")


def test_a_runs_folder_is_that_run_whatever_came_later_and_a_file_needs_no_folder(tmp_path, monkeypatch, caplog):
    first = checkpoint(tmp_path, "outputs", "day", "10-00")
    second = checkpoint(tmp_path, "outputs", "day", "11-00")
    run = tmp_path / "outputs" / "day" / "12-00"
    assert find_checkpoint(str(first.parents[1]), run) == first
    assert find_checkpoint("last", run) == second
    monkeypatch.chdir(first.parent)
    found = find_checkpoint(first.name, run)
    assert found == first
    check_continues(found, OmegaConf.create())
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(ArtefactError, match="no checkpoint of a training run, or not whole"):
        find_checkpoint(str(second), run)
    assert not caplog.messages
    assert find_checkpoint("last", run) == first, "the newest that is whole"
    assert caplog.messages == [f"passed over: {second} is no checkpoint of a training run, or not whole"]
    first.write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"no checkpoint under \S+ is whole"):
        find_checkpoint("last", run)


def test_an_objective_that_no_validation_measures_is_told_before_training(tiny_run):
    with pytest.raises(ConfigError, match=r"objective=val/macrof1: there is no such metric; near it are val/macro_f1"):
        tiny_run(*SHORT, "objective=val/macrof1", "head.probe=0.05")
    assert not Spy.last.rates, "no step was taken"


def test_the_adapter_is_the_best_validation_and_not_the_last(tiny_run):
    from safetensors.torch import load_file

    _, run = tiny_run(
        "evaluate=false", SPY, "data.batch_size=16", "trainer.max_epochs=6", "optim.head_lr=0.3", "optim.gate_lr=0.02",
        "optim.warmup_steps=0",
        "optim.final_lr_fraction=1", "callbacks.best.false_allow_ceiling=1", "~callbacks.guard", "head.probe=0", "head.words=0",
        "seed=3",
    )  # fmt: skip
    scores = [figures["val/macro_f1"] for _, figures, _ in Spy.last.validations]
    best = scores.index(max(scores))
    assert best < len(scores) - 1, "or the test shows nothing"
    adapter = load_file(run / "adapter" / "adapter.safetensors")
    kept, last = Spy.last.validations[best][2], Spy.last.validations[-1][2]
    assert set(adapter) == {n.removeprefix("model.") for n in kept if n.startswith("model.")}
    assert all(torch.equal(tensor, kept[f"model.{name}"]) for name, tensor in adapter.items())
    assert not all(torch.equal(tensor, last[f"model.{name}"]) for name, tensor in adapter.items())
    assert json.loads((run / "adapter" / "adapter.json").read_text())["labels"] == list(LABELS)


# -- the terms of the loss ---------------------------------------------------------------------------------------------

WEIGHTS = {
    "safety": "loss.safety_weight",
    "path": "loss.path_weight",
    "cost": "loss.cost_weight",
    "task": "loss.task_weight",
    "pet": "pet.weight",
    "inertia": "pet.inertia_weight",
}


def test_every_term_is_logged_with_its_share_and_the_shares_add_up(tiny_run):
    _, run = tiny_run(*SHORT, "trainer.log_every_n_steps=1", "pet.exploration=1", "pet.max_share=0.3", "pet.weight=1")
    rows = [r for r in table(run) if r["train/loss"]]
    assert len(rows) == 5
    for row in rows:
        terms = {name: float(row[f"train/{name}"]) for name in WEIGHTS}
        assert sum(terms.values()) == pytest.approx(float(row["train/loss"]), rel=1e-5)
        for name, value in terms.items():
            assert float(row[f"train/share_{name}"]) == pytest.approx(value / sum(terms.values()), rel=1e-4, abs=1e-7)
        safety_side = sum(v for name, v in terms.items() if name != "task")
        share = float(row["train/share_pet_of_safety"])
        assert share == pytest.approx(terms["pet"] / safety_side, rel=1e-4)
        assert share <= 0.3 + 1e-6


def test_each_term_with_weight_zero_is_off_and_leaves_the_others_as_they_were(tiny_run):
    tiny_run(*SHORT, "trainer.limit_train_batches=2", "head.dropout=0", "optim.gate_lr=0.05")
    module, batch = Spy.last.module, Spy.last.batches[0]
    whole = module.loss_terms(batch, module(batch), progress=1.0).terms
    assert set(whole) == set(WEIGHTS)
    for term, key in WEIGHTS.items():
        section, field = key.split(".")
        before = getattr(module, f"{section}_spec")
        setattr(module, f"{section}_spec", replace(before, **{field: 0.0}))
        rest = module.loss_terms(batch, module(batch), progress=1.0).terms
        setattr(module, f"{section}_spec", before)
        assert set(rest) == set(WEIGHTS) - {term}
        for name, value in rest.items():
            if name != "pet":  # whose cap is a share of the others
                assert torch.equal(value, whole[name]), (term, name)


def test_each_term_that_is_on_gives_the_gates_a_gradient(tiny_run):
    tiny_run(*SHORT, "gate.interior=both", "pet.exploration=1", "optim.gate_lr=0.05")
    module, batch = Spy.last.module, Spy.last.batches[0]
    coordinates = {name: p for name, p in module.named_parameters() if p.requires_grad and "gates" in name}
    terms = module.loss_terms(batch, module(batch), progress=1.0)
    assert set(terms.terms) == set(WEIGHTS)
    for name, value in terms.terms.items():
        gradients = torch.autograd.grad(value, list(coordinates.values()), retain_graph=True, allow_unused=True)
        reached = {n for n, g in zip(coordinates, gradients, strict=True) if g is not None and g.abs().max() > 0}
        if name == "task":
            assert reached == {"model.gates.last.cmd.coords"}
        elif name == "inertia":
            assert reached == set(coordinates)
        else:
            assert reached == set(coordinates) - {"model.gates.last.cmd.coords"}, name


def test_the_schedule_of_pet_has_three_phases_over_the_optimiser_steps(tiny_run):
    _, run = tiny_run(
        "evaluate=false", "data.batch_size=4", "trainer.max_epochs=1", "trainer.limit_train_batches=20",
        "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    phases = [float(row["train/pet_phase"]) for row in table(run) if row["train/pet_phase"]]
    # 10 optimiser steps: progress 0, 0.1 | 0.2 ... 0.5 | 0.6 ... 0.9
    assert phases == pytest.approx([0.0] * 2 + [0.1] * 4 + [1.0] * 4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_terms(tiny_run, monkeypatch):
    monkeypatch.setattr(LossTerms, "total", lambda self: next(iter(self.terms.values())) * float("nan"))
    with pytest.raises(ConfigError, match=r"not finite at step 0.*safety"):
        tiny_run(*SHORT)


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_over_gloo_share_the_rows_and_end_with_the_same_weights(rows_file, tmp_path):
    command = [
        sys.executable, "train.py", *QUICK, f"data.path={rows_file}", "trainer.devices=2", "+trainer.strategy=ddp",
        "trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.limit_val_batches=1", "data.batch_size=4",
        "evaluate=false", f"hydra.run.dir={tmp_path}/run", "+callbacks.write._target_=tests.spies.WriteWeights",
        f"+callbacks.write.folder={tmp_path}/ranks",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / "ranks" / f"rank{k}.pt", weights_only=True) for k in (0, 1))
    assert one["process"] != two["process"]
    assert one["world"] == two["world"] == 2
    assert one["backend"] == "gloo"
    assert one["steps"] == two["steps"] == 4
    rows = [i for seen in (one["seen"], two["seen"]) for batch in seen for i in batch]
    assert len(rows) == len(set(rows)) == 2 * 4 * 4, "no row went to both"
    assert all(torch.equal(tensor, two["state"][name]) for name, tensor in one["state"].items())
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()
    assert find_checkpoint("last", tmp_path / "run")


def test_a_module_stays_on_the_device_it_was_trained_on_when_lightning_is_done_with_it(tiny_base):
    module = SO8TModule(
        SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec()), LossSpec(), PetSpec(), OptimSpec(), class_counts=(1, 1, 1)
    )
    module.model.gates.detach()
    module.model.base = torch.nn.Identity()  # whose 4-bit weights do not go where this does
    module.to("meta")  # another device than the CPU; what is here could not even be copied back
    strategy = SingleDeviceStrategy(device=torch.device("meta"), accelerator=CPUAccelerator())
    strategy.connect(module)
    strategy.teardown()
    assert all(parameter.is_meta for parameter in module.parameters())
