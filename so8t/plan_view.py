"""A memory plan for people (a table, a stacked bar) and for programs (JSON)."""

from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from so8t.config import Config
from so8t.memory import MARGIN, PARTS, Plan, runs_on_gpu
from so8t.plots import COLOURS, Target, finish
from so8t.remedies import Remedy


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def subject(config: Config) -> str:
    """What was planned: base, batch, sequence, K, and what it runs on."""
    where = config.hw.name if config.hw else "a GPU" if runs_on_gpu(config) else "the CPU"
    task = "task loss on" if config.loss.task_weight else "task loss off"
    return (
        f"{config.base.name} on {where}: batch {config.data.batch_size}, sequence {config.data.max_length}, "
        f"K = {config.gate.top_layers}, {task}"
    )


def verdict(planned: Plan) -> str:
    """One sentence: whether it fits, and with how much to spare."""
    needs = f"{_size(planned.peak_gib)} and {MARGIN:.0%} of margin make {_size(planned.needed_gib)}"
    if planned.budget_gib is None:
        return f"{needs}; no hardware profile says what there is (add one: +hw=rtx3060)"
    card = f", of a card of {planned.card_gib:g} GiB" if planned.card_gib else ""
    return f"{'fits' if planned.fits else 'does not fit'}: {needs}; the budget is {planned.budget_gib:g} GiB{card}"


def above_the_cut(planned: Plan) -> str:
    """What is paid for activations there: memory, or a second forward pass."""
    return f"activations above the cut are {'computed again' if planned.checkpointed else 'kept'} for the backward pass"


def by_part(planned: Plan) -> list[list[str]]:
    """A row a part that is there, with its size at the peak of each phase; their sums are the last row."""
    rows = [
        [name, *(_size(size) if size else "-" for size in sizes)]
        for part, name in PARTS.items()
        if any(sizes := [parts[part] for parts in planned.phases.values()])
    ]
    return [*rows, ["together", *(_size(sum(parts.values())) for parts in planned.phases.values())]]


def print_plan(config: Config, planned: Plan, found: list[Remedy], console: Console) -> None:
    """The parts of both phases, the verdict, and what would make it fit."""
    table = Table(title=f"planned, not measured: {subject(config)}", title_justify="left")
    table.add_column("at the peak of")
    for phase in planned.phases:
        table.add_column(f"a {phase}", justify="right", style="bold" if phase == planned.phase else "")
    *parts, together = by_part(planned)
    for row in parts:
        table.add_row(*row)
    table.add_section()
    table.add_row(*together)
    console.print(table)
    colour = {True: "green", False: "red", None: "yellow"}[planned.fits]
    console.print(f"[bold {colour}]{verdict(planned)}[/]")
    console.print(above_the_cut(planned))
    for line in advice(planned, found):
        console.print(line)


def advice(planned: Plan, found: list[Remedy]) -> list[str]:
    """What would make it fit, one line each; nothing when it fits."""
    if planned.fits is not False:
        return []
    if not found:
        return ["nothing that is known here makes it fit: take a larger card, or a smaller base"]
    lines = ["what would make it fit, cheapest first (each planned again):"]
    return lines + [f"  {' '.join(r.overrides)}   {_size(r.plan.peak_gib)}" for r in found]


def as_json(planned: Plan, found: list[Remedy]) -> dict[str, Any]:
    """For programs: sizes in GiB."""
    return {
        "peak_gib": planned.peak_gib,
        "fits": planned.fits,
        "parts": planned.parts,
        "phase": planned.phase,
        "checkpointed": planned.checkpointed,
        "phases": {phase: sum(parts.values()) for phase, parts in planned.phases.items()},
        "margin": MARGIN,
        "budget_gib": planned.budget_gib,
        "card_gib": planned.card_gib,
        "would_fit": [{"overrides": list(r.overrides), "peak_gib": r.plan.peak_gib} for r in found],
    }


def plot_plan(config: Config, planned: Plan, to: Target) -> None:
    """One stacked bar a phase, with the budget as a line."""
    figure, axis = plt.subplots(figsize=(10, 3.4))
    names = list(planned.phases)
    begin = [0.0] * len(names)
    shown = [part for part in PARTS if any(parts[part] > 0.005 * planned.peak_gib for parts in planned.phases.values())]
    for k, part in enumerate(shown):
        sizes = [planned.phases[name][part] for name in names]
        hatch = "//" if k >= len(COLOURS) else None  # more parts than colours that all can tell apart
        axis.barh(names, sizes, left=begin, color=COLOURS[k % len(COLOURS)], hatch=hatch, label=PARTS[part])
        begin = [b + size for b, size in zip(begin, sizes, strict=True)]
    for y, total in enumerate(begin):
        axis.text(total, y, f" {_size(total)}", va="center")
    if planned.budget_gib is not None:
        axis.axvline(planned.budget_gib, color="black", ls="--", lw=1.2, label=f"budget, {planned.budget_gib:g} GiB")
    axis.set_xlim(0, 1.15 * max(*begin, planned.budget_gib or 0))
    axis.invert_yaxis()
    axis.set_xlabel("GiB at the peak (planned, not measured)")
    says = {True: "fits", False: "does not fit", None: "needs"}[planned.fits]
    axis.set_title(f"{subject(config)}\n{says}: {_size(planned.peak_gib)} at the peak", fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    finish(figure, to)


__all__ = ["advice", "as_json", "by_part", "plot_plan", "print_plan", "subject", "verdict"]
