"""What commands share: how a word of the command line is read, and where an agent at work keeps its state."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from so8t.data.records import ReadReport, bad_unicode
from so8t.errors import SO8TError
from so8t.labels import Label

T = TypeVar("T", int, float)

STATE = Path("outputs/agent")
"""Where an agent at work keeps its queue and its audit log."""
AUDIT, QUEUE = "audit", "escalations.sqlite"
"""Their names in it."""

COLOURS = {Label.ALLOW: "green", Label.ESCALATE: "yellow", Label.REFUSE: "red"}
"""Of decisions in a terminal."""

TOO_LONG = "too long to be read whole, and so not allowed"
"""What is told beside the decision on such a text."""


def given(what: str, read: Callable[[], str]) -> str:
    """A text from the command line or from standard input.

    Raises:
        SO8TError: it is not UTF-8.
    """
    try:
        text = read()
    except UnicodeDecodeError as error:
        raise SO8TError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    if wrong := bad_unicode(text):
        raise SO8TError(f"{what} is {wrong}: give it in UTF-8")
    return text


def row_arguments(parser: argparse.ArgumentParser) -> None:
    """How a file of records is read and decided."""
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    parser.add_argument("--batch-size", type=positive, default=32)


def uncalibrated_argument(parser: argparse.ArgumentParser) -> None:
    """Leaves out the policy."""
    parser.add_argument(
        "--uncalibrated",
        action="store_true",
        help="decide by the most probable label, without the policy of so8t calibrate",
    )


def tell_left_out(report: ReadReport, console: Console) -> None:
    """A line a bad row."""
    for line in report.skipped:
        console.print(f"left out: {escape(line)}")


def _number(kind: Callable[[str], T], text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def row_id(text: str) -> int:
    """The number of a row in an SQLite table, which has 64 bits."""
    value = positive(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large for a number of a request")
    return value


def not_negative(text: str) -> float:
    """A number from 0 up."""
    value = _number(float, text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    value = not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def port(text: str) -> int:
    """A TCP port; 0 is any free one."""
    value = _number(int, text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


def inside_unit(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = _number(float, text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (5 % is 0.05)")
    return value
