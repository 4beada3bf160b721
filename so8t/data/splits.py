"""Splits that cannot leak: near-duplicates and twins stay together; which group goes where depends on the seed alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from so8t.data.records import Record

NEAR_DUPLICATE = 0.6
"""Jaccard similarity of character 4-grams from which two requests count as the same."""


def folded(text: str) -> str:
    """Lower case, white space folded: what two requests are compared as."""
    return " ".join(text.lower().split())


def near_duplicates(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int]]:
    """Pairs `(i, j)`, `i < j`, whose sets of character 4-grams (lower case, white space folded) have a Jaccard
    similarity of at least `threshold`."""
    if not texts:
        return []
    # filled up so that the shortest text has a 4-gram; not with spaces, which the vectoriser would fold
    padded = [f" {folded(t)} ".ljust(4, "\0") for t in texts]
    grams: csr_matrix = CountVectorizer(analyzer="char", ngram_range=(4, 4), binary=True, lowercase=False).fit_transform(padded)
    sizes = np.asarray(grams.sum(axis=1)).ravel()
    pairs: list[tuple[int, int]] = []
    for begin in range(0, len(texts), 512):
        common = (grams[begin : begin + 512] @ grams.T).tocoo()
        rows, cols, shared = common.row + begin, common.col, common.data
        later = cols > rows
        rows, cols, shared = rows[later], cols[later], shared[later]
        close = shared / (sizes[rows] + sizes[cols] - shared) >= threshold
        pairs += list(zip(rows[close].tolist(), cols[close].tolist(), strict=True))
    return pairs


def apart_from(others: Sequence[Record], rows: Sequence[Record]) -> list[Record]:
    """The rows whose request is no near-duplicate of one of the others'."""
    edge = len(others)
    pairs = near_duplicates([r.user_request for r in [*others, *rows]])
    leaking = {j - edge for i, j in pairs if i < edge <= j}
    return [r for k, r in enumerate(rows) if k not in leaking]


def without_twins(others: Sequence[Record], rows: Sequence[Record], *, same_groups: bool = False) -> list[Record]:
    """The rows whose group none of the others is in. A group's name means something within its source, or everywhere with
    `same_groups`: for files of one's own, whose sources are called as the files are."""

    def group(record: Record) -> tuple[str, str]:
        return "" if same_groups else record.source, record.group or ""

    taken = {group(r) for r in others if r.group}
    return [r for r in rows if group(r) not in taken]


def group_ids(records: Sequence[Record]) -> list[int]:
    """One number per record; records that must stay together share it (union of twins and near-duplicates)."""
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, record in enumerate(records):
        if record.group is not None:
            parent[root(i)] = root(first.setdefault((record.source, record.group), i))
    for i, j in near_duplicates([r.user_request for r in records]):
        parent[root(j)] = root(i)
    return [root(i) for i in range(len(records))]


@dataclass(frozen=True)
class Split:
    """Row numbers of each part."""

    train: list[int]
    val: list[int]
    test: list[int]


def split_by_group(records: Sequence[Record], *, val: float, test: float, seed: int) -> Split:
    """Every group goes to train, validation or test as a whole, by a hash of the seed and its first request.

    A row's place does not depend on which other rows are there (but for those it is grouped with).
    """
    groups = group_ids(records)
    smallest: dict[int, str] = {}
    for group, record in zip(groups, records, strict=True):
        text = record.user_request
        smallest[group] = min(smallest.get(group, text), text)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for i, group in enumerate(groups):
        digest = hashlib.sha256(f"{seed}\0{smallest[group]}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        parts[2 if place < test else 1 if place < test + val else 0].append(i)
    return Split(*parts)
