"""The plan against what a real step allocates.

    .venv/bin/python -m benchmarks.memory [--bases qwen2.5_0.5b ...] [OVERRIDE ...]     on a GPU
    .venv/bin/python -m benchmarks.memory --cpu [OVERRIDE ...]                          the embedded base on the CPU

On a CUDA GPU: `torch.cuda.max_memory_allocated` with random NF4 weights of the named bases' shapes, in the settings of
`+hw=rtx3060`. Needs no network and no weights: the base is `so8t.blank`, its numbers are random, its sizes and operations are
not. On the CPU: what PyTorch's allocator reports (its profiler's memory events) for the real NF4 SmolLM2-135M in the
default settings. Each runs a training step and a validation batch at their longest, and writes planned and measured peaks
and their ratio into `results/memory.json` or `results/memory_cpu.json`; the bar is 10 %.
"""

import argparse
import gc
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import bitsandbytes
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from so8t.base import SplitBase, load_base, stored_tensors
from so8t.blank import blank_base
from so8t.config import Config, compose_train, validate
from so8t.console import quieten, reported
from so8t.errors import HardwareError
from so8t.files import write_json
from so8t.lightning_module import SO8TModule
from so8t.memory import GIB, longest_batch, module_of, plan, training_step, validation_step, warm_up
from so8t.shapes import NAMED, base_config
from so8t.tracker import ByteTracker

RESULTS = Path(__file__).parent / "results"
BAR = 0.10


def phases(module: SO8TModule, config: Config, device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """The longest training step and the longest validation batch, ready to run."""
    for phase, step, rows in (
        ("training step", training_step, config.data.batch_size),
        ("validation batch", validation_step, config.data.eval_batch_size),
    ):
        module.train(phase == "training step")
        batch = longest_batch(config, rows, device)
        yield phase, lambda step=step, batch=batch: step(module, batch)


def measure_gpu(config: Config, device: torch.device) -> dict[str, float]:
    """GiB allocated at the peak of each phase."""
    shape, with_head = base_config(config.base), bool(config.loss.task_weight)
    base = blank_base(config.base, shape, cut=config.gate.top_layers, device=device, on_gpu=True, with_head=with_head)
    module = module_of(config, base).to(device)
    optimizer = warm_up(module, ByteTracker())  # its averages stay alive
    peaks = {}
    for phase, run in phases(module, config, device):
        run()  # the first call of a kernel may allocate workspaces that stay
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peaks[phase] = torch.cuda.max_memory_allocated(device) / GIB
        del run
    del optimizer, module, base
    gc.collect()
    torch.cuda.empty_cache()
    return peaks


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(run: Callable[[], None]) -> int:
    """Bytes that PyTorch's CPU allocator had given out at the peak of `run`, above those of before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure_cpu(config: Config, base: SplitBase) -> tuple[float, dict[str, float]]:
    """GiB that is there before a step, and GiB above it at the peak of each phase."""
    module = module_of(config, base)
    optimizer = warm_up(module, ByteTracker())
    averages = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    weights = [tensor for _, tensor in stored_tensors(base)] + [m.dense for m in base.modules() if hasattr(m, "dense")]
    there = held([*weights, *module.parameters(), *module.buffers(), *gradients, *averages])
    above = {phase: allocated(run) / GIB for phase, run in phases(module, config, torch.device("cpu"))}
    module.model.gates.detach()
    return there / GIB, above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=list(NAMED), default=list(reversed(NAMED)))
    parser.add_argument("--cpu", action="store_true", help="the embedded base on the CPU instead")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every base")
    args = parser.parse_intermixed_args()
    quieten()
    console = Console()
    if not args.cpu and not torch.cuda.is_available():
        raise HardwareError(
            "benchmarks.memory measures on a CUDA GPU and torch sees none here: `so8t plan` predicts without one, and "
            "--cpu compares its prediction with a real step of the embedded base"
        )
    device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
    if not args.cpu:  # as trainer.deterministic=warn does
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    name = f"CPU ({platform.machine()})" if args.cpu else torch.cuda.get_device_name(device)
    out = {
        "device": name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__},
        "overrides": args.overrides,
        "bar": BAR,
        "rows": [],
    }
    for base in ["smollm2_135m"] if args.cpu else args.bases:
        settings = ["trainer.accelerator=cpu"] if args.cpu else ["+hw=rtx3060", f"base={base}"]
        config = validate(compose_train([*settings, *args.overrides]))
        planned = plan(config)
        if args.cpu:
            there, above = measure_cpu(config, load_base(config.base, cut=config.gate.top_layers))
            measured = {phase: there + gib for phase, gib in above.items()}
        else:
            measured = measure_gpu(config, device)
        for phase, gib in measured.items():
            guess = sum(planned.phases[phase].values())
            row = {"base": base, "phase": phase, "planned_gib": guess, "measured_gib": gib, "ratio": guess / gib}
            out["rows"].append({**row, "parts": planned.phases[phase]})
        write_json(RESULTS / ("memory_cpu.json" if args.cpu else "memory.json"), out)
    report(out, console)


def report(out: dict, console: Console) -> None:
    """The table, and how far off the plan was at most."""
    table = Table(title=f"planned and measured peaks, {out['device']}", title_justify="left")
    for column in ("base", "phase", "planned (GiB)", "measured (GiB)", "planned / measured"):
        table.add_column(column, justify="left" if column in ("base", "phase") else "right")
    for row in out["rows"]:
        sizes = (f"{row['planned_gib']:.4f}", f"{row['measured_gib']:.4f}", f"{row['ratio']:.4f}")
        table.add_row(row["base"], row["phase"], *sizes)
    console.print(table)
    worst = max(abs(row["ratio"] - 1) for row in out["rows"])
    console.print(f"largest error of the plan: {worst:.2%} (bar {BAR:.0%})")


if __name__ == "__main__":
    with reported():
        main()
