"""A page of panels: pictures and tables of texts, written as one HTML file by jinja2. It knows nothing about runs."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from so8t.errors import SO8TError
from so8t.files import write_bytes
from so8t.intervals import Interval, number


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page, and its name as a file of its own; a `wide` one scrolls sideways on a telephone."""

    name: str
    alt: str
    png: bytes
    wide: bool = False

    @property
    def base64(self) -> str:
        """As a page holds it."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Cells as text; `texts`: the first column holds whole requests. `marked`: by row, the parts of its first cell, each with
    the decision that colours it; a row without parts shows its text."""

    title: str
    head: list[str]
    rows: list[list[str]]
    texts: bool = False
    marked: list[list[tuple[str, str]]] = field(default_factory=list)


@dataclass
class Panel:
    """One part of the page."""

    key: str
    title: str
    note: str = ""
    absent: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def misses(self, *files: str) -> None:
        """Names files that are not in the folder."""
        self.absent += [f"not in the run's folder, so not shown: {name}" for name in files]


def figure_cell(value: float | None, interval: Interval | None, *, digits: int = 3) -> str:
    """A figure, and its interval, within which no line is broken."""
    return number(value, interval, digits=digits).replace(", ", ",\N{NO-BREAK SPACE}")


def drawn(name: str, alt: str, plot: Callable[[BytesIO], None], *, wide: bool = False) -> Picture:
    """Draws into memory; `plot` writes a PNG to what it is given."""
    memory = BytesIO()
    plot(memory)
    return Picture(name, alt, memory.getvalue(), wide)


def write_out(path: Path, data: bytes) -> None:
    """Writes what `--out` names, atomically.

    Raises:
        SO8TError: it cannot be written there.
    """
    try:
        write_bytes(path, data)
    except OSError as error:
        raise SO8TError(f"{path} cannot be written: {error.strerror}; name another place with --out") from None


def render_page(name: str, panels: list[Panel]) -> str:
    """The HTML. Every text is escaped, there is no script, and nothing is loaded from elsewhere."""
    loader = PackageLoader("so8t", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html").render(name=name, panels=panels)
