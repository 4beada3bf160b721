"""The report's panel on the loss: its parts over training, and PET's phases."""

import math
from functools import partial
from itertools import groupby
from operator import itemgetter

from pydantic import TypeAdapter, ValidationError

from so8t.page import Panel, Table, drawn
from so8t.pet import PetSpec
from so8t.plots import Series, plot_losses
from so8t.run_folder import METRICS, RunFolder


def losses_panel(run: RunFolder) -> Panel:
    """The loss and each term's share; the phases of PET where it was on."""
    panel = Panel("losses", "Loss, its parts and PET's share")
    if run.series is None:
        panel.misses(METRICS)
        return panel
    if not run.series.get("train/loss"):
        panel.absent.append(f"{METRICS} has no losses: the run logged no training step")
        return panel
    alt = "Loss and its parts against optimiser steps"
    panel.pictures.append(drawn(panel.key, alt, partial(plot_losses, run.series), wide=True))
    spec = _pet(run)
    shares = [value for _, value in run.series.get("train/share_pet", [])]
    if shares:
        panel.note = (
            f"PET's share of the loss: {shares[-1]:.1%} at the last logged step, {max(shares):.1%} at most; "
            f"pet.max_share is {'-' if spec is None else spec.max_share} (of the safety part)."
        )
    if spec is not None and spec.weight:
        head = ["phase", "of the planned steps", "steps logged in it", "factor", "pet.weight x factor"]
        panel.tables.append(Table("PET's phases", head, phases(spec, run.series)))
    return panel


def _pet(run: RunFolder) -> PetSpec | None:
    """The run's settings of PET; `None` where they are not known, or not to this version."""
    try:
        return TypeAdapter(PetSpec).validate_python(run.setting("pet"))
    except ValidationError:
        return None


def phases(spec: PetSpec, series: Series) -> list[list[str]]:
    """A row a phase that has steps, phases in a row that are equally strong together: where it lies, and how strong PET is."""
    settings = (
        ("exploration", 0.0, spec.exploration_end, spec.exploration),
        ("transition", spec.exploration_end, spec.transition_end, spec.transition),
        ("stabilisation", max(spec.exploration_end, spec.transition_end), 1.0, spec.stabilisation),
    )
    logged = [(value, list(points)) for value, points in groupby(series.get("train/pet_phase", []), key=itemgetter(1))]
    rows = []
    for factor, alike in groupby((phase for phase in settings if phase[1] < phase[2]), key=itemgetter(3)):
        names, begins, ends, _ = zip(*alike, strict=True)
        steps = logged.pop(0)[1] if logged and math.isclose(logged[0][0], factor, rel_tol=1e-6) else []
        told = f"{steps[0][0]} to {steps[-1][0]}" if steps else "-"
        span = f"{100 * begins[0]:g} % to {100 * ends[-1]:g} %"
        rows.append([", ".join(names), span, told, f"{factor:g}", f"{spec.weight * factor:g}"])
    return rows
