"""A request with what was said before it."""

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
