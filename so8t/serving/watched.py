"""An upstream's answer under watch: what of it is text, in what order, and when a part that is held back may go.

Text is every string of an answer but the few short ones under `METADATA`: content, refusals, reasoning, names and arguments of
tool calls, and whatever a server adds to them. What a choice says is one running text in the order of arrival. It is looked at
in pieces small enough to be wholly in view at the end of what the head reads. Knows nothing of HTTP or models.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing

from pydantic import JsonValue

from so8t.serving.strict_json import parse

METADATA = {
    *("id", "object", "model", "provider", "system_fingerprint", "service_tier", "obfuscation"),
    *("role", "type", "finish_reason", "severity", "tool_call_id"),
}
"""Names whose strings are not read if they are words for programs."""
WORD = re.compile(r"[!-~]{0,64}")
"""Such a word: printable ASCII, no space, no more than 64 characters."""

DONE = "[DONE]"
"""Ends a stream."""

ARRIVED_SECONDS, MOST_EVENTS = 0.002, 64
"""How long a look waits for what has arrived meanwhile, and how many events it takes at once."""

Path = tuple[str | int, ...]


class Garbled(Exception):
    """What came is not an answer in OpenAI's shape, or ended before its end."""


class LeftAllow(Exception):
    """The answer left ALLOW."""


def strings(value: JsonValue, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every string that is text, with its place; items of a list go by their `index` where they have one.

    Raises:
        Garbled: there is a list of numbers, which may be tokens or bytes of text.
    """
    if isinstance(value, str):
        if value and not (path and path[-1] in METADATA and WORD.fullmatch(value)):
            yield path, value
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, int | float) and not isinstance(item, bool):
                raise Garbled(f"a list of numbers, which cannot be read, in `{path[-1] if path else ''}`")
            index = item.get("index") if isinstance(item, dict) else None
            yield from strings(item, (*path, index if isinstance(index, int) else place))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, (*path, name))


def pieces(text: str, tokens: Callable[[str], int], most: int) -> Iterator[str]:
    """`text` in parts of at most `most` tokens each, by halving."""
    if len(text) < 2 or tokens(text) <= most:
        yield text
        return
    middle = len(text) // 2
    yield from pieces(text[:middle], tokens, most)
    yield from pieces(text[middle:], tokens, most)


class WatchedAnswer:
    """One answer, whole or as it grows: `take` what came, `look` at what is new of it.

    Args:
        allowed: whether a text in the answer's place may be shown.
        tokens: how many tokens a text is.
        most: tokens of a piece that are surely in view.
    """

    def __init__(self, allowed: Callable[[str], Awaitable[bool]], tokens: Callable[[str], int], most: int):
        self.allowed, self.tokens, self.most = allowed, tokens, most
        self.head: dict[str, JsonValue] = {}
        """Id, time and model of the answer, so far as they are told."""
        self._seen: dict[Path, str] = {}  # by choice and the part of it (`message`, `delta`)
        self._fresh: dict[Path, str] = {}
        self._last: dict[Path, Path] = {}
        self._open: dict[int, bool] = {}

    @property
    def finished(self) -> bool:
        """Whether there is a choice and every one has its finish reason."""
        return bool(self._open) and not any(self._open.values())

    @property
    def text(self) -> str:
        """All that was looked at and is ALLOW."""
        return "\n\n".join(self._seen.values())

    @property
    def waiting(self) -> int:
        """Tokens not yet looked at."""
        return sum(self.tokens(text) for text in self._fresh.values())

    def take(self, payload: bytes) -> None:
        """Adds a whole answer's JSON, or a chunk's.

        Raises:
            Garbled: it is neither.
        """
        try:
            parsed = parse(payload)
        except ValueError:
            raise Garbled("something that is not JSON") from None
        if not isinstance(parsed, dict) or not isinstance(choices := parsed.get("choices"), list):
            raise Garbled("an error" if isinstance(parsed, dict) and "error" in parsed else "JSON without `choices`")
        for name, kind in (("id", str), ("created", int), ("model", str)):
            if isinstance(parsed.get(name), kind):
                self.head.setdefault(name, parsed[name])
        for choice in choices:
            if not isinstance(choice, dict) or not isinstance(index := choice.get("index"), int):
                raise Garbled("a choice without `index`")
            self._add(index, choice)
            self._open[index] = self._open.get(index, True) and choice.get("finish_reason") is None
        self._add(-1, {name: value for name, value in parsed.items() if name != "choices"})

    def _add(self, index: int, value: JsonValue) -> None:
        for path, text in strings(value):
            part = (index, path[0])
            joint = "" if self._last.setdefault(part, path) == path else "\n"
            self._last[part] = path
            self._fresh[part] = self._fresh.get(part, "") + joint + text

    async def look(self) -> None:
        """Looks at all that is new, piece by piece.

        Raises:
            LeftAllow: with a piece, it left ALLOW.
        """
        for part, fresh in self._fresh.items():
            for piece in pieces(fresh, self.tokens, self.most):
                text = self._seen.get(part, "") + piece
                if not await self.allowed(text):
                    raise LeftAllow
                self._seen[part] = text
        self._fresh.clear()


async def released(events: AsyncIterator[str], answer: WatchedAnswer, *, every: int, until: float) -> AsyncGenerator[str, None]:
    """The events of a stream, each after its text was looked at: a look waits for `every` tokens and takes what has arrived
    meanwhile too. `[DONE]` is left out. `until`: the loop's time at which it has to be over.

    Raises:
        Garbled: an event is no chunk, or the stream ended before its answer.
        LeftAllow: the answer left ALLOW; nothing more is released.
        TimeoutError: it is not over yet.
    """
    held: list[str] = []
    async with aclosing(_arriving(events, until)) as batches:
        async for batch in batches:
            for data in batch:
                if data != DONE:
                    answer.take(data.encode())
                    held.append(data)
            if DONE in batch or not 0 < answer.waiting < every:
                await answer.look()
                for data in held:
                    yield data
                held.clear()
    if not answer.finished:
        raise Garbled("a stream that ended before its answer")


async def _arriving(events: AsyncIterator[str], until: float) -> AsyncGenerator[list[str], None]:
    """What has come since the last time, one event or more; the last of all is `[DONE]`, sent or not."""

    async def following() -> str:
        return await anext(events, DONE)

    coming = asyncio.create_task(following())
    try:
        batch: list[str] = []
        while DONE not in batch:
            if not (await asyncio.wait({coming}, timeout=until - asyncio.get_running_loop().time()))[0]:
                raise TimeoutError
            batch = [coming.result()]
            while batch[-1] != DONE:
                coming = asyncio.create_task(following())
                if len(batch) == MOST_EVENTS or not (await asyncio.wait({coming}, timeout=ARRIVED_SECONDS))[0]:
                    break
                batch.append(coming.result())
            yield batch
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
