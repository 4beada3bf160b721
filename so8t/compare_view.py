"""A comparison of runs: its tables, what does not help in plain words, a picture, and the same as plain values."""

import math
import textwrap
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8t.compare import FIGURES, PAIRED, Comparison, Figure, Variant, mean_and_spread
from so8t.plots import COLOURS, Target, finish

ABREAST, WIDTH = 4, 14
"""Figures in a table, and the columns that each takes, so that a table is no wider than 80."""
DRAWN = ("macro_f1", "false_allow_rate", "over_refusal_rate")
"""Figures on the picture, a row of it each."""
MANY = 12
"""Variants, beyond which the picture's lines are closer."""
TERMINAL = {"better": "green", "worse": "red"}
MARKS = {
    "better": (COLOURS[0], "o"),
    "worse": (COLOURS[1], "s"),
    "no difference shown": (COLOURS[7], "D"),
    None: ("#000000", "o"),
}
"""Colour and form of each verdict; the baseline, and what cannot be told, are black."""


def _known(comparison: Comparison) -> list[Figure]:
    """Figures that any variant has."""
    return [figure for figure in FIGURES if any(variant.values(figure) for variant in comparison.variants)]


def _cell(variant: Variant, figure: Figure) -> str:
    told = _mean(variant.values(figure), f".{figure.digits}f")
    interval = variant.interval(figure)
    return told if interval is None else f"{told}\n{escape(f'[{interval[0]:.3f}, {interval[1]:.3f}]')}"


def _mean(values: Sequence[float], form: str) -> str:
    """Of seeds, with their spread where there are several."""
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} ± {spread:{form.removeprefix('+')}}"


def _gain(variant: Variant, baseline: Variant, figure: Figure) -> str:
    if not figure.paired:
        return _mean(variant.gain_by_seed(figure, baseline), f"+.{figure.digits}f")
    gain = variant.gain(figure, baseline)
    if gain is None:
        return "-"
    colour = TERMINAL.get(variant.verdict(figure, baseline) or "")
    told = f"{gain[0]:+.3f}\n{escape(f'[{gain[1][0]:+.3f}, {gain[1][1]:+.3f}]')}"
    return f"[{colour}]{told}[/]" if colour else told


def _table(title: str, *columns: str) -> Table:
    """Without lines between columns, so that four figures fit into 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(textwrap.fill(column, WIDTH), justify="right", no_wrap=True)
    return table


def _print_figures(
    title: str, comparison: Comparison, variants: Sequence[Variant], cell: Callable[[Variant, Figure], str], console: Console
) -> None:
    """A row a variant, by its number, and `ABREAST` figures a table."""
    known = _known(comparison)
    for begin in range(0, len(known), ABREAST):
        shown = known[begin : begin + ABREAST]
        table = _table("" if begin else title, "variant", *(figure.title for figure in shown))
        for variant in variants:
            number = str(1 + comparison.variants.index(variant))
            style = "bold" if variant is comparison.baseline else ""
            table.add_row(number, *(cell(variant, figure) for figure in shown), style=style)
        console.print(table, "")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The variants by number, their figures, differences to the baseline, and a verdict on each in plain words."""
    baseline = comparison.baseline
    table = _table("", "variant")
    table.add_column("what differs", overflow="fold")
    table.add_column("seeds", justify="right")
    table.add_column("trained", justify="right", no_wrap=True)
    for number, variant in enumerate(comparison.variants, 1):
        trained = "-" if variant.trained is None else f"{variant.trained:,}"
        style = "bold" if variant is baseline else ""
        table.add_row(str(number), escape(variant.name), ", ".join(map(str, variant.seeds)), trained, style=style)
    console.print(table, "")
    named = [variant for variant in comparison.variants if variant.name not in (_keys(variant), "all runs")]
    for variant in named:
        console.print(f"{escape(variant.name)}: {escape(_keys(variant))}")
    _print_figures("mean ± s.d. over seeds [95 %, over rows and seeds]", comparison, comparison.variants, _cell, console)
    if comparison.others:
        number = 1 + comparison.variants.index(baseline)
        title = f"difference to variant {number} [95 %, paired], or mean ± s.d. over pairs of seeds"
        _print_figures(title, comparison, comparison.others, lambda variant, f: _gain(variant, baseline, f), console)
    for variant in comparison.others:
        console.print(f"{escape(variant.name)}: {describe(variant, baseline)}")
    for line in notes(comparison):
        console.print(line)
    for left in comparison.left_out:
        console.print(f"[yellow]left out: {escape(str(left.folder))}: {escape(left.why)}[/]")


def _keys(variant: Variant) -> str:
    return " ".join(f"{key}={value}" for key, value in variant.differences.items())


def describe(variant: Variant, baseline: Variant) -> str:
    """Whether it helps, and every figure that is shown to be better or worse."""
    right = variant.more_right(baseline)
    if right is None:
        return "cannot be told: predictions are missing"
    shown = [
        f"{figure.title} {verdict}"
        for figure in PAIRED
        if (verdict := variant.verdict(figure, baseline)) in ("better", "worse")
    ]
    head = "[bold]does NOT help[/]"
    if right:
        head = "[bold yellow]more right, but allows more harm[/]" if variant.more_harm(baseline) else "[bold green]helps[/]"
    return f"{head} ({'; '.join(shown) or 'no difference shown in any figure'})"


def notes(comparison: Comparison) -> list[str]:
    """What has to be known before the verdicts are believed."""
    lines = []
    figures = sum(figure.paired for figure in _known(comparison))
    if comparison.others:
        lines.append(
            "helps: the interval of macro-F1's difference is above zero on one set and below zero on none, and no false allow "
            f"is shown to be worse. Each interval is 95 % by itself: of {len(comparison.others)} variants on {figures} figures "
            "some miss by chance"
        )
    if any(len(variant.runs) == 1 for variant in comparison.variants):
        lines.append("variants with one seed: their intervals know nothing of what another seed would give")
    return lines


def plot_comparison(comparison: Comparison, to: Target) -> None:
    """A dot and its interval a variant, small dots the seeds; its colour and form tell the difference to the baseline."""
    shown = [figure for figure in _known(comparison) if figure.key in DRAWN]
    keys, parts = list(dict.fromkeys(f.key for f in shown)), list(dict.fromkeys(f.part for f in shown))
    count = len(comparison.variants)
    names = [textwrap.fill(textwrap.shorten(variant.name, 90, placeholder=" ..."), 32) for variant in comparison.variants]
    each = 0.45 if count <= MANY else 0.13 + 0.15 * max(name.count("\n") + 1 for name in names)
    size = (4.6 * len(parts) + 2, len(keys) * (1.5 + each * count))
    figure, axes = plt.subplots(len(keys), len(parts), figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for what in shown:
        axis = axes[keys.index(what.key)][parts.index(what.part)]
        axis.set_axis_on()
        for row, variant in enumerate(comparison.variants):
            values = variant.values(what)
            if not values:
                continue
            verdict = None if variant is comparison.baseline else variant.verdict(what, comparison.baseline)
            colour, marker = MARKS[verdict]
            mean = sum(values) / len(values)
            axis.plot(values, [row + 0.2] * len(values), ls="", marker=".", ms=4, color=colour, alpha=0.7)
            if interval := variant.interval(what):
                axis.plot(interval, [row, row], color=colour, lw=1.8)
            axis.plot(mean, row, marker=marker, ms=7, color=colour)
            if variant is comparison.baseline:
                axis.axvline(mean, color="#000000", ls=":", lw=1)
        axis.set(xlabel=f"{what.title} ({'more' if what.more else 'less'} is better)")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(count), names)
    for left in axes[:, 0]:
        left.tick_params("y", labelsize=8)
    axes[0][0].set_ylim(count - 0.4, -0.6)
    verdicts = {v for what in shown for o in comparison.others if (v := o.verdict(what, comparison.baseline))}
    legend = [
        Line2D([], [], color=MARKS[v][0], marker=MARKS[v][1], lw=1.8, label=f"{v}, paired 95 %" if v == "better" else v)
        for v in MARKS
        if v in verdicts
    ]
    legend.append(Line2D([], [], color="#000000", marker="o", ls=":", lw=1, label="baseline"))
    below = -0.6 / (0.6 + each * count)
    axes[-1][0].legend(handles=legend, loc="upper left", bbox_to_anchor=(0, below), ncols=2, fontsize=8, frameon=False)
    axes[0][0].set_title(finding(comparison), fontsize=11, loc="left")
    finish(figure, to)


def finding(comparison: Comparison) -> str:
    """The picture's title."""
    told = [helps for variant in comparison.others if (helps := variant.helps(comparison.baseline)) is not None]
    if not told:
        return "Variants side by side"
    return f"{sum(told)} of {len(told)} variants {'is' if sum(told) == 1 else 'are'} shown to help"


def as_json(comparison: Comparison) -> dict[str, object]:
    """Plain values; what is not known is null."""
    baseline = comparison.baseline
    return {
        "baseline": baseline.name,
        "variants": [
            {
                "name": variant.name,
                "differences": variant.differences,
                "runs": [str(run.folder) for run in variant.runs],
                "seeds": variant.seeds,
                "trained_parameters": variant.trained,
                "figures": {_key(figure): _plain(variant, baseline, figure) for figure in FIGURES},
                "helps": None if variant is baseline else variant.helps(baseline),
            }
            for variant in comparison.variants
        ],
        "left_out": [{"run": str(left.folder), "why": left.why} for left in comparison.left_out],
    }


def _key(figure: Figure) -> str:
    return f"{figure.part}/{figure.key}"


def _plain(variant: Variant, baseline: Variant, figure: Figure) -> dict[str, object]:
    values = variant.values(figure)
    mean, spread = (None if math.isnan(v) else v for v in mean_and_spread(values))
    told: dict[str, object] = {"mean": mean, "sd": spread, "by_seed": values, "interval_95": variant.interval(figure)}
    if variant is baseline:
        return told
    by_seed = variant.gain_by_seed(figure, baseline)
    if by_seed:
        mean, spread = (None if math.isnan(v) else v for v in mean_and_spread(by_seed))
        told |= {"gain": mean, "gain_sd": spread, "gain_by_seed": by_seed}
    gain = variant.gain(figure, baseline)
    if gain is not None:
        told |= {"gain": gain[0], "gain_95": gain[1], "verdict": variant.verdict(figure, baseline)}
    return told
