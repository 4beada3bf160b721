"""One HTML file about a trained run, whole in itself: what was trained, how well it decides, what it gets wrong.

Every panel takes what it needs from a `RunFolder` and names the files that it misses.
"""

from collections.abc import Callable, Iterable
from functools import partial

from so8t.calibration_panel import calibration_panel, under_policy
from so8t.curves import OperatingPoint, operating_point, reliability, risk_coverage, trade_off
from so8t.evaluation import ALONG, GROUPED, SCORED, SHOWN, told_perplexity
from so8t.grouped_panel import grouped_panel
from so8t.intervals import ENOUGH, number
from so8t.labels import LABELS, Label
from so8t.losses_panel import losses_panel
from so8t.memory_panel import memory_panel
from so8t.mistakes import MOST, worst_mistakes
from so8t.page import Panel, Table, drawn, figure_cell, render_page
from so8t.plots import (
    plot_angles,
    plot_confusion,
    plot_group,
    plot_reliability,
    plot_risk_coverage,
    plot_trade_off,
)
from so8t.robustness_panel import robustness_panel
from so8t.run_folder import ADAPTER, CONFIG, METRICS, SETS, TENSORS, DataRows, PredictedRows, RunFolder, Scores

LONGEST = 400
"""Characters shown of a request."""


def render(run: RunFolder, told: list[Panel]) -> str:
    """The page of a run's panels."""
    return render_page("/".join(run.folder.resolve().parts[-2:]), told)


def panels(run: RunFolder) -> list[Panel]:
    """The parts of the page."""
    return [panel(run) for panel in PANELS]


def _sets(run: RunFolder, panel: Panel) -> Iterable[tuple[str, str, PredictedRows]]:
    """Each set, its title and its predictions; the missing ones are named in the panel."""
    for part, title in SETS.items():
        predictions = run.predictions[part]
        if predictions is None:
            panel.misses(f"{part}_predictions.jsonl")
        elif not predictions.rows:
            panel.absent.append(f"{title}: no row was decided")
        else:
            yield part, title, predictions


def _scores(run: RunFolder, panel: Panel) -> Iterable[tuple[str, str, Scores]]:
    """Each set, its title and its figures; the missing ones are named in the panel."""
    for part, title in SETS.items():
        scores = run.scores[part]
        if scores is None:
            panel.misses(f"{part}.json")
        else:
            yield part, title, scores


def _told(value: object) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(_told, value)) or "none"
    return "-" if value is None else str(value)


def _setup(run: RunFolder) -> Panel:
    panel = Panel("setup", "What was trained on what")
    if run.config is None:
        panel.misses(CONFIG)
    else:
        settings = {
            "base, frozen": ("base.name", "base.source", "base.quantization"),
            "gates": (
                "gate.interior",
                "gate.top_layers",
                "gate.sites",
                "gate.last",
                "gate.blocks",
                "gate.map",
                "gate.triality",
            ),
            "head": (
                "head.reads",
                "head.commutator",
                "head.pooling",
                "head.standardise",
                "head.probe",
                "head.words",
                "head.fold_words",
                "head.weigh_words",
                "head.longest",
                "head.familiar",
                "head.smoothing",
                "head.dropout",
            ),
            "loss": (
                "loss.cost_weight",
                "loss.costs",
                "loss.path_weight",
                "loss.task_weight",
                "loss.task_reaches",
            ),
            "PET": (
                "pet.weight",
                "pet.max_share",
                "pet.target",
                "pet.path",
                "pet.exploration_end",
                "pet.transition_end",
                "pet.inertia_weight",
            ),
            "training": (
                "seed",
                "init_from",
                "trainer.max_epochs",
                "trainer.limit_train_batches",
                "data.batch_size",
                "optim.gate_lr",
                "optim.head_lr",
            ),
            "prompts and rows": ("data.decision_prompt", "data.framed", "data.coded"),
            "kept for the unseen set": ("data.holdout_sources",),
        }
        rows = [[what, "; ".join(f"{key} {_told(run.setting(key))}" for key in keys)] for what, keys in settings.items()]
        panel.tables.append(Table("settings, from config.yaml", ["part", "settings"], rows))
        sources = run.setting("data.sources")
        if isinstance(sources, dict) and sources:
            keys = ("kind", "licence", "weight")
            table = [
                [str(name), *(_told(source.get(key) if isinstance(source, dict) else None) for key in keys)]
                for name, source in sources.items()
            ]
            panel.tables.append(Table("sources of the rows", ["source", *keys], table))
        elif (path := run.setting("data.path")) is not None:
            panel.tables.append(Table("sources of the rows", ["file"], [[_told(path)]]))
    if run.data is not None:
        panel.tables += _rows(run.data)
    if run.trained is None:
        panel.misses(*(name for name in (TENSORS, ADAPTER) if not (run.folder / name).is_file()))
    else:
        steps = max((step for points in (run.series or {}).values() for step, _ in points), default=None)
        rows = [[f"{what}, numbers", f"{count:,}"] for what, count in run.trained.items()]
        rows.append(["optimiser steps, last logged", _told(steps)])
        panel.tables.append(Table("trained", ["part", ""], rows))
    return panel


def _rows(data: DataRows) -> list[Table]:
    """Rows by source, part and label, their sums last; and what was left out, where anything was."""
    tables = [Table(f"rows by source ({' / '.join(LABELS)})", ["source", *data.rows], data.by_source())]
    left_out = [[what, str(count)] for what, count in data.skipped.items()] + [[line, "all"] for line in data.missing]
    return [*tables, Table("rows left out", ["of", "rows"], left_out)] if left_out else tables


def _metrics(run: RunFolder) -> Panel:
    panel = Panel(
        "metrics",
        "How well it decides",
        "Brackets are 95 % intervals: of rates exact (Clopper and Pearson), of the others by bootstrap over rows, from "
        f"{ENOUGH} rows up; drawing rows adds to ECE, so its interval lies high. They speak of other rows from the same "
        "sources. Baselines were fitted on the same training rows; what a constant answer reaches is no score. AUPRC is the "
        "average precision of 'not ALLOW', AURC the mean error rate over all coverages.",
    )
    for _, title, scores in _scores(run, panel):
        rows = []
        for who, figures in {"SO8T": scores.metrics, **scores.baselines}.items():
            intervals = {"macro_f1": scores.macro_f1_95.get(who), **scores.intervals_95.get("all", {}).get(who, {})}
            rows.append([who, *(figure_cell(figures.get(key), intervals.get(key)) for key, _ in SHOWN)])
        heads = [head for _, head in SHOWN]
        counted = {key: int(scores.metrics.get(key) or 0) for key in ("rows", "failures", "unsure")}
        about = f"{title}: {counted['rows']} rows, {counted['failures']} failures (not counted), {counted['unsure']} unsure"
        gated, alone = (scores.metrics.get(key) for key in ("task_perplexity", "task_perplexity_base"))
        if gated and alone:
            about += f"; {told_perplexity(gated, alone)}"
        panel.tables.append(Table(about, ["classifier", *heads], rows))
        for kind, groups in (("source", scores.by_source), ("language", scores.by_language), ("form", scores.by_form)):
            names = list(next(iter(groups.values()), {}))
            rows, scored = [], []
            for group, table in groups.items():
                own, intervals = table.get("SO8T", {}), scores.intervals_95.get(kind, {}).get(group, {})
                accuracies = [number(table.get(who, {}).get("accuracy")) for who in names]
                told = [figure_cell(own.get(key), intervals.get(key)) for key, _ in GROUPED]
                of_rows = str(int(own.get("rows") or 0))
                rows.append([group, of_rows, *accuracies, *told])
                scored.append([group, of_rows, *(figure_cell(own.get(key), intervals.get(key)) for key, _ in SCORED)])
            if rows:
                about = f"{title}, by {kind}: accuracy of each classifier, and SO8T's figures"
                panel.tables.append(Table(about, [kind, "rows", *names, *(head for _, head in GROUPED)], rows))
                about = f"{title}, by {kind}: how good SO8T's probabilities are"
                panel.tables.append(Table(about, [kind, "rows", *(head for _, head in SCORED)], scored))
    return panel


def _stream(run: RunFolder) -> Panel:
    panel = Panel(
        "stream",
        "Along the tokens of a request",
        "What is decided after each token, smoothed by head.smoothing: how many risky requests are off ALLOW by their end, "
        "after how many tokens for good, how often the decision changes, and how often that of an ALLOW row leaves ALLOW. "
        "Brackets are 95 % intervals over rows.",
    )
    rows = []
    for _, title, scores in _scores(run, panel):
        intervals = scores.intervals_95.get("all", {}).get("SO8T", {})
        rows.append([title, *(figure_cell(scores.metrics.get(key), intervals.get(key), digits=n) for key, _, n in ALONG)])
    if rows:
        panel.tables.append(Table("along the tokens", ["set", *(head for _, head, _ in ALONG)], rows))
    return panel


def _confusion(run: RunFolder) -> Panel:
    panel = Panel("confusion", "Confusion matrices")
    for part, title, scores in _scores(run, panel):
        heading = f"{title}: macro-F1 {number(scores.metrics.get('macro_f1'))}"
        plot = partial(plot_confusion, scores.confusion, heading)
        alt = f"Confusion matrix, {title}: {scores.confusion}, labels by decisions"
        panel.pictures.append(drawn(f"confusion_{part}", alt, plot))
    return panel


def _reliability(run: RunFolder) -> Panel:
    panel = Panel(
        "reliability",
        "Reliability",
        "How often the most probable label is right, by how probable it was said to be. Bars under the dashed line: too sure."
        + ("" if run.policy is None else " Beside each: the same rows after so8t calibrate."),
    )
    for part, title, told in _sets(run, panel):
        bins = reliability(told.probabilities, told.labels)
        plot = partial(plot_reliability, bins, title)
        panel.pictures.append(drawn(f"reliability_{part}", f"Reliability diagram, {title}: ECE {bins.error:.3f}", plot))
        if run.policy is not None:
            after = f"{title}, calibrated"
            bins = reliability(under_policy(run.policy, told).probabilities.double().numpy(), told.labels)
            alt = f"Reliability diagram, {after}: ECE {bins.error:.3f}"
            panel.pictures.append(drawn(f"reliability_{part}_calibrated", alt, partial(plot_reliability, bins, after)))
    return panel


def _trade_off(run: RunFolder) -> Panel:
    panel = Panel(
        "trade-off",
        "False allow against over-refusal",
        "The curve moves one threshold on P(ALLOW). Marks are ways of deciding: as in the predictions' file and, after "
        "so8t calibrate, by the policy, which looks at more than P(ALLOW), so that marks may lie beside the curve.",
    )
    curves, points = {}, {}
    for _, title, told in _sets(run, panel):
        curve = trade_off(told.probabilities, told.labels)
        if curve is None:
            panel.absent.append(f"{title}: needs rows labelled ALLOW and others, and one kind is missing")
            continue
        allowed = {"as decided": told.decisions == Label.ALLOW}
        if run.policy is not None:
            allowed["by the policy"] = under_policy(run.policy, told).labels.numpy() == Label.ALLOW
        marks = {how: operating_point(given, told.labels) for how, given in allowed.items()}
        curves[title] = curve
        points[title] = {how: point for how, point in marks.items() if isinstance(point, OperatingPoint)}
    if curves:
        alt = "False allow against over-refusal over all thresholds"
        panel.pictures.append(drawn(panel.key, alt, partial(plot_trade_off, curves, points), wide=True))
        rows = [
            [title, how, number(point.false_allow), number(point.over_refusal)]
            for title, marks in points.items()
            for how, point in marks.items()
        ]
        panel.tables.append(Table("operating points", ["set", "decided", "false allow", "over-refusal"], rows))
    return panel


def _risk_coverage(run: RunFolder) -> Panel:
    panel = Panel(
        "risk-coverage",
        "Risk and coverage",
        "The error rate if only the most confident rows are decided and the others go to a person (Geifman and El-Yaniv 2017). "
        "The dotted line is the error rate over all rows.",
    )
    curves = {}
    for _, title, told in _sets(run, panel):
        curve = risk_coverage(told.probabilities, told.labels)
        if curve is not None:
            curves[title] = curve
    if curves:
        panel.pictures.append(drawn(panel.key, "Error rate against coverage", partial(plot_risk_coverage, curves), wide=True))
    return panel


def _group(run: RunFolder) -> Panel:
    panel = Panel("group", "Group invariants over training", "Defects of orthogonality and determinant over all gates.")
    if run.series is None:
        panel.misses(METRICS)
        return panel
    if not any(name.startswith("group/") for name in run.series):
        panel.absent.append(f"{METRICS} has no group invariants: the run was trained without callbacks.group, or without gates")
        return panel
    bars = []
    for key, default in (("tolerance", 1e-12), ("tolerance_float32", 5e-6)):
        value = run.setting(f"callbacks.group.{key}")
        bars.append(float(value) if isinstance(value, int | float) else default)
    plot = partial(plot_group, run.series, tolerance=bars[0], tolerance_float32=bars[1])
    alt = "Defects, commutator and angles of the gates against optimiser steps"
    panel.pictures.append(drawn(panel.key, alt, plot, wide=True))
    return panel


def _gates(run: RunFolder) -> Panel:
    panel = Panel(
        "gates",
        "How far each gate turns",
        "The distance of each rotation from the identity in the saved adapter; 0 leaves its block as it was.",
    )
    if run.angles is None:
        panel.misses(*(name for name in (TENSORS, ADAPTER) if not (run.folder / name).is_file()))
    elif not run.angles:
        panel.absent.append(f"{TENSORS} has no gates")
    else:
        alt = "Distance from the identity by gate and block"
        panel.pictures.append(drawn(panel.key, alt, partial(plot_angles, run.angles), wide=True))
        rows = [
            [name, str(len(values)), *(f"{value:.4f}" for value in (values.mean(), values.min(), values.max()))]
            for name, values in run.angles.items()
        ]
        panel.tables.append(Table("distance from the identity", ["gate", "blocks", "mean", "least", "most"], rows))
    return panel


def _mistakes(run: RunFolder) -> Panel:
    panel = Panel(
        "mistakes",
        "The worst mistakes",
        f"Rows that were decided wrongly, those with the most probable wrong decision first; at most {MOST} of each set. "
        "Requests are shown as they are in the data, and some are offensive. Colours tell "
        "what was decided after each token, smoothed: ALLOW green, ESCALATE amber and dotted, REFUSE red and underlined. The "
        "decision proper is read after the template's closing tokens.",
    )
    for _, title, told in _sets(run, panel):
        rows: list[list[str]] = []
        marked: list[list[tuple[str, str]]] = []
        for i in worst_mistakes(told.probabilities, told.decisions, told.labels):
            row, shares = told.rows[i], [f"{p:.3f}" for p in told.probabilities[i]]
            rows.append(["".join(_within([row.user_request])), row.source, row.safety_label, row.decision, *shares])
            texts = _within([text for text, _ in row.tokens])
            marked.append([(text, label) for text, (_, label) in zip(texts, row.tokens, strict=False)])
        head = ["request", "source", "label", "decision", *(f"P({name})" for name in LABELS)]
        wrong = int((told.decisions != told.labels).sum())
        about = f"{title}: {wrong} of {len(told.rows)} rows decided wrongly"
        panel.tables.append(Table(about, head, rows, texts=True, marked=marked))
    return panel


def _within(parts: list[str]) -> list[str]:
    """The parts of a text up to `LONGEST` characters, with an ellipsis where more would follow."""
    kept: list[str] = []
    left = LONGEST
    for part in parts:
        if len(part) > left:
            return [*kept, part[:left] + "…"]
        kept.append(part)
        left -= len(part)
    return kept


PANELS: tuple[Callable[[RunFolder], Panel], ...] = (
    _setup,
    _metrics,
    calibration_panel,
    _stream,
    _confusion,
    _reliability,
    _trade_off,
    _risk_coverage,
    grouped_panel,
    robustness_panel,
    _group,
    losses_panel,
    _gates,
    memory_panel,
    _mistakes,
)
"""In the order of the page."""
