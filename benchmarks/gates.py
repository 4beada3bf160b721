"""What the gates are worth: the default run's head, data, loss and steps with gates, without (`gate=none`), and with PEFT LoRA.

    .venv/bin/python -m benchmarks.gates [--seeds 0 1 2] [--variants gates none lora triality commutator] [OVERRIDE ...]

Every variant is trained by the project's own `SO8TModule` and trainer, selected by its own validation, and scored on the mixed
test split and on the unseen source; TF-IDF and the frozen probe, fitted on the same rows, stand beside them. The prefix is
computed once, into the cache on disk. Writes `results/gates.json` and `results/gates.png`; each finished run is kept at once.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score

from benchmarks.adapters import ADAPTER_RATE, NO_GATES, AdaptedModule, Peer, lora
from so8t.baselines import Baselines
from so8t.config import Config, compose_train, validate
from so8t.console import quieten
from so8t.data.datamodule import SafetyData
from so8t.evaluation import evaluate, frozen_features, predict
from so8t.files import write_json
from so8t.lightning_module import SO8TModule
from so8t.training import build, load_data, prepare, restore_best

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FIGURES = ("macro_f1", "false_allow_rate", "over_refusal_rate", "accuracy")

CPU = torch.device("cpu")

PEERS = {
    "gates": Peer("SO(8) gates"),
    "none": Peer("same head,\nno gates", NO_GATES),
    "triality": Peer("SO(8) gates,\ntriality", ("gate.triality=true", "loss.task_weight=0")),
    "commutator": Peer("SO(8) gates,\ncommutator", ("head.commutator=true", "loss.task_weight=0")),
    "lora": Peer("LoRA r = 8", (*NO_GATES, *ADAPTER_RATE), lora(8)),
}


def machine(device: torch.device = CPU) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.python_version()}, torch {torch.__version__}"


def result_file(name: str, device: torch.device) -> Path:
    """Where a machine's figures go: one file a kind of device."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu_{platform.machine()}"
    return RESULTS / f"{name}_{'_'.join(place.lower().split())}.json"


def composed(overrides: list[str], folder: Path) -> DictConfig:
    config = compose_train([*overrides, f"paths.output_dir={folder}", "~callbacks.progress"])
    OmegaConf.set_struct(config, False)
    config.trainer.enable_progress_bar = False
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def made(peer: Peer, config: Config, data: SafetyData) -> SO8TModule:
    """The peer's module, ready to train."""
    module = build(config, data, SO8TModule if peer.adapter is None else AdaptedModule)
    if isinstance(module, AdaptedModule):
        depth = module.model.base.depth
        module.inject(peer.adapter(list(range(depth - config.gate.top_layers, depth))))
    prepare(module, config, data, resumed=False)
    return module


def one_run(name: str, peer: Peer, seed: int, overrides: list[str]) -> dict[str, object]:
    """Trains and scores one peer."""
    with tempfile.TemporaryDirectory() as folder:
        raw = composed([*overrides, f"seed={seed}"], Path(folder))
        config = validate(raw)
        L.seed_everything(seed, workers=True, verbose=False)
        data = load_data(config)
        module = made(peer, config, data)
        callbacks = [instantiate(node) for name, node in raw.callbacks.items() if name != "learning_rate"]  # it wants a logger
        trainer: L.Trainer = instantiate(raw.trainer, callbacks=callbacks, logger=[])
        begun = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - begun
        restore_best(trainer, module)
        groups = {name: sum(p.numel() for p in ps) for name, ps in module.parameter_groups().items()}
        result: dict[str, object] = {"variant": name, "seed": seed, "fit_seconds": seconds, "parameters": groups}
        for part in ("val", "test", "unseen"):
            records = getattr(data, part)
            predictions = predict(module.model, records, data.template, batch_size=32, cache=module.cache)
            figures = evaluate(part, records, predictions, None, None)
            result[part] = {k: figures.overall["SO8T"].get(k) for k in FIGURES}
            if "(benign, sounds dangerous)" in figures.by_source:
                result[part]["sounds_dangerous_allowed"] = figures.by_source["(benign, sounds dangerous)"]["SO8T"]["accuracy"]
        module.cache.flush()
        return result


def baseline_figures(config: Config, data: SafetyData) -> dict[str, dict[str, float]]:
    """Macro-F1 of TF-IDF, the frozen probe and the constants, fitted on the same rows."""
    module = build(config, data)
    features = {
        part: frozen_features(module.model, getattr(data, part), data.template, batch_size=32, cache=module.cache)
        for part in ("train", "test", "unseen")
    }
    module.cache.flush()
    baselines = Baselines.fit(data.train, features["train"])
    figures: dict[str, dict[str, float]] = {}
    for part in ("test", "unseen"):
        records = getattr(data, part)
        labels = [int(r.safety_label) for r in records]
        for name, probabilities in baselines.probabilities(records, features[part]).items():
            score = f1_score(labels, probabilities.numpy().argmax(-1), average="macro")
            figures.setdefault(name, {})[part] = float(score)
    return figures


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=sorted(PEERS), default=["gates", "none", "lora"])
    parser.add_argument("--name", default="gates", help="name of the files in benchmarks/results")
    parser.add_argument("--keep", action="store_true", help="keep the runs that the file holds, add what is missing")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every variant")
    args = parser.parse_intermixed_args()
    quieten()
    console = Console()
    config = validate(composed(args.overrides, ROOT / "outputs"))
    data = load_data(config)
    file = RESULTS / f"{args.name}.json"
    rows = {part: len(getattr(data, part)) for part in ("train", "val", "test", "unseen")}
    before = json.loads(file.read_text(encoding="utf-8")) if args.keep else None
    settings = OmegaConf.to_container(composed(args.overrides, Path("outputs")), resolve=True)
    if before:
        parts = {part: getattr(config, part) for part in ("gate", "head", "loss", "pet", "optim")}
        # as specs: a key that came later is at its default there
        other = [p for p, now in parts.items() if TypeAdapter(type(now)).validate_python(before["config"][p]) != now]
        if other or before["rows"] != rows:
            raise SystemExit(f"{file} holds runs of other settings ({', '.join(other) or 'rows'}): give --name another name")
    out = {
        "machine": machine(),
        "overrides": args.overrides,
        "rows": rows,
        "config": settings,
        "baselines": before["baselines"] if before else baseline_figures(config, data),
        "runs": before["runs"] if before else [],
    }
    done = {(run["variant"], run["seed"]) for run in out["runs"]}
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed) in done:
                continue
            run = one_run(variant, PEERS[variant], seed, [*args.overrides, *PEERS[variant].overrides])
            out["runs"].append(run)
            write_json(file, out)
            figures = {p: {k: round(v, 3) for k, v in run[p].items() if v is not None} for p in ("val", "test", "unseen")}
            console.print(f"{run['variant']} seed {run['seed']} ({run['fit_seconds']:.0f} s): {figures}")
    report(out, console, file.with_suffix(".png"))


def report(out: dict, console: Console, picture: Path) -> None:
    """The table, what the gates remove of the error, and the picture."""
    table = Table(
        title=f"macro-F1, mean ± s.d. over seeds; {out['machine']}",
        title_justify="left",
    )
    columns = (
        "variant",
        "seeds",
        "beside the head",
        "macro-F1, mixed",
        "false allow",
        "macro-F1, unseen",
        "sounds dangerous, allowed",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    means: dict[str, list[float]] = {}
    for variant in dict.fromkeys(run["variant"] for run in out["runs"]):
        runs = [r for r in out["runs"] if r["variant"] == variant]
        means[variant] = [r["test"]["macro_f1"] for r in runs]
        beside = sum(v for k, v in runs[0]["parameters"].items() if k != "head")
        table.add_row(
            variant,
            str(len(runs)),
            f"{beside:,}",
            spread(means[variant]),
            spread([r["test"]["false_allow_rate"] for r in runs]),
            spread([r["unseen"]["macro_f1"] for r in runs]),
            spread([r["test"]["sounds_dangerous_allowed"] for r in runs]),
        )
    for name, figures in out["baselines"].items():
        table.add_row(name, "", "-", f"{figures['test']:.3f}", "-", f"{figures['unseen']:.3f}", "-")
    console.print(table)
    if {"gates", "none"} <= means.keys():
        with_gates, without = statistics.mean(means["gates"]), statistics.mean(means["none"])
        console.print(f"the gates remove {(with_gates - without) / (1 - without):.0%} of the macro-F1 error of the same head")
    plot(out, picture)


def plot(out: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS, finish

    variants = list(dict.fromkeys(run["variant"] for run in out["runs"]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, part, title in zip(axes, ("test", "unseen"), ("mixed test split", "unseen source"), strict=True):
        for k, variant in enumerate(variants):
            values = [r[part]["macro_f1"] for r in out["runs"] if r["variant"] == variant]
            axis.bar(k, statistics.mean(values), color=COLOURS[k], width=0.6)
            axis.scatter([k] * len(values), values, color="black", s=14, zorder=3)
        beside = list(out["baselines"])[:2]  # TF-IDF and the frozen probe
        for k, name in enumerate(beside, start=len(variants)):
            axis.bar(k, out["baselines"][name][part], color="#999999", width=0.6)
        variant_names = [*(PEERS[v].title for v in variants), *beside]
        axis.set_xticks(range(len(variant_names)), variant_names, fontsize=8)
        axis.set(title=title, ylim=(0, 1))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("macro-F1 (dots: seeds)")
    finish(figure, path)


if __name__ == "__main__":
    main()
