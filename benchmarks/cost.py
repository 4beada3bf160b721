"""What a step costs as work grows, and a rotation beside a copy of the tensor.

    .venv/bin/python -m benchmarks.cost [--layers 1 2 4 8 16 30] [--lengths 64 128 256 512] [OVERRIDE ...]

Times are of real training steps of the configured base (no task loss, full batches of one length), forward and backward, with
the prefix computed and with the prefix from the cache, against the number K of layers above the cut and against the length;
memory is the plan's (`so8t plan`), against K, length and the named bases' sizes in the settings of `+hw=rtx3060`. `rotate` is
timed forward and backward at [1, 2048, 3584] in bfloat16 and float32; its floor is a copy of the tensor. Writes
`results/cost_<machine>.json` and `results/cost_<machine>.png`.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gates import ROOT, composed, machine, result_file
from benchmarks.peers import Contender, clock
from so8t.base import load_base
from so8t.config import Config, validate
from so8t.console import quieten, reported
from so8t.data.cache import PrefixCache
from so8t.files import write_json
from so8t.fused import fused_rotations
from so8t.memory import longest_batch, module_of, plan
from so8t.shapes import NAMED
from so8t.so8 import exp_map, rotate
from so8t.training import device_of

SHAPE = (1, 2048, 3584)
REPEATS = 15
STEPS = 5


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    clock(run, device)
    return statistics.median(clock(run, device) for _ in range(repeats))


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


def step_times(overrides: list[str], cut: int, length: int) -> dict[str, float]:
    """Seconds of a step on one full batch, with the prefix computed and with it cached."""
    settings = [*overrides, f"gate.top_layers={cut}", f"data.max_length={length}", "loss.task_weight=0"]
    config = validate(composed(settings, ROOT / "outputs"))
    device = device_of(config)
    module = module_of(config, load_base(config.base, cut=cut, device=device, with_head=False)).to(device).train()
    batch = longest_batch(config, config.data.batch_size, device)
    one = Contender(module, module.make_optimizer())
    seconds = {"computed": median_seconds(partial(one.step, batch), device, STEPS)}
    module.cache = PrefixCache(module.model.base, memory_gib=4.0, keep=module.model.below)
    seconds["cached"] = median_seconds(partial(one.step, batch), device, STEPS)
    module.model.gates.detach()
    return seconds


def planned_gib(*overrides: str) -> float:
    config: Config = validate(composed(["+hw=rtx3060", *overrides], ROOT / "outputs"))
    return plan(config).peak_gib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 30])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the timed steps")
    args = parser.parse_intermixed_args()
    quieten()
    console = Console()
    plain = validate(composed(args.overrides, ROOT / "outputs"))
    device = device_of(plain)
    out = {
        "machine": machine(device),
        "rotate": rotation_times(device),
        "by_layers": [{"layers": k, **step_times(args.overrides, k, 128)} for k in args.layers],
        "by_length": [{"length": n, **step_times(args.overrides, plain.gate.top_layers, n)} for n in args.lengths],
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
    for key in ("by_layers", "by_length", "planned_by_layers", "planned_by_length", "planned_by_base"):
        console.print(
            f"{key}: "
            + ", ".join("/".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()) for r in out[key])
        )
    plot(out, file.with_suffix(".png"))


def plot(out: dict, path: Path) -> None:
    """Time above, planned memory below."""
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS, finish

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4))
    for axis, (key, x, name) in zip(
        axes[0], (("by_layers", "layers", "layers above the cut, K"), ("by_length", "length", "tokens a row")), strict=True
    ):
        for colour, kind in zip(COLOURS, ("computed", "cached"), strict=False):
            points = [(row[x], row[kind]) for row in out[key]]
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"prefix {kind}")
        axis.set(xlabel=name, ylabel="seconds a step", ylim=(0, None))
        axis.legend(fontsize=8)
    axes[0][0].set_title("Cached, a step costs what K layers cost")
    axes[0][1].set_title("Time grows with the tokens")
    for axis, (key, x, name) in zip(
        axes[1],
        (("planned_by_layers", "layers", "layers above the cut, K"), ("planned_by_length", "length", "tokens a row")),
        strict=True,
    ):
        points = [(row[x], row["gib"]) for row in out[key]]
        axis.plot(*zip(*points, strict=True), color=COLOURS[2], marker="o")
        axis.set(xlabel=name, ylabel="planned peak (GiB)", ylim=(0, 1.15 * max(gib for _, gib in points)))
        axis.set_title("Qwen2.5-7B, +hw=rtx3060: planned memory")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    finish(figure, path)


if __name__ == "__main__":
    with reported():
        main()
