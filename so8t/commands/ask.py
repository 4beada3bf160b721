"""`so8t ask`: decides one request; on ALLOW the agent answers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from so8t.commands.types import COLOURS, TOO_LONG, positive
from so8t.errors import SO8TError
from so8t.labels import LABELS, Label

if TYPE_CHECKING:
    from so8t.adapter import Agent

HELP = "decide one request; on ALLOW the agent answers"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder, such as outputs/2026-01-31/12-00-00")
    parser.add_argument("request", help="the request, or - to read it from standard input")
    parser.add_argument("--context", help="what the agent knows of the setting")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of the answer (default 128)")
    parser.add_argument(
        "--gated", action="store_true", help="answer behind all gates (R_cmd included) instead of from the intact base"
    )
    parser.add_argument(
        "--stream", action="store_true", help="first show what is decided after each token of the request, in colours"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output; with --stream, one a token before it"
    )


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.adapter import load_agent

    request = sys.stdin.read() if args.request == "-" else args.request
    if not request.strip():
        raise SO8TError("the request is empty")
    agent = load_agent(args.run)
    console = Console(soft_wrap=True)
    if args.stream:
        show_stream(agent, request, args.context, console, as_json=args.json)
    decisions = agent.decide(request, args.context)
    label, unread = Label(int(decisions.labels[0])), bool(decisions.unread[0])
    probabilities = {name: float(decisions.probabilities[0, k]) for k, name in enumerate(LABELS)}
    answer = None
    if label is Label.ALLOW:
        answer = agent.answer(request, args.context, max_new_tokens=args.max_new_tokens, gated=args.gated)
    if args.json:
        out: dict[str, object] = {
            "user_request": request,
            "decision": label.name,
            "probabilities": probabilities,
            "answer": answer,
        }
        if agent.policy is not None:
            out["policy"] = agent.policy.as_json()
        if bool(decisions.failed[0]):
            out["failure"] = "a logit was not finite"
        if bool(decisions.unsure[0]):
            out["unsure"] = True
        if unread:
            out["unread"] = True
        print(json.dumps(out, ensure_ascii=False))
        return
    console.print(f"[bold {COLOURS[label]}]{label.name}[/]   " + "  ".join(f"{k} {v:.3f}" for k, v in probabilities.items()))
    if bool(decisions.failed[0]):
        console.print("this is a failure (a logit was not finite), not a prediction")
    if bool(decisions.unsure[0]):
        console.print("unsure: not sure enough of its most probable label, or too unlike what it knows to be allowed")
    if unread:
        console.print(TOO_LONG)
    if agent.policy is not None:
        console.print(f"decided {agent.policy.describe()}")
    if answer is not None:
        console.print(escape(answer))


def show_stream(agent: Agent, request: str, context: str | None, console: Console, *, as_json: bool) -> None:
    """The request token by token, each in the colour of what is decided after it; or one JSON line a token."""
    from so8t.streaming import stream

    for number, token in enumerate(stream(agent, request, context), start=1):
        if as_json:
            probabilities = dict(zip(LABELS, token.probabilities, strict=True))
            line = {"token": number, "text": token.text, "decision": token.label.name, "probabilities": probabilities}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            console.print(Text(token.text, style=COLOURS[token.label]), end="")
    if not as_json:
        console.print()
