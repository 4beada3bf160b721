"""What watches a run: the group, safety collapse, memory, checkpoints. Each is shown to act, and to keep still."""

import csv
import logging
import math
from pathlib import Path

import lightning as L
import pytest
import torch

import so8t.gates
from so8t.callbacks.checkpoints import BestUnderCeiling
from so8t.callbacks.collapse import SafetyCollapseGuard
from so8t.callbacks.group import GroupMonitor
from so8t.callbacks.memory import MemoryMonitor, peak_gib
from so8t.config import validate
from so8t.data.datamodule import SafetyData
from so8t.errors import GroupError
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from so8t.so8 import exp_map, skew
from tests.conftest import QUICK, composed, synthetic_rows, write_rows
from tests.spies import At, Scripted, Spy, copied


def columns(run: Path, start: str) -> dict[str, list[tuple[int, float]]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [n for n in rows[0] if n.startswith(start)]
    return {n: [(int(float(r["step"])), float(r[n])) for r in rows if r[n] != ""] for n in names}


@pytest.fixture
def fit(tiny_model, rows_file, tmp_path):
    """Trains the random base with these callbacks alone; 6 steps an epoch, one validation each."""

    def run(*callbacks: L.Callback, epochs: int = 1, batches: int = 6, **trainer: object) -> tuple[L.Trainer, SO8TModule]:
        spec = validate(composed(*QUICK, f"data.path={rows_file}", "data.batch_size=4", output_dir=tmp_path)).data
        data = SafetyData(spec, seed=0)
        data.setup()
        data.use_tokenizer(tiny_model.base.tokenizer)
        module = SO8TModule(tiny_model, LossSpec(task_weight=0.0), PetSpec(), OptimSpec(warmup_steps=1), class_counts=(1, 1, 1))
        made = L.Trainer(
            accelerator="cpu", max_epochs=epochs, limit_train_batches=batches, callbacks=list(callbacks), logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
            **{"enable_checkpointing": False, **trainer},
        )  # fmt: skip
        made.fit(module, data)
        return made, module

    return run


# -- GroupMonitor ------------------------------------------------------------------------------------------------------

TINY_STEPS = ("evaluate=false", "data.batch_size=4", "trainer.max_epochs=1", "trainer.limit_train_batches=6")


def test_every_gate_is_logged_from_start_to_end_and_is_under_the_bars(tiny_run):
    _, run = tiny_run(
        *TINY_STEPS, "callbacks.group.every_n_steps=2", "optim.gate_lr=0.3", "gate.interior=both", "data.task_rows=2"
    )
    logged = columns(run, "group/")
    gates = {f"interior.{layer}_{site}" for layer in (2, 3) for site in ("o_proj", "down_proj")} | {"last"}
    bars = {"orthogonality": 1e-12, "determinant": 1e-12, "orthogonality_float32": 5e-6, "determinant_float32": 5e-6}
    for gate in gates:
        for rotation in ("safe", "cmd"):
            for kind, bar in bars.items():
                points = logged[f"group/{gate}.{rotation}/{kind}"]
                assert [step for step, _ in points] == [0, 2, 4, 6]
                assert all(value < bar for _, value in points)
            angles = dict(logged[f"group/{gate}.{rotation}/angle"])
            assert angles[6] > 10 * angles[0], "the gates did turn"
        commutators = dict(logged[f"group/{gate}/commutator_mean"])
        assert 0 < commutators[0] < 1e-3
        assert commutators[6] > 100 * commutators[0], "and their pair does not commute"


def first_order(coords):
    """What a home-made exponential looks like: right to the first order only."""
    return torch.eye(8, dtype=torch.float64) + skew(coords.double())


def reflected(coords):
    """Orthogonal to the last bit, with determinant -1."""
    mirror = torch.diag(torch.tensor([-1.0] + [1.0] * 7, dtype=torch.float64))
    return mirror @ exp_map(coords)


def rounded(coords):
    """A rotation that was kept in bf16."""
    return exp_map(coords).bfloat16().double()


@pytest.mark.parametrize(
    ("broken", "what"), [(first_order, "orthogonality"), (reflected, "determinant"), (rounded, "orthogonality")]
)
def test_a_map_that_leaves_so8_stops_the_run_before_its_first_step(tiny_run, monkeypatch, broken, what):
    monkeypatch.setitem(so8t.gates.MAPS, "exp", broken)
    with pytest.raises(
        GroupError, match=rf"step 0: \S+\.safe has left SO\(8\): {what} defect .* allowed 1e-12.*ckpt_path=last"
    ):
        tiny_run(*TINY_STEPS)


@pytest.mark.parametrize("broken", [first_order, reflected, rounded])
def test_a_gate_that_is_pushed_out_of_so8_in_the_middle_stops_the_run_and_is_named(fit, broken):
    def push_out(trainer: L.Trainer, module: SO8TModule) -> None:
        module.model.gates.get_submodule("interior.3_o_proj.safe").map = broken

    with pytest.raises(GroupError, match=r"step 4: interior\.3_o_proj\.safe has left SO\(8\).*lower optim\.gate_lr"):
        fit(GroupMonitor(every_n_steps=2), At(3, push_out))


def test_a_pair_that_commutes_after_training_has_started_stops_the_run(fit):
    def reset(trainer: L.Trainer, module: SO8TModule) -> None:
        with torch.no_grad():
            for rotation in (module.model.gates.last.safe, module.model.gates.last.cmd):
                rotation.coords.zero_()

    with pytest.raises(GroupError, match="step 2: R_safe and R_cmd of last commute"):
        fit(At(2, reset), GroupMonitor(every_n_steps=1))


# -- SafetyCollapseGuard -----------------------------------------------------------------------------------------------

LEARNS = (
    "evaluate=false", "+callbacks.spy._target_=tests.spies.Spy", "data.batch_size=16", "data.val_fraction=0.2",
    "trainer.max_epochs=5", "optim.head_lr=0.02", "optim.gate_lr=0.01", "optim.warmup_steps=2", "optim.clip=0",
    "optim.final_lr_fraction=1", "loss.task_weight=0", "head.pooling=both", "head.dropout=0", "pet.exploration_end=0.5",
    "pet.transition_end=0.5", "callbacks.guard.tolerance=0.3", "callbacks.guard.lr_factor=0.25",
)  # fmt: skip


@pytest.fixture
def learnable(tmp_path) -> str:
    """Enough rows that the random base learns all three classes in two epochs."""
    return f"data.path={write_rows(tmp_path / 'rows.jsonl', synthetic_rows(360))}"


def test_a_pet_that_flattens_every_state_collapses_and_the_guard_restores_the_best_bit_for_bit(tiny_run, learnable, caplog):
    # PET at a million times the class loss, without a cap worth the name, from the middle of the run; nothing but the states
    # that it flattens is read, and nothing teaches the tokens on its path
    alone = ("head.reads=[last]", "loss.path_weight=0")
    with caplog.at_level(logging.WARNING, logger="so8t.callbacks.collapse"):
        tiny_run(*LEARNS, learnable, "pet.weight=1e6", "pet.max_share=0.9999999", *alone)
    spy = Spy.last
    recalls = [(f["val/refuse_recall"] + f["val/escalate_recall"]) / 2 for _, f, _ in spy.validations]
    best = 0
    for k, recall in enumerate(recalls):
        if recall < recalls[best] - 0.3:
            break
        best = k if recall >= recalls[best] else best
    else:
        pytest.fail(f"nothing collapsed: {recalls}")
    assert recalls[best] > 0.6, "there was something to lose"
    assert recalls[k] <= 0.5, "no better than a constant now"
    assert "best gates restored, learning rates times 0.25 (1)" in caplog.text
    step, _, after = spy.validations[k]
    assert after.keys() == spy.validations[best][2].keys()
    for name, tensor in spy.validations[best][2].items():
        assert torch.equal(after[name], tensor), name
    before, after_ = spy.rates[step - 1], spy.rates[step]
    for group, rate in (("gates", 0.01), ("head", 0.02)):
        assert before[group] == pytest.approx(rate)
        assert after_[group] == pytest.approx(0.25 * rate), "and the schedule keeps it down"


def test_the_same_run_with_the_capped_pet_does_not_collapse_and_the_guard_keeps_still(tiny_run, learnable, caplog):
    with caplog.at_level(logging.WARNING, logger="so8t.callbacks.collapse"):
        tiny_run(*LEARNS, learnable)
    recalls = [(f["val/refuse_recall"] + f["val/escalate_recall"]) / 2 for _, f, _ in Spy.last.validations]
    assert recalls[-1] > 0.6
    assert "restored" not in caplog.text
    assert len({rate["head"] for rate in Spy.last.rates[2:]}) == 1, "no learning rate was touched"


def recalls(refuse: float, escalate: float) -> dict[str, float]:
    return {"val/refuse_recall": refuse, "val/escalate_recall": escalate}


def test_a_constant_refuse_is_seen_as_a_collapse_although_its_refuse_recall_is_perfect(fit):
    guard = SafetyCollapseGuard(tolerance=0.2)
    spy = Spy()
    fit(Scripted([recalls(0.8, 0.8), recalls(1.0, 0.0)]), guard, spy, epochs=2)
    assert guard.restores == 1
    assert all(torch.equal(t, spy.validations[0][2][name]) for name, t in spy.validations[1][2].items())


@pytest.mark.parametrize(
    "sequence",
    [
        [recalls(0.8, 0.8), recalls(0.7, 0.6)],  # 0.65, not below 0.8 - 0.2
        [recalls(0.8, 0.8), recalls(math.nan, 0.1)],  # a class without rows says nothing
        [{}, {}],
    ],
    ids=["within tolerance", "no rows", "no figures"],
)
def test_the_guard_keeps_still(fit, sequence):
    guard = SafetyCollapseGuard(tolerance=0.2)
    spy = Spy()
    fit(Scripted(sequence), guard, spy, epochs=2)
    assert guard.restores == 0
    assert not torch.equal(spy.validations[0][2]["model.head.linear.weight"], spy.validations[1][2]["model.head.linear.weight"])


def test_action_stop_ends_the_run_with_the_best_gates(fit):
    guard = SafetyCollapseGuard(action="stop")
    spy = Spy()
    trainer, module = fit(Scripted([recalls(0.9, 0.9), recalls(0.1, 0.1), recalls(0.9, 0.9)]), guard, spy, epochs=3)
    assert len(spy.validations) == 2
    assert trainer.current_epoch == 2
    assert all(torch.equal(t, spy.validations[0][2][name]) for name, t in copied(module).items())


def test_a_run_that_collapses_more_often_than_allowed_stops(fit):
    guard = SafetyCollapseGuard(max_restores=1, lr_factor=0.5)
    spy = Spy()
    fit(Scripted([recalls(0.9, 0.9), *[recalls(0.1, 0.1)] * 9]), guard, spy, epochs=10, batches=2)
    assert guard.restores == 1
    assert len(spy.validations) == 3


def test_the_guards_memory_travels_with_the_checkpoint(fit, tmp_path):
    guard = SafetyCollapseGuard()
    trainer, _ = fit(Scripted([recalls(0.9, 0.7)]), guard, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "g.ckpt")
    states = torch.load(tmp_path / "g.ckpt", weights_only=True)["callbacks"]
    again = SafetyCollapseGuard()
    again.load_state_dict(states["SafetyCollapseGuard"])
    assert again.best == pytest.approx(0.8)
    assert again._best_state.keys() == guard._best_state.keys()
    assert all(torch.equal(t, guard._best_state[n]) for n, t in again._best_state.items())


# -- MemoryMonitor -----------------------------------------------------------------------------------------------------


def test_the_peak_on_a_cpu_is_the_kernels_high_water_mark():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water = int(status["VmHWM"].split()[0]) / 2**20
    assert peak_gib(torch.device("cpu")) == pytest.approx(high_water, rel=0.02)


def test_the_peak_grows_with_what_was_held():
    before = peak_gib(torch.device("cpu"))
    block = torch.ones(int((before + 0.25) * 2**28))  # float32: 0.25 GiB more than the peak so far, at the least
    del block
    assert peak_gib(torch.device("cpu")) >= before + 0.2


def test_past_its_budget_a_run_warns_once_and_goes_on(fit, caplog):
    with caplog.at_level(logging.WARNING, logger="so8t.callbacks.memory"):
        trainer, _ = fit(MemoryMonitor(budget_gib=0.01, every_n_steps=1))
    assert trainer.global_step == 6
    told = [r.message for r in caplog.records if "over hw.memory_budget_gib=0.01" in r.message]
    assert len(told) == 1
    assert "lower data.max_length" in told[0]


def test_past_its_budget_a_run_can_stop(fit):
    trainer, _ = fit(MemoryMonitor(budget_gib=0.01, on_exceed="stop", every_n_steps=2), epochs=5)
    assert trainer.global_step < 30


def test_under_its_budget_a_run_says_nothing(fit, caplog):
    with caplog.at_level(logging.WARNING, logger="so8t.callbacks.memory"):
        fit(MemoryMonitor(budget_gib=1e6, on_exceed="stop", every_n_steps=1), epochs=2)
    assert "peak memory" not in caplog.text


def test_the_last_reading_counts_as_the_others_do(fit, caplog):
    with caplog.at_level(logging.WARNING, logger="so8t.callbacks.memory"):
        fit(MemoryMonitor(budget_gib=0.01, every_n_steps=1000))
    assert "over hw.memory_budget_gib=0.01" in caplog.text


def test_the_profiles_budget_is_the_monitors(make_config):
    assert make_config("+hw=rtx3060", "base=tiny").callbacks.memory.budget_gib == 8
    assert make_config("base=tiny").callbacks.memory.budget_gib is None


# -- checkpoints -------------------------------------------------------------------------------------------------------


def scored(macro_f1: float, false_allow_rate: float) -> dict[str, float]:
    return {"val/macro_f1": macro_f1, "val/false_allow_rate": false_allow_rate}


@pytest.mark.parametrize(
    ("sequence", "best"),
    [
        ([scored(0.5, 0.1), scored(0.9, 0.5), scored(0.7, 0.15), scored(0.6, 0.0)], 2),  # 0.9 lets too much through
        ([scored(0.9, 0.21), scored(0.1, 0.2)], 1),  # the poorest under the ceiling beats the best above it
        ([scored(0.4, 0.5), scored(0.6, 0.9), scored(0.5, 0.3)], 1),  # none is under it
        ([scored(0.3, 0.1), scored(0.9, math.nan)], 0),  # no risky rows prove nothing
    ],
    ids=["under the ceiling", "ceiling first", "none under", "nan"],
)
def test_the_best_is_by_macro_f1_among_those_under_the_false_allow_ceiling(fit, tmp_path, sequence, best):
    keep = BestUnderCeiling(false_allow_ceiling=0.2, dirpath=tmp_path / "kept", filename="best-{step}", save_top_k=1)
    spy = Spy()
    fit(Scripted(sequence), keep, spy, epochs=len(sequence), enable_checkpointing=True)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [f"best-step={6 * (best + 1)}.ckpt"]
    state = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(t, spy.validations[best][2][name]) for name, t in state.items())


def test_a_run_that_goes_on_in_another_folder_keeps_the_best_of_before_until_it_is_beaten(fit, tmp_path):
    def keep(folder: str) -> BestUnderCeiling:
        return BestUnderCeiling(false_allow_ceiling=0.2, dirpath=tmp_path / folder, filename="best-{step}", save_top_k=1)

    first = keep("one")
    fit(Scripted([scored(0.9, 0.1)]), first, enable_checkpointing=True)
    for folder, f1, best in (("two", 0.5, "best-step=6"), ("three", 0.95, "best-step=12")):
        later = keep(folder)
        later.load_state_dict(first.state_dict())
        fit(Scripted([scored(0.0, 0.9), scored(f1, 0.1)]), later, epochs=2, enable_checkpointing=True)
        assert [p.name for p in (tmp_path / folder).iterdir()] == [f"{best}.ckpt"]
        assert later.best_model_path == str(tmp_path / folder / f"{best}.ckpt")
        assert float(later.best_model_score) == pytest.approx(max(f1, 0.9))
    assert (tmp_path / "one" / "best-step=6.ckpt").is_file(), "the first run keeps its own"


def test_what_a_guard_restored_is_never_kept_under_the_score_of_what_collapsed(fit, tmp_path):
    # the second validation has the higher macro-F1 and has lost its ESCALATE; the guard brings the first back
    sequence = [{**recalls(0.8, 0.8), **scored(0.3, 0.1)}, {**recalls(1.0, 0.0), **scored(0.6, 0.1)}]
    keep = BestUnderCeiling(false_allow_ceiling=0.2, dirpath=tmp_path / "kept", filename="best-{step}", save_top_k=1)
    fit(Scripted(sequence), SafetyCollapseGuard(), keep, epochs=2, enable_checkpointing=True)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["best-step=6.ckpt"]
    assert float(keep.best_model_score) == pytest.approx(0.3)


def test_checkpoints_by_step_and_by_minutes_keep_the_newest_two(tiny_run):
    _, run = tiny_run(
        *TINY_STEPS, "trainer.limit_train_batches=9", "callbacks.by_step.every_n_train_steps=2",
        "callbacks.by_minutes.train_time_interval.minutes=0", "+callbacks.by_minutes.train_time_interval.milliseconds=1",
    )  # fmt: skip
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert [n for n in names if n.startswith("step-")] == ["step-step=6.ckpt", "step-step=8.ckpt"]
    assert [n for n in names if n.startswith("time-")] == ["time-step=8.ckpt", "time-step=9.ckpt"]


def test_by_default_time_checkpoints_come_every_three_minutes_and_two_are_kept(make_config):
    from hydra.utils import instantiate

    callbacks = make_config("base=tiny").callbacks
    by_minutes = instantiate(callbacks.by_minutes)
    assert by_minutes._train_time_interval.total_seconds() == 180
    assert by_minutes.save_top_k == callbacks.by_step.save_top_k == 2


def test_progress_and_learning_rates_are_shown_by_default(make_config):
    targets = {node["_target_"].rsplit(".", 1)[1] for node in make_config("base=tiny").callbacks.values()}
    assert {"RichProgressBar", "LearningRateMonitor", "GroupMonitor", "SafetyCollapseGuard", "MemoryMonitor"} <= targets
    assert {"BestUnderCeiling", "ModelCheckpoint"} <= targets
