"""A request with what was said before it, and which texts of it the head decides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """What was asked and what was answered."""

    request: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A request, what the agent knows of the setting, and the exchanges before, oldest first."""

    request: str
    context: str | None = None
    earlier: tuple[Exchange, ...] = ()


def with_answer(request: str, answer: str) -> str:
    """How the head reads an answer: behind its request, in the place of a request."""
    return f"{request}\n\n{answer}" if answer.strip() else request


@dataclass(frozen=True)
class Reading:
    """A text that the head decides, in the place of a request. `whole`: all of it, in windows if it is long; else its beginning
    and its end, as far as there is room. `request`: nothing of an answer is in it, which may be strange without being wrong."""

    text: str
    context: str | None = None
    whole: bool = True
    request: bool = True


def readings(prompt: Prompt, answer: str, fits: Callable[[str, str | None], bool]) -> list[Reading]:
    """The request (with its answer so far) alone and behind the latest earlier ones that still fit. Of an answer the newest
    part is in view; what was before it has been decided before."""
    last, alone = with_answer(prompt.request, answer), not answer.strip()
    found = [Reading(last, prompt.context, whole=alone, request=alone)]

    def behind(exchanges: Sequence[Exchange]) -> str:
        return "\n\n".join([*(exchange.request for exchange in exchanges), last])

    before = latest(prompt.earlier, lambda number: fits(behind(prompt.earlier[-number:]), prompt.context))
    if before:
        found.append(Reading(behind(before), prompt.context, whole=alone, request=alone))
    return found


def latest(exchanges: tuple[Exchange, ...], fits: Callable[[int], bool]) -> tuple[Exchange, ...]:
    """The latest exchanges, as many as fit. `fits` tells whether so many do (where more do, fewer do). Their number is doubled
    until it is too large and then halved in, so that a long conversation is never put together as a whole."""
    most, beyond = 0, 1
    while beyond <= len(exchanges) and fits(beyond):
        most, beyond = beyond, 2 * beyond
    beyond = min(beyond, len(exchanges) + 1)
    while beyond - most > 1:
        middle = (most + beyond) // 2
        most, beyond = (middle, beyond) if fits(middle) else (most, middle)
    return exchanges[len(exchanges) - most :]


def readings_of(earlier: Sequence[Exchange], context: str | None) -> list[Reading]:
    """Of each earlier exchange two: its request, and its request with the answer."""
    texts = ((text, text == e.request) for e in earlier for text in (e.request, with_answer(e.request, e.answer)))
    return [Reading(text, context, request=alone) for text, alone in texts]
