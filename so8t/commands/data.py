"""`so8t data check`: what is in files of records, and what is wrong with them, before anyone trains on them."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8t.labels import LABELS

HELP = "check files of records: counts, lengths, duplicates, conflicting labels, leaks between files"
SHOWN = 10


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=("check",))
    parser.add_argument(
        "files", type=Path, nargs="+", help="JSONL files; give train, validation and test together to see leaks"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON on standard output")


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.data.check import check_files

    found = check_files(args.files)
    if args.json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    for file in found.files:
        table = Table(title=f"{file.name}: {file.rows} rows", title_justify="left")
        for column in ("", *LABELS, "all"):
            table.add_column(column, justify="right" if column else "left")
        for kind, counts in (("source", file.by_source), ("language", file.by_language), ("form", file.by_form)):
            for value, row in counts.items():
                table.add_row(f"{kind} {escape(value)}", *map(str, row), str(sum(row)))
        console.print(table)
        longest = max(file.lengths.values())
        for name, count in file.lengths.items():
            console.print(f"{name:>10} characters {'█' * max(1, round(40 * count / longest))} {count}")
        for line in file.bad_rows:
            console.print(f"[red]bad row[/] {escape(line)}")
    for title, pairs in (
        ("label conflicts (same request and context, another label)", found.conflicts),
        ("near-duplicates within a file", found.within),
        ("leaks between files", found.leaks),
    ):
        console.print(f"[bold]{title}: {len(pairs)}[/]")
        for pair in pairs[:SHOWN]:
            label = "" if pair.same_label else ", other label"
            console.print(f"  {escape(pair.first)} = {escape(pair.second)}{label}: {escape(pair.request[:80])}")
        if len(pairs) > SHOWN:
            console.print(f"  ... and {len(pairs) - SHOWN} more (--json has all)")
