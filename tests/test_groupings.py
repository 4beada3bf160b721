"""Curves by source, language and form: of which rows each is, which groups have none, and that a reader is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text

from so8t import plots
from so8t.curves import operating_point, risk_coverage, trade_off
from so8t.data.records import Record
from so8t.evaluation import Predictions, write_predictions
from so8t.grouped_panel import LEAST, MOST, grouped_panel
from so8t.groupings import rows_by_group
from so8t.labels import LABELS, Label
from so8t.page import Panel
from so8t.run_folder import Predicted, PredictedRows, RunFolder, read_run

A, E, R = Label


def told(**groups: list[str | None]) -> PredictedRows:
    """As many rows as the lists are long, of all labels in turn, with chances of their own."""
    count = len(next(iter(groups.values())))
    chances = np.random.default_rng(0).dirichlet((1, 1, 1), count).round(6)
    rows = [
        Predicted(
            user_request=str(k),
            decision=LABELS[p.argmax()],
            probabilities=dict(zip(LABELS, p.tolist(), strict=True)),
            safety_label=LABELS[k % 3],
            source=groups.get("source", ["file"] * count)[k],
            language=groups.get("language", [None] * count)[k],
            form=groups.get("form", [None] * count)[k],
        )
        for k, p in enumerate(chances)
    ]
    return PredictedRows(rows, 0)


def run_of(test: PredictedRows | None, unseen: PredictedRows | None = None) -> RunFolder:
    """A run that was decided and nothing else."""
    return RunFolder(Path(), None, None, None, {}, {"test": test, "unseen": unseen}, None, None, None, None)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict]:
    """What the panel draws, by the name of the picture; nothing is drawn."""
    found: dict[str, dict] = {}

    def noted(name, alt, plot, *, wide):
        found[name] = plot.args[0]
        return name

    monkeypatch.setattr("so8t.grouped_panel.drawn", noted)
    return found


HALF = 3 * LEAST
"""Rows of which `LEAST` are labelled ALLOW and twice as many are not."""


def test_each_curve_is_of_its_group_s_rows_and_the_first_one_of_all(drawn):
    rows = told(language=["en", "ja"] * HALF)
    panel = grouped_panel(run_of(rows))
    assert panel.pictures == list(drawn) == ["grouped_trade-off_test", "grouped_risk-coverage_test"]
    chosen = {
        f"all, {2 * HALF} rows": slice(None),
        f"en, {HALF} rows": slice(0, None, 2),
        f"ja, {HALF} rows": slice(1, None, 2),
    }
    rates, risks = (drawn[name] for name in panel.pictures)
    assert list(rates) == list(risks) == ["language"], "all are of one source"
    assert list(rates["language"]) == list(risks["language"]) == list(chosen)
    for name, part in chosen.items():
        probabilities, labels = rows.probabilities[part], rows.labels[part]
        curve, point = rates["language"][name]
        assert np.array_equal(curve.false_allow, trade_off(probabilities, labels).false_allow)
        assert point == operating_point(rows.decisions[part] == A, labels)
        assert risks["language"][name].aurc == risk_coverage(probabilities, labels).aurc


def test_groups_of_few_rows_and_of_one_kind_of_row_are_left_out_and_named(drawn):
    sources = ["many"] * HALF + ["few"] * (LEAST - 1) + ["benign" if k % 3 == 0 else "many" for k in range(2 * HALF)]
    panel = grouped_panel(run_of(told(source=sources)))
    assert [name.split(",")[0] for name in drawn["grouped_risk-coverage_test"]["source"]] == ["all", "many", "benign"]
    assert [name.split(",")[0] for name in drawn["grouped_trade-off_test"]["source"]] == ["all", "many"]
    assert "mixed test split, error rate against coverage, left out: source few" in panel.absent
    assert "mixed test split, false allow against over-refusal, left out: source benign, few" in panel.absent


def test_no_picture_has_more_groups_than_a_reader_tells_apart(drawn):
    sizes = [LEAST + k for k in range(MOST + 2)]
    panel = grouped_panel(run_of(told(form=[f"form {size}" for size in sizes for _ in range(size)])))
    curves = drawn["grouped_risk-coverage_test"]["form"]
    assert [name.split(",")[0] for name in curves] == ["all", *(f"form {size}" for size in reversed(sizes[2:]))]
    assert len(curves) <= len(plots.GROUP_STYLES)
    assert any(f"left out: form form {LEAST}, form {LEAST + 1}" in line for line in panel.absent)


def test_predictions_of_earlier_versions_are_grouped_by_source_alone_and_that_is_said(drawn):
    panel = grouped_panel(run_of(told(source=["one", "two"] * HALF)))
    assert panel.absent == ["mixed test split: no row tells its language or form",
                            "not in the run's folder, so not shown: unseen_predictions.jsonl"]  # fmt: skip
    assert [list(kinds) for kinds in drawn.values()] == [["source"]] * 2


@pytest.mark.parametrize("rows", [PredictedRows([], 0), told(language=["en"] * HALF)])
def test_one_group_or_none_is_no_picture(drawn, rows):
    assert grouped_panel(run_of(rows)).pictures == []
    assert not drawn


def test_what_is_written_of_a_row_s_source_language_and_form_is_what_it_is_grouped_by(tmp_path):
    records = [
        Record("a", A, source="s", language="ja", form="question"), Record("b", E), Record("c", R, source="s", form="command"),
    ]  # fmt: skip
    chances = Predictions.of_probabilities(torch.eye(3))
    write_predictions(tmp_path / "test_predictions.jsonl", records, chances)
    lines = (tmp_path / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert ['"language": "ja", "form": "question"}' in line for line in lines] == [True, False, False]
    assert ["language" in line for line in lines] == [True, False, False]
    read = read_run(tmp_path).predictions["test"]
    assert rows_by_group(read.rows) == rows_by_group(records)
    assert rows_by_group(records) == {
        "source": {"file": [1], "s": [0, 2]},
        "language": {"ja": [0], "unknown": [1, 2]},
        "form": {"command": [2], "question": [0], "unknown": [1]},
    }


NAMES = ["_hidden", "costs $5 or $6", "w" * 90, "plain"]


def test_every_group_is_in_the_legend_whatever_it_is_called(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, to: figures.append(figure))
    monkeypatch.setattr("so8t.grouped_panel.drawn", lambda name, alt, plot, *, wide: plot(None))
    panel: Panel = grouped_panel(run_of(told(source=NAMES * HALF, form=["question", "command"] * (2 * HALF))))
    assert len(panel.pictures) == len(figures) == 2
    for figure in figures:
        first, second = figure.axes
        texts = [text.get_text() for text in first.get_legend().get_texts()]
        assert len(texts) == 1 + len(NAMES)
        assert len(second.get_legend().get_texts()) == 3
        assert any("_hidden, 90 rows" in text for text in texts)
        assert any(r"costs \$5 or \$6, 90 rows" in text for text in texts)
        assert not any(map(is_math_text, texts))
        assert max(map(len, texts)) < plots.LONGEST + 20
        assert first.get_title().startswith("by source, most ")
        colours = [(line.get_color(), line.get_linestyle()) for line in first.get_legend().get_lines()]
        assert len(set(colours)) == len(colours)
