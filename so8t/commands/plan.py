"""`so8t plan`: predicts the peak memory of a training run, without GPU and weights."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from so8t.errors import SO8TError

HELP = "predict the peak memory of a training run, without GPU and weights"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="what train.py would be given, such as +hw=rtx3060 base=qwen2.5_7b"
    )
    parser.add_argument("--json", action="store_true", help="peak_gib, fits and parts as JSON on standard output")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where the picture goes (default outputs/plan.png; with --json none)"
    )


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.config import compose_train, validate
    from so8t.memory import plan
    from so8t.plan_view import as_json, plot_plan, print_plan
    from so8t.remedies import remedies

    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise SO8TError(f"--plot {args.plot}: the picture is a PNG, name it so")
    config = validate(compose_train([*args.overrides]))
    console = Console(stderr=args.json, soft_wrap=True)
    with console.status("planning"):
        planned = plan(config)
    with console.status("looking for settings that fit"):
        found = remedies(config, planned)
    if args.json:
        print(json.dumps(as_json(planned, found)))
    else:
        print_plan(config, planned, found, console)
    picture = args.plot or (None if args.json else Path("outputs/plan.png"))
    if picture is not None:
        plot_plan(config, planned, picture)
        console.print(f"picture: {picture}")
