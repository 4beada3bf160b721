"""`so8t escalations`: what waits for a person, and what the person decides."""

import argparse
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8t.commands.types import AUDIT, QUEUE, STATE, row_id
from so8t.console import visible
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue

HELP = "list escalated requests, approve or deny them, and have approved ones answered"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=("list", "show", "approve", "deny", "answer"))
    parser.add_argument("id", type=row_id, nargs="?", help="the number of a request, for all but list")
    parser.add_argument("--all", action="store_true", help="list decided requests, too")
    parser.add_argument("--note", help="why, kept beside the decision")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="for answer: the run whose agent answers or refuses")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of queue and audit log (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The command."""
    file = args.state / QUEUE
    if not file.is_file():
        raise SO8TError(f"{file}: no queue here; `so8t chat` makes one, --state names another folder")
    queue, console = EscalationQueue(file), Console(soft_wrap=True, emoji=False)
    if args.action == "list":
        table = Table(title=str(file), title_justify="left")
        for column in ("id", "when", "state", "why", "request"):
            table.add_column(column, overflow="fold")
        for item in queue.listed(None if args.all else "pending"):
            when = datetime.fromtimestamp(item.created).astimezone().isoformat(" ", "seconds")
            table.add_row(str(item.id), when, item.state, item.reason, shown(item.request))
        console.print(table)
        return
    if args.id is None:
        raise SO8TError(f"`so8t escalations {args.action}` wants the number of a request; `so8t escalations list` shows them")
    if args.action == "answer":
        _answer(args, queue, console)
        return
    if args.action == "show":
        item = queue.get(args.id)
    else:
        item = queue.decide(args.id, "approved" if args.action == "approve" else "denied", args.note)
    console.print(f"[bold]{item.id}[/]   {item.state}, because of the {item.reason}")
    if item.context:
        console.print(f"context: {shown(item.context)}")
    for exchange in item.earlier:
        console.print(f"[dim]> {shown(exchange.request)}\n{shown(exchange.answer)}[/]")
    console.print(shown(item.request))
    console.print("  ".join(f"{name} {value:.3f}" for name, value in item.probabilities.items()))
    if item.note:
        console.print(f"note: {shown(item.note)}")
    if item.held:
        console.print(f"reply: {shown(item.reply)}" if item.reply else "held by a guard, which sends it on once it is approved")


def shown(text: str) -> str:
    """As it is, whatever it tells a terminal or rich: what is approved is what was read."""
    return escape(visible(text))


def _answer(args: argparse.Namespace, queue: EscalationQueue, console: Console) -> None:
    from so8t.adapter import load_agent
    from so8t.agent import SafeAgent
    from so8t.audit import AuditLog

    if args.run is None:
        raise SO8TError("`so8t escalations answer` wants --run RUN_DIR, the run whose agent answers")
    reply = SafeAgent(load_agent(args.run), audit=AuditLog(args.state / AUDIT), queue=queue).resume(args.id)
    console.print(f"[bold]{reply.verdict.label.name}[/]   {shown(reply.text)}")
