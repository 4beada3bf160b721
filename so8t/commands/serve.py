"""`so8t serve`: a trained agent behind HTTP, in OpenAI's shapes and its own."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from so8t.commands.types import AUDIT, QUEUE, STATE, not_negative, port, positive, positive_number
from so8t.errors import SO8TError

if TYPE_CHECKING:
    from so8t.serving.app import Routes
    from so8t.serving.worker import Limits

HELP = "serve a trained agent over HTTP: OpenAI's endpoints, decisions, escalations, metrics"

TOKEN = "SO8T_TOKEN"  # noqa: S105  (the variable's name)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_arguments(parser: argparse.ArgumentParser, *, at: int) -> None:
    """What every server of ours is told; `at` is its usual port."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s, this machine alone)")
    parser.add_argument("--port", type=port, default=at, help="port, 0 for any free one (default %(default)s)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"a file that holds the token clients must send (or set {TOKEN})"
    )
    parser.add_argument(
        "--max-queue", type=positive, default=256, help="requests that may wait; more get 503 (default %(default)s)"
    )
    parser.add_argument("--max-body-kib", type=positive, default=1024, help="size of a request (default %(default)s)")
    parser.add_argument(
        "--timeout", type=positive_number, default=120.0, help="seconds a request may take (default %(default)g)"
    )
    parser.add_argument(
        "--watch-every", type=positive, default=8, help="tokens between two looks at an answer (default %(default)s)"
    )
    parser.add_argument("--keep-text", action="store_true", help="requests and answers in the audit log, not their hashes")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of queue and audit log (default %(default)s)")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    server_arguments(parser, at=8000)
    parser.add_argument("--max-batch", type=positive, default=16, help="decisions in one pass (default %(default)s)")
    parser.add_argument(
        "--max-wait-ms",
        type=not_negative,
        default=5.0,
        help="how long the first of a batch waits for others (default %(default)g)",
    )
    parser.add_argument("--max-answers", type=positive, default=4, help="answers on their way at a time (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of an answer (default %(default)s)")
    parser.add_argument("--no-rationales", action="store_true", help="only the fixed sentence where nothing is answered")


def run(args: argparse.Namespace) -> None:
    """The command."""
    token = read_token(args.token_file)
    from so8t.serving.app import ROUTES
    from so8t.serving.worker import Limits

    limits = Limits(args.max_batch, args.max_wait_ms / 1e3, args.max_queue, args.max_answers, args.timeout)
    launch(args, token, ROUTES, limits, max_new_tokens=args.max_new_tokens, rationales=not args.no_rationales)


def launch(
    args: argparse.Namespace,
    token: str | None,
    routes: Sequence[Routes],
    limits: Limits,
    *,
    max_new_tokens: int = 1,
    rationales: bool,
) -> None:
    """Loads the run and serves it by these routes until it is told to stop.

    Raises:
        SO8TError: other machines would get in without a token, the port is taken, or the run cannot be loaded.
    """
    if token is None and args.host not in LOOPBACK:
        raise SO8TError(f"--host {args.host} lets other machines in: set {TOKEN} or --token-file first")
    listener = listen(args.host, args.port)

    import uvicorn

    from so8t.adapter import load_agent
    from so8t.agent import SafeAgent
    from so8t.audit import AuditLog
    from so8t.escalations import EscalationQueue
    from so8t.serving.app import make_app
    from so8t.serving.service import make_service

    queue = EscalationQueue(args.state / QUEUE)
    safe = SafeAgent(
        load_agent(args.run),
        audit=AuditLog(args.state / AUDIT),
        queue=queue,
        max_new_tokens=max_new_tokens,
        watch_every=args.watch_every,
        keep_text=args.keep_text,
        rationales=rationales,
    )
    service = make_service(safe, queue, limits)
    app = make_app(service, max_bytes=args.max_body_kib * 2**10, token=token, hosts=names(args.host), routes=routes)
    host, number = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    Console(soft_wrap=True).print(f"{service.model} at http://{shown}:{number}/v1 (Ctrl-C ends it)", highlight=False)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def names(host: str) -> tuple[str, ...]:
    """What a server that listens at `host` may be called in a request: on this machine alone its names, else any (none)."""
    return (*LOOPBACK, "[::1]") if host in LOOPBACK else ()  # requests have an IPv6 address in brackets


def read_token(file: Path | None, variable: str = TOKEN) -> str | None:
    """The token from the file, or from the environment's variable; never from the command line, which others can read.

    Raises:
        SO8TError: the file cannot be read, or the token is blank or no plain ASCII.
    """
    if file is None:
        token = os.environ.get(variable)
    else:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SO8TError(f"{file}: the token cannot be read: {error}") from None
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise SO8TError(f"{file or variable}: a token is one line of visible ASCII, and not empty")
    return token


def listen(host: str, number: int) -> socket.socket:
    """A listening socket, before anything slow begins.

    Raises:
        SO8TError: the port is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, number), family=family)
        # asyncio does this for sockets it makes itself; without it small answers wait for the client's acknowledgement, 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise SO8TError(f"cannot listen at {host}, port {number}: {error.strerror or error}; choose another --port") from None
