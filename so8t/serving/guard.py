"""The guard's order, for any OpenAI-compatible upstream: read all of a request, decide it, hand it on, watch the answer.

The upstream gets a request only after ALLOW, and the client a part of its answer only after it was looked at. Earlier exchanges
are decided too, and those that the head does not allow are taken out of what is sent. Decisions of many clients, on requests
and on answers, are taken in the worker's batches. Knows nothing of how HTTP is served.
"""

import asyncio
import copy
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from so8t.agent import Reply, SafeAgent, Verdict, Watch, spoken, strictest
from so8t.conversation import Prompt, Reading, readings, readings_of
from so8t.errors import SO8TError
from so8t.escalations import Held
from so8t.labels import Label
from so8t.serving.reading import Chat, read_chat
from so8t.serving.service import Service, decided
from so8t.serving.strict_json import parse
from so8t.serving.upstream import Upstream, events, handed_back, read
from so8t.serving.watched import Garbled, LeftAllow, WatchedAnswer, released
from so8t.serving.wire import Answer, ChatCompletion, Choice, Decided, Usage, WireError, new_id

log = logging.getLogger(__name__)

T = TypeVar("T")
Headers = Iterable[tuple[str, str]]

CHAT = "/chat/completions"

NO_TOKENS = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


class Guard:
    """SO8T's decisions before an upstream.

    Args:
        watch_every: the agent's own tokens between two looks at a streamed answer.
    """

    def __init__(self, service: Service, upstream: Upstream, *, watch_every: int):
        self.service, self.upstream, self.watch_every = service, upstream, watch_every
        self.safe = service.agent
        self.template = copy.deepcopy(self.safe.agent.template)  # a tokenizer is not for two threads
        self._writing: set[asyncio.Future] = set()

    async def models(self, headers: Headers) -> bytes:
        """The upstream's list of models.

        Raises:
            WireError: the upstream failed.
        """
        async with self.upstream.asked("GET", "/models", headers) as response, asyncio.timeout(self.service.limits.seconds):
            body = await read(response)
            try:
                parse(body)
            except ValueError:
                raise Garbled("something that is not JSON") from None
        return body

    # -- the request -----------------------------------------------------------------------------------------------------

    async def begin(self, chat: Chat) -> tuple[Chat, "HoldingWatch"]:
        """Decides all of a chat; gives what of it may be sent, if the watch's reply is not `finished`.

        Raises:
            WireError: 503, the queue is full; 504, deciding takes too long.
        """
        begun = time.perf_counter()
        await self.run(lambda: None, accepted=False)  # 503 if the queue is full
        told = len(chat.prompt.earlier)
        try:
            async with asyncio.timeout(self.service.limits.seconds):
                chat = chat.without(await self._not_allowed(chat))
                verdict = await self._verdict(chat)
        except TimeoutError:
            raise WireError(504, "the request was not decided in time", code="timeout") from None
        except SO8TError:
            raise
        except Exception:
            log.exception("a conversation failed")
            self.safe.failures += 1
            verdict = Verdict.not_taken()
        more = {"left_out": told - len(chat.prompt.earlier)} if told else {}

        def hold(number: int, ticket: str) -> None:
            self.service.queue.hold(number, ticket, chat.unstreamed(), self.upstream.url)

        watch = await self.run(partial(HoldingWatch, hold, self.safe, chat.prompt, verdict, begun=begun, **more))
        if watch.reply.finished:
            replies = watch.explained()
            while not (await self.run(partial(next, replies))).finished:
                pass
            self.service.metrics.decided(verdict)
        return chat, watch

    async def _not_allowed(self, chat: Chat) -> set[int]:
        """Which earlier exchanges the head does not allow, request or answer."""
        verdicts = await self._verdicts(readings_of(chat.prompt.earlier, chat.prompt.context))
        return {k // 2 for k, verdict in enumerate(verdicts) if verdict.label is not Label.ALLOW}

    async def _verdict(self, chat: Chat) -> Verdict:
        """The strictest decision on the user's turn, on it with all that follows, and behind earlier ones."""
        asked = Reading(chat.asked, chat.prompt.context)
        return strictest(await self._verdicts([asked, *readings(chat.prompt, "", self.template.reads_whole)]))

    async def _verdicts(self, asked: Sequence[Reading]) -> list[Verdict]:
        """From the worker's batches, no more at once than one of them takes: a long conversation leaves room for others."""
        once, most = list(dict.fromkeys(asked)), self.service.limits.batch
        found: dict[Reading, Verdict] = {}
        for k in range(0, len(once), most):
            waiting = [asyncio.wrap_future(future) for future in self.service.worker.read(once[k : k + most])]
            found |= zip(once[k : k + most], await asyncio.gather(*waiting), strict=True)
        return [found[reading] for reading in asked]

    # -- the answer ------------------------------------------------------------------------------------------------------

    async def whole(self, chat: Chat, watch: Watch, headers: Headers) -> tuple[bytes, dict[str, str]] | None:
        """The upstream's answer and headers of it; `None` where it left ALLOW, and `watch.reply` tells the rest.

        Raises:
            WireError: the upstream failed.
        """
        answer = self.watched(watch)
        try:
            async with (
                self.upstream.asked("POST", CHAT, headers, chat.body) as response,
                asyncio.timeout(self.service.limits.seconds),
            ):
                body = await read(response)
                answer.take(body)
                await answer.look()
                if not answer.finished:
                    raise Garbled("an answer without a finish reason")
            await self.run(partial(watch.end, "answer", answer.text))
            return body, handed_back(response)
        except LeftAllow:
            return None
        finally:
            self._write_down(watch, answer)

    async def approved(self, held: Held) -> tuple[str, str]:
        """The completion of a request that a person has allowed, and what it says; its answer is watched against REFUSE alone.

        Raises:
            WireError: the upstream failed.
        """
        begun = time.perf_counter()
        chat = read_chat(held.body.encode())
        verdict = await self._verdict(chat)
        told = partial(Watch, self.safe, chat.prompt, verdict, approved=True, begun=begun, escalation=held.number)
        watch = await self.run(told)
        answer = await self.whole(chat, watch, ())
        if answer is not None:
            return answer[0].decode(), watch.reply.text
        reply = watch.reply
        completion = closed(chat.request.model, reply, decided(reply.verdict, reply))
        return completion.model_dump_json(), spoken(reply.verdict, reply.escalation)

    async def stream(self, chat: Chat, watch: Watch, answer: WatchedAnswer, headers: Headers) -> AsyncGenerator[str, None]:
        """The upstream's events, each after its text was looked at.

        Raises:
            LeftAllow: the answer left ALLOW, and `watch.reply` tells the rest.
            WireError: the upstream failed.
        """
        until = asyncio.get_running_loop().time() + self.service.limits.seconds
        try:
            async with (
                self.upstream.asked("POST", CHAT, headers, chat.body) as response,
                aclosing(events(response)) as coming,
                aclosing(released(coming, answer, every=self.watch_every, until=until)) as allowed,
            ):
                async for data in allowed:
                    yield data
            await self.run(partial(watch.end, "answer", answer.text))
        finally:
            self._write_down(watch, answer)

    async def run(self, act: Callable[[], T], *, accepted: bool = True) -> T:
        """On the thread that owns the model."""
        return await asyncio.wrap_future(self.service.worker.have_done(act, accepted=accepted))

    def watched(self, watch: Watch) -> WatchedAnswer:
        """An answer that `watch` looks at."""

        async def allowed(text: str) -> bool:
            seen = strictest(await self._verdicts(readings(watch.prompt, text, self.template.reads_whole)))
            if watch.allows(seen):
                watch.saw(text, seen)
            else:
                await self.run(partial(watch.saw, text, seen))  # is written down
            return not watch.reply.stopped

        return WatchedAnswer(allowed, self.template.length, self.template.room // 3)

    def _write_down(self, watch: Watch, answer: WatchedAnswer) -> None:
        """An answer that broke off, or whose client left, is written down as far as it was looked at."""
        self.service.metrics.decided(watch.reply.verdict)
        writing = asyncio.ensure_future(
            self.run(lambda: watch.reply if watch.reply.finished else watch.end("interrupted", answer.text))
        )
        self._writing.add(writing)  # the loop itself keeps only a weak reference
        writing.add_done_callback(self._writing.discard)


class HoldingWatch(Watch):
    """A watch that holds what is for a person as soon as it is in the queue, so that a client who leaves takes nothing along.
    `ticket` is for the reply to it."""

    def __init__(
        self,
        hold: Callable[[int, str], None],
        safe: SafeAgent,
        prompt: Prompt,
        verdict: Verdict,
        *,
        begun: float,
        **more: object,
    ):
        self.hold = hold
        self.ticket: str | None = None
        super().__init__(safe, prompt, verdict, approved=False, begun=begun, **more)

    @property
    def told(self) -> Decided:
        """What the client is told where nothing is answered, or no more."""
        return decided(self.reply.verdict, self.reply, self.ticket)

    def _closed(self, verdict: Verdict, reason: str) -> Reply:
        reply = super()._closed(verdict, reason)
        if reply.escalation is not None:
            ticket = new_id("chatcmpl")
            self.hold(reply.escalation, ticket)
            self.ticket = ticket
        return reply


def said_instead(reply: Reply) -> str:
    """What is said instead of an answer, or of the rest of one."""
    return spoken(reply.verdict, reply.escalation) if reply.stopped else reply.text


def closed(model: str, reply: Reply, told: Decided) -> ChatCompletion:
    """The whole answer where there is none."""
    said = Answer(content=said_instead(reply))
    return ChatCompletion(
        model=model, choices=[Choice(message=said, finish_reason="content_filter")], usage=NO_TOKENS, so8t=told
    )
