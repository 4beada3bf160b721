"""The report's panel on wrapped requests: what gets through as it is and wrapped, in all and by language."""

from functools import partial

from so8t.page import Panel, Table, drawn, figure_cell
from so8t.plots import plot_robustness
from so8t.robustness import Wrapped
from so8t.run_folder import ROBUSTNESS, RunFolder

HEAD = ("rows", "false allow [95 %]", "wrapped [95 %]", "over-refusal [95 %]", "wrapped [95 %]", "decision changed [95 %]")


def robustness_panel(run: RunFolder) -> Panel:
    """Both rates before and after each wrapping."""
    panel = Panel(
        "robustness",
        "Under wrappings",
        "Requests of the test split wrapped in ways that were never trained on, decided before and after, with 95 % intervals. "
        "Refusing whatever is wrapped is not robust: over-refusal shows it. Rewordings in another tense have no originals.",
    )
    if run.robustness is None:
        panel.misses(f"{ROBUSTNESS} (so8t robustness writes it)")
    elif run.robustness:
        alt = "False allow and over-refusal by wrapping, before and after"
        panel.pictures.append(drawn(panel.key, alt, partial(plot_robustness, run.robustness), wide=True))
        rows = [[one.name, *_cells(one)] for one in run.robustness]
        panel.tables.append(Table("rates by wrapping", ["wrapping", *HEAD], rows))
        rows = [[one.name, name, *_cells(part)] for one in run.robustness for name, part in one.by_language.items()]
        if rows:
            panel.tables.append(Table("rates by wrapping and language", ["wrapping", "language", *HEAD], rows))
    return panel


def _cells(one: Wrapped) -> list[str]:
    """Under `HEAD`."""
    rates = (*one.false_allow, *one.over_refusal, one.changed)
    told = ["-" if rate is None else figure_cell(rate.rate, rate.interval_95) for rate in rates]
    return [str(one.risky + one.benign), *told]
