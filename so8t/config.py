"""The composed configuration, validated once before anything is loaded; after this it is trusted.

Every section is the spec of the room that reads it. Unknown keys, wrong types and impossible values are one-line errors.
"""

import importlib
import inspect
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from so8t.base import BaseSpec
from so8t.data.datamodule import DataSpec
from so8t.data.store import CacheSpec
from so8t.errors import ConfigError
from so8t.gates import GateSpec
from so8t.labels import LABELS
from so8t.lightning_module import LossSpec
from so8t.model import HeadSpec
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from so8t.rationale_training import RationaleSpec
from so8t.specs import Count, Positive, spec

OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)  # micro-batches of so many optimiser steps

# targets that hand keywords they do not name on to another function
_PASSES_ON = {"lightning.pytorch.loggers.WandbLogger": "wandb.init"}

Node = dict[str, Any]
"""A section that Hydra instantiates: `_target_` and its arguments, checked against the signature."""


@spec
class HwSpec:
    """A hardware profile: `+hw=rtx3060` and others. `memory_budget_gib` is what a run may use of the card; with
    `checkpoint_suffix` the layers above the cut run again in the backward pass, `auto` where nothing fits without."""

    name: str
    accelerator: str
    memory_gib: Positive
    memory_budget_gib: Positive
    checkpoint_suffix: bool | Literal["auto"] = False


@spec
class PathsSpec:
    """Where a run writes."""

    output_dir: str


@spec
class Config:
    """Everything `train.py` reads."""

    base: BaseSpec
    gate: GateSpec
    head: HeadSpec
    pet: PetSpec
    loss: LossSpec
    optim: OptimSpec
    data: DataSpec
    cache: CacheSpec
    paths: PathsSpec
    trainer: Node
    callbacks: dict[str, Node]
    logger: dict[str, Node]
    seed: Count = 0
    evaluate: bool = True
    ckpt_path: str | None = None
    init_from: str | None = None
    objective: str = "val/macro_f1"
    tags: tuple[str, ...] = ()
    compile: bool = False
    hw: HwSpec | None = None
    rationale: RationaleSpec = RationaleSpec()


def compose_train(overrides: Sequence[str]) -> DictConfig:
    """Composes `conf/train.yaml` as `train.py` does, for commands that run nothing and write no run folder.

    Raises:
        ConfigError: there is no such group, option or key.
    """
    folder = Path(__file__).parents[1] / "conf"
    if not folder.is_dir():
        raise ConfigError(f"there is no {folder}: run this from a checkout of the repository, where conf/ is")
    with composition_told(), initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", overrides=["paths.output_dir=outputs", *overrides])


_HYDRAS_OWN = {
    "Config group override must be": "configuration: a group cannot be null: choose one of its options, such as gate=none",
    "Only one of --run": "of --run, --multirun (-m), --cfg, --info and --shell-completion only one goes at a time",
    "The --resolve flag": "--resolve goes with --cfg: python train.py --cfg job --resolve",
}
"""By the words that Hydra begins with, of errors that it raises as ValueError."""


@contextmanager
def composition_told() -> Iterator[None]:
    """What Hydra cannot compose is told in one line.

    Raises:
        ConfigError: it cannot.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        told = str(error).split("Config search path")[0].split("full_key:")[0]
        raise ConfigError("configuration: " + " ".join(told.split())) from None
    except ValueError as error:
        ours = next((text for begin, text in _HYDRAS_OWN.items() if str(error).startswith(begin)), None)
        if ours is None:
            raise
        raise ConfigError(ours) from None


def validate(composed: DictConfig, *, saved: bool = False) -> Config:
    """Turns a composed configuration into specs. One that was `saved` by a finished run is read for what it says, and may hold
    what a new run is refused for.

    Raises:
        ConfigError: with every problem on one line.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"configuration: {where}{str(error).splitlines()[0]}") from None
    try:
        config = TypeAdapter(Config).validate_python(plain)
    except ValidationError as error:
        raise ConfigError("configuration: " + "; ".join(_explain(e) for e in error.errors()[:6])) from None
    if saved:
        return config
    for path, node in [("trainer", config.trainer)] + [
        (f"{group}.{name}", node) for group in ("callbacks", "logger") for name, node in getattr(config, group).items()
    ]:
        _check_node(path, node)
    _check_together(config)
    return config


def _explain(error: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    where = ".".join(str(part) for part in error["loc"] if part not in ("tagged-union",))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key"
    if error["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    return f"{where}={error['input']!r:.60}: {error['msg']}"


def _check_node(path: str, node: Node) -> None:
    """The target can be imported and takes these keys and, where its signature says of which types, values."""
    target = node.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"configuration: {path}._target_ must name a class, got {target!r}")
    try:
        cls = _imported(target)
    except (ImportError, AttributeError):
        raise ConfigError(f"configuration: {path}._target_: there is no {target}") from None
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        types = _signature(cls)
    except ValueError:  # written in C, such as datetime.timedelta: making one is the only way to ask
        try:
            cls(**given)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"configuration: {path}: {target}: {error}") from None
        return
    if target in _PASSES_ON:
        types = dict.fromkeys(inspect.signature(_imported(_PASSES_ON[target])).parameters, Any) | types
    unknown = sorted(key for key in given if key not in types)
    if unknown:
        raise ConfigError(f"configuration: {', '.join(f'{path}.{k}' for k in unknown)}: unknown key of {target}")
    for key, value in given.items():
        _check_value(f"{path}.{key}", value, types[key])


def _check_value(path: str, value: object, kind: Any) -> None:  # noqa: ANN401  (an annotation)
    """A plain value is of the type that the signature says; a node in it is a node."""
    if isinstance(value, dict | list):
        if isinstance(value, dict) and "_target_" in value:
            _check_node(path, value)
            return
        for place, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(f"{path}.{place}", inner, Any)
        return
    try:
        taken = TypeAdapter(kind, config=_ANY_CLASS).validate_python(value)
    except PydanticUserError:  # a type that pydantic has a schema of its own for
        return
    except ValidationError as error:
        raise ConfigError(f"configuration: {path}={value!r:.60}: {error.errors()[0]['msg']}") from None
    if isinstance(value, str) and isinstance(taken, bool | int | float):
        raise ConfigError(f"configuration: {path}={value!r:.60}: a text, where a number is wanted: leave the quotes out")


_ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)


def _signature(cls: Any) -> dict[str, Any]:  # noqa: ANN401  (a class or a function)
    """What it takes and of which types; what a class hands on to its bases, too."""
    types: dict[str, Any] = {}
    for kind in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        parameters = inspect.signature(kind).parameters if kind is not object else {}
        try:
            hints = typing.get_type_hints(kind.__init__ if inspect.isclass(kind) else kind, include_extras=True)
        except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers alone
            hints = {}
        for key, parameter in parameters.items():
            hint = hints.get(key, Any)
            types.setdefault(key, hint | None if parameter.default is None else hint)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return types


def _imported(dotted: str) -> Any:  # noqa: ANN401  (a class or a function)
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check_together(config: Config) -> None:
    """Combinations that no single section can judge."""
    problems = []
    gate, loss, pet, data = config.gate, config.loss, config.pet, config.data
    if pet.exploration_end > pet.transition_end:
        problems.append(f"pet.exploration_end={pet.exploration_end} is after pet.transition_end={pet.transition_end}")
    if config.trainer.get("accumulate_grad_batches", 1) < 1:
        problems.append(f"trainer.accumulate_grad_batches={config.trainer['accumulate_grad_batches']} is less than 1")
    if data.val_fraction + data.test_fraction >= 1:
        problems.append("data.val_fraction + data.test_fraction leave nothing to train on")
    untaught = not loss.safety_weight and not loss.cost_weight and not loss.path_weight
    if untaught and config.init_from is None:
        problems.append("loss.safety_weight, loss.cost_weight and loss.path_weight are all 0: nothing teaches the head")
    if gate.interior == "both" and not gate.last and loss.task_weight:
        problems.append("gate.last=false leaves no R_cmd for the task loss: set loss.task_weight=0")
    if (gate.triality or config.head.commutator) and not gate.last:
        problems.append("gate.triality and head.commutator are about the last gate: set gate.last=true")
    if gate.triality and gate.map != "exp":
        problems.append(f"gate.triality=true needs gate.map=exp: {gate.map} does not carry from V to S+ and S-")
    if gate.interior != "none" and not gate.sites:
        problems.append("gate.sites is empty: name o_proj or down_proj, or set gate.interior=none")
    if config.head.familiar and not config.head.standardise:
        problems.append("head.familiar measures standardised features: set head.standardise=true, or head.familiar=0")
    if config.head.words and not config.head.probe and config.init_from is None:
        problems.append("head.words are fitted where the head begins: set head.probe, or head.words=0")
    if len(set(config.head.reads)) < len(config.head.reads):
        problems.append(f"head.reads={list(config.head.reads)} names a layer twice")
    if not config.head.reads:
        problems.append("head.reads is empty: name 'last' or fractions of the base's depth, such as 0.6")
    n = len(LABELS)
    if [len(row) for row in loss.costs] != [n] * n:
        problems.append(f"loss.costs must be {n} rows of {n} numbers, in the order {', '.join(LABELS)}")
    if isinstance(loss.class_weights, tuple) and len(loss.class_weights) != n:
        problems.append(f"loss.class_weights must be {n} numbers, in the order {', '.join(LABELS)}")
    if isinstance(loss.class_weights, tuple) and not any(loss.class_weights):
        problems.append("loss.class_weights are all 0: no class teaches the head")
    if not data.sources:
        problems.append("data.sources is empty: nothing to train on")
    if data.path is not None and all(source.path != data.path for source in data.sources.values()):
        problems.append(f"data.path={data.path} is read by no source: add data=jsonl")
    for name, source in data.sources.items():
        if source.weight and source.kind == "file" and not source.path:
            problems.append(f"data.sources.{name}.path is not set: name the JSONL file, such as data=jsonl data.path=FILE")
        if source.weight and source.kind not in ("file", "hub") and source.path:
            problems.append(
                f"data.sources.{name}.path means nothing with kind={source.kind}: add data.sources.{name}.kind=file"
            )
    if config.hw is not None and config.hw.memory_budget_gib > config.hw.memory_gib:
        problems.append(
            f"hw.memory_budget_gib={config.hw.memory_budget_gib:g} is more than hw.memory_gib={config.hw.memory_gib:g}"
        )
    if config.base.source == "hub" and not config.base.model_id:
        problems.append("base.model_id is empty")
    problems += [f"base.{key} means nothing with base.source={config.base.source}" for key in config.base.not_read()]
    part, _, figure = config.objective.partition("/")
    if part not in ("train", "val", "test", "unseen") or not figure:
        problems.append(f"objective={config.objective} is no metric: val/macro_f1, or test/... or unseen/... of an evaluation")
    elif part in ("test", "unseen") and not config.evaluate:
        problems.append(f"objective={config.objective} needs evaluate=true")
    elif part == "unseen" and not data.holdout_sources:
        problems.append(f"objective={config.objective} needs data.holdout_sources")
    if config.base.source == "random" and config.base.hidden_size % 8:
        problems.append(f"base.hidden_size={config.base.hidden_size} is not a multiple of 8")
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))
