"""`so8t report`: one HTML file about a trained run, from what its folder holds; it needs no base and no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from so8t.errors import SO8TError

HELP = "write one HTML file about a trained run: figures, curves, gates, worst mistakes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.files import write_text
    from so8t.report import render
    from so8t.run_folder import read_run

    out: Path = args.out or args.run / "report.html"
    if out.is_dir():
        raise SO8TError(f"--out {out} is a folder: name a file")
    if out.suffix.lower() not in (".html", ".htm"):
        raise SO8TError(f"--out {out} would be taken for something else than a page: give it a name that ends in .html")
    write_text(out, render(read_run(args.run)))
    print(f"report: {out}")
