"""The server behind the guard: a request handed on, its answer, and every way it can fail, as an error with a status."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
from prometheus_client import Counter

from so8t.serving.strict_json import parse
from so8t.serving.watched import WORD, Garbled
from so8t.serving.wire import WireError

log = logging.getLogger(__name__)

NOT_HANDED_ON = {
    # of one connection alone (RFC 9110, 7.6.1)
    *("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
    # of a message that we write anew
    *("host", "content-length", "content-type", "content-encoding", "accept", "accept-encoding", "expect"),
    # what some servers take for another path or method than the one that was guarded
    *("x-original-url", "x-rewrite-url", "x-http-method", "x-http-method-override", "x-method-override"),
}
HANDED_BACK = ("x-request-id", "retry-after")
"""Of the answer's headers."""

CONNECT_SECONDS = 10.0
MAX_BYTES = 8 * 2**20
"""Of a whole answer."""


def handed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The client's headers that go to the upstream; those that `Connection` names do not either."""
    given = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in given if name == "connection" for word in value.split(",")}
    return [(name, value) for name, value in given if name not in NOT_HANDED_ON | named]


class Upstream:
    """An OpenAI-compatible server.

    Args:
        url: as OpenAI's clients take it for `base_url`, such as `http://localhost:8000/v1`.
        failures: counts by code.
        seconds: how long it may be silent.
        key: sent as bearer token; `None` hands on what the client sends, an empty one nothing.
    """

    def __init__(self, url: str, failures: Counter, *, seconds: float, key: str | None = None):
        self.url, self.failures, self.key = url.rstrip("/"), failures, key
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            # no .netrc lends a key, no redirect sends it elsewhere, and no client gets the cookies of another
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )

    @asynccontextmanager
    async def asked(
        self, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The answer, its body not yet read; leaving the block closes the connection if there is more.

        Raises:
            WireError: 504 where the upstream is too slow, here or in the block; its own status from 400 to 499, 503 and 529;
                502 for all else.
        """
        sent = [*handed_on(headers), ("accept-encoding", "identity")]
        if body is not None:
            sent.append(("content-type", "application/json"))
        if self.key is not None:
            sent = [pair for pair in sent if pair[0] != "authorization"]
        if self.key:
            sent.append(("authorization", f"Bearer {self.key}"))
        try:
            async with self.client.stream(method, self.url + path, content=body, headers=sent) as answer:
                if answer.status_code != 200:
                    raise await _refused(answer)
                yield answer
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, Garbled, WireError) as error:
            told = _told(error)
            self.failures.labels(told.body.error.code).inc()
            raise told from None

    async def aclose(self) -> None:
        """Closes what is kept open."""
        await self.client.aclose()


def _told(error: Exception) -> WireError:
    if isinstance(error, WireError):
        return error
    log.warning("the upstream failed: %s: %s", type(error).__name__, error)
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return WireError(504, "the upstream was not done in time", code="upstream_timeout")
    if isinstance(error, Garbled):
        return WireError(502, f"the upstream sent {error}", code="upstream_garbled")
    return WireError(502, f"the upstream failed ({type(error).__name__})", code="upstream_failed")


async def _refused(answer: httpx2.Response) -> WireError:
    """Its status, where that is for the client, and words for programs; its message may quote an answer and is for the log."""
    status, body = answer.status_code, await read(answer)
    log.warning("the upstream answered %d: %.500s", status, body.decode("utf-8", "replace"))
    try:
        told = parse(body)
    except ValueError:
        told = None
    detail = told.get("error") if isinstance(told, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    words = [word for name in ("code", "param") if isinstance(word := detail.get(name), str) and WORD.fullmatch(word)]
    return WireError(
        status if 400 <= status < 500 or status in (503, 529) else 502,
        f"the upstream answered {' '.join([str(status), *words])}; the guard's log has its message",
        code="upstream_refused",
        headers=handed_back(answer),
    )


def handed_back(answer: httpx2.Response) -> dict[str, str]:
    """The answer's headers that the client gets."""
    return {name: answer.headers[name] for name in HANDED_BACK if name in answer.headers}


async def read(answer: httpx2.Response) -> bytes:
    """The whole body.

    Raises:
        Garbled: it is larger than `MAX_BYTES`.
    """
    body = bytearray()
    async for part in answer.aiter_bytes():
        body += part
        if len(body) > MAX_BYTES:
            raise Garbled(f"more than {MAX_BYTES:,} bytes")
    return bytes(body)


async def events(answer: httpx2.Response) -> AsyncGenerator[str, None]:
    """The data of its server-sent events; comments and other fields are left out."""
    async for event in httpx2.EventSource(answer):
        yield event.data
