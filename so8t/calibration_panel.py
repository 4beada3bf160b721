"""The report's panel on calibration: what the policy promises, and what it costs on the sets that the run was tested on."""

import torch

from so8t.curves import Floats, Integers, operating_point, reliability
from so8t.groupings import rows_by_group
from so8t.intervals import ece_interval, number
from so8t.labels import LABELS, Label
from so8t.model import Decisions
from so8t.page import Panel, Table, figure_cell
from so8t.policy import Policy
from so8t.run_folder import SETS, TENSORS, PredictedRows, RunFolder


def under_policy(policy: Policy, told: PredictedRows) -> Decisions:
    """What a policy decides of rows that were predicted without one."""
    no = torch.zeros(len(told.rows), dtype=torch.bool)
    unsure = torch.tensor([row.unsure for row in told.rows], dtype=torch.bool)
    return policy.apply(Decisions(torch.from_numpy(told.probabilities), torch.from_numpy(told.decisions), no, unsure))


def calibration_panel(run: RunFolder) -> Panel:
    """Promises and their price; without a policy, that there is none."""
    panel = Panel("calibration", "Calibration")
    if not (run.folder / TENSORS).is_file():
        panel.misses(TENSORS)
        return panel
    if run.policy is None:
        panel.note = "Not calibrated (so8t calibrate does it): all figures on this page are of uncalibrated decisions."
        return panel
    policy = run.policy
    tested = policy.allow.rows + policy.refuse.rows
    panel.note = (
        f"Temperature {policy.temperature:.3f}, fitted on {policy.temperature_rows} rows ({policy.rows_from}). On the {tested} "
        f"other ones, on which the thresholds were tested, the calibration error (ECE) was {policy.ece_before:.3f} before and "
        f"{policy.ece_after:.3f} after. A bound is the largest rate that those rows leave possible, except with probability "
        "delta. It holds for requests like those rows; of the validation split it is a little optimistic, as the best model "
        "was selected there. Other figures on this page are of uncalibrated decisions, but for marks that name the policy. "
        "Brackets are 95 % intervals, by bootstrap over rows; as drawing rows adds to ECE, they lie high."
    )
    head = ["answer", "given from", "wrong for", "rows", "rate", "bound", "alpha", "delta"]
    promises = [
        [
            name,
            "never given" if told.at is None else f"P({name}) = {told.at:.4f}",
            wrong_for,
            str(told.rows),
            *(f"{100 * share:.2f} %" for share in (told.rate, told.bound)),
            *(f"{100 * share:g} %" for share in (told.alpha, told.delta)),
        ]
        for name, told, wrong_for in (("ALLOW", policy.allow, "ESCALATE, REFUSE"), ("REFUSE", policy.refuse, "ALLOW"))
    ]
    panel.tables.append(Table("what is promised, and the rows on which it was tested", head, promises))
    costs, errors = [], []
    for part, title in SETS.items():
        told = run.predictions[part]
        if told is not None and told.rows:
            after = under_policy(policy, told)
            calibrated = after.probabilities.double().numpy()
            costs.append([title, "uncalibrated", *_costs(told.probabilities, told.decisions, told.labels)])
            costs.append([title, "by the policy", *_costs(calibrated, after.labels.numpy(), told.labels)])
            for kind, groups in rows_by_group(told.rows).items():
                for group, rows in groups.items() if len(groups) > 1 else ():
                    both = (_error(of[rows], told.labels[rows]) for of in (told.probabilities, calibrated))
                    errors.append([title, f"{kind} {group}", str(len(rows)), *both])
    if costs:
        head = ["set", "decided", *LABELS, "false allow", "over-refusal", "ECE"]
        panel.tables.append(Table("what it costs: decisions before and after", head, costs))
    if errors:
        head = ["set", "rows of", "rows", "ECE, uncalibrated", "ECE, calibrated"]
        panel.tables.append(Table("the calibration error of groups of rows, before and after", head, errors))
    return panel


def _costs(probabilities: Floats, decisions: Integers, labels: Integers) -> list[str]:
    """Shares of the three decisions, both rates, and the calibration error."""
    shares = [f"{100 * (decisions == label).mean():.1f} %" for label in Label]
    point = operating_point(decisions == Label.ALLOW, labels)
    rates = ["-", "-"] if point is None else [number(point.false_allow), number(point.over_refusal)]
    return [*shares, *rates, _error(probabilities, labels)]


def _error(probabilities: Floats, labels: Integers) -> str:
    """ECE and its interval."""
    return figure_cell(reliability(probabilities, labels).error, ece_interval(probabilities, labels))
