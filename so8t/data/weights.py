"""How much each training row counts: its source's weight, and reweighing, under which a language says nothing of the label."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from so8t.data.records import Record
from so8t.labels import Label

LEAST = 10
"""Rows of every label that a language needs to be reweighed: fewer would each count for too many."""


def row_weights(records: Sequence[Record], *, reweigh_languages: bool) -> list[float]:
    """Weights of the records, in their order: what their sources weigh.

    With `reweigh_languages` rows of languages that have `LEAST` rows of every label also count
    `P(language) P(label) / P(language, label)` (reweighing: Kamiran and Calders 2012, doi:10.1007/s10115-011-0463-8), by the
    shares among these languages: each label's and each language's weight stays what it was, and the labels' shares are the
    same in all of them. Else a language whose rows are mostly benign is one in which everything is allowed.
    """
    weights = [record.weight for record in records]
    if not reweigh_languages:
        return weights
    counts = Counter((record.language, record.safety_label) for record in records)
    languages = {record.language for record in records}
    taken = {language for language in languages if all(counts[language, label] >= LEAST for label in Label)}
    mass: defaultdict[Hashable, float] = defaultdict(float)
    for record, weight in zip(records, weights, strict=True):
        if record.language in taken:
            for key in (None, (record.language,), record.safety_label, (record.language, record.safety_label)):
                mass[key] += weight
    return [
        weight * mass[(r.language,)] * mass[r.safety_label] / (mass[None] * mass[r.language, r.safety_label])
        if r.language in taken
        else weight
        for r, weight in zip(records, weights, strict=True)
    ]
