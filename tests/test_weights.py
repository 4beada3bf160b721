"""How much rows count: a language says nothing of the label, and no weight is lost or made."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.base import load_base
from so8t.config import validate
from so8t.data.records import Record
from so8t.data.weights import LEAST, row_weights
from so8t.labels import Label
from so8t.training import load_data
from tests.conftest import TINY, synthetic_rows, write_rows

CELLS = [(language, label) for language in ("en", "ja", None) for label in Label]
WEIGHTS = (0.5, 3.0, 1.0)


@st.composite
def rows(draw) -> list[Record]:
    """Any number of rows of every language and label, of sources that weigh differently."""
    counts = draw(st.lists(st.integers(0, 4 * LEAST), min_size=len(CELLS), max_size=len(CELLS)))
    weights = draw(st.lists(st.sampled_from(WEIGHTS), min_size=1, max_size=7))
    cells = [cell for cell, count in zip(CELLS, counts, strict=True) for _ in range(count)]
    return [
        Record("a request", label, language=language, weight=weights[k % len(weights)])
        for k, (language, label) in enumerate(cells)
    ]


def mass(records, weights, **wanted) -> float:
    return sum(w for r, w in zip(records, weights, strict=True) if all(getattr(r, k) == v for k, v in wanted.items()))


@given(rows())
@settings(max_examples=100, deadline=None)
def test_labels_and_languages_keep_their_weight_and_the_labels_shares_are_the_same_in_every_language_that_has_them(records):
    plain = row_weights(records, reweigh_languages=False)
    weights = row_weights(records, reweigh_languages=True)
    assert all(w > 0 for w in weights)
    for label in Label:
        assert mass(records, weights, safety_label=label) == pytest.approx(mass(records, plain, safety_label=label))
    shares = []
    for language in ("en", "ja", None):
        whole = mass(records, plain, language=language)
        assert mass(records, weights, language=language) == pytest.approx(whole)
        counts = [sum(r.language == language and r.safety_label == label for r in records) for label in Label]
        if min(counts) >= LEAST:
            shares.append([mass(records, weights, language=language, safety_label=label) / whole for label in Label])
        else:
            own = [(w, p) for r, w, p in zip(records, weights, plain, strict=True) if r.language == language]
            assert all(w == p for w, p in own), "too few rows of a label: they count as before"
    for other in shares[1:]:
        assert other == pytest.approx(shares[0])


def test_by_hand():
    counts = {("en", Label.ALLOW): 10, ("en", Label.ESCALATE): 10, ("en", Label.REFUSE): 20}
    counts |= {("ja", Label.ALLOW): 40, ("ja", Label.ESCALATE): 10, ("ja", Label.REFUSE): 10}
    records = [Record("a", label, language=language) for (language, label), n in counts.items() for _ in range(n)]
    found = dict(
        zip([(r.language, r.safety_label) for r in records], row_weights(records, reweigh_languages=True), strict=True)
    )
    # P(ja) P(ALLOW) / P(ja, ALLOW) = (60/100)(50/100) / (40/100)
    assert found["ja", Label.ALLOW] == pytest.approx(0.75)
    assert found["en", Label.ALLOW] == pytest.approx(2.0)
    assert found["ja", Label.REFUSE] == pytest.approx(1.8)
    assert found["en", Label.REFUSE] == pytest.approx(0.6)


@pytest.mark.parametrize("reweigh", [True, False])
def test_training_batches_carry_the_weights_and_other_batches_do_not(make_config, tmp_path, reweigh):
    rows = [row | {"language": "ja" if k % 2 else "en"} for k, row in enumerate(synthetic_rows(240))]
    rows = [row for k, row in enumerate(rows) if k % 4 != 1 or row["safety_label"] != "REFUSE"]  # fewer Japanese ones
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = validate(
        make_config("base=tiny", "data=jsonl", f"data.path={path}", f"data.reweigh_languages={str(reweigh).lower()}")
    )
    data = load_data(config)
    data.use_tokenizer(load_base(TINY, cut=2).tokenizer)
    wanted = row_weights(data.train, reweigh_languages=reweigh)
    assert (len(set(wanted)) > 1) == reweigh
    for batch in data.sample(10**6, batch_size=16):
        assert batch.weights.tolist() == pytest.approx([wanted[i] for i in batch.rows])
    assert all((batch.weights == 1).all() for batch in data.val_dataloader())
