"""What README says of the run of `make train`: its own figures, and what the commands tell of it on rows that it never saw.

    .venv/bin/python -m benchmarks.default_run RUN [--robustness 150] [--answers 300] [--keep]

RUN stays as it is: a copy is calibrated and wrapped by the commands that a user has. From the folder come both test sets and
the group's invariants; `plain.jsonl`, `field.jsonl` and `blind.jsonl` are decided anew, uncalibrated; along answers, a seeded
sample of the test rows is read. Writes `results/default_run.json`, part by part, from which `readme_tables` makes README's
tables.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.gates import RESULTS, ROOT, machine
from so8t.adapter import cache_for, load_agent
from so8t.calibration_panel import under_policy
from so8t.cli import main as so8t
from so8t.console import quieten, reported
from so8t.curves import operating_point, reliability
from so8t.errors import SO8TError
from so8t.evaluation import along_answers
from so8t.files import write_json
from so8t.labels import Label
from so8t.plots import read_metrics
from so8t.run_folder import METRICS, RunFolder, read_run
from so8t.training import data_of

FILES = ("plain", "field", "blind")
KEPT = ("metrics", "baselines", "confusion", "intervals_95", "by_source", "by_language", "by_form")
"""Of what an evaluation says."""
LEFT_OUT = ("precision_", "f1_")
"""Figures that follow from the confusion matrix."""
DIGITS = 6
BATCH = 32


def short(value: object) -> object:
    """Numbers with `DIGITS` significant digits, without what the confusion matrix says already."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items() if not k.startswith(LEFT_OUT)}
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def commit() -> str:
    """Which state of this repository is running."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return head.stdout.strip()


def told(evaluation: dict[str, object]) -> dict[str, object]:
    """The part of an evaluation that is kept."""
    return {key: evaluation[key] for key in KEPT}


def command(*words: object) -> str:
    """What `so8t` prints; where it fails it says why and ends the program."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        so8t([str(word) for word in words])
    return printed.getvalue()


def invariants(run: Path) -> dict[str, dict[str, float]]:
    """The group's worst figure over all gates: at the first and the last step that were logged, and over all of them. Of the
    commutator the smallest."""
    series = read_metrics(run / METRICS)
    found = {}
    for kind in ("orthogonality", "determinant", "orthogonality_float32", "determinant_float32", "commutator", "angle"):
        pick = min if kind == "commutator" else max
        gates = [points for name, points in series.items() if name.startswith("group/") and name.endswith(f"/{kind}")]
        worst = [pick(value for _, value in step) for step in zip(*gates, strict=True)]
        found[kind] = {"first": worst[0], "last": worst[-1], "worst": pick(worst)}
    return found


def decided(run: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Both test sets before and after the calibration."""
    assert run.policy is not None
    out: dict[str, dict[str, dict[str, float]]] = {}
    for part, rows in run.predictions.items():
        if rows is None:
            continue
        after = under_policy(run.policy, rows)
        out[part] = {}
        for name, labels, probabilities in (
            ("uncalibrated", rows.decisions, rows.probabilities),
            ("calibrated", after.labels.numpy(), after.probabilities.double().numpy()),
        ):
            point = operating_point(labels == Label.ALLOW, rows.labels)
            assert point is not None
            out[part][name] = {
                "false_allow_rate": point.false_allow,
                "over_refusal_rate": point.over_refusal,
                "escalated": float((labels == Label.ESCALATE).mean()),
                "ece": reliability(probabilities, rows.labels).error,
            }
    return out


def answers(run: Path, rows: int) -> dict[str, object]:
    """Along the answers of a seeded sample of the test rows."""
    agent = load_agent(run, device="cpu", with_policy=False)
    records = random.Random(0).sample(data_of(run).test, rows)
    cache = cache_for(agent)
    return along_answers(agent.model, records, agent.template, batch_size=BATCH, cache=cache, title="answers").as_json()


def measured(run: Path, *, robustness: int, answered: int, kept: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Part by part, what is not `kept`."""
    yield "run", {"name": run.name, "commit": commit(), "machine": machine(), "seed": OmegaConf.load(run / "config.yaml").seed}
    for part in ("test", "unseen"):
        yield part, told(json.loads((run / f"{part}.json").read_text(encoding="utf-8")))
    yield "group", invariants(run)
    if "answers" not in kept:
        yield "answers", answers(run, answered)
    for name in FILES:
        if name not in kept:
            file = ROOT / "benchmarks" / f"{name}.jsonl"
            yield name, told(json.loads(command("evaluate", run, "--data", file, "--uncalibrated", "--json")))
    if {"policy", "decided", "robustness"} <= kept.keys():
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run.name
        shutil.copytree(run, copy)
        command("calibrate", copy)
        read = read_run(copy)
        assert read.policy is not None
        yield "policy", read.policy.as_json()
        yield "decided", decided(read)
        command("robustness", copy, "--rows", robustness, "--uncalibrated")
        yield "robustness", json.loads((copy / "robustness.json").read_text(encoding="utf-8"))


def main() -> None:
    """Measures, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--robustness", type=int, default=150, metavar="ROWS", help="rows that are wrapped (default 150)")
    parser.add_argument(
        "--answers", type=int, default=300, metavar="ROWS", help="test rows whose answers are read (default 300)"
    )
    parser.add_argument("--keep", action="store_true", help="measure what the file does not hold of this run")
    args = parser.parse_args()
    quieten()
    with reported():
        file = RESULTS / "default_run.json"
        found = json.loads(file.read_text(encoding="utf-8")) if args.keep else {}
        if found and found["run"]["name"] != args.run.name:
            raise SO8TError(f"{file} is of another run, {found['run']['name']}: leave --keep out")
        for part, value in measured(args.run, robustness=args.robustness, answered=args.answers, kept=found):
            found[part] = short(value)
            write_json(file, found)
    Console().print("written: benchmarks/results/default_run.json; README's tables: python -m benchmarks.readme_tables")


if __name__ == "__main__":
    main()
