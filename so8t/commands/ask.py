"""`so8t ask`: decides one request; on ALLOW the agent answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from so8t.commands.types import COLOURS, TOO_LONG, given, positive
from so8t.errors import SO8TError
from so8t.labels import LABELS, Label

if TYPE_CHECKING:
    from so8t.adapter import Agent
    from so8t.agent import Reply

HELP = "decide one request; on ALLOW the agent answers"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder, such as outputs/2026-01-31/12-00-00")
    parser.add_argument("request", help="the request, or - to read it from standard input")
    parser.add_argument("--context", help="what the agent knows of the setting")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of the answer (default 128)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--gated", action="store_true", help="answer behind all gates (R_cmd included) instead of from the intact base"
    )
    how.add_argument(
        "--stream",
        action="store_true",
        help="show what is decided after each token of the request, smoothed, in colours; then watch the answer and look at it "
        "after each token, where chat and serve look every few",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output; with --stream, one a token before it"
    )


def run(args: argparse.Namespace) -> None:
    """The command."""
    from so8t.adapter import load_agent

    request = given("the request", sys.stdin.read if args.request == "-" else lambda: args.request)
    given("--context", lambda: args.context or "")
    if not request.strip():
        raise SO8TError("the request is empty")
    agent = load_agent(args.run)
    console = Console(soft_wrap=True)
    if args.stream:
        show_request(agent, request, args.context, console, as_json=args.json)
    decisions = agent.decide(request, args.context)
    label, unread = Label(int(decisions.labels[0])), bool(decisions.unread[0])
    probabilities = {name: float(decisions.probabilities[0, k]) for k, name in enumerate(LABELS)}
    if not args.json:
        console.print(told(label, probabilities))
        if bool(decisions.failed[0]):
            console.print("this is a failure (a logit was not finite), not a prediction")
        if bool(decisions.unsure[0]):
            console.print("unsure: not sure enough of its most probable label, or too unlike what it knows to be allowed")
        if unread:
            console.print(TOO_LONG)
        if agent.policy is not None:
            console.print(f"decided {agent.policy.describe()}")
    answer, watched = None, None
    if label is Label.ALLOW and args.stream:
        watched = show_answer(agent, request, args.context, args.max_new_tokens, console, as_json=args.json)
        answer = watched.text
    elif label is Label.ALLOW:
        answer = agent.answer(request, args.context, max_new_tokens=args.max_new_tokens, gated=args.gated)
        if not args.json:
            console.print(escape(answer))
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
        if watched is not None and watched.verdict.label is not Label.ALLOW:
            out["stopped"] = watched.verdict.label.name
            if watched.verdict.failed:
                out["failure"] = "the watch over the answer failed"
        print(json.dumps(out, ensure_ascii=False))


def told(label: Label, probabilities: Mapping[str, float]) -> str:
    """A decision and its probabilities, for people."""
    return f"[bold {COLOURS[label]}]{label.name}[/]   " + "  ".join(f"{k} {v:.3f}" for k, v in probabilities.items())


def json_line(
    part: str, number: int, text: str, label: Label, probabilities: Mapping[str, float], prompt: int | None = None
) -> str:
    """What was decided after a token of the request or of the answer."""
    place = {} if prompt is None else {"prompt": prompt}
    line = {"part": part, **place, "token": number, "text": text, "decision": label.name, "probabilities": probabilities}
    return json.dumps(line, ensure_ascii=False)


def show_request(agent: Agent, request: str, context: str | None, console: Console, *, as_json: bool) -> None:
    """Token by token, each in the colour of what is decided after it, or one JSON line a token; a long request in every prompt
    that it is decided in."""
    from so8t.streaming import streams

    prompts = streams(agent, request, context)
    for place, prompt in enumerate(prompts, start=1):
        if len(prompts) > 1 and not as_json:
            what = "its beginning and end" if place == 1 else f"window {place - 1} of {len(prompts) - 1}"
            console.print(f"the request is long, here {what}:", style="dim")
        for number, token in enumerate(prompt, start=1):
            if as_json:
                probabilities = dict(zip(LABELS, token.probabilities, strict=True))
                print(json_line("request", number, token.text, token.label, probabilities, prompt=place), flush=True)
            else:
                console.print(Text(token.text, style=COLOURS[token.label]), end="")
        if not as_json:
            console.print()


def show_answer(
    agent: Agent, request: str, context: str | None, max_new_tokens: int, console: Console, *, as_json: bool
) -> Reply:
    """The answer token by token, none of them shown before the answer with it was decided to be ALLOW; its end is a token, too.
    Gives the last reply."""
    from so8t.agent import SafeAgent

    replies = SafeAgent(agent, max_new_tokens=max_new_tokens, watch_every=1, rationales=False).stream(request, context)
    number, reply = 0, next(replies)  # on the request alone
    shown = ""
    for number, reply in enumerate(replies, start=1):
        text, shown = reply.text[len(shown) :], reply.text
        if as_json:
            print(json_line("answer", number, text, reply.verdict.label, reply.verdict.probabilities), flush=True)
        else:
            console.print(Text(text, style=COLOURS[reply.verdict.label]), end="")
    if not as_json:
        console.print()
        if reply.verdict.label is not Label.ALLOW:
            decided = told(reply.verdict.label, reply.verdict.probabilities)
            what = f"the answer with token {number}, which is not shown," if number else "the request, decided again,"
            console.print(f"stopped: {what} is {decided}")
        if reply.verdict.failed:
            console.print("this is a failure, not a prediction")
    return reply
