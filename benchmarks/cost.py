"""What a step costs as work grows, and a rotation beside a copy of the tensor.

    .venv/bin/python -m benchmarks.cost [--layers 1 2 4 8 16 30] [--lengths 64 128 256 512] [--bases NAME ...] [OVERRIDE ...]

Times are of real training steps of the configured base (no task loss, full batches of one length), with the prefix computed and
with the prefix from the cache, and of its forward and backward pass apart, against the number K of layers above the cut and
against the length; against the size of the base they are of random NF4 weights of that shape, four rows a batch. Memory is the
plan's (`so8t plan`), against K, length and the named bases' sizes in the settings of `+hw=rtx3060`. `rotate` is timed forward
and backward at [1, 2048, 3584] in bfloat16 and float32; its floor is a copy of the tensor. Writes `results/cost_<machine>.json`
and `results/cost_<machine>.png`.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gates import ROOT, composed, machine, result_file
from benchmarks.peers import Contender, clock, random_base
from so8t.base import SplitBase, load_base
from so8t.config import Config, validate
from so8t.console import quieten, reported
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import Batch
from so8t.files import write_json
from so8t.fused import fused_rotations
from so8t.memory import longest_batch, module_of, plan
from so8t.shapes import NAMED
from so8t.so8 import exp_map, rotate
from so8t.training import device_of

SHAPE = (1, 2048, 3584)
REPEATS = 15
STEPS = 5


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    clock(run, device)
    return statistics.median(clock(run, device) for _ in range(REPEATS))


def rotation_times(device: torch.device) -> list[dict]:
    """`rotate` beside a copy, in both dtypes."""
    rows = []
    rotation = exp_map(torch.randn(SHAPE[-1] // 8, 28)).to(device).requires_grad_()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(SHAPE, device=device).to(dtype).requires_grad_()
        up = torch.randn(SHAPE, device=device).to(dtype)
        copy = median_seconds(x.detach().clone, device)
        forward = median_seconds(lambda x=x: rotate(x.detach(), rotation.detach()), device)
        both = median_seconds(lambda x=x, up=up: rotate(x, rotation).backward(up), device)
        with fused_rotations():
            fused = median_seconds(lambda x=x: rotate(x.detach(), rotation.detach()), device)
        rows.append(
            {
                "dtype": str(dtype),
                "copy_seconds": copy,
                "forward_seconds": forward,
                "compiled_seconds": fused,
                "both_seconds": both,
            }
        )
    return rows


def step_times(base: SplitBase, config: Config) -> dict[str, float]:
    """Seconds of a step on one full batch, with the prefix computed and with it cached; medians, as those of the parts are."""
    device = base.device
    module = module_of(config, base).to(device).train()
    batch = longest_batch(config, config.data.batch_size, device)
    one, seconds = Contender(module, module.make_optimizer()), {}
    for kind, memory in (("computed", 0.0), ("cached", 4.0)):
        module.cache = PrefixCache(base, memory_gib=memory, keep=module.model.below)
        one.step(batch)
        parts = [parts_of_a_step(one, batch, device) for _ in range(STEPS)]
        seconds |= {f"{kind}_{part}": statistics.median(step[part] for step in parts) for part in parts[0]}
        seconds[kind] = statistics.median(sum(step.values()) for step in parts)
    module.model.gates.detach()
    return seconds


def parts_of_a_step(one: Contender, batch: Batch, device: torch.device) -> dict[str, float]:
    """Seconds of forward pass, backward pass and update."""
    losses: list[torch.Tensor] = []
    forward = clock(lambda: losses.append(one.loss(batch)), device)
    return {"forward": forward, "backward": clock(losses.pop().backward, device), "update": clock(one.update, device)}


def configured(overrides: list[str], cut: int, length: int, *more: str) -> Config:
    settings = [*overrides, f"gate.top_layers={cut}", f"data.max_length={length}", "loss.task_weight=0", *more]
    return validate(composed(settings, ROOT / "outputs"))


def of_configured(config: Config) -> dict[str, float]:
    """Of the base itself."""
    cut = config.gate.top_layers
    return step_times(load_base(config.base, cut=cut, device=device_of(config), with_head=False), config)


def of_shape(overrides: list[str], name: str, length: int) -> dict[str, float]:
    """Of random weights in a named base's shape."""
    config = configured(overrides, 4, length, f"base={name}", "data.batch_size=4")
    return step_times(random_base(config, device_of(config)), config)


def planned_gib(*overrides: str) -> float:
    config: Config = validate(composed(["+hw=rtx3060", *overrides], ROOT / "outputs"))
    return plan(config).peak_gib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 30])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--bases", nargs="+", default=["smollm2_135m", "qwen2.5_0.5b", "qwen2.5_1.5b"])
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the timed steps")
    args = parser.parse_intermixed_args()
    quieten()
    console = Console()
    plain = validate(composed(args.overrides, ROOT / "outputs"))
    device = device_of(plain)
    out = {
        "machine": machine(device),
        "rotate": rotation_times(device),
        "by_layers": [{"layers": k, **of_configured(configured(args.overrides, k, 128))} for k in args.layers],
        "by_length": [
            {"length": n, **of_configured(configured(args.overrides, plain.gate.top_layers, n))} for n in args.lengths
        ],
        "by_base": [{"base": name, **of_shape(args.overrides, name, 128)} for name in args.bases],
        "planned_by_layers": [{"layers": k, "gib": planned_gib(f"gate.top_layers={k}")} for k in (1, 2, 4, 8, 16, 27)],
        "planned_by_length": [{"length": n, "gib": planned_gib(f"data.max_length={n}")} for n in (256, 512, 1024, 2048, 4096)],
        "planned_by_base": [{"base": name, "gib": planned_gib(f"base={name}")} for name in reversed(NAMED)],
    }
    file = result_file("cost", device)
    write_json(file, out)
    table = Table(title=f"rotate at {list(SHAPE)}; {out['machine']}", title_justify="left")
    for column in ("dtype", "copy (ms)", "forward (ms)", "of a copy", "compiled (ms)", "of a copy", "with backward (ms)"):
        table.add_column(column, justify="right")
    for row in out["rotate"]:
        copy, plain, fused, both = (1e3 * row[f"{key}_seconds"] for key in ("copy", "forward", "compiled", "both"))
        ratios = (f"{seconds:.2f}\t{seconds / copy:.1f}".split("\t") for seconds in (plain, fused))
        table.add_row(row["dtype"], f"{copy:.2f}", *(cell for pair in ratios for cell in pair), f"{both:.2f}")
    console.print(table)
    for key in ("by_layers", "by_length", "by_base", "planned_by_layers", "planned_by_length", "planned_by_base"):
        console.print(
            f"{key}: "
            + ", ".join("/".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()) for r in out[key])
        )
    plot(out, file.with_suffix(".png"))


SWEEPS = (("layers", "layers above the cut, K"), ("length", "tokens a row"), ("base", "base"))


def plot(out: dict, path: Path) -> None:
    """Time above, planned memory below; against K, length and base."""
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS, finish

    figure, axes = plt.subplots(2, 3, figsize=(14, 6.8))
    for axis, (x, name) in zip(axes[0], SWEEPS, strict=True):
        rows = out[f"by_{x}"]
        for colour, (key, label, style) in zip(
            COLOURS,
            (
                ("computed", "a step, prefix computed", "-"),
                ("cached", "a step, prefix cached", "-"),
                ("cached_forward", "of it forward", "--"),
                ("cached_backward", "of it backward", ":"),
            ),
            strict=False,
        ):
            axis.plot([row[x] for row in rows], [row[key] for row in rows], style, color=colour, marker="o", ms=4, label=label)
        axis.set(xlabel=name, ylabel="seconds", ylim=(0, None))
        axis.legend(fontsize=8)
    axes[0][0].set_title("Cached, a step costs what K layers cost", fontsize=10)
    axes[0][1].set_title("Time grows with the tokens", fontsize=10)
    axes[0][2].set_title("Random NF4 weights, K = 4, 4 rows of 128 tokens", fontsize=10)
    for axis, (x, name) in zip(axes[1], SWEEPS, strict=True):
        rows = out[f"planned_by_{x}"]
        axis.plot([row[x] for row in rows], [row["gib"] for row in rows], color=COLOURS[2], marker="o", ms=4)
        axis.set(xlabel=name, ylabel="planned peak (GiB)", ylim=(0, 1.15 * max(row["gib"] for row in rows)))
        axis.set_title("planned with +hw=rtx3060" if x == "base" else "Qwen2.5-7B, planned with +hw=rtx3060", fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[:, 2]:
        axis.tick_params(axis="x", rotation=15)
    finish(figure, path)


if __name__ == "__main__":
    with reported():
        main()
