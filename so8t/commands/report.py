"""`so8t report`: one HTML file about a trained run and its pictures as PNGs, from what its folder holds; it needs no base and,
but for `--wandb` of a run that was logged online, no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from so8t.errors import SO8TError

HELP = "write one HTML file about a trained run: figures, curves, gates, worst mistakes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        help="the file to write, with its pictures beside it in a folder NAME_plots (default: report.html in the run's folder, "
        "with its pictures in plots)",
    )
    told = "send its pictures and tables to the Weights & Biases run, too, that it was trained under"
    parser.add_argument("--wandb", action="store_true", help=told)


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.page import write_out
    from so8t.report import panels, render
    from so8t.run_folder import read_run

    out: Path = args.out or args.run / "report.html"
    if out.is_dir():
        raise SO8TError(f"--out {out} is a folder: name a file")
    if out.suffix.lower() not in (".html", ".htm"):
        raise SO8TError(f"--out {out} would be taken for something else than a page: give it a name that ends in .html")
    read = read_run(args.run)
    logger = None
    if args.wandb:
        from so8t.wandb_panels import log_panels, logger_of

        logger = logger_of(read)
    told = panels(read)
    write_out(out, render(read, told).encode())
    plots = args.run / "plots" if args.out is None else out.with_name(f"{out.stem}_plots")
    for picture in (picture for panel in told for picture in panel.pictures):
        write_out(plots / f"{picture.name}.png", picture.png)
    print(f"report: {out}; its pictures: {plots}")
    if logger is not None:
        from wandb import Error

        try:
            try:
                log_panels(logger, told)
            finally:
                logger.experiment.finish()
        except Error as error:
            raise SO8TError(f"Weights & Biases: {error}") from None
        print(f"wandb: run {logger.version} of project {logger.name}")
