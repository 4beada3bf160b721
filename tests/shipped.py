"""What every shipped set promises of its rows, beside what its own test says."""

from collections.abc import Sequence

from so8t.data.records import Record
from so8t.data.splits import near_duplicates
from so8t.labels import LABELS


def check_distinct(rows: Sequence[Record], *, near: float) -> None:
    """No request, answer or rationale comes twice, and at most a share `near` of the requests are near-duplicates."""
    texts = [r.user_request for r in rows]
    assert len(set(texts)) == len(texts)
    assert len(near_duplicates(texts, 0.5)) <= near * len(texts)
    assert len({r.task_output for r in rows}) == len(texts)
    assert len({r.safety_rationale for r in rows}) == len(texts)


def check_own(rows: Sequence[Record], source: str, beside: set[str]) -> None:
    """No row says its own label or is one of those `beside`, and all are the source's."""
    for record in rows:
        assert not any(name in record.user_request for name in LABELS), record
        assert record.user_request.casefold() not in beside
        assert (record.source, record.licence) == (source, "Apache-2.0")
