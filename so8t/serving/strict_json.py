"""JSON that every reader reads alike: UTF-8, no name twice in an object, no half of a surrogate pair, no NaN."""

import json

from pydantic import JsonValue


def parse(body: bytes) -> JsonValue:
    """The value.

    Raises:
        ValueError: it is no JSON, or another reader might see another value.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("too deep") from None
    return value


def _once(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
