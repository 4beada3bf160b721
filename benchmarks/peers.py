"""Side by side with what one would otherwise pick: SO8T, with and without its cache, QLoRA, OFT, and plain text classifiers.

    .venv/bin/python -m benchmarks.peers                              times and memory, then quality at equal steps
    .venv/bin/python -m benchmarks.peers --steps 0                    times and memory alone
    .venv/bin/python -m benchmarks.peers --steps 234 --seeds 0 1 2 --equal-time
    .venv/bin/python -m benchmarks.peers --shape qwen2.5_7b --steps 0 +hw=rtx3060     on a GPU, random NF4 weights

One run, one machine, the same NF4 base, rows, batches, head and loss for all (no task loss). Every peer takes a step on the
same batch before the next batch comes, in an order that turns, and the ratio to QLoRA is taken batch by batch: the median
stands in the table. Memory is what is held plus the peak above it of a step on the longest batch. At equal time, every peer
trains as long as QLoRA takes for its steps, the first epoch of the cached SO8T at its uncached price. Adapters' learning rates
are not tuned. Writes `results/peers_<machine>.json` after each part, and `results/peers_<machine>.png`.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.adapters import ADAPTER_RATE, NO_GATES, AdaptedModule, Peer, lora, oft
from benchmarks.gates import ROOT, baseline_figures, composed, machine, made, one_run, result_file, spread
from benchmarks.memory import allocated, held
from so8t.base import SplitBase, stored_tensors
from so8t.blank import blank_base
from so8t.config import Config, validate
from so8t.console import quieten, reported
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import Batch
from so8t.errors import ConfigError
from so8t.files import write_json
from so8t.lightning_module import SO8TModule
from so8t.memory import GIB, longest_batch, runs_suffix_again
from so8t.model import SO8TModel
from so8t.shapes import NAMED, base_config
from so8t.training import device_of, load_data

ADAPTED = (*NO_GATES, *ADAPTER_RATE)
PEERS = {
    "so8t": Peer("SO8T", ("loss.task_weight=0",), cached=False),
    "so8t_cached": Peer("SO8T, cached", ("loss.task_weight=0",)),
    "qlora": Peer("QLoRA r = 16, all layers", ADAPTED, lora(16), every_layer=True, cached=False),
    "oft8": Peer("OFT block 8, all layers", ADAPTED, oft(8), every_layer=True, cached=False),
    "oft": Peer("OFT default, all layers", ADAPTED, oft(), every_layer=True, cached=False),
    "lora_top": Peer("LoRA r = 16, top K", ADAPTED, lora(16), cached=False),
    "oft8_top": Peer("OFT block 8, top K", ADAPTED, oft(8), cached=False),
}
REFERENCE = "qlora"
BARS = {"cpu": {"so8t": 0.6, "so8t_cached": 0.15}, "cuda": {"so8t": 0.45, "so8t_cached": 0.15}}
"""Step time as a share of QLoRA's, at most."""
MEMORY_BAR = 0.75
"""The same for the peak of memory, on a GPU."""


@dataclass
class Contender:
    """A peer's module with its optimiser."""

    module: SO8TModule
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        """What a training step of the project does: all terms with PET at full weight, backward, clipping, AdamW, inertia."""
        self.loss(batch).backward()
        self.update()

    def loss(self, batch: Batch) -> torch.Tensor:
        """The forward pass."""
        module = self.module
        with module.model.gates_computed_once():
            return module.loss_terms(batch, module(batch), progress=1.0).total()

    def update(self) -> None:
        """What follows the backward pass."""
        module = self.module
        for parameters in module.parameter_groups().values():
            if parameters:
                nn.utils.clip_grad_norm_(parameters, module.optim_spec.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with module.model.gates.computed_once():
            module.inertia.update(module.model.gates)

    def held_bytes(self) -> int:
        """Weights, dequantised copies of layers, what is trained and its averages."""
        module = self.module
        averages = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        dense = [m.dense for m in module.modules() if hasattr(m, "dense")]
        weights = [tensor for _, tensor in stored_tensors(module.model.base)]
        return held([*weights, *dense, *module.parameters(), *module.buffers(), *averages])


def random_linear(
    width: int, rows: int, *, bias: bool, dtype: torch.dtype, double: bool, device: torch.device
) -> bnb.nn.Linear4bit:
    """Random weights in NF4, in bitsandbytes' own layer, as PEFT wants it."""
    layer = bnb.nn.Linear4bit(
        width, rows, bias, compute_dtype=dtype, compress_statistics=double, quant_type="nf4", device="meta"
    )
    weight = torch.randn(rows, width, dtype=dtype, device=device) * 0.02
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    ).to(device)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # its repacked layout has no backward
    return layer


def random_base(config: Config, device: torch.device) -> SplitBase:
    """The base's shape with random weights, without an lm_head."""
    shape, cut = base_config(config.base), config.gate.top_layers
    base = blank_base(
        config.base, shape, cut=cut, device=device, on_gpu=device.type == "cuda", with_head=False, linear=random_linear
    )
    base.checkpoint_suffix = runs_suffix_again(config)
    return base


def shaped(peer: Peer, config: Config, device: torch.device) -> SO8TModule:
    """The peer's module on random weights; the cache is in memory."""
    base = random_base(config, device)
    model = SO8TModel(base, config.gate, config.head)
    kind = SO8TModule if peer.adapter is None else AdaptedModule
    cache = PrefixCache(base, memory_gib=4.0 if peer.cached else 0.0, keep=model.below)
    module = kind(model, config.loss, config.pet, config.optim, class_counts=(1, 1, 1), cache=cache)
    if isinstance(module, AdaptedModule):
        module.inject(peer.adapter(list(range(base.depth - config.gate.top_layers, base.depth))))
    return module


def contender(peer: Peer, make: Callable[[Peer, Config], SO8TModule], overrides: list[str], depth: int) -> Contender:
    config = validate(composed([*overrides, *peer.settings(depth)], ROOT / "outputs"))
    module = make(peer, config)
    module.to(device_of(config)).train()
    return Contender(module, module.make_optimizer())


def clock(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def peak_gib(one: Contender, batch: Batch, device: torch.device) -> float:
    """GiB at the peak of a step, what is held before it included."""
    own = one.held_bytes()
    if device.type == "cpu":
        return (own + allocated(partial(one.step, batch))) / GIB
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    one.step(batch)
    torch.cuda.synchronize(device)
    return (own + torch.cuda.max_memory_allocated(device) - before) / GIB


def measure(contenders: dict[str, Contender], batches: list[Batch], longest: Batch, per_epoch: int) -> dict[str, dict]:
    """Times of paired steps and peaks of memory, by peer."""
    device = longest.tokens.device
    for one in contenders.values():
        one.step(batches[0])  # AdamW's averages, kernels' workspaces
        with torch.no_grad():
            for batch in batches:
                if len(one.module.cache) or one.module.cache.room:
                    one.module.cache.prefix(batch.tokens, batch.mask)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    console = Console(stderr=True)
    for k, batch in enumerate(track(batches, description="paired steps", console=console, transient=True)):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            seconds[name].append(clock(partial(contenders[name].step, batch), device))
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    found = {}
    for name, one in contenders.items():
        ratios = [mine / other for mine, other in zip(seconds[name], seconds[REFERENCE], strict=True)]
        groups = one.module.parameter_groups()
        found[name] = {
            "trained_beside_the_head": sum(p.numel() for key, ps in groups.items() if key != "head" for p in ps),
            "step_seconds": seconds[name],
            "step_seconds_median": statistics.median(seconds[name]),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "tokens_per_second": tokens / sum(seconds[name]),
            "epoch_seconds": per_epoch * statistics.mean(seconds[name]),
            "peak_gib": peak_gib(one, longest, device),
        }
    return found


def steps_in(seconds: float, name: str, found: dict[str, dict], per_epoch: int) -> int:
    """How many steps a peer takes in that time; the cached SO8T pays for the prefix in its first epoch."""
    mean = {who: statistics.mean(figures["step_seconds"]) for who, figures in found.items()}
    if name != "so8t_cached":
        return max(1, round(seconds / mean[name]))
    first = per_epoch * mean["so8t"]
    return max(1, round(seconds / mean["so8t"] if seconds < first else per_epoch + (seconds - first) / mean[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--batches", type=int, default=24, help="paired steps to time (default 24)")
    parser.add_argument("--steps", type=int, default=234, help="training steps for quality, of 16 rows; 0 leaves it out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--equal-time", action="store_true", help="quality at equal time, too")
    parser.add_argument("--shape", choices=[*NAMED, "tiny"], help="random NF4 weights of this shape: times and memory alone")
    parser.add_argument("--keep", action="store_true", help="keep the times and runs that the file holds, add what is missing")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all peers")
    args = parser.parse_intermixed_args()
    if REFERENCE not in args.peers:
        raise ConfigError(f"--peers must name {REFERENCE}: the ratios are to it")
    if args.shape and args.steps:
        raise ConfigError("--shape has random weights, whose quality means nothing: add --steps 0")
    quieten()
    console = Console()
    overrides = [*args.overrides, *([f"base={args.shape}", "base.quantization=nf4"] if args.shape else [])]
    plain = validate(composed(overrides, ROOT / "outputs"))
    device, depth = device_of(plain), base_config(plain.base).num_hidden_layers
    file = result_file(f"peers_{args.shape}" if args.shape else "peers", device)
    out = {"machine": machine(device), "overrides": args.overrides, "runs": []}
    if args.keep:
        if not file.is_file():
            raise ConfigError(f"--keep: there is no {file} yet")
        out = json.loads(file.read_text(encoding="utf-8"))
    elif args.shape:
        batch = longest_batch(plain, plain.data.batch_size, device)
        contenders = {name: contender(PEERS[name], partial(shaped, device=device), overrides, depth) for name in args.peers}
        out["measured"] = measure(contenders, [batch] * args.batches, batch, per_epoch=1000)
        out["per_epoch"] = 1000
    else:
        data = load_data(plain)
        quick = [*overrides, "head.probe=0", "head.words=0"]  # where the head begins makes no step longer
        contenders = {name: contender(PEERS[name], partial(made, data=data), quick, depth) for name in args.peers}
        size = plain.data.batch_size
        batches = data.sample(args.batches * size, batch_size=size)
        out["per_epoch"] = len(data.train_dataloader())
        longest = longest_batch(plain, plain.data.batch_size, device)
        out["measured"] = measure(contenders, batches, longest, out["per_epoch"])
        del contenders
    write_json(file, out)
    if args.steps and "baselines" not in out:
        out["baselines"] = baseline_figures(plain, load_data(plain))
    quality(out, args, overrides, depth, file)
    report(out, console, device)
    plot(out, file.with_suffix(".png"))


def quality(out: dict, args: argparse.Namespace, overrides: list[str], depth: int, file: Path) -> None:
    """Trains and scores what is not in `out` yet; every run is kept at once."""
    if not args.steps:
        return
    done = {(run["variant"], run["seed"], run["terms"]) for run in out["runs"]}
    budget = args.steps * statistics.mean(out["measured"][REFERENCE]["step_seconds"])
    wanted = [(f"{args.steps} steps", dict.fromkeys(args.peers, args.steps))]
    if args.equal_time:
        by_time = {name: steps_in(budget, name, out["measured"], out["per_epoch"]) for name in args.peers}
        wanted.append((f"{budget:.0f} s", by_time))
    for terms, steps in wanted:
        for seed in args.seeds:
            for name, peer in PEERS.items():
                if name not in steps or (name, seed, terms) in done or (name == "so8t" and terms.endswith("steps")):
                    continue  # with and without the cache the same steps give the same agent
                limits = [f"+trainer.max_steps={steps[name]}", "trainer.max_epochs=-1"]
                run = one_run(name, peer, seed, [*overrides, *peer.settings(depth), *limits])
                out["runs"].append({**run, "terms": terms, "steps": steps[name]})
                write_json(file, out)


def report(out: dict, console: Console, device: torch.device) -> None:
    """Both tables, and what the bars say."""
    table = Table(title=f"one training step, side by side; {out['machine']}", title_justify="left")
    columns = ("", "trained beside the head", "step (s)", "of QLoRA", "tokens/s", "peak (GiB)", "epoch (s)")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, row in out["measured"].items():
        low, high = row["ratio_quartiles"]
        table.add_row(
            PEERS[name].title,
            f"{row['trained_beside_the_head']:,}",
            f"{row['step_seconds_median']:.3f}",
            f"{row['ratio_median']:.3f} [{low:.3f}, {high:.3f}]",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.3f}",
            f"{row['epoch_seconds']:.0f}",
        )
    console.print(table)
    reference = out["measured"][REFERENCE]
    for name, bar in BARS[device.type].items():
        if name in out["measured"]:
            judged = [("step", out["measured"][name]["ratio_median"], bar)]
            if device.type == "cuda":
                judged.append(("peak memory", out["measured"][name]["peak_gib"] / reference["peak_gib"], MEMORY_BAR))
            for what, ratio, most in judged:
                said = "met" if ratio <= most else "NOT met"
                console.print(f"{PEERS[name].title}: {ratio:.3f} of QLoRA's {what}, bar {most}: {said}")
    if not out["runs"]:
        return
    table = Table(title="quality, mean ± s.d. over seeds", title_justify="left")
    for column in ("", "trained for", "seeds", "macro-F1, mixed", "macro-F1, unseen", "false allow, mixed"):
        table.add_column(column, justify="right" if column else "left")
    for terms in dict.fromkeys(run["terms"] for run in out["runs"]):
        for name, peer in PEERS.items():
            runs = [r for r in out["runs"] if r["variant"] == name and r["terms"] == terms]
            if runs:
                figures = [("test", "macro_f1"), ("unseen", "macro_f1"), ("test", "false_allow_rate")]
                cells = [spread([r[part][key] for r in runs]) for part, key in figures]
                table.add_row(peer.title, f"{terms} ({runs[0]['steps']:,} steps)", str(len(runs)), *cells)
    for name, figures in out["baselines"].items():
        table.add_row(name, "", "", f"{figures['test']:.3f}", f"{figures['unseen']:.3f}", "-")
    console.print(table)


def plot(out: dict, path: Path) -> None:
    """Step time and peak memory, side by side."""
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS, finish

    names = list(out["measured"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    panels = (
        ("step_seconds_median", "seconds a step (median)", "Time of a training step"),
        ("peak_gib", "GiB", "Peak memory of a step, longest batch"),
    )
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        values = [out["measured"][name][key] for name in names]
        colours = [COLOURS[0] if name.startswith("so8t") else "#999999" for name in names]
        bars = axis.barh([PEERS[name].title for name in names], values, color=colours)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axis.set(xlabel=unit, title=title, xlim=(0, 1.15 * max(values)))
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    finish(figure, path)


if __name__ == "__main__":
    with reported():
        main()
