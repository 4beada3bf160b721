"""Pictures of a run, from the metrics that it logged: loss and its parts, group invariants, confusion matrices.

Colours are Okabe and Ito's, which the colour-blind can tell apart and print keeps.
"""

import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from so8t.labels import LABELS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
Series = dict[str, list[tuple[int, float]]]


def read_metrics(path: Path) -> Series:
    """The CSV logger's table by column: `[(step, value), ...]`; empty cells are passed over."""
    series: Series = defaultdict(list)
    if not path.is_file():
        return series
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(float(row.get("step") or 0))
            for name, cell in row.items():
                if cell not in ("", None) and name not in ("step", "epoch"):
                    value = float(cell)
                    if math.isfinite(value):
                        series[name].append((step, value))
    return series


def _finish(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def plot_losses(series: Series, path: Path) -> Path:
    """The total and every weighted term against optimiser steps, and each term's share."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    terms = [t for t in ("loss", "safety", "cost", "task", "pet", "inertia") if series.get(f"train/{t}")]
    for colour, term in zip(COLOURS, terms, strict=False):
        steps, values = zip(*series[f"train/{term}"], strict=True)
        left.plot(steps, values, color=colour, label="total" if term == "loss" else term, lw=2 if term == "loss" else 1.2)
        shares = series.get(f"train/share_{term}")
        if shares:
            steps, values = zip(*shares, strict=True)
            right.plot(steps, [100 * v for v in values], color=colour, label=term)
    if series.get("val/loss"):
        steps, values = zip(*series["val/loss"], strict=True)
        left.plot(steps, values, color="#000000", ls="--", marker="o", ms=3, label="validation, class loss")
    left.set(xlabel="optimiser step", ylabel="loss (nats, weighted)", title="Loss and its parts", yscale="log")
    right.set(xlabel="optimiser step", ylabel="share of the total (%)", title="Share of each term")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    return _finish(figure, path)


def plot_group(series: Series, path: Path, *, tolerance: float, tolerance_float32: float) -> Path:
    """Worst defects over all gates, the commutator of the last gate, and how far each gate has turned."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))

    def worst(kind: str) -> list[tuple[int, float]]:
        table: dict[int, float] = {}
        for name, points in series.items():
            if name.startswith("group/") and name.endswith(f"/{kind}"):
                for step, value in points:
                    table[step] = max(table.get(step, 0.0), value)
        return sorted(table.items())

    top = 0.0
    for colour, (kind, label) in zip(
        COLOURS,
        (
            ("orthogonality", "orthogonality, float64"),
            ("determinant", "determinant, float64"),
            ("orthogonality_float32", "orthogonality, as applied"),
            ("determinant_float32", "determinant, as applied"),
        ),
        strict=False,
    ):
        points = worst(kind)
        if points:
            steps, values = zip(*points, strict=True)
            axes[0].plot(steps, [max(v, 1e-18) for v in values], color=colour, label=label)
            top = max(top, max(values))
    axes[0].axhline(tolerance, color="#999999", ls=":", label="bar, float64")
    axes[0].axhline(tolerance_float32, color="#999999", ls="--", label="bar, as applied")
    axes[0].set(yscale="log", xlabel="optimiser step", ylabel="worst defect over all gates")
    axes[0].set_title("Every gate stays in SO(8)" if top < tolerance_float32 else "A gate has left SO(8)")
    for name, points in sorted(series.items()):
        if name.startswith("group/") and name.endswith("/commutator_mean"):
            steps, values = zip(*points, strict=True)
            axes[1].plot(steps, values, label=name.split("/")[1])
    axes[1].set(
        xlabel="optimiser step", ylabel=r"mean $\|R_{cmd}R_{safe} - R_{safe}R_{cmd}\|_F$", title="The pair does not commute"
    )
    angles = sorted(n for n in series if n.startswith("group/") and n.endswith("/angle"))
    for k, name in enumerate(angles):
        steps, values = zip(*series[name], strict=True)
        axes[2].plot(steps, values, color=COLOURS[k % 8], ls=("-", "--", ":")[k // 8 % 3], label=name.split("/")[1])
    axes[2].set(xlabel="optimiser step", ylabel=r"largest $\|R - I\|_F$ of a block", title="How far each gate turns")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return _finish(figure, path)


def plot_confusion(confusion: list[list[int]], title: str, path: Path) -> Path:
    """Rows are labels, columns decisions; colour is the share of the row."""
    figure, axis = plt.subplots(figsize=(4.8, 4.2))
    sums = [max(1, sum(row)) for row in confusion]
    image = axis.imshow([[v / s for v in row] for row, s in zip(confusion, sums, strict=True)], cmap="cividis", vmin=0, vmax=1)
    for i, row in enumerate(confusion):
        for j, value in enumerate(row):
            dark = value / sums[i] < 0.5
            axis.text(j, i, f"{value}\n{value / sums[i]:.0%}", ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(LABELS)), LABELS)
    axis.set_yticks(range(len(LABELS)), LABELS)
    axis.set(xlabel="decision", ylabel="label", title=title)
    figure.colorbar(image, label="share of the label's rows", shrink=0.8)
    return _finish(figure, path)
