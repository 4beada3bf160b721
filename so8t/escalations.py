"""What waits for a person: a queue of escalated requests in one SQLite file. A request is approved or denied once."""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from so8t.conversation import Exchange
from so8t.errors import ArtefactError, SO8TError

State = Literal["pending", "approved", "denied"]

_TABLE = """
CREATE TABLE IF NOT EXISTS escalations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    request TEXT NOT NULL,
    context TEXT,
    probabilities TEXT NOT NULL,
    reason TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'approved', 'denied')),
    decided REAL,
    note TEXT,
    earlier TEXT NOT NULL DEFAULT '[]'
)
"""
_HELD = """
CREATE TABLE IF NOT EXISTS held (
    id INTEGER PRIMARY KEY REFERENCES escalations (id),
    ticket TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    reply TEXT,
    said TEXT,
    upstream TEXT,
    until REAL
)
"""
"""What a guard holds back for its upstream until it is approved; the upstream's reply, and what that says. Until `until` it is
being sent, and nobody else may."""
_ADDED = (
    ("escalations", "earlier", "TEXT NOT NULL DEFAULT '[]'"),
    ("held", "upstream", "TEXT"),
    ("held", "until", "REAL"),
)
"""Columns that a queue of an earlier version lacks: conversations were not kept, nor for whom something is held."""
_COLUMNS = "id, created, request, context, probabilities, reason, state, decided, note, earlier, ticket IS NOT NULL, said"
_FROM = "FROM escalations LEFT JOIN held USING (id)"
_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Escalation:
    """One request that a person decides, with the conversation it came in. Times are seconds since 1970; `reason` is why it
    came here. `held`: by a guard, which sends it on when it is approved; `reply` is what was said then."""

    id: int
    created: float
    request: str
    context: str | None
    probabilities: dict[str, float]
    reason: str
    state: State
    decided: float | None
    note: str | None
    earlier: tuple[Exchange, ...] = ()
    held: bool = False
    reply: str | None = None


@dataclass(frozen=True)
class Held:
    """A request that a guard holds: the number of its escalation, the body to send, and the reply to it as it came."""

    number: int
    body: str
    reply: str | None


class EscalationQueue:
    """The queue in `path`; several processes may use it at once.

    Raises:
        ArtefactError: `path` is there and no such queue.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(_TABLE)
            database.execute(_HELD)
            database.execute("BEGIN IMMEDIATE")  # of two processes that open an old queue, one adds the columns
            for table, column, kind in _ADDED:
                if column not in [row[1] for row in database.execute(f"PRAGMA table_info({table})")]:
                    database.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as database, database:
                yield database
        except sqlite3.DatabaseError as error:
            raise ArtefactError(f"{self.path}: cannot be used as a queue of escalations: {error}") from None

    def add(
        self,
        request: str,
        context: str | None,
        probabilities: Mapping[str, float],
        reason: str,
        earlier: Sequence[Exchange] = (),
    ) -> int:
        """Puts a request in; returns its id."""
        before = json.dumps([asdict(exchange) for exchange in earlier])
        values = (time.time(), request, context, json.dumps(dict(probabilities)), reason, before)
        with self._open() as database:
            row = database.execute(
                "INSERT INTO escalations (created, request, context, probabilities, reason, earlier) VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
            return int(row.lastrowid or 0)

    def listed(self, state: State | None = "pending") -> list[Escalation]:
        """Requests in one state, or all (`None`), oldest first."""
        where, values = ("", ()) if state is None else (" WHERE state = ?", (state,))
        with self._open() as database:
            rows = database.execute(f"SELECT {_COLUMNS} {_FROM}{where} ORDER BY id", values).fetchall()
        return [_escalation(row) for row in rows]

    def get(self, number: int) -> Escalation:
        """One request.

        Raises:
            SO8TError: there is none of that id.
        """
        with self._open() as database:
            row = database.execute(f"SELECT {_COLUMNS} {_FROM} WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise SO8TError(f"{self.path}: no escalation {number}; `so8t escalations list --all` shows what there is")
        return _escalation(row)

    def decide(self, number: int, state: Literal["approved", "denied"], note: str | None = None) -> Escalation:
        """Approves or denies a pending request, once: of two that decide at the same time, one gets the error.

        Raises:
            SO8TError: there is none of that id, or it was decided before.
        """
        with self._open() as database:
            changed = database.execute(
                "UPDATE escalations SET state = ?, decided = ?, note = ? WHERE id = ? AND state = 'pending'",
                (state, time.time(), note, number),
            ).rowcount
        found = self.get(number)
        if not changed:
            raise SO8TError(f"escalation {number} was {found.state} before: a decision is taken once")
        return found

    # -- what a guard holds --------------------------------------------------------------------------------------------

    def hold(self, number: int, ticket: str, body: str, upstream: str) -> None:
        """Keeps what is to be sent to the `upstream` once the request is approved; who has the `ticket` gets the reply."""
        values = (number, ticket, body, upstream)
        with self._open() as database:
            database.execute("INSERT INTO held (id, ticket, body, upstream) VALUES (?, ?, ?, ?)", values)

    def held(self, ticket: str) -> Held | None:
        """What is held under a ticket."""
        with self._open() as database:
            row = database.execute("SELECT id, body, reply FROM held WHERE ticket = ?", (ticket,)).fetchone()
        return None if row is None else Held(*row)

    def to_send(self, upstream: str, *, seconds: float) -> list[Held]:
        """What was approved for this upstream (or is of a queue that does not say for whom) and has no reply yet, oldest first.
        It is the caller's to send for so many seconds: nobody else gets it meanwhile."""
        now = time.time()
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            rows = database.execute(
                f"SELECT id, body, reply {_FROM} WHERE state = 'approved' AND body IS NOT NULL AND reply IS NULL"
                " AND coalesce(upstream, ?) = ? AND coalesce(until, 0) <= ? ORDER BY id",
                (upstream, upstream, now),
            ).fetchall()
            database.executemany("UPDATE held SET until = ? WHERE id = ?", [(now + seconds, row[0]) for row in rows])
        return [Held(*row) for row in rows]

    def send_again(self, number: int, *, seconds: float) -> None:
        """What could not be sent may be, by whomever, after so many seconds."""
        with self._open() as database:
            database.execute("UPDATE held SET until = ? WHERE id = ?", (time.time() + seconds, number))

    def keep_reply(self, number: int, reply: str, said: str) -> None:
        """Keeps the reply to what was sent, as it came and as text."""
        with self._open() as database:
            database.execute("UPDATE held SET reply = ?, said = ? WHERE id = ?", (reply, said, number))


def _escalation(row: tuple) -> Escalation:
    number, created, request, context, probabilities, reason, state, decided, note, earlier, held, said = row
    exchanges = tuple(Exchange(**exchange) for exchange in json.loads(earlier))
    told = json.loads(probabilities)
    return Escalation(number, created, request, context, told, reason, state, decided, note, exchanges, bool(held), said)
