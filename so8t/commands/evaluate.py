"""`so8t evaluate`: decides every row of a JSONL file and prints the metrics.

It measures the head as it was trained and calibrated: one prompt a row, a long request by its beginning and its end. At work a
long one is read in windows besides, and the strictest decision counts.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from so8t.commands.types import row_arguments, tell_left_out, uncalibrated_argument
from so8t.errors import SO8TError

HELP = "decide every row of a JSONL file and print the metrics"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of records (user_request, safety_label)")
    parser.add_argument("--out", type=Path, help="write one prediction a row, in the file's order (JSONL)")
    uncalibrated_argument(parser)
    parser.add_argument("--json", action="store_true", help="metrics as JSON on standard output")
    row_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.adapter import cache_for, load_agent
    from so8t.baselines import Baselines
    from so8t.data.records import read_jsonl
    from so8t.evaluation import evaluate, frozen_features, predict, print_evaluation, write_predictions

    records, report = read_jsonl(args.data, on_bad_row=args.on_bad_row)
    if args.out is not None and args.out.resolve() == args.data.resolve():
        raise SO8TError(f"--out {args.out} would overwrite the data")
    if args.out is not None and args.out.is_dir():
        raise SO8TError(f"--out {args.out} is a folder: name a file")
    agent = load_agent(args.run, with_policy=not args.uncalibrated)
    cache = cache_for(agent)
    size = {"batch_size": args.batch_size, "cache": cache}
    title = "" if args.json else args.data.name
    predictions = predict(agent.model, records, agent.template, title=title, **size)
    if agent.policy is not None:
        predictions = predictions.under(agent.policy)
    folder = agent.folder.parent / "baselines"
    baselines = Baselines.load(folder) if folder.is_dir() else None
    features = frozen_features(agent.model, records, agent.template, title=title, **size) if baselines else None
    result = evaluate(args.data.name, records, predictions, baselines, features)
    if args.out is not None:
        write_predictions(args.out, records, predictions)
    policy = None if agent.policy is None else agent.policy.as_json()
    if args.json:
        print(json.dumps({**result.as_json(), "policy": policy, "bad_rows": report.skipped}, ensure_ascii=False))
        return
    console = Console()
    tell_left_out(report, console)
    if cut := sum(not agent.template.reads_whole(r.user_request, r.context) for r in records):
        console.print(f"{cut} rows have no room for their middle, which is not read here; `so8t ask` reads it in windows")
    if agent.policy is not None:
        console.print(f"decided {agent.policy.describe()}; --uncalibrated shows the most probable labels")
    print_evaluation(result, console)
    if args.out is not None:
        console.print(f"predictions: {args.out}")
