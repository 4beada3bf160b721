"""The story of one run: data, base, model, callbacks, loggers, fit, evaluate, save. Called by `train.py`."""

import difflib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from so8t.adapter import Agent, TemplateSpec, adapter_to_start_from, save_adapter
from so8t.base import load_base
from so8t.baselines import Baselines, Floats
from so8t.callbacks.checkpoints import BestUnderCeiling
from so8t.callbacks.group import GroupMonitor
from so8t.capability import task_perplexity
from so8t.config import Config, validate
from so8t.console import quieten
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import SafetyData, no_longer
from so8t.data.records import Record
from so8t.data.store import PrefixStore
from so8t.errors import ArtefactError, ConfigError, HardwareError
from so8t.evaluation import evaluate, fill_cache, frozen_features, predict, print_evaluation, told_perplexity, write_predictions
from so8t.files import write_json, write_text
from so8t.fused import fused_rotations
from so8t.intervals import conformal_quantile
from so8t.labels import LABELS, Label
from so8t.lightning_module import SO8TModule
from so8t.memory import GIB, plan, runs_suffix_again, settled
from so8t.model import SO8TModel
from so8t.plan_view import above_the_cut, advice, subject, verdict
from so8t.plots import plot_confusion, plot_group, plot_losses, read_metrics
from so8t.rationale_training import learn
from so8t.remedies import remedies
from so8t.report import panels
from so8t.resume import check_continues, find_checkpoint
from so8t.run_folder import DataRows, read_run, write_data
from so8t.streaming import request_tokens
from so8t.wandb_panels import log_panels

log = logging.getLogger(__name__)

STANDARDISE_ROWS, PROBE_ROWS = 512, 8192
"""Training rows, at most, that tell what the head shifts and scales by: without a probe, or in a run on part of the data; and
with one, which is fitted on the same rows. Their features are in memory together."""


def train(composed: DictConfig) -> dict[str, float]:
    """Trains, evaluates and saves one agent; returns every metric, `objective` first for sweeps.

    Raises:
        SO8TError: for everything a user can cause; nothing half-written is left behind.
    """
    config = validate(composed)
    check_hardware(config)
    quieten()
    console = Console()
    if device_of(config).type == "cuda":
        cap_memory(config, device_of(config))
        free, _ = torch.cuda.mem_get_info(device_of(config))
        config = settled(config, card_gib=free / GIB)
        console.print(check_memory(config, card_gib=free / GIB))
    callbacks, loggers, trainer = made(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")

    data = load_data(config)
    rows = DataRows(data.describe(), data.skipped, data.missing)
    print_data(rows, console)

    run = Path(config.paths.output_dir)
    checkpoint = find_checkpoint(config.ckpt_path, run)
    if checkpoint is not None:
        check_continues(checkpoint, composed)
    module = build(config, data)
    print_model(module, console)
    kept = config.evaluate and config.cache.max_gib
    last_states = PrefixStore.of_last_states(module.model.base, config.cache) if kept else None
    prepare(module, config, data, resumed=checkpoint is not None, last_states=last_states)

    write_text(run / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    write_data(run, rows)
    log_settings(loggers, composed, module)

    if checkpoint is None and (config.init_from is not None or config.head.probe):
        trainer.validate(module, data, verbose=False)  # what the guard compares with
        check_objective(config.objective, trainer.callback_metrics)
    with fused_rotations() if config.compile else nullcontext():
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    restore_best(trainer, module)
    module.cache.flush()
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}

    if trainer.is_global_zero:
        limit_strangeness(module, data, config)
        size = config.data.batch_size
        rationales = learn(module.model, data.template, data.train, config.rationale, batch_size=size, seed=config.seed)
        save_adapter(run / "adapter", module.model, data.template, rationales)
        if config.evaluate:
            metrics |= evaluate_run(module, data, config, console, loggers, last_states)
        draw(run, callbacks)
        takers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        told = panels(read_run(run)) if takers else []
        for taker in takers:
            log_panels(taker, told)
        if config.objective not in metrics:
            log.warning("objective=%s: no such figure was measured", config.objective)
        write_json(run / "metrics.json", {k: (v if v == v else None) for k, v in sorted(metrics.items())})
        console.print(f'\nrun folder: [bold]{run}[/]   ask it: [bold]so8t ask {run} "how do I kill a python process?"[/]')
    module.cache.flush()
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of a sweep would go on writing into this one
    return metrics


def made(config: Config) -> tuple[list[L.Callback], list[Logger], L.Trainer]:
    """Callbacks, loggers and the trainer, before anything is loaded: what they refuse is a setting.

    Raises:
        ConfigError: they do.
    """

    def node(path: str, settings: dict[str, Any], **more: object) -> Any:  # noqa: ANN401  (whatever the node makes)
        try:
            return instantiate(settings, **more)
        except InstantiationException as error:
            raise ConfigError(f"configuration: {path}: {' '.join(str(error.__cause__ or error).split())}") from None

    callbacks = [node(f"callbacks.{name}", settings) for name, settings in config.callbacks.items()]
    loggers = [node(f"logger.{name}", settings) for name, settings in config.logger.items()]
    return callbacks, loggers, node("trainer", config.trainer, callbacks=callbacks, logger=loggers)


def check_objective(objective: str, validated: Mapping[str, object]) -> None:
    """A sweep must not train for hours after a figure of the validation that does not exist.

    Raises:
        ConfigError: with the nearest ones.
    """
    if objective.startswith("val/") and validated and objective not in validated:
        near = difflib.get_close_matches(objective, list(validated), n=3, cutoff=0.4) or sorted(validated)[:3]
        raise ConfigError(f"objective={objective}: there is no such metric; near it are {', '.join(near)}")


def check_hardware(config: Config) -> None:
    """A GPU profile without a GPU is told before anything is loaded.

    Raises:
        HardwareError: with what to do.
    """
    wants_gpu = config.trainer.get("accelerator") in ("gpu", "cuda")
    if wants_gpu and not torch.cuda.is_available():
        name = f"+hw={config.hw.name}" if config.hw else "trainer.accelerator=gpu"
        raise HardwareError(
            f"{name} needs a CUDA GPU and torch sees none: leave the profile out to run on the CPU, add "
            "trainer.accelerator=cpu to try its settings, or install a CUDA build of torch and its driver"
        )


def check_memory(config: Config, *, card_gib: float) -> str:
    """Plans the run for a card with `card_gib` free, before anything is downloaded; returns the verdict in a line.

    Raises:
        HardwareError: it does not fit, with what would.
    """
    planned = plan(config, card_gib=card_gib)
    if planned.fits is False:
        found = remedies(config, planned, card_gib=card_gib)
        lines = [f"{subject(config)} {verdict(planned)}, {card_gib:.2f} GiB are free now", *advice(planned, found)]
        raise HardwareError("\n".join(lines))
    return f"planned: {verdict(planned)}; {above_the_cut(planned)}"


def cap_memory(config: Config, device: torch.device) -> None:
    """Holds PyTorch's allocator to the profile's budget: a run that needs more fails by itself and leaves the desktop alone."""
    if config.hw is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.hw.memory_budget_gib * GIB / whole), device)


def load_data(config: Config) -> SafetyData:
    """Reads and splits; needs no base yet, so that bad data is told before one is loaded."""
    data = SafetyData(config.data, seed=config.seed, answer_in_path=config.pet.path == "request_and_answer")
    data.setup()
    return data


def data_of(run: Path) -> SafetyData:
    """The rows of a finished run, read and split again as its `config.yaml` says.

    Raises:
        ArtefactError: there is no config.yaml.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file, so the run's rows are not known: name rows with --data")
    saved = OmegaConf.load(path)
    if not isinstance(saved, DictConfig):
        raise ArtefactError(f"{path}: not a run's configuration: name rows with --data")
    return load_data(validate(saved, saved=True))


def build(config: Config, data: SafetyData, kind: type[SO8TModule] = SO8TModule) -> SO8TModule:
    """Base, model, cache and module of one run, as a configuration says; `data` learns the base's tokenizer.

    Raises:
        ArtefactError: `init_from` names no adapter, or one that does not fit.
    """
    with_head = bool(config.loss.task_weight)
    run = config.init_from
    prompts = TemplateSpec(config.data.max_length, config.data.system_prompt, config.data.decision_prompt)
    start = None if run is None else adapter_to_start_from(Path(run), config.gate, config.head, prompts)
    base = load_base(config.base, cut=config.gate.top_layers, device=device_of(config), with_head=with_head)
    base.checkpoint_suffix = runs_suffix_again(config)
    data.use_tokenizer(base.tokenizer)
    model = SO8TModel(base, config.gate, config.head)
    model.prompts_open_with(data.template.before)
    if start is not None:
        start.put_on(model)
        model.head.limit.fill_(math.inf)  # behind these gates nothing was measured yet
    counts = Counter(int(r.safety_label) for r in data.train)
    store = None
    if config.cache.max_gib and base.cut == base.depth:
        log.info("gate.top_layers=%d leaves no frozen prefix: nothing to cache", base.cut)
    elif config.cache.max_gib:
        store = PrefixStore.of(base, config.cache, model.below)
    return kind(
        model,
        config.loss,
        config.pet,
        config.optim,
        class_counts=tuple(counts[k] for k in range(len(LABELS))),
        cache=PrefixCache(base, store=store, keep=model.below, lead=data.template.before),
    )


def prepare(
    module: SO8TModule, config: Config, data: SafetyData, *, resumed: bool, last_states: PrefixStore | None = None
) -> None:
    """What is done once before training: the cache is filled, and a new head learns what to shift and scale by, and where to
    begin, from what is read then or was by a run before. On the way `last_states` of the frozen base are kept for the probe
    beside an evaluation.

    Raises:
        BaseModelError: a part of the prefix is trainable.
    """
    module.model.base.check_prefix_is_frozen()
    limit = config.trainer.get("limit_train_batches", 1.0)
    part = isinstance(limit, int) or config.trainer.get("overfit_batches")  # some batches, for a try: 1 is one, 1.0 all
    all_read = not part and (limit == 1.0 or config.head.probe)  # by an epoch, or where the head begins
    if all_read and config.pet.path == "request":  # as `fill_cache` sees them
        title, size = "frozen prefix of the training rows", config.data.eval_batch_size
        longest = None if limit == 1.0 else config.head.longest  # longer rows are read where a step draws them
        rows = no_longer(data.train, data.template, longest)
        fill_cache(module.model, rows, data.template, batch_size=size, cache=module.cache, title=title)
    if (config.head.standardise or config.head.probe) and not resumed and config.init_from is None:
        most = PROBE_ROWS if config.head.probe and not part else STANDARDISE_ROWS
        batches = data.sample(most, batch_size=config.data.eval_batch_size)
        title = "where the head begins"
        model = module.model
        frozen = not model.gates.command_is_read and not any(p.requires_grad for p in model.base.parameters())
        facts = (*model.layers, model.head.spec.pooling, model.head.FEATURES)
        found = PrefixStore.of_head(model.base, config.cache, facts) if config.cache.max_gib and frozen else None
        module.begin_head(track(batches, title, console=Console(stderr=True), transient=True), last_states, found)


def limit_strangeness(module: SO8TModule, data: SafetyData, config: Config) -> None:
    """Measures on the validation rows labelled ALLOW how strange a text may be that is allowed, as `head.familiar` says. After
    training, because what the gates turn moves what the head reads; a run on parts of its rows has no limit."""
    head = module.model.head
    head.limit.fill_(math.inf)
    whole = config.trainer.get("limit_val_batches", 1.0)
    benign = [record for record in data.val if record.safety_label == Label.ALLOW]
    if not head.spec.familiar or isinstance(whole, int) or whole != 1.0 or not benign:
        return
    size = config.data.eval_batch_size
    told = predict(module.model, benign, data.template, batch_size=size, cache=module.cache, title="what is strange")
    found = told.strangeness[~told.failed].tolist()
    head.limit.copy_(torch.tensor(conformal_quantile(found, head.spec.familiar)))
    if head.limit.isfinite():
        log.info("strangeness: up to %.2f may be allowed, measured on %d rows", float(head.limit), len(benign))
    else:
        log.warning("%d ALLOW validation rows are too few for head.familiar=%g: nothing is too strange to be allowed",
                    len(benign), head.spec.familiar)  # fmt: skip


def device_of(config: Config) -> torch.device:
    """Where the base goes; quantised weights are loaded onto it directly."""
    if config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def restore_best(trainer: L.Trainer, module: SO8TModule) -> None:
    """Loads gates and head of the best validation, where one was kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestUnderCeiling) and callback.best_model_path:
            state = torch.load(callback.best_model_path, map_location=module.device, weights_only=True)
            module.load_state_dict(state["state_dict"])
            score = float(callback.best_model_score) if callback.best_model_score is not None else float("nan")
            if score < 0:
                log.warning(
                    "no validation was under the false-allow ceiling %g: the best above it is kept",
                    callback.false_allow_ceiling,
                )
            log.info("best validation: %s (%.3f)", Path(callback.best_model_path).name, score)


def evaluate_run(
    module: SO8TModule,
    data: SafetyData,
    config: Config,
    console: Console,
    loggers: list[Logger],
    last_states: PrefixStore | None,
) -> dict[str, float]:
    """Mixed test split and unseen sources, with the baselines fitted on the same training rows; prints and writes."""
    model, cache, template = module.model, module.cache, data.template
    run, batch_size = Path(config.paths.output_dir), config.data.eval_batch_size

    def features(records: list[Record], what: str) -> Floats:
        title = f"frozen base, {what}"
        return frozen_features(model, records, template, batch_size=batch_size, cache=cache, store=last_states, title=title)

    probed = no_longer(data.train, template, config.head.longest)  # as the head's own regression on states
    baselines = Baselines.fit(data.train, features(probed, "training rows"), probed)
    baselines.save(run / "baselines")
    agent = Agent(model, template, run / "adapter")
    metrics: dict[str, float] = {}
    for part, records, title in (("test", data.test, "mixed test split"), ("unseen", data.unseen, "unseen sources")):
        if not records:
            console.print(f"{title}: no rows (data.holdout_sources is empty or could not be fetched)")
            continue
        predictions = predict(model, records, template, batch_size=batch_size, cache=cache, title=title)
        result = evaluate(title, records, predictions, baselines, features(records, title))
        print_evaluation(result, console)
        if perplexity := task_perplexity(model, records, template, batch_size=batch_size):
            console.print(f"{title}: {told_perplexity(*perplexity.values())}")
            result.overall["SO8T"] |= perplexity
        write_json(run / f"{part}.json", result.as_json())
        mistakes = {i: request_tokens(agent, records[i], prefix=cache.prefix) for i in predictions.worst(records)}
        write_predictions(run / f"{part}_predictions.jsonl", records, predictions, mistakes)
        plot_confusion(
            result.confusion,
            f"{title}: macro-F1 {result.overall['SO8T'].get('macro_f1', float('nan')):.3f}",
            run / "plots" / f"confusion_{part}.png",
        )
        metrics |= {f"{part}/{k}": v for k, v in result.overall["SO8T"].items()}
        metrics |= {
            f"{part}/{who.replace(' ', '_').lower()}_macro_f1": v["macro_f1"]
            for who, v in result.overall.items()
            if who != "SO8T" and "macro_f1" in v
        }
        for logger in loggers:
            logger.log_metrics({f"{part}/{k}": v for k, v in result.overall["SO8T"].items()})
    return metrics


def log_settings(loggers: list[Logger], composed: DictConfig, module: SO8TModule) -> None:
    """The resolved configuration and the sizes, to every logger."""
    settings = OmegaConf.to_container(composed, resolve=True)
    sizes = {f"parameters/{k}": sum(p.numel() for p in v) for k, v in module.parameter_groups().items()}
    for logger in loggers:
        logger.log_hyperparams({"config": settings, **sizes})


def draw(run: Path, callbacks: list[L.Callback]) -> None:
    """Loss and group plots from the CSV log."""
    series = read_metrics(run / "csv" / "metrics.csv")
    plot_losses(series, run / "plots" / "losses.png")
    monitor = next((c for c in callbacks if isinstance(c, GroupMonitor)), None)
    if monitor is not None and any(name.startswith("group/") for name in series):
        plot_group(
            series, run / "plots" / "group.png", tolerance=monitor.tolerance, tolerance_float32=monitor.tolerance_float32
        )


def print_data(data: DataRows, console: Console) -> None:
    """Rows by source, label and split, and what was left out."""
    table = Table(title="data: rows by source (ALLOW / ESCALATE / REFUSE)", title_justify="left")
    table.add_column("source")
    for part in data.rows:
        table.add_column(part, justify="right")
    for source, *cells in data.by_source():
        table.add_row(escape(source), *cells, style="bold" if source == "all" else "")
    console.print(table)
    for line in data.missing:
        console.print(f"[yellow]{line}[/]")
    for name, count in data.skipped.items():
        console.print(f"left out: {count} rows of {name}")


def print_model(module: SO8TModule, console: Console) -> None:
    """What is trained, and what is not."""
    groups = {name: sum(p.numel() for p in ps) for name, ps in module.parameter_groups().items()}
    base = json.loads(module.model.base.describe())
    console.print(
        f"base: {base['name']} ({base['architecture']}, {base['layers']} layers, hidden {base['hidden_size']}, "
        f"{base['quantization']}), frozen; gates in the top {module.model.base.cut} layers\n"
        f"trained: {groups['gates_safe']:,} coordinates on the safety side, {groups['gates_cmd']:,} on the command side, "
        f"{groups['head']:,} in the head"
    )


__all__ = ["build", "cap_memory", "check_hardware", "check_memory", "load_data", "prepare", "train"]
