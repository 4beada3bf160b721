"""`so8t serve`: a trained agent behind HTTP, in OpenAI's shapes and its own."""

import argparse
import os
import socket
from pathlib import Path

from rich.console import Console

from so8t.commands.types import AUDIT, QUEUE, STATE, not_negative, port, positive, positive_number
from so8t.errors import SO8TError

HELP = "serve a trained agent over HTTP: OpenAI's endpoints, decisions, escalations, metrics"

TOKEN = "SO8T_TOKEN"  # noqa: S105  (the variable's name)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s, this machine alone)")
    parser.add_argument("--port", type=port, default=8000, help="port, 0 for any free one (default %(default)s)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"a file that holds the token clients must send (or set {TOKEN})"
    )
    parser.add_argument("--max-batch", type=positive, default=16, help="decisions in one pass (default %(default)s)")
    parser.add_argument(
        "--max-wait-ms",
        type=not_negative,
        default=5.0,
        help="how long the first of a batch waits for others (default %(default)g)",
    )
    parser.add_argument(
        "--max-queue", type=positive, default=256, help="requests that may wait; more get 503 (default %(default)s)"
    )
    parser.add_argument("--max-answers", type=positive, default=4, help="answers on their way at a time (default %(default)s)")
    parser.add_argument("--max-body-kib", type=positive, default=1024, help="size of a request (default %(default)s)")
    parser.add_argument(
        "--timeout", type=positive_number, default=120.0, help="seconds a request may take (default %(default)g)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of an answer (default %(default)s)")
    parser.add_argument(
        "--watch-every", type=positive, default=8, help="tokens between two looks at an answer (default %(default)s)"
    )
    parser.add_argument("--keep-text", action="store_true", help="requests and answers in the audit log, not their hashes")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of queue and audit log (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The command."""
    token = read_token(args.token_file)
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
    from so8t.serving.worker import Limits

    queue = EscalationQueue(args.state / QUEUE)
    safe = SafeAgent(
        load_agent(args.run),
        audit=AuditLog(args.state / AUDIT),
        queue=queue,
        max_new_tokens=args.max_new_tokens,
        watch_every=args.watch_every,
        keep_text=args.keep_text,
    )
    limits = Limits(args.max_batch, args.max_wait_ms / 1e3, args.max_queue, args.max_answers, args.timeout)
    service = make_service(safe, queue, limits)
    hosts = LOOPBACK if args.host in LOOPBACK else ()
    app = make_app(service, max_bytes=args.max_body_kib * 2**10, token=token, hosts=hosts)
    host, number = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    Console(soft_wrap=True).print(f"{service.model} at http://{shown}:{number}/v1 (Ctrl-C ends it)", highlight=False)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def read_token(file: Path | None) -> str | None:
    """The token from the file, or from the environment; never from the command line, which others can read.

    Raises:
        SO8TError: the file cannot be read, or the token is blank or no plain ASCII.
    """
    if file is None:
        token = os.environ.get(TOKEN)
    else:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SO8TError(f"{file}: the token cannot be read: {error}") from None
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise SO8TError(f"{file or TOKEN}: a token is one line of visible ASCII, and not empty")
    return token


def listen(host: str, number: int) -> socket.socket:
    """A listening socket, before anything slow begins.

    Raises:
        SO8TError: the port is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, number), family=family)
    except OSError as error:
        raise SO8TError(f"cannot listen at {host}, port {number}: {error.strerror or error}; choose another --port") from None
