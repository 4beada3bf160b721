"""Rows by source, language and form, which every figure is told of apart."""

from collections.abc import Sequence
from typing import Protocol

UNKNOWN = "unknown"
"""Language or form of rows that tell none."""


class Told(Protocol):
    """A row that tells where it is from: a record, or a prediction of one."""

    @property
    def source(self) -> str:
        """Always told."""

    @property
    def language(self) -> str | None:
        """`None` where it is not told."""

    @property
    def form(self) -> str | None:
        """Question, command or statement; `None` where it is not told."""


def rows_by_group(rows: Sequence[Told]) -> dict[str, dict[str, list[int]]]:
    """Row numbers by kind of group and group, by name."""
    values = {
        "source": [row.source for row in rows],
        "language": [row.language or UNKNOWN for row in rows],
        "form": [row.form or UNKNOWN for row in rows],
    }
    return {
        kind: {group: [i for i, other in enumerate(of) if other == group] for group in sorted(set(of))}
        for kind, of in values.items()
    }
