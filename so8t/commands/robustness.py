"""`so8t robustness`: wraps a run's test requests (role play, Base64, another tense, ...) and tells which decisions change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from so8t.commands.types import positive, row_arguments, tell_left_out, uncalibrated_argument
from so8t.errors import FetchError, SO8TError

if TYPE_CHECKING:
    from so8t.data.records import Record
    from so8t.evaluation import Predictions

HELP = "wrap a run's test requests (role play, Base64, ...) and tell which decisions change"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data", type=Path, help="JSONL file of records never trained on; by default the run's test split")
    parser.add_argument("--rows", type=positive, help="so many rows of each set, always the same ones (default: all)")
    parser.add_argument("--out", type=Path, help="folder for robustness.json and robustness.png (default: RUN's)")
    uncalibrated_argument(parser)
    parser.add_argument("--json", action="store_true", help="the figures as JSON on standard output")
    row_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.adapter import find_adapter, load_agent
    from so8t.data.cache import PrefixCache
    from so8t.data.records import read_jsonl
    from so8t.evaluation import predict
    from so8t.files import write_json
    from so8t.plots import plot_robustness
    from so8t.robustness import measure, print_robustness
    from so8t.training import data_of

    console = Console(stderr=args.json, soft_wrap=True)
    folder = find_adapter(args.run)
    out: Path = args.out or (folder.parent if (folder.parent / "config.yaml").is_file() else folder)
    if out.exists() and not out.is_dir():
        raise SO8TError(f"--out {out} is a file: name a folder")
    if args.data is None:
        data = data_of(folder.parent)
        records, train = data.test, data.train
    else:
        records, report = read_jsonl(args.data, on_bad_row=args.on_bad_row)
        tell_left_out(report, console)
        train = data_of(folder.parent).train if (folder.parent / "config.yaml").is_file() else []
    records = _some(records, args.rows)
    if not train:
        console.print("rewordings are left out: without the run's config.yaml its training rows are not known")
        reworded = {}
    else:
        reworded = {name: _some(rows, args.rows) for name, rows in _reworded(train, console).items()}
    agent = load_agent(folder, with_policy=not args.uncalibrated)

    def decide(rows: Sequence[Record], title: str) -> Predictions:
        cache = PrefixCache(agent.model.base, keep=agent.model.below)  # without room: nothing is read twice
        title = "" if args.json else title
        told = predict(agent.model, rows, agent.template, batch_size=args.batch_size, cache=cache, title=title)
        return told if agent.policy is None else told.under(agent.policy)

    wrapped = list(measure(records, reworded, decide, agent.template))
    told = {
        "data": "test split" if args.data is None else args.data.name,
        "rows": len(records),
        "policy": None if agent.policy is None else agent.policy.as_json(),
        "wrappings": [dataclasses.asdict(one) for one in wrapped],
    }
    write_json(out / "robustness.json", told)
    plot_robustness(wrapped, out / "robustness.png")
    if args.json:
        print(json.dumps(told))
        return
    if agent.policy is not None:
        console.print(f"decided {agent.policy.describe()}; --uncalibrated shows the most probable labels")
    print_robustness(wrapped, console)
    console.print(f"written: {escape(str(out / 'robustness.json'))} and robustness.png")


def _reworded(train: Sequence[Record], console: Console) -> dict[str, list[Record]]:
    """Requests in another tense, but for near-duplicates of training rows."""
    from so8t.data.sources import load_source
    from so8t.data.splits import apart_from
    from so8t.data.wrappings import REWORDED

    reworded = {}
    for name, source in REWORDED.items():
        try:
            rows = load_source(name, source, on_bad_row="error").records
        except FetchError as error:
            console.print(f"{name} is left out: {escape(str(error))}")
            continue
        reworded[name] = apart_from(train, rows)
        near = len(rows) - len(reworded[name])
        console.print(f"{name}: {near} of {len(rows)} rows are near-duplicates of training rows and left out")
    return reworded


def _some(records: list[Record], rows: int | None) -> list[Record]:
    """All, or so many of them, drawn at random with each label's share as it is."""
    if rows is None or rows >= len(records):
        return records
    drawn = random.Random(0).sample(records, len(records))  # noqa: S311
    drawn.sort(key=lambda record: record.safety_label)
    return [drawn[int((k + 0.5) * len(drawn) / rows)] for k in range(rows)]
