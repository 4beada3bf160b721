"""The guard's order, for any OpenAI-compatible upstream: read all of a request, decide it, hand it on, watch the answer.

The upstream gets a request only after ALLOW, and the client a part of its answer only after it was looked at. Earlier exchanges
are decided too, and those that the head does not allow are taken out of what is sent. What is too long for the head to read at
once is also read in overlapping windows, and the strictest decision counts. Knows nothing of how HTTP is served.
"""

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from so8t.agent import Verdict, Watch
from so8t.conversation import with_answer
from so8t.errors import SO8TError
from so8t.labels import Label
from so8t.serving.reading import Chat
from so8t.serving.service import Service
from so8t.serving.strict_json import parse
from so8t.serving.upstream import Upstream, events, handed_back, read
from so8t.serving.watched import Garbled, LeftAllow, WatchedAnswer, pieces, released
from so8t.serving.wire import WireError

log = logging.getLogger(__name__)

T = TypeVar("T")
Headers = Iterable[tuple[str, str]]

CHAT = "/chat/completions"

MOST_WINDOWS = 64
"""Of one request; a longer one is refused (413)."""
AT_ONCE = 8
"""Texts that the head reads in one pass."""


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

    async def begin(self, chat: Chat) -> tuple[Chat, Watch]:
        """Decides all of a chat; gives what of it may be sent, if the watch's reply is not `finished`.

        Raises:
            WireError: it is too long to be read (413).
        """
        begun = time.perf_counter()
        await self.run(lambda: None, accepted=False)  # 503 if the queue is full
        told = len(chat.prompt.earlier)
        try:
            chat = chat.without(await self._not_allowed(chat))
            verdict = await self._verdict(chat)
        except SO8TError:
            raise
        except Exception:
            log.exception("a conversation failed")
            self.safe.failures += 1
            verdict = Verdict.not_taken()
        more = {"left_out": told - len(chat.prompt.earlier)} if told else {}
        watch = await self.run(partial(Watch, self.safe, chat.prompt, verdict, approved=False, begun=begun, **more))
        if watch.reply.finished:
            replies = watch.explained()
            while not (await self.run(partial(next, replies))).finished:
                pass
            self.service.metrics.decided(verdict)
        return chat, watch

    async def _not_allowed(self, chat: Chat) -> set[int]:
        """Which earlier exchanges the head does not allow, request or answer or a window of them."""
        context = chat.prompt.context
        texts: list[tuple[str, str | None]] = []
        owners: list[int] = []
        for k, exchange in enumerate(chat.prompt.earlier):
            whole = with_answer(exchange.request, exchange.answer)
            of_it = [(exchange.request, context), (whole, context), *self._windows(whole, context)]
            texts += of_it
            owners += [k] * len(of_it)
        verdicts = await self._verdicts(texts)
        return {k for k, verdict in zip(owners, verdicts, strict=True) if verdict.label is not Label.ALLOW}

    async def _verdict(self, chat: Chat) -> Verdict:
        """The strictest decision on the user's turn, on it with all that follows, behind earlier ones, and on every window."""
        prompt = chat.prompt
        texts = [(chat.asked, prompt.context), *self._windows(prompt.request, prompt.context)]
        verdicts = [await self.run(partial(self.safe.verdict, prompt)), *await self._verdicts(texts)]
        return max(verdicts, key=lambda verdict: verdict.strictness)

    def _windows(self, text: str, context: str | None) -> list[tuple[str, str | None]]:
        """What is too long to be read at once, in overlapping windows."""
        if self.template.reads_whole(text, context):
            return []
        whole = f"{context}\n\n{text}" if context else text
        parts = list(pieces(whole, self.template.length, self.template.room // 2))
        if len(parts) > MOST_WINDOWS:
            raise WireError(413, f"too long to be read: more than {MOST_WINDOWS * self.template.room // 2:,} tokens of ours")
        return [(one + other, None) for one, other in itertools.pairwise(parts) if (one + other).strip()]

    async def _verdicts(self, texts: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        texts_once = list(dict.fromkeys(texts))
        found: dict[tuple[str, str | None], Verdict] = {}
        for k in range(0, len(texts_once), AT_ONCE):
            batch = texts_once[k : k + AT_ONCE]
            found |= zip(batch, await self.run(partial(self.safe.verdicts, batch)), strict=True)
        return [found[text] for text in texts]

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

        async def decide(text: str) -> Verdict:
            return (await self.run(partial(watch.look, text))).verdict

        return WatchedAnswer(decide, self.template.length, self.template.room // 3)

    def _write_down(self, watch: Watch, answer: WatchedAnswer) -> None:
        """An answer that broke off, or whose client left, is written down as far as it was looked at."""
        self.service.metrics.decided(watch.reply.verdict)
        writing = asyncio.ensure_future(
            self.run(lambda: watch.reply if watch.reply.finished else watch.end("interrupted", answer.text))
        )
        self._writing.add(writing)  # the loop itself keeps only a weak reference
        writing.add_done_callback(self._writing.discard)
