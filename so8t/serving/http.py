"""What our servers do alike: errors in OpenAI's shape, a limit to the size of a request, a bearer token.

Knows nothing of models. The limits are plain ASGI, so that no body is read, and no stream held back, for their sake.
"""

import hmac
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from so8t.serving.wire import WireError

log = logging.getLogger(__name__)


def error_response(error: WireError) -> JSONResponse:
    """The HTTP answer of an error."""
    return JSONResponse(error.body.model_dump(), error.status, error.headers)


def tell_errors(app: FastAPI) -> None:
    """Every error of `app` is told in OpenAI's shape: ours, a body that does not fit (400), no such path, and bugs (500)."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, WireError)
        return error_response(error)

    async def unfit(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        # pydantic names the member of a union, too
        field = ".".join(str(part) for part in first["loc"][1:] if part != "str" and str(part).replace("_", "").isalnum())
        return error_response(WireError(400, f"{field or 'body'}: {first['msg']}", param=field or None))

    async def other(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(WireError(error.status_code, str(error.detail), headers=error.headers))

    app.add_exception_handler(WireError, ours)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(HTTPException, other)
    app.add_middleware(_Bugs)


class _Bugs:
    """Tells what nobody expected. Starlette's own handler raises it once more, upon which the server cuts the connection."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def seen(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            log.exception("a request failed")
            told = WireError(500, f"a failure inside ({type(error).__name__}); the server's log tells more")
            await error_response(told)(scope, receive, send)


class BodyLimit:
    """Refuses requests whose body is larger than `max_bytes` (413), by what they declare and by what arrives. FastAPI's own
    `max_body_size` answers the first kind in plain text."""

    def __init__(self, app: ASGIApp, *, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await error_response(WireError(413, self._too_large()))(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, self._too_large())  # FastAPI takes any other for a malformed body
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> str:
        return f"the request's body is larger than {self.max_bytes:,} bytes"


class BearerToken:
    """Asks every request for `Authorization: Bearer <token>` (401), but for those to the paths in `open_paths`."""

    def __init__(self, app: ASGIApp, *, token: str, open_paths: frozenset[str]):
        self.app, self.expected, self.open_paths = app, f"Bearer {token}".encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                error = WireError(
                    401,
                    "no or a wrong token: send `Authorization: Bearer TOKEN` (OpenAI's clients: api_key)",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
