"""`so8t chat`: a conversation with a trained agent; answers appear as they are watched."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from so8t.commands.types import AUDIT, COLOURS, QUEUE, STATE, TOO_LONG, given, positive
from so8t.conversation import Exchange
from so8t.labels import Label

ANEW = "/new"
HELP = "chat with a trained agent; every answer is watched as it grows"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--context", help="what the agent knows of the setting")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of an answer (default 128)")
    parser.add_argument("--watch-every", type=positive, default=8, help="tokens between two looks at an answer (default 8)")
    parser.add_argument("--keep-text", action="store_true", help="requests and answers in the audit log, not their hashes")
    parser.add_argument("--no-rationales", action="store_true", help="only the fixed sentence where nothing is answered")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of queue and audit log (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The command."""
    given("--context", lambda: args.context or "")
    from so8t.adapter import load_agent
    from so8t.agent import SafeAgent
    from so8t.audit import AuditLog
    from so8t.escalations import EscalationQueue

    agent = SafeAgent(
        load_agent(args.run),
        audit=AuditLog(args.state / AUDIT),
        queue=EscalationQueue(args.state / QUEUE),
        max_new_tokens=args.max_new_tokens,
        watch_every=args.watch_every,
        keep_text=args.keep_text,
        rationales=not args.no_rationales,
    )
    console = Console(soft_wrap=True)
    if sys.stdin.isatty():
        console.print(f"{ANEW} begins a new conversation; an empty line or Ctrl-D ends", style="dim")
    earlier: list[Exchange] = []
    while request := _asked(console):
        if request == ANEW:
            earlier = []
            continue
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for reply in agent.stream(request, args.context, earlier):
                # wrapped whatever the console does: the live view would cut long lines off
                shown = Text(no_wrap=False, overflow="fold")
                shown.append(f"{reply.verdict.label.name}  ", style=f"bold {COLOURS[reply.verdict.label]}")
                shown.append("  ".join(f"{k} {v:.2f}" for k, v in reply.verdict.probabilities.items()), style="dim")
                if reply.verdict.unread:
                    shown.append(f"  {TOO_LONG}", style="dim")
                shown.append(f"\n{reply.text}", style="none")
                live.update(shown, refresh=True)
        if reply.verdict.label is Label.ALLOW and reply.text:
            earlier.append(Exchange(request, reply.text))
        if not console.is_terminal:  # the live view leaves out the last line's end there
            console.print()
    if agent.failures:
        console.print(f"[red]{agent.failures} failures (counted as ESCALATE, not as predictions); the log tells more[/]")


def _asked(console: Console) -> str:
    """The next request; empty at the end."""
    try:
        return given("the request", lambda: console.input("[bold]> [/]" if sys.stdin.isatty() else "")).strip()
    except EOFError:
        return ""
