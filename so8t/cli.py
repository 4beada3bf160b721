"""The `so8t` command: reads the command line and calls the module in `so8t.commands` that bears the command's name."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from so8t.console import quieten, reported

COMMANDS = (
    "plan",
    "ask",
    "evaluate",
    "robustness",
    "calibrate",
    "chat",
    "serve",
    "guard",
    "escalations",
    "audit",
    "data",
    "report",
    "compare",
    "cache",
    "export",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="so8t", description="Trains, asks and looks after safe agents made of rotations.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        module = import_module(f"so8t.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(command)
        command.set_defaults(run_command=module.run)
    args = parser.parse_args(argv)
    with reported():
        quieten()
        args.run_command(args)


if __name__ == "__main__":
    main()
