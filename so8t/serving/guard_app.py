"""The guard over HTTP: chat completions under watch, those held for a person, the list of models, and nothing else."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from so8t.serving.approvals import Approvals, completion
from so8t.serving.guard import CHAT, NO_TOKENS, Guard, HoldingWatch, closed, said_instead
from so8t.serving.reading import Chat, read_chat
from so8t.serving.watched import LeftAllow
from so8t.serving.wire import DONE, EVENT_STREAM, ChatChunk, ChunkChoice, Delta, WireError, new_id, sse

LOOK_SECONDS = 0.2
"""How often it is seen whether the client is still there, until the answer begins."""


class Stream(StreamingResponse):
    """Events, whose source is closed at once when the client leaves."""

    def __init__(self, frames: AsyncGenerator[bytes, None]):
        super().__init__(frames, media_type=EVENT_STREAM)
        self.frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        async with aclosing(self.frames):
            await super().__call__(scope, receive, send)


def guard_routes(guard: Guard) -> APIRouter:
    """The routes; while they are served, what a person approved is sent on."""
    routes = APIRouter(lifespan=Approvals(guard).running)

    @routes.post("/v1" + CHAT)
    async def chat(request: Request) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # what any web page may send without being asked, and would be sent on with our key
            raise WireError(415, "the content type must be application/json", param="content-type")
        chat = read_chat(await request.body())
        return await _while_connected(request, _answered(guard, chat, request))

    @routes.get("/v1" + CHAT + "/{ticket}")
    async def retrieve(ticket: str) -> Response:
        """What became of a request that was held for a person."""
        status, body = await run_in_threadpool(completion, guard.service.queue, ticket)
        return Response(body, status, media_type="application/json")

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        return Response(await guard.models(request.headers.items()), media_type="application/json")

    return routes


async def _while_connected(request: Request, work: Coroutine[None, None, Response]) -> Response:
    """The response, unless the client leaves before it begins: then `work` is ended."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _answered(guard: Guard, chat: Chat, request: Request) -> Response:
    chat, watch = await guard.begin(chat)
    headers = request.headers.items()
    if chat.request.stream:
        frames = _frames(guard, chat, watch, headers)
        first = await anext(frames)  # what fails before it has a status of its own
        return Stream(_chained(first, frames))
    if not watch.reply.finished and (answer := await guard.whole(chat, watch, headers)) is not None:
        return Response(answer[0], headers=answer[1], media_type="application/json")
    return Response(closed(chat.request.model, watch.reply, watch.told).model_dump_json(), media_type="application/json")


async def _frames(guard: Guard, chat: Chat, watch: HoldingWatch, headers: list[tuple[str, str]]) -> AsyncGenerator[bytes, None]:
    """The bytes of a streamed answer."""
    answer, begun = guard.watched(watch), False
    if not watch.reply.finished:
        try:
            async with aclosing(guard.stream(chat, watch, answer, headers)) as events:
                async for data in events:
                    yield "".join(f"data: {line}\n" for line in data.split("\n")).encode() + b"\n"
                    begun = True
            yield DONE
            return
        except LeftAllow:
            pass
        except WireError as error:
            if not begun:
                raise
            yield sse(error.body)
            return
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": chat.request.model, **answer.head}
    for frame in _closing(chat, watch, head):
        yield frame


def _closing(chat: Chat, watch: HoldingWatch, head: dict) -> Iterator[bytes]:
    """The last events of a stream that is closed; what is said instead of an answer is a refusal where one had begun."""
    reply = watch.reply
    said = said_instead(reply)
    delta = Delta(refusal=said) if reply.stopped else Delta(role="assistant", content=said)
    yield sse(ChatChunk(**head, choices=[ChunkChoice(delta=delta)]))
    last = ChunkChoice(delta=Delta(), finish_reason="content_filter")
    yield sse(ChatChunk(**head, choices=[last], so8t=watch.told))
    if chat.request.stream_options is not None and chat.request.stream_options.include_usage:
        yield sse(ChatChunk(**head, choices=[], usage=NO_TOKENS))
    yield DONE


async def _chained(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for frame in rest:
            yield frame
