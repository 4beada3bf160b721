"""`so8t evaluate`: decides every row of a JSONL file and prints the metrics.

It measures the head as it was trained and calibrated: one prompt a row, a long request by its beginning and its end. At work a
long one is read in windows besides, and the strictest decision counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from so8t.commands.types import row_arguments, tell_left_out, uncalibrated_argument
from so8t.errors import SO8TError

if TYPE_CHECKING:
    from so8t.baselines import Baselines

HELP = "decide every row of a JSONL file and print the metrics"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of records (user_request, safety_label)")
    parser.add_argument("--out", type=Path, help="write one prediction a row, in the file's order (JSONL)")
    parser.add_argument(
        "--answers",
        action="store_true",
        help="also tell what is decided along answers: those of ALLOW rows (task_output), and risky requests as if they were "
        "the answer to a harmless one",
    )
    uncalibrated_argument(parser)
    parser.add_argument("--json", action="store_true", help="metrics as JSON on standard output")
    row_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.adapter import cache_for, load_agent
    from so8t.data.records import read_jsonl
    from so8t.evaluation import along_answers, evaluate, frozen_features, predict, print_evaluation, write_predictions

    records, report = read_jsonl(args.data, on_bad_row=args.on_bad_row)
    if args.out is not None:
        check_out(args.out, args.data)
    agent = load_agent(args.run, with_policy=not args.uncalibrated)
    baselines = stored_baselines(agent.folder.parent / "baselines", Console(stderr=args.json))
    cache = cache_for(agent)
    size = {"batch_size": args.batch_size, "cache": cache}
    title = "" if args.json else args.data.name
    predictions = predict(agent.model, records, agent.template, title=title, **size)
    if agent.policy is not None:
        predictions = predictions.under(agent.policy)
    features = frozen_features(agent.model, records, agent.template, title=title, **size) if baselines else None
    result = evaluate(args.data.name, records, predictions, baselines, features)
    if args.answers:
        result.answers = along_answers(agent.model, records, agent.template, title=title, **size)
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


def check_out(out: Path, data: Path) -> None:
    """Raises SO8TError where predictions cannot be written, or would overwrite the data: before anything is decided."""
    if out.resolve() == data.resolve():
        raise SO8TError(f"--out {out} would overwrite the data")
    if os.path.isdir(out):
        raise SO8TError(f"--out {out} is a folder: name a file")
    place = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    try:
        tempfile.NamedTemporaryFile(dir=place, prefix=f".{out.name}-").close()  # as it will be written beside its name
    except OSError as error:
        raise SO8TError(f"--out {out}: nothing can be written in {place}: {error.strerror}") from None


def stored_baselines(folder: Path, console: Console) -> Baselines | None:
    """What the run's evaluation left; none where it is not all there, and that is told."""
    from safetensors import SafetensorError

    from so8t.baselines import Baselines

    if not folder.is_dir():
        console.print("without baselines: the run kept none, it did not evaluate")
        return None
    try:
        return Baselines.load(folder)
    except (FileNotFoundError, KeyError, ValueError, SafetensorError) as error:  # a file is gone, or torn
        console.print(f"without baselines: {escape(str(folder))} is not whole: {escape(str(error))}")
        return None
