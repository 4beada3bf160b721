"""`so8t audit`: walks an audit log's chain and tells every line that was changed, torn, removed or moved."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from so8t.commands.types import AUDIT, STATE
from so8t.errors import ArtefactError

HELP = "verify an audit log"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=("verify",))
    parser.add_argument("folder", type=Path, nargs="?", default=STATE / AUDIT, help="default: %(default)s")
    parser.add_argument("--last", metavar="HASH", help="the last hash as it was kept elsewhere: lines cut off at the end show")


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.audit import hashes, verify

    found = verify(args.folder)
    problems = list(found.problems)
    if args.last and args.last not in hashes(args.folder):
        problems.append(f"no line has the hash {args.last}: the log was cut off before it, or it is another log's")
    console = Console(soft_wrap=True)
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/]")
    if problems:
        raise ArtefactError(f"{args.folder}: {len(problems)} problems in {found.lines} lines")
    console.print(f"{args.folder}: {found.lines} lines, the chain is whole; last hash {found.last}", highlight=False)
