"""The configuration: every combination composes and is valid, and nothing impossible gets past the door."""

import ast
import dataclasses
import functools
import inspect
import itertools
import random
import re
import typing

import pytest
import torch
import wandb
import yaml
from hydra.errors import HydraException
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter

import so8t.training
from so8t.base import BaseSpec
from so8t.config import Config, HwSpec, PathsSpec, _check_together, validate
from so8t.data.datamodule import DataSpec
from so8t.data.sources import HubSpec, Rule, SourceSpec, WheelSpec
from so8t.data.store import CacheSpec
from so8t.errors import ConfigError, HardwareError
from so8t.gates import GateSpec
from so8t.lightning_module import LossSpec
from so8t.model import HeadSpec
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from so8t.rationale_training import RationaleSpec
from tests import quick_hydra
from tests.conftest import ROOT, composed

CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    """Names as the command line says them, those in folders within the group too."""
    return sorted(str(p.relative_to(CONF / group).with_suffix("")) for p in (CONF / group).rglob("*.yaml"))


PROFILES = options("hw")
GROUPS: dict[str, list[str]] = {
    "+hw": ["", *PROFILES],
    "base": options("base"),
    "gate": options("gate"),
    "pet": options("pet"),
    "optim": options("optim"),
    "data": [name for name in options("data") if name != "base"],
    "debug": ["", *options("debug")],
    "experiment": ["", *options("experiment")],
    "logger": options("logger"),
}


def overrides(choice: dict[str, str]) -> list[str]:
    chosen = [f"{group}={option}" for group, option in choice.items() if option]
    return chosen + (["data.path=rows.jsonl"] if choice.get("data") == "jsonl" else [])


@functools.cache
def touches(group: str, option: str) -> set[str]:
    """The sections of the composed configuration that an option writes into, read off its file."""
    if not option:
        return set()
    text = (CONF / group.strip("+") / f"{option}.yaml").read_text()
    raw = yaml.safe_load(text)
    if "@package _global_" not in text:
        return {group.strip("+")}
    swapped = {k.split("/")[-1] for entry in raw.get("defaults", []) if isinstance(entry, dict) for k in entry}
    return (set(raw) - {"defaults"}) | swapped


SECTIONS = {
    section: [g for g, opts in GROUPS.items() if any(section in touches(g, o) for o in opts)]
    for section in {s for g, opts in GROUPS.items() for o in opts for s in touches(g, o)}
}
"""The groups that meet in each section. Groups that meet in none cannot disturb each other."""


def kind(section: str, group: str, option: str) -> str:
    """An option by what it does to a section; all that leave it alone are alike."""
    return option if section in touches(group, option) else "-"


def kinds(section: str) -> set[tuple[str, ...]]:
    """Every combination of what the groups of a section do to it."""
    groups = SECTIONS[section]
    return set(itertools.product(*(dict.fromkeys(kind(section, g, o) for o in GROUPS[g]) for g in groups)))


Option = tuple[str, str]
"""A group and what is chosen in it."""
MEETINGS: set[frozenset[Option]] = {
    frozenset([(one, a), (other, b)])
    for one, other in itertools.combinations(GROUPS, 2)
    for a, b in itertools.product(GROUPS[one], GROUPS[other])
}
"""Every two options of different groups."""


def met(choice: dict[str, str]) -> set[frozenset[Option]]:
    return {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)}


def filled(choice: dict[str, str], unmet: set[frozenset[Option]], rng: random.Random) -> dict[str, str]:
    """A whole choice that keeps what is chosen and lets many meet that have not; groups with many options first."""
    for group in sorted(GROUPS.keys() - choice.keys(), key=lambda g: (-len(GROUPS[g]), g)):
        new = {o: sum(frozenset([(group, o), other]) in unmet for other in choice.items()) for o in GROUPS[group]}
        choice = {**choice, group: rng.choice([o for o, count in new.items() if count == max(new.values())])}
    return {group: choice[group] for group in GROUPS}


def for_sections(missing: dict[str, list[tuple[str, ...]]], rng: random.Random) -> dict[str, str]:
    """Part of a choice: in as many sections as it can, a combination of what the groups do to it that is missing."""
    choice: dict[str, str] = {}
    for section in sorted(missing, key=lambda s: -len(missing[s])):
        for wanted in missing[section]:
            fitting = [
                [o for o in ([choice[g]] if g in choice else GROUPS[g]) if kind(section, g, o) == k]
                for g, k in zip(SECTIONS[section], wanted, strict=True)
            ]
            if all(fitting):
                choice |= {g: rng.choice(options) for g, options in zip(SECTIONS[section], fitting, strict=True)}
                break
    return choice


def covering() -> list[dict[str, str]]:
    """Choices in which every section meets every combination of its groups, and every two options of different groups meet."""
    rng = random.Random(0)
    missing = {section: sorted(kinds(section)) for section in sorted(SECTIONS)}
    unmet, choices = set(MEETINGS), []
    while unmet or any(missing.values()):
        begun = for_sections(missing, rng) if any(missing.values()) else dict(sorted(min(unmet, key=sorted)))
        choices.append(filled(begun, unmet, rng))
        unmet -= met(choices[-1])
        missing = {s: [c for c in left if c != of_section(s, choices[-1])] for s, left in missing.items()}
    return choices


def of_section(section: str, choice: dict[str, str]) -> tuple[str, ...]:
    return tuple(kind(section, group, choice[group]) for group in SECTIONS[section])


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> list[tuple[dict[str, str], dict[str, object]]]:
    """Whole choices of options, each composed by Hydra and validated."""
    folder = tmp_path_factory.mktemp("composed")
    made = []
    for choice in covering():
        config = composed(*overrides(choice), output_dir=folder)
        validate(config)
        made.append((choice, OmegaConf.to_container(config)))
    return made


@pytest.fixture(scope="module")
def by_section(wholes) -> dict[str, dict[tuple[str, ...], object]]:
    """Every section under every combination of the groups that meet in it."""
    table: dict[str, dict[tuple[str, ...], object]] = {section: {} for section in SECTIONS}
    for choice, plain in wholes:
        for section in SECTIONS:
            table[section].setdefault(of_section(section, choice), plain.get(section))
    return table


def test_every_section_is_valid_under_every_combination_of_the_groups_that_meet_in_it(by_section):
    assert set(SECTIONS["base"]) == {"+hw", "base"}
    assert {"+hw", "optim", "debug"} <= set(SECTIONS["trainer"])
    assert {"gate", "experiment"} <= set(SECTIONS["gate"])
    assert len(by_section["base"]) == 5 * len(GROUPS["base"])
    assert len(by_section["data"]) == 5 * 2 * len(GROUPS["data"]), "of the bases tiny alone has a say there"
    for section in SECTIONS:
        assert set(by_section[section]) == kinds(section), section


def test_every_whole_combination_is_valid(by_section, tmp_path):
    """The sections of the fixture, put together for each element of the full product, pass the checks across sections."""
    base = composed("data=starter", output_dir=tmp_path)
    default = validate(base)
    specs = {
        "base": BaseSpec,
        "gate": GateSpec,
        "pet": PetSpec,
        "loss": LossSpec,
        "optim": OptimSpec,
        "data": DataSpec,
        "hw": HwSpec,
    }
    made = {
        name: {
            chosen: TypeAdapter(kind).validate_python(v) if v is not None else None for chosen, v in by_section[name].items()
        }
        for name, kind in specs.items()
    }
    groups = {g: opts for g, opts in GROUPS.items() if any(g in SECTIONS[name] for name in specs)}
    assert GROUPS.keys() - groups.keys() == {"logger", "debug"}, "they say nothing about these sections"
    count = 0
    for chosen in itertools.product(*groups.values()):
        choice = dict(zip(groups, chosen, strict=True))
        parts = {name: made[name][of_section(name, choice)] for name in specs}
        _check_together(dataclasses.replace(default, **parts))
        count += 1
    assert count == 5 * 7 * 2 * 2 * 3 * 4 * 15


def test_every_two_options_of_different_groups_meet_in_a_composition(wholes):
    assert set().union(*(met(choice) for choice, _ in wholes)) == MEETINGS
    assert len(GROUPS["experiment"]) == 1 + 1 + 4 + 4 + 2 + 3, "the folders in it, too"


def test_a_whole_combination_is_its_sections_put_together(wholes, by_section):
    """What the product rests on: whatever else is chosen, a section is the same under the same choice of its groups."""
    for choice, plain in wholes:
        for section in SECTIONS:
            wanted, got = by_section[section][of_section(section, choice)], plain.get(section)
            if section == "callbacks":  # the monitor's budget and the folder come from elsewhere, by interpolation
                wanted, got = (_without(v, "budget_gib", "dirpath") for v in (wanted, got))
            if section in ("logger", "trainer"):
                wanted, got = (_without(v, "save_dir", "default_root_dir", "tags") for v in (wanted, got))
            assert got == wanted, (section, choice)


def _without(value: object, *keys: str) -> object:
    if isinstance(value, dict):
        return {k: _without(v, *keys) for k, v in value.items() if k not in keys}
    return value


def swaps(group: str, option: str) -> list[str]:
    """What a file chooses in other groups, as the command line would say it."""
    raw = yaml.safe_load((CONF / group.strip("+") / f"{option}.yaml").read_text())
    entries = [entry for entry in raw.get("defaults", []) if isinstance(entry, dict)]
    return [f"{key.removeprefix('override /')}={value}" for entry in entries for key, value in entry.items()]


@pytest.mark.parametrize("asked", [f"{g}={o}" for g in ("+hw", "experiment") for o in GROUPS[g] if o and swaps(g, o)])
def test_what_a_file_chooses_in_other_groups_is_as_if_the_command_line_did(asked, tmp_path):
    """The combinations above name every group, and a named one wins."""
    named = swaps(*asked.split("="))
    assert composed(asked, output_dir=tmp_path) == composed(asked, *named, output_dir=tmp_path)


def test_tests_compose_what_hydra_composes(monkeypatch, tmp_path):
    commands = [("+hw=rtx3060", "base=tiny", "data=hub_mix", "optim=seed"), ("experiment=no_gates", "debug=overfit")]
    commands += [("hparams_search=pet", "data=starter", "~callbacks.progress", "+trainer.max_time=null")]
    quicker = [composed(*command, output_dir=tmp_path) for command in commands * 2][-len(commands) :]
    for owner, name, function in quick_hydra.PLAIN:
        monkeypatch.setattr(owner, name, function)
    assert quicker == [composed(*command, output_dir=tmp_path) for command in commands]
    assert [type(config) for config in quicker] == [DictConfig] * 3


# -- who wins ----------------------------------------------------------------------------------------------------------


def test_no_hardware_profile_is_chosen_unless_asked_for(make_config):
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    assert not any("hw" in entry for entry in defaults if isinstance(entry, dict))
    config = make_config()
    assert "hw" not in config
    assert config.trainer.accelerator == "auto"
    assert config.base.name == "smollm2_135m"
    assert validate(config).hw is None


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_brings_its_base_in_nf4_and_a_base_on_the_command_line_wins(make_config, profile):
    config = make_config(f"+hw={profile}")
    assert config.hw.name == profile
    assert config.base.quantization == "nf4"
    assert config.base.double_quantization
    assert config.base.compute_dtype == "bfloat16"
    assert config.trainer.accelerator == "gpu"
    assert config.hw.memory_budget_gib < config.hw.memory_gib
    other = make_config(f"+hw={profile}", "base=qwen2.5_0.5b", "data.batch_size=3")
    assert other.base.name == "qwen2.5_0.5b"
    assert other.data.batch_size == 3
    assert other.trainer.accumulate_grad_batches == config.trainer.accumulate_grad_batches


def test_the_rtx3060_profile_is_what_the_issue_says(make_config):
    config = validate(make_config("+hw=rtx3060"))
    assert (config.base.name, config.base.model_id) == ("qwen2.5_7b", "Qwen/Qwen2.5-7B-Instruct")
    assert (config.base.quantization, config.base.double_quantization, config.base.compute_dtype) == ("nf4", True, "bfloat16")
    assert (config.data.batch_size, config.trainer["accumulate_grad_batches"]) == (1, 32)
    assert config.hw == HwSpec("rtx3060", "gpu", 12, 8, checkpoint_suffix=True)
    assert config.callbacks["memory"]["budget_gib"] == 8


@pytest.mark.parametrize("more", [(), ("+hw=rtx3060",), ("base=tiny", "logger=csv_wandb")])
def test_the_seed_recipe_is_what_the_issue_says_whatever_else_is_chosen(make_config, more):
    config = validate(make_config("optim=seed", *more))
    optim, trainer, by_step = config.optim, config.trainer, config.callbacks["by_step"]
    assert (optim.gate_lr, optim.head_lr, optim.weight_decay, optim.gate_weight_decay) == (3e-5, 1.5e-5, 0.01, 0.01)
    assert (optim.clip, optim.warmup_steps, optim.final_lr_fraction) == (0.5, 10, 0.0)
    assert (trainer["max_epochs"], trainer["log_every_n_steps"]) == (2, 2)
    steps = trainer["val_check_interval"] / trainer["accumulate_grad_batches"]
    assert (steps, trainer["check_val_every_n_epoch"]) == (25, None)
    assert (by_step["every_n_train_steps"], by_step["save_top_k"]) == (25, 2)


def test_the_seed_recipe_validates_every_25_optimiser_steps_whatever_a_step_accumulates(make_config):
    config = validate(make_config("optim=seed", "+hw=rtx3060"))
    assert config.trainer["val_check_interval"] == 25 * 32, "Lightning counts micro-batches"


def test_debug_presets_win_over_recipes_and_the_command_line_over_both(make_config):
    config = make_config("optim=seed", "debug=one_batch")
    assert (config.trainer.max_epochs, config.trainer.limit_train_batches) == (1, 1)
    assert config.optim.gate_lr == 3e-5
    assert make_config("optim=seed", "debug=one_batch", "trainer.max_epochs=7").trainer.max_epochs == 7
    assert make_config("debug=one_batch", "+hw=rtx3060").trainer.limit_train_batches == 1


def test_without_gates_there_is_no_pet_and_no_task_loss(make_config):
    config = validate(make_config("experiment=no_gates"))
    assert (config.gate.interior, config.gate.last) == ("none", False)
    assert (config.pet.weight, config.pet.inertia_weight, config.loss.task_weight) == (0, 0, 0)


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG = {
    "+gate.foo=1": r"gate\.foo: unknown key",
    "+nonsense=1": r"nonsense: unknown key",
    "+data.sources.starter.wieght=2": r"data\.sources\.starter\.wieght: unknown key",
    "+trainer.max_epoch=3": r"trainer\.max_epoch: unknown key of lightning\.Trainer",
    "+callbacks.guard.tolerence=0.1": r"callbacks\.guard\.tolerence: unknown key",
    "+logger.csv.flush=1": r"logger\.csv\.flush: unknown key",
    "+callbacks.best.save_topk=1": r"callbacks\.best\.save_topk: unknown key",
    "callbacks.guard._target_=so8t.callbacks.collapse.Gard": r"there is no so8t\.callbacks\.collapse\.Gard",
    "optim.gate_lr=fast": r"optim\.gate_lr='fast'",
    "optim.gate_lr=0": r"optim\.gate_lr=0: .*greater than 0",
    "optim.gate_lr=-0.1": r"optim\.gate_lr=-0\.1",
    "optim.gate_lr=nan": r"optim\.gate_lr=nan",
    "optim.betas=[0.9,1.0]": r"optim\.betas",
    "data.batch_size=0": r"data\.batch_size=0",
    "data.batch_size=1.5": r"data\.batch_size=1\.5",
    "data.val_fraction=1": r"data\.val_fraction=1",
    "gate.interior=maybe": r"gate\.interior='maybe'",
    "gate.map=pade": r"gate\.map='pade'",
    "gate.sites=[q_proj]": r"gate\.sites",
    "gate.sites=[]": r"gate\.sites",
    "gate.top_layers=0": r"gate\.top_layers=0",
    "gate.init_std=0": r"gate\.init_std=0",
    "base.quantization=fp4": r"base\.quantization='fp4'",
    "base.hidden_size=60": r"base\.hidden_size=60 is not a multiple of 8",
    "pet.max_share=1": r"pet\.max_share=1",
    "pet.exploration_end=0.9": r"pet\.exploration_end=0\.9 is after pet\.transition_end",
    "loss.costs=[[0,1],[1,0]]": r"loss\.costs",
    "loss.class_weights=[1,2]": r"loss\.class_weights",
    "loss.class_weights=heavy": r"loss\.class_weights",
    "loss.task_reaches=both": r"loss\.task_reaches='both'",
    "head.min_confidence=2": r"head\.min_confidence=2",
    "seed=-1": r"seed=-1",
    "evaluate=perhaps": r"evaluate='perhaps'",
    "optim.gate_lr=inf": r"optim\.gate_lr=inf",
    "loss.safety_weight=inf": r"loss\.safety_weight=inf",
    "loss.class_weights=[0,0,0]": r"loss\.class_weights are all 0",
    "data.train_labels=[]": r"data\.train_labels",
    "data.path=mine.jsonl": r"data\.path=mine\.jsonl is read by no source: add data=jsonl",
    "data=jsonl": r"data\.sources\.file\.path is not set",
    "+data.sources.starter.path=mine.jsonl": r"data\.sources\.starter\.path means nothing with kind=starter",
    "+base.model_id=mine": r"base\.model_id means nothing with base\.source=random",
    "head.reads=[last,last]": r"names a layer twice",
    "trainer.max_epochs=abc": r"trainer\.max_epochs='abc'",
    "trainer.accelerator=warp": r"warp",
    "trainer.devices=0": r"devices",
    "trainer.accumulate_grad_batches=0": r"accumulate",
    "callbacks.guard.action=restor": r"callbacks\.guard\.action='restor': .*'restore' or 'stop'",
    "callbacks.guard.tolerance=abc": r"callbacks\.guard\.tolerance='abc'",
    "callbacks.group.every_n_steps=0": r"callbacks\.group\.every_n_steps=0: .*greater than or equal to 1",
    "callbacks.memory.on_exceed=explode": r"callbacks\.memory\.on_exceed='explode'",
    "callbacks.best.false_allow_ceiling=lots": r"callbacks\.best\.false_allow_ceiling='lots'",
    "callbacks.by_minutes.train_time_interval.minutes=abc": r"callbacks\.by_minutes\.train_time_interval: datetime\.timedelta",
    "+callbacks.by_minutes.train_time_interval.minuts=3": r"callbacks\.by_minutes\.train_time_interval: .*minuts",
    "callbacks.guard.tolerance='0.2'": r"callbacks\.guard\.tolerance='0\.2': a text, where a number is wanted",
    "trainer.plugins._target_=so8t.gone.Plugin": r"trainer\.plugins\._target_: there is no so8t\.gone\.Plugin",
    "+trainer.callbacks=[{_target_:so8t.gone.Plugin}]": r"trainer\.callbacks\.0\._target_: there is no so8t\.gone\.Plugin",
    "objective=macro_f1": r"objective=macro_f1 is no metric",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_work_is_one_line_before_anything_is_loaded(make_config, monkeypatch, tmp_path, override):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(so8t.training, "load_base", loaded)
    monkeypatch.setattr(so8t.training, "SafetyData", loaded)
    with pytest.raises(ConfigError, match=WRONG[override]) as error:
        so8t.training.train(make_config("base=tiny", override))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_values_that_lightning_takes_are_taken(make_config):
    theme = "{_target_:lightning.pytorch.callbacks.progress.rich_progress.RichProgressBarTheme}"
    more = ["+trainer.precision=bf16-mixed", "trainer.devices=auto", "trainer.limit_train_batches=3", "+trainer.max_time=null"]
    for values in (more, ["trainer.devices=[0]", "+callbacks.progress.leave=true", "+callbacks.progress.theme=null"],
                   [f"+callbacks.progress.theme={theme}"], ["debug=overfit", "optim=seed"]):  # fmt: skip
        validate(make_config("base=tiny", *values))


def test_what_a_finished_run_says_is_read_though_a_new_one_would_be_refused(make_config):
    config = make_config("data=starter", "data.path=mine.jsonl", "objective=once", "callbacks.guard.action=gone")
    with pytest.raises(ConfigError):
        validate(config)
    assert validate(config, saved=True).data.path == "mine.jsonl"


@pytest.mark.parametrize(
    ("together", "told"),
    [
        (("loss.safety_weight=0", "loss.path_weight=0", "loss.cost_weight=0"), "nothing teaches the head"),
        (("data.val_fraction=0.5", "data.test_fraction=0.5"), "leave nothing to train on"),
        (("base=qwen2.5_7b", "base.model_id=''"), r"base\.model_id is empty"),
        (("gate.interior=both", "gate.last=false"), r"no R_cmd for the task loss"),
        (("gate.triality=true", "gate=none"), r"about the last gate: set gate\.last=true"),
        (("head.commutator=true", "gate.last=false"), r"about the last gate: set gate\.last=true"),
        (("gate.triality=true", "gate.map=cayley"), r"needs gate\.map=exp: cayley does not"),
        (("head.reads=[3,last]",), r"head\.reads.*3.*less than or equal to 1"),
        (
            (
                "data=starter",
                "~data.sources.starter",
                "~data.sources.everyday",
                "~data.sources.stakes",
                "~data.sources.detailed",
            ),
            r"data\.sources is empty",
        ),
        (("head.reads=[]",), r"head\.reads is empty"),
        (("objective=test/macro_f1", "evaluate=false"), r"objective=test/macro_f1 needs evaluate=true"),
        (("objective=unseen/macro_f1", "data.holdout_sources=[]"), r"objective=unseen/macro_f1 needs data\.holdout_sources"),
        (("base=smollm2_135m", "+base.layers=3"), r"base\.layers means nothing with base\.source=wheel"),
        (("+hw=rtx3060", "hw.memory_budget_gib=13"), r"hw\.memory_budget_gib=13 is more than hw\.memory_gib=12"),
    ],
)
def test_values_that_cannot_be_together_are_told(make_config, together, told):
    with pytest.raises(ConfigError, match=told):
        validate(make_config("base=tiny", *together))


def test_a_key_that_is_spelled_wrong_on_the_command_line_is_refused_by_hydra_already(make_config):
    with pytest.raises(HydraException, match=r"gate\.fo"):
        make_config("gate.fo=1")


def test_several_mistakes_are_told_at_once(make_config):
    with pytest.raises(ConfigError, match=r"gate\.top_layers=0.*optim\.clip=-1"):
        validate(make_config("gate.top_layers=0", "optim.clip=-1"))


def test_a_missing_value_is_told(make_config):
    config = make_config("base=tiny")
    config.gate.map = "???"
    with pytest.raises(ConfigError, match=r"gate\.map"):
        validate(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("asked", [*[f"+hw={name}" for name in PROFILES], "trainer.accelerator=gpu"])
def test_a_gpu_profile_without_a_gpu_says_what_to_do(make_config, monkeypatch, asked):
    monkeypatch.setattr(so8t.training, "SafetyData", None)
    with pytest.raises(HardwareError, match="needs a CUDA GPU") as error:
        so8t.training.train(make_config(asked))
    text = str(error.value)
    assert asked in text
    assert "trainer.accelerator=cpu" in text
    assert len(text.splitlines()) == 1


# -- no key without a reader, no field without a key -------------------------------------------------------------------

SPECS: dict[str, type] = {
    "base": BaseSpec, "gate": GateSpec, "head": HeadSpec, "pet": PetSpec, "loss": LossSpec, "optim": OptimSpec,
    "data": DataSpec, "cache": CacheSpec, "rationale": RationaleSpec, "hw": HwSpec, "paths": PathsSpec,
}  # fmt: skip
NESTED = {"source": SourceSpec, "wheel": WheelSpec, "hub": HubSpec, "rule": Rule}


def fields(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def keys_of_files() -> dict[str, set[str]]:
    """Every key of every file in conf/, by section, as plain YAML."""
    found: dict[str, set[str]] = {}

    def take(section: str, body: object) -> None:
        if isinstance(body, dict):
            found.setdefault(section, set()).update(k for k in body if k != "defaults")

    for file in CONF.rglob("*.yaml"):
        raw = yaml.safe_load(file.read_text()) or {}
        if file.name == "train.yaml":
            take("", raw)
        elif "@package _global_" in file.read_text():
            for section, body in raw.items():
                take(section, body)
                if section not in ("defaults", "hydra"):
                    found.setdefault("", set()).add(section)
        else:
            take(file.parent.name, raw)
    return found


def test_every_key_in_conf_is_a_field_of_the_spec_that_reads_it():
    found = keys_of_files()
    for section, kind in SPECS.items():
        assert found[section] <= fields(kind), section
    assert found[""] <= fields(Config)


def test_every_key_of_a_callback_logger_or_trainer_is_an_argument_of_its_target(make_config):
    import importlib

    config = OmegaConf.to_container(make_config("logger=csv_wandb", "optim=seed", "base=tiny"))
    nodes = [config["trainer"], *config["callbacks"].values(), *config["logger"].values()]
    assert len(nodes) >= 11
    for node in nodes:
        module, _, name = node["_target_"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        taken = {p for base in inspect.getmro(kind) if base is not object for p in inspect.signature(base).parameters}
        if kind is WandbLogger:  # hands the rest on
            taken |= set(inspect.signature(wandb.init).parameters)
        assert {k for k in node if not k.startswith("_")} <= taken, node["_target_"]


def test_every_field_of_a_spec_can_be_found_in_a_conf_file():
    found = keys_of_files()
    for section, kind in SPECS.items():
        assert fields(kind) <= found[section], f"{section}: {fields(kind) - found[section]} cannot be seen in conf/"
    assert fields(Config) <= found[""] | set(SPECS) | {"trainer", "callbacks", "logger"}


def reads() -> dict[str, set[str]]:
    """Attribute names that are read in so8t/, by file; assignments and the specs' own declarations do not count."""
    found: dict[str, set[str]] = {}
    for file in [*(ROOT / "so8t").rglob("*.py"), ROOT / "train.py"]:
        names = {
            n.attr
            for n in ast.walk(ast.parse(file.read_text()))
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
        }
        found[file.name] = names
    return found


@pytest.mark.parametrize("name", [*SPECS, *NESTED, "config"])
def test_every_field_of_a_spec_is_read_by_the_code_or_by_another_key(name):
    kind = {**SPECS, **NESTED, "config": Config}[name]
    attributes = set().union(*reads().values())
    interpolated = " ".join(re.findall(r"\$\{[^}]*\}", "\n".join(f.read_text() for f in CONF.rglob("*.yaml"))))
    unread = {
        f for f in fields(kind) if f not in attributes and not re.search(rf"\b{name}\.{f}\b|\{{{f}\b", interpolated)
    }  # fmt: skip
    assert not unread, f"{name}: nobody reads {unread}"


def test_every_spec_is_reached_from_the_config():
    hints = typing.get_type_hints(Config)
    for section, kind in SPECS.items():
        assert kind in (hints[section], *typing.get_args(hints[section])), section


def test_every_profile_and_recipe_shows_the_command_that_chooses_it():
    for profile in PROFILES:
        assert f"python train.py +hw={profile}" in (CONF / "hw" / f"{profile}.yaml").read_text()
    for group in ("debug", "experiment", "hparams_search", "hydra/launcher"):
        for option in options(group):
            assert f"{group}={option}" in (CONF / group / f"{option}.yaml").read_text()
