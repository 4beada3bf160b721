"""`so8t cache`: shows or deletes the frozen prefix's output on disk."""

import argparse

from rich.console import Console
from rich.table import Table

HELP = "the frozen prefix's output on disk: show or delete it"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=("info", "clear"))
    parser.add_argument("--folder", help="as cache.folder; by default `prefix` in the cache folder")


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.data.store import clear_stores, store_root, stores

    root = store_root(args.folder)
    console = Console(soft_wrap=True)
    if args.action == "clear":
        console.print(f"{clear_stores(root) / 2**30:.2f} GiB freed in {root}")
        return
    table = Table(title=f"{root}", title_justify="left")
    for column in ("base, cut and format", "rows", "GiB"):
        table.add_column(column, justify="left" if column.startswith("base") else "right", overflow="fold")
    found = stores(root)
    for info in found:
        table.add_row(info.name, f"{info.rows:,}", f"{info.bytes / 2**30:.3f}")
    table.add_row("all", f"{sum(i.rows for i in found):,}", f"{sum(i.bytes for i in found) / 2**30:.3f}", style="bold")
    console.print(table)
