"""How much each training row counts: its source's weight, and reweighing, under which a language says nothing of the label."""

from collections import Counter
from collections.abc import Mapping, Sequence

from so8t.data.records import Record


def row_weights(records: Sequence[Record], by_source: Mapping[str, float], *, reweigh_languages: bool) -> list[float]:
    """Weights of the records, in their order; a source that is not named counts 1.

    With `reweigh_languages` each row also counts `P(language) P(label) / P(language, label)` (reweighing: Kamiran and Calders
    2012, doi:10.1007/s10115-011-0463-8). The labels' shares stay what they are, and are the same in every language that has
    all of them: else a language whose rows are mostly benign is one in which everything is allowed.
    """
    weights = [by_source.get(record.source, 1.0) for record in records]
    if not reweigh_languages:
        return weights
    cells = [(record.language, record.safety_label) for record in records]
    together: Counter[object] = Counter()
    languages: Counter[object] = Counter()
    labels: Counter[object] = Counter()
    for (language, label), weight in zip(cells, weights, strict=True):
        together[language, label] += weight  # type: ignore[assignment]
        languages[language] += weight  # type: ignore[assignment]
        labels[label] += weight  # type: ignore[assignment]
    whole = sum(weights)
    return [
        weight * languages[cell[0]] * labels[cell[1]] / (whole * together[cell]) if weight else 0.0
        for cell, weight in zip(cells, weights, strict=True)
    ]
