"""What the routes of the server share: the agent behind its worker, limits, and waiting for it without blocking."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from pydantic import BaseModel

from so8t.agent import Reply, SafeAgent, Verdict
from so8t.escalations import EscalationQueue
from so8t.serving.metrics import Metrics
from so8t.serving.wire import DONE, Decided, WireError, sse
from so8t.serving.worker import Limits, Worker


@dataclass(frozen=True)
class Service:
    """One agent as a server shows it. `model` is its name, `created` when its adapter was written (seconds since 1970)."""

    model: str
    created: int
    agent: SafeAgent
    queue: EscalationQueue
    limits: Limits
    metrics: Metrics
    worker: Worker

    async def decide(self, requests: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """Decisions from the worker's batches.

        Raises:
            WireError: 400, one is blank or there are too many; 503, no room; 504, it took too long.
        """
        if len(requests) > self.limits.queue:
            raise WireError(400, f"{len(requests)} texts in one request: at most {self.limits.queue} find room in the queue")
        if not requests or not all(request.strip() for request, _ in requests):
            raise WireError(400, "there is no text to decide, or one is blank")
        waiting = [asyncio.wrap_future(future) for future in self.worker.decide(requests)]
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await asyncio.gather(*waiting)
        except TimeoutError:
            raise self.late() from None

    def answer(self, begin: Callable[[], Iterator[Reply]]) -> AsyncIterator[Reply]:
        """Replies from the worker as they grow. It is in the queue when this returns.

        Raises:
            WireError: 503, no room. While iterating: 504, it took too long; or what the worker raised.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Reply | Exception | None] = asyncio.Queue()
        deadline = time.monotonic() + self.limits.seconds
        job = self.worker.answer(begin, lambda reply: _to_loop(loop, inbox, reply))

        async def replies() -> AsyncIterator[Reply]:
            try:
                while True:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        reply = await inbox.get()
                    if isinstance(reply, Exception):
                        raise reply
                    if reply is None:
                        return
                    yield reply
            except TimeoutError:
                raise self.late() from None
            finally:
                job.cancel()

        return replies()

    def late(self) -> WireError:
        """What is told when the time is over."""
        return WireError(504, f"not done within {self.limits.seconds:g} seconds", code="timeout")


def make_service(agent: SafeAgent, queue: EscalationQueue, limits: Limits) -> Service:
    """The agent, which escalates into `queue`, behind a worker that has not started yet."""
    metrics = Metrics()
    adapter = agent.agent
    return Service(
        model=f"{adapter.model.base.spec.name}-so8t",
        created=int((adapter.folder / "adapter.json").stat().st_mtime),
        agent=agent,
        queue=queue,
        limits=limits,
        metrics=metrics,
        worker=Worker(agent, limits, metrics),
    )


def _to_loop(
    loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Reply | Exception | None], reply: Reply | Exception | None
) -> None:
    if not loop.is_closed():  # a server that was stopped by force
        loop.call_soon_threadsafe(inbox.put_nowait, reply)


async def events(
    first: Reply, rest: AsyncIterator[Reply], shown: Callable[[Reply], Iterator[BaseModel]]
) -> AsyncIterator[bytes]:
    """Server-sent events of a reply as it grows: what is `shown` of each, until it is finished or an error ends it."""
    async with aclosing(rest):  # type: ignore[type-var]
        reply = first
        try:
            while True:
                for data in shown(reply):
                    yield sse(data)
                if reply.finished:
                    break
                reply = await anext(rest)
        except WireError as error:
            yield sse(error.body)
            return
        yield DONE


async def last(replies: AsyncIterator[Reply]) -> Reply:
    """The finished one."""
    reply = await anext(replies)
    async for newer in replies:
        reply = newer
    return reply


def decided(verdict: Verdict, reply: Reply | None = None, ticket: str | None = None) -> Decided:
    """A decision on the wire."""
    return Decided(
        decision=verdict.label.name,
        probabilities=verdict.probabilities,
        failed=verdict.failed,
        unread=verdict.unread,
        stopped=reply is not None and reply.stopped,
        escalation=None if reply is None else reply.escalation,
        ticket=ticket,
    )
