"""Pictures of a run: loss and its parts, group invariants, gates, confusion matrices, and curves over thresholds.

Colours are Okabe and Ito's, which the colour-blind can tell apart and print keeps.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from so8t.curves import Floats, OperatingPoint, Reliability, RiskCoverage, TradeOff
from so8t.labels import LABELS

if TYPE_CHECKING:
    from so8t.robustness import Wrapped

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
GROUP_STYLES = (("#000000", "--"), *((colour, "-") for colour in COLOURS[:6]))
"""Of all rows, and of groups of them."""
LONGEST = 36
"""Characters of a name in a picture."""
Series = dict[str, list[tuple[int, float]]]
Target = Path | BytesIO
"""Where a picture goes, as PNG: a file, or memory."""


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


def finish(figure: Figure, to: Target) -> None:
    """Lays out, writes the PNG and forgets the figure."""
    if isinstance(to, Path):
        to.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.set_layout_engine(None)  # laid out; with an engine, savefig would draw everything twice
    figure.savefig(to, dpi=130, format="png")
    plt.close(figure)


def plot_losses(series: Series, to: Target) -> None:
    """The total and every weighted term against optimiser steps, and each term's share with PET's phases."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    terms = [t for t in ("loss", "safety", "path", "cost", "task", "pet", "inertia") if series.get(f"train/{t}")]
    for colour, term in zip((*COLOURS[:6], COLOURS[7]), terms, strict=False):  # black is the validation's
        steps, values = zip(*series[f"train/{term}"], strict=True)
        left.plot(steps, values, color=colour, label="total" if term == "loss" else term, lw=2 if term == "loss" else 1.2)
        shares = series.get(f"train/share_{term}")
        if shares:
            steps, values = zip(*shares, strict=True)
            right.plot(steps, [100 * v for v in values], color=colour, label=term)
    before = math.nan
    for step, factor in series.get("train/pet_phase", []):
        if factor != before:
            right.axvline(step, color="#999999", ls=":", lw=1)
            right.text(step, 0.98, f" PET x {factor:g}", transform=right.get_xaxis_transform(), fontsize=7, va="top")
        before = factor
    if series.get("val/loss"):
        steps, values = zip(*series["val/loss"], strict=True)
        left.plot(steps, values, color="#000000", ls="--", marker="o", ms=3, label="validation, class loss")
    left.set(xlabel="optimiser step", ylabel="loss (nats, weighted)", title="Loss and its parts", yscale="log")
    right.set(xlabel="optimiser step", ylabel="share of the total (%)", title="Share of each term")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    finish(figure, to)


def plot_group(series: Series, to: Target, *, tolerance: float, tolerance_float32: float) -> None:
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
    finish(figure, to)


def plot_confusion(confusion: list[list[int]], title: str, to: Target) -> None:
    """Rows are labels, columns decisions; colour is the share of the row."""
    figure, axis = plt.subplots(figsize=(4.8, 3.7))
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
    finish(figure, to)


def plot_trade_off(curves: Mapping[str, TradeOff], points: Mapping[str, Mapping[str, OperatingPoint]], to: Target) -> None:
    """False allow against over-refusal, one curve a set; `points` are ways of deciding, by set and name."""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        axis.plot(100 * curve.over_refusal, 100 * curve.false_allow, color=colour, lw=1.6, label=name)
        for marker, (how, point) in zip("osD^", points.get(name, {}).items(), strict=False):
            axis.plot(
                100 * point.over_refusal, 100 * point.false_allow, ls="", color=colour, marker=marker, ms=8, mec="black",
                label=f"{how}: {point.false_allow:.1%} false allow, {point.over_refusal:.1%} over-refusal",
            )  # fmt: skip
    axis.set(xlabel="over-refusal (% of ALLOW rows)", ylabel="false allow (% of the other rows)", xlim=(0, 100), ylim=(0, 100))
    axis.set_title("What fewer false allows cost, by threshold on P(ALLOW)", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper right")
    finish(figure, to)


def plot_risk_coverage(curves: Mapping[str, RiskCoverage], to: Target) -> None:
    """Error rate among the most confident rows, one curve a set."""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        label = f"{name}: AURC {curve.aurc:.3f} (best order {curve.best_aurc:.3f})"
        axis.step(100 * curve.coverage, 100 * curve.risk, where="post", color=colour, lw=1.6, label=label)
        axis.axhline(100 * curve.risk[-1], color=colour, ls=":", lw=1)
    axis.set(xlabel="coverage (% of the rows, most confident first)", ylabel="error rate among them (%)", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    axis.set_title("Error rate when only confident rows are decided", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    finish(figure, to)


def plot_trade_offs(kinds: Mapping[str, Mapping[str, tuple[TradeOff, OperatingPoint]]], title: str, to: Target) -> None:
    """False allow against over-refusal by kind of group and group, all rows first; the dots are the decisions."""
    figure, axes = _side_by_side(kinds)
    for axis, (kind, groups) in zip(axes, kinds.items(), strict=True):
        for (colour, dashes), (name, (curve, point)) in zip(GROUP_STYLES, groups.items(), strict=False):
            axis.plot(100 * curve.over_refusal, 100 * curve.false_allow, color=colour, ls=dashes, lw=1.4, label=_cut(name))
            axis.plot(100 * point.over_refusal, 100 * point.false_allow, color=colour, marker="o", ms=6, mec="black")
        _, *others = groups
        worst = max(others, key=lambda name: groups[name][1].false_allow)
        axis.set_title(f"by {kind}, most let through:\n{_cut(worst)} ({groups[worst][1].false_allow:.1%})", fontsize=9)
        axis.set(xlabel="over-refusal (% of ALLOW rows)", xlim=(0, 100), ylim=(0, 100))
    axes[0].set_ylabel("false allow (% of the other rows)")
    figure.suptitle(f"{title}: what fewer false allows cost, by threshold on P(ALLOW)", fontsize=11)
    _finish_side_by_side(figure, axes, to)


def plot_risk_coverages(kinds: Mapping[str, Mapping[str, RiskCoverage]], title: str, to: Target) -> None:
    """Error rate among the most confident rows by kind of group and group, all rows first."""
    figure, axes = _side_by_side(kinds)
    for axis, (kind, groups) in zip(axes, kinds.items(), strict=True):
        for (colour, dashes), (name, curve) in zip(GROUP_STYLES, groups.items(), strict=False):
            label = f"{_cut(name)}: AURC {curve.aurc:.3f}"
            axis.step(100 * curve.coverage, 100 * curve.risk, where="post", color=colour, ls=dashes, lw=1.4, label=label)
        _, *others = groups
        worst = max(others, key=lambda name: groups[name].risk[-1])
        axis.set_title(f"by {kind}, most errors:\n{_cut(worst)} ({groups[worst].risk[-1]:.1%})", fontsize=9)
        axis.set(xlabel="coverage (% of the rows, most confident first)", xlim=(0, 100))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("error rate among them (%)")
    figure.suptitle(f"{title}: error rate when only confident rows are decided", fontsize=11)
    _finish_side_by_side(figure, axes, to)


def _side_by_side(kinds: Mapping[str, Mapping[str, object]]) -> tuple[Figure, list[Axes]]:
    """One part a kind, with room for the names of its groups below."""
    lines = max(map(len, kinds.values()))
    figure, axes = plt.subplots(1, len(kinds), figsize=(max(6.4, 4 * len(kinds)), 4 + 0.19 * lines), squeeze=False)
    return figure, list(axes[0])


def _finish_side_by_side(figure: Figure, axes: Sequence[Axes], to: Target) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    finish(figure, to)


def _cut(name: str) -> str:
    """A name from the data as part of a text in a picture: its middle left out where it is long, and no mathematics."""
    cut = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"
    return cut.replace("$", r"\$").replace("_", " _", int(cut.startswith("_")))  # a legend leaves out what begins with _


def plot_reliability(bins: Reliability, title: str, to: Target) -> None:
    """Accuracy by confidence above, rows by confidence below; the gaps to the diagonal are the calibration error."""
    figure, (top, low) = plt.subplots(2, 1, figsize=(4.8, 5.2), sharex=True, height_ratios=(3, 1))
    middles, width = (bins.edges[:-1] + bins.edges[1:]) / 2, bins.edges[1] - bins.edges[0]
    top.bar(middles, np.nan_to_num(bins.accuracy), width=0.94 * width, color=COLOURS[5], label="accuracy")
    top.plot(bins.confidence, bins.accuracy, ls="", marker="o", ms=4, color=COLOURS[0], label="mean confidence, accuracy")
    top.plot([0, 1], [0, 1], color="#000000", ls="--", lw=1, label="calibrated")
    top.set(ylabel="share decided rightly", ylim=(0, 1), xlim=(0, 1), title=f"{title}: ECE {bins.error:.3f}")
    top.legend(fontsize=8, loc="upper left")
    low.bar(middles, bins.rows, width=0.94 * width, color=COLOURS[7])
    low.set(xlabel="probability of the most probable label", ylabel="rows")
    for axis in (top, low):
        axis.grid(alpha=0.3)
    finish(figure, to)


def plot_angles(angles: Mapping[str, Floats], to: Target) -> None:
    """How far every block of every gate turns, `||R - I||_F`: `{gate: [blocks]}`."""
    widest = max(map(len, angles.values()))
    table = np.full((len(angles), widest), np.nan)
    for row, values in zip(table, angles.values(), strict=True):
        row[: len(values)] = values
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.3 * len(angles)))
    image = axis.imshow(table, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0)
    axis.set_yticks(range(len(angles)), list(angles), fontsize=8)
    least = min(angles, key=lambda name: float(angles[name].mean()))
    most = max(angles, key=lambda name: float(angles[name].mean()))
    axis.set(xlabel="block of eight", title=f"{most} turns most, {least} least")
    figure.colorbar(image, label=r"$\|R - I\|_F$ (at most $2\sqrt{8} = 5.66$)", pad=0.01)
    finish(figure, to)


def plot_robustness(wrapped: Sequence["Wrapped"], to: Target) -> None:
    """False allow and over-refusal by wrapping: hollow as they are, filled wrapped, with 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.8 + 0.35 * len(wrapped)), sharey=True)
    for axis, colour, what, pairs in (
        (axes[0], COLOURS[1], "false allow (% of ESCALATE and REFUSE rows)", [one.false_allow for one in wrapped]),
        (axes[1], COLOURS[0], "over-refusal (% of ALLOW rows)", [one.over_refusal for one in wrapped]),
    ):
        for y, (before, after) in enumerate(pairs):
            if after.rate is None:
                continue
            if before is not None and before.rate is not None:
                axis.plot([100 * before.rate, 100 * after.rate], [y, y], color="#999999", lw=1, zorder=1)
                axis.plot(100 * before.rate, y, marker="o", ms=7, mfc="white", color=colour, ls="")
            if after.interval_95 is not None:
                axis.hlines(y, 100 * after.interval_95[0], 100 * after.interval_95[1], color=colour, lw=3, alpha=0.35)
            axis.plot(100 * after.rate, y, marker="o", ms=7, color=colour, ls="")
        axis.set(xlabel=what, xlim=(-2, 102))
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(wrapped)), [one.name for one in wrapped])
    axes[0].invert_yaxis()
    worst = max(wrapped, key=lambda one: one.false_allow[1].rate or 0.0)
    figure.suptitle(
        f"Most gets through under: {worst.name}, {worst.false_allow[1].rate or 0:.0%} false allow "
        "(hollow: as they are, filled: wrapped)",
        fontsize=11,
    )
    finish(figure, to)
