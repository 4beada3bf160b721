"""The report's panel on sources, languages and forms: the curves over thresholds of each, beside those of all rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from so8t.curves import OperatingPoint, RiskCoverage, TradeOff, operating_point, risk_coverage, trade_off
from so8t.groupings import UNKNOWN, rows_by_group
from so8t.labels import Label
from so8t.page import Panel, drawn
from so8t.plots import plot_risk_coverages, plot_trade_offs
from so8t.run_folder import SETS, PredictedRows, RunFolder

LEAST = 30
"""Rows under which a group gets no curve: each of fewer would move it by more than three points."""
MOST = 6
"""Groups in one picture, the largest: as many as a reader tells apart."""
T = TypeVar("T")
Kinds = Mapping[str, Mapping[str, Sequence[int]]]
"""Row numbers by kind of group and group."""


def grouped_panel(run: RunFolder) -> Panel:
    """A picture of each curve for each set, with a part for sources, languages and forms of which there is more than one."""
    panel = Panel(
        "grouped-curves",
        "Curves by source, language and form",
        "The two curves above for groups of a set's rows, where there are two or more: errors of groups of "
        f"{LEAST} rows or more, false allows of groups of {LEAST} rows labelled ALLOW and {LEAST} others or more, at most the "
        f"{MOST} largest. Dashed are all rows; dots are decisions as in the predictions' file.",
    )
    for part, title in SETS.items():
        told = run.predictions[part]
        if told is None:
            panel.misses(f"{part}_predictions.jsonl")
        else:
            _add(panel, part, title, told)
    return panel


def _add(panel: Panel, part: str, title: str, told: PredictedRows) -> None:
    """Both pictures of a set, and the names of the groups that are not in them."""
    kinds = rows_by_group(told.rows)
    if untold := [kind for kind, groups in kinds.items() if list(groups) == [UNKNOWN]]:
        panel.absent.append(f"{title}: no row tells its {' or '.join(untold)}")
    kinds = {kind: groups for kind, groups in kinds.items() if len(groups) > 1}

    def rarer(rows: Sequence[int]) -> int:
        benign = int((told.labels[rows] == Label.ALLOW).sum())
        return min(benign, len(rows) - benign)

    many, of_both = _large(kinds, len), _large(kinds, rarer)
    rates, risks = _each(told, of_both, _rates), _each(told, many, _risk)
    for name, what, chosen, plot in (
        ("trade-off", "false allow against over-refusal", of_both, partial(plot_trade_offs, rates, title)),
        ("risk-coverage", "error rate against coverage", many, partial(plot_risk_coverages, risks, title)),
    ):
        if chosen:
            alt = f"{title}: {what} by {', '.join(chosen)}"
            panel.pictures.append(drawn(f"grouped_{name}_{part}", alt, plot, wide=True))
        left_out = {kind: [group for group in groups if group not in chosen.get(kind, {})] for kind, groups in kinds.items()}
        if any(left_out.values()):
            names = "; ".join(f"{kind} {', '.join(groups)}" for kind, groups in left_out.items() if groups)
            panel.absent.append(f"{title}, {what}, left out: {names}")


def _large(kinds: Kinds, counted: Callable[[Sequence[int]], int]) -> Kinds:
    """The groups with `LEAST` rows or more, as they are counted, and no more than `MOST` of a kind; no kind without any."""
    found = {}
    for kind, groups in kinds.items():
        enough = [group for group, rows in groups.items() if counted(rows) >= LEAST]
        largest = sorted(enough, key=lambda group: -len(groups[group]))[:MOST]
        if largest:
            found[kind] = {group: groups[group] for group in largest}
    return found


def _each(told: PredictedRows, kinds: Kinds, curve: Callable[[PredictedRows, Sequence[int]], T]) -> dict[str, dict[str, T]]:
    """A curve of all rows, and one of each group, by its name and number of rows."""
    count = len(told.rows)
    return {
        kind: {
            f"all, {count} rows": curve(told, range(count)),
            **{f"{group}, {len(rows)} rows": curve(told, rows) for group, rows in groups.items()},
        }
        for kind, groups in kinds.items()
    }


def _rates(told: PredictedRows, rows: Sequence[int]) -> tuple[TradeOff, OperatingPoint]:
    """Of rows of both kinds: the curve, and where the decisions are."""
    labels = told.labels[rows]
    curve, point = trade_off(told.probabilities[rows], labels), operating_point(told.decisions[rows] == Label.ALLOW, labels)
    assert curve is not None
    assert point is not None
    return curve, point


def _risk(told: PredictedRows, rows: Sequence[int]) -> RiskCoverage:
    """Of one row or more."""
    curve = risk_coverage(told.probabilities[rows], told.labels[rows])
    assert curve is not None
    return curve
