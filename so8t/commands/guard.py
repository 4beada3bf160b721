"""`so8t guard`: a trained agent's decisions before any OpenAI-compatible server, whose answers it watches."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from so8t.commands.serve import launch, read_token, server_arguments

if TYPE_CHECKING:
    from fastapi import APIRouter

    from so8t.serving.service import Service

HELP = "put a trained agent's decisions before any OpenAI-compatible server, and watch its answers"

KEY = "SO8T_UPSTREAM_KEY"
"""The environment's variable."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    server_arguments(parser, at=8001)
    parser.add_argument(
        "--upstream",
        type=base_url,
        required=True,
        metavar="URL",
        help="the server behind, as an OpenAI client's base_url: http://localhost:8000/v1",
    )
    parser.add_argument(
        "--upstream-key-file",
        type=Path,
        metavar="FILE",
        help=f"a file that holds the key to send it (or set {KEY}); without one, and without a token of the guard's own, "
        "it gets the client's",
    )
    # what is refused in a flood would cost a second each, and a small base's prose stands beside a large one's
    parser.add_argument("--rationales", action="store_true", help="the agent's own words where nothing is answered")


def base_url(text: str) -> str:
    """An HTTP address to which paths can be added."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text} is no address such as http://localhost:8000/v1")
    return text


def run(args: argparse.Namespace) -> None:
    """The command."""
    token = read_token(args.token_file)
    key = read_token(args.upstream_key_file, KEY)
    if key is None and token is not None:
        key = ""  # what clients send is the guard's token, and nobody else's business

    def routes(service: "Service") -> "APIRouter":
        from so8t.serving.guard import Guard
        from so8t.serving.guard_app import guard_routes
        from so8t.serving.upstream import Upstream

        upstream = Upstream(args.upstream, service.metrics.upstream, seconds=args.timeout, key=key)
        return guard_routes(Guard(service, upstream, watch_every=args.watch_every))

    from so8t.serving.worker import Limits

    launch(args, token, (routes,), Limits(queue=args.max_queue, seconds=args.timeout), rationales=args.rationales)
