"""`so8t compare`: runs beside each other, grouped by what they differ in, with what each variant gains over a baseline."""

import argparse
import json
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from so8t.errors import SO8TError

HELP = "compare runs: groups of seeds side by side, and which variants do not help"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--sweep", type=Path, metavar="DIR", help="a multirun's folder; runs in it that did not finish are left out"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the variant to measure against, by its name or a part of it (default: the first)"
    )
    parser.add_argument("--json", action="store_true", help="the comparison as JSON on standard output")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="where the picture goes (default compare.png in the sweep; with --json none)"
    )


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.compare import compare, sweep_folders
    from so8t.compare_view import as_json, plot_comparison, print_comparison
    from so8t.page import write_out

    if not args.runs and args.sweep is None:
        raise SO8TError("name runs, or a multirun's folder with --sweep")
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise SO8TError(f"--out {args.out}: the picture is a PNG, name it so")
    of_sweep = [] if args.sweep is None else sweep_folders(args.sweep)
    comparison = compare(args.runs, of_sweep=of_sweep, baseline=args.baseline)
    picture = args.out or (None if args.json else (args.sweep or Path("outputs")) / "compare.png")
    if picture is not None:
        drawn = BytesIO()
        plot_comparison(comparison, drawn)
        write_out(picture, drawn.getvalue())
    if args.json:
        print(json.dumps(as_json(comparison), ensure_ascii=False))
        return
    console = Console()
    print_comparison(comparison, console)
    console.print(f"picture: {escape(str(picture))}", soft_wrap=True)
