"""`so8t calibrate`: fits a temperature and tests thresholds, so that decisions come with a promise; writes calibration.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8t.commands.types import inside_unit, row_arguments, tell_left_out
from so8t.labels import LABELS, Label

if TYPE_CHECKING:
    from so8t.data.records import Record
    from so8t.evaluation import Predictions
    from so8t.policy import Policy

HELP = "make thresholds that keep the false-allow rate under alpha, except with probability delta"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--data",
        type=Path,
        help="JSONL file of records never used for this run, where the promise is cleanest; by default the run's validation "
        "rows, on which its best model was also selected",
    )
    parser.add_argument(
        "--alpha",
        type=inside_unit,
        default=0.05,
        help="largest share of risky rows (not labelled ALLOW) that are allowed (default 0.05)",
    )
    parser.add_argument(
        "--delta", type=inside_unit, default=0.05, help="probability that the rate is above alpha all the same (default 0.05)"
    )
    parser.add_argument(
        "--refuse-alpha", type=inside_unit, default=0.05, help="largest share of ALLOW rows that are refused (default 0.05)"
    )
    parser.add_argument("--refuse-delta", type=inside_unit, default=0.05, help="the same for --refuse-alpha (default 0.05)")
    parser.add_argument("--json", action="store_true", help="the policy as JSON on standard output")
    row_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """The command."""
    import torch

    from so8t.adapter import cache_for, find_adapter, load_agent
    from so8t.calibration import Target, fit_policy, halves
    from so8t.data.records import read_jsonl
    from so8t.evaluation import predict
    from so8t.policy import adapter_digest, save_policy
    from so8t.training import data_of

    console = Console(stderr=args.json, soft_wrap=True)
    folder = find_adapter(args.run)
    if args.data is not None:
        records, report = read_jsonl(args.data, on_bad_row=args.on_bad_row)
        rows_from = args.data.name
        tell_left_out(report, console)
    else:
        records, rows_from = data_of(folder.parent).val, "validation split"
        console.print(
            "rows: the run's validation split. The best model was selected on it, and how strange a text may be was "
            "measured on it, so what is promised is a little optimistic; rows that were never used, given with --data, make "
            "it clean"
        )
    labels = torch.tensor([int(r.safety_label) for r in records])
    agent = load_agent(folder, with_policy=False)
    predictions = predict(
        agent.model,
        records,
        agent.template,
        batch_size=args.batch_size,
        cache=cache_for(agent),
        title="" if args.json else rows_from,
    )
    split = halves(labels)
    policy = fit_policy(
        predictions.decided,
        labels,
        split=split,
        allow=Target(args.alpha, args.delta),
        refuse=Target(args.refuse_alpha, args.refuse_delta),
        rows_from=rows_from,
        adapter_sha256=adapter_digest(folder),
    )
    path = save_policy(folder, policy)
    if args.json:
        print(json.dumps(json.loads(path.read_text(encoding="utf-8"))))
        return
    print_policy(policy, records, predictions, split[1].tolist(), console)
    console.print(f"policy: {escape(str(path))}; `so8t ask` and `so8t evaluate` decide by it from now on")


def print_policy(policy: Policy, records: list[Record], raw: Predictions, rows: list[int], console: Console) -> None:
    """Each promise in a line, and what it costs: decisions before and after on the `rows` that thresholds were tested on."""
    console.print(
        f"temperature {policy.temperature:.3f} from {policy.temperature_rows} rows; calibration error (ECE) on the other "
        f"{len(rows)}: {policy.ece_before:.3f} before, {policy.ece_after:.3f} after"
    )
    for name, threshold, what in (
        ("ALLOW", policy.allow, "ESCALATE and REFUSE rows answered ALLOW"),
        ("REFUSE", policy.refuse, "ALLOW rows refused"),
    ):
        if threshold.at is None:
            console.print(
                f"[yellow]{name} is never given: even the strictest threshold fails the test on {threshold.rows} rows[/] "
                f"(at most {threshold.alpha:.1%} of {what}, delta {threshold.delta:.1%})"
            )
        else:
            console.print(
                f"{name} from P({name}) = {threshold.at:.4f} up: {what} {threshold.rate:.1%} of {threshold.rows}, at most "
                f"{threshold.bound:.1%} (promised {threshold.alpha:.1%}) except with probability {threshold.delta:.1%}"
            )
    table = Table(title=f"the {len(rows)} rows that thresholds were tested on", title_justify="left")
    table.add_column("decided by")
    for title in (*LABELS, "false allow", "ALLOW rows refused"):
        table.add_column(title, justify="right")
    for who, predictions in (("argmax", raw), ("policy", raw.under(policy))):
        decided = [int(d) for d in predictions.decisions[rows]]
        pairs = [(int(records[i].safety_label), d) for i, d in zip(rows, decided, strict=True)]
        wrong = [
            sum(label != Label.ALLOW and d == Label.ALLOW for label, d in pairs) / policy.allow.rows,
            sum(label == Label.ALLOW and d == Label.REFUSE for label, d in pairs) / policy.refuse.rows,
        ]
        shares = [decided.count(label) / len(rows) for label in Label]
        table.add_row(who, *(f"{share:.1%}" for share in [*shares, *wrong]))
    console.print(table)
