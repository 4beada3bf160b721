"""A server that speaks OpenAI, well or badly, on a thread of the test's own process."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@contextmanager
def running(app: FastAPI):
    """The address of `app` behind uvicorn, until the block ends."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def chunk(delta: dict, finish: str | None = None, index: int = 0) -> bytes:
    """One event of a stream."""
    body = {
        "id": "chatcmpl-up",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "up",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def chunks(*texts: str, finish: str = "stop") -> list[bytes]:
    """A whole stream."""
    begin = chunk({"role": "assistant", "content": ""})
    return [begin, *(chunk({"content": text}) for text in texts), chunk({}, finish), b"data: [DONE]\n\n"]


def completion(message: dict, **more: object) -> dict:
    """A whole answer, with fields of its own."""
    return {
        "id": "chatcmpl-up",
        "object": "chat.completion",
        "created": 7,
        "model": "up",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **more,
    }


class Upstream:
    """What it answers is set by the test: `whole`, a body or a response, or `parts`, bytes and seconds of silence in turn.

    `asked` is what came, `closed` tells that a stream was left by the other side before its end.
    """

    def __init__(self) -> None:
        self.whole: dict | Response = completion({"content": "hello there"})
        self.parts: list[bytes | float] = list(chunks("hello", " there"))
        self.asked: list[tuple[str, dict, bytes]] = []
        self.closed = threading.Event()
        self.sent = 0
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST"])

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        self.asked.append((request.url.path, dict(request.headers), body))
        if request.method == "GET":
            return JSONResponse({"object": "list", "data": [{"id": "up", "object": "model", "created": 7, "owned_by": "me"}]})
        if json.loads(body).get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        if not isinstance(self.whole, Response):
            return JSONResponse(self.whole)
        return self.whole

    async def _stream(self) -> AsyncIterator[bytes]:
        self.sent = 0
        try:
            for part in self.parts:
                if isinstance(part, bytes):
                    yield part
                    self.sent += 1
                elif part < 0:
                    raise RuntimeError("the upstream dies")
                else:
                    await asyncio.sleep(part)
        except asyncio.CancelledError:
            self.closed.set()
            raise


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Waits for what happens on another thread."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()
