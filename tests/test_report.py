"""`so8t report`: every panel with its picture, hostile texts escaped, missing files named, other folders refused."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from so8t.adapter import load_agent
from so8t.calibration import calibration_error
from so8t.calibration_panel import calibration_panel
from so8t.cli import main
from so8t.config import Config, validate
from so8t.curves import reliability
from so8t.data.datamodule import DataSpec, SafetyData
from so8t.data.sources import SourceSpec
from so8t.errors import ArtefactError
from so8t.intervals import ENOUGH, ece_interval
from so8t.labels import LABELS
from so8t.losses_panel import losses_panel, phases
from so8t.memory import Plan, plan
from so8t.mistakes import MOST
from so8t.page import Picture, drawn, figure_cell
from so8t.pet import PetSpec
from so8t.policy import Policy, Threshold, adapter_digest, save_policy
from so8t.policy import calibrated as calibrated_probabilities
from so8t.report import LONGEST, panels, render
from so8t.run_folder import DataRows, read_run, write_data
from so8t.streaming import stream
from tests.conftest import synthetic_rows, write_rows

PICTURES = {
    "setup": 0, "metrics": 0, "calibration": 0, "stream": 0, "confusion": 1, "reliability": 1, "trade-off": 1,
    "risk-coverage": 1, "grouped-curves": 0, "robustness": 0, "group": 1, "losses": 1, "gates": 1, "memory": 1, "mistakes": 0,
}  # fmt: skip
"""Of a run that has a test split and no unseen sources."""


class Page(HTMLParser):
    """Tags, attributes, and the text, pictures and table cells of each section."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.pictures: dict[str, list[str]] = {}
        self.cells: list[str] = []
        self.inside: list[str] = []
        self.section = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.tags.append((tag, told))
        if tag == "section":
            self.section = told["id"]
            self.text[self.section], self.pictures[self.section] = "", []
        elif tag == "img":
            self.pictures[self.section].append(told["src"])
        elif tag == "td":
            self.cells.append("")
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag == "section":
            self.section = ""
        elif tag == "td":
            self.inside.pop()
        elif tag == "p":
            self.text[self.section] += "\n"

    def handle_data(self, data):
        if self.section:
            self.text[self.section] += data
        if self.inside:
            self.cells[-1] += data


PLANS: dict[str, Plan] = {}


@pytest.fixture(autouse=True)
def planned_once(monkeypatch):
    """Equal settings are planned once for all tests here: a plan takes a second, and most of them ask for the same."""

    def remembered(config: Config) -> Plan:
        if repr(config) not in PLANS:
            PLANS[repr(config)] = plan(config)
        return PLANS[repr(config)]

    monkeypatch.setattr("so8t.memory_panel.plan", remembered)


DRAWN: dict[tuple[str, str], Picture] = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """So are pictures of one name that say the same of what they show: all of a page take two seconds."""

    def remembered(name: str, alt: str, plot, *, wide: bool = False) -> Picture:
        if (name, alt) not in DRAWN:
            DRAWN[name, alt] = drawn(name, alt, plot, wide=wide)
        return DRAWN[name, alt]

    for module in ("report", "grouped_panel", "losses_panel", "memory_panel", "robustness_panel"):
        monkeypatch.setattr(f"so8t.{module}.drawn", remembered)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a tiny run, to be mended and broken."""
    folder = tmp_path / "a_run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("prefix", "checkpoints", "baselines"))
    return folder


def page_of(folder: Path) -> Page:
    read = read_run(folder)
    return Page(render(read, panels(read)))


def tables_of(folder: Path, key: str) -> dict[str, list[list[str]]]:
    """Rows of a panel's tables by title."""
    (panel,) = (panel for panel in panels(read_run(folder)) if panel.key == key)
    return {table.title: table.rows for table in panel.tables}


def test_every_panel_has_its_picture_and_the_missing_set_is_named(run, capsys):
    main(["report", str(run)])
    assert "report.html" in capsys.readouterr().out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert {key: len(pictures) for key, pictures in page.pictures.items()} == PICTURES
    for picture in (p for pictures in page.pictures.values() for p in pictures):
        assert base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    for key in ("metrics", "stream", "confusion"):
        assert "unseen.json" in page.text[key]
    for key in ("reliability", "trade-off", "risk-coverage", "grouped-curves", "mistakes"):
        assert "unseen_predictions.jsonl" in page.text[key]
    figures = json.loads((run / "test.json").read_text())["metrics"]
    assert {f"{figures[key]:.3f}" for key in ("macro_f1", "auprc_not_allow", "aurc")} <= set(page.cells)


def test_every_picture_of_the_page_lies_beside_it_as_a_file_of_the_panel_s_name(run, tmp_path, so8t):
    code, out, _ = so8t("report", run, "--out", tmp_path / "elsewhere" / "page.html")
    assert code == 0
    assert f"its pictures: {tmp_path / 'elsewhere' / 'page_plots'}" in out
    page = Page((tmp_path / "elsewhere/page.html").read_text(encoding="utf-8"))
    of_panel = {"confusion": "confusion_test", "reliability": "reliability_test"}
    files = {file.name: file.read_bytes() for file in (tmp_path / "elsewhere/page_plots").iterdir()}
    shown = {
        f"{of_panel.get(key, key)}.png": base64.b64decode(picture.removeprefix("data:image/png;base64,"))
        for key, pictures in page.pictures.items()
        for picture in pictures
    }
    assert files == shown
    assert so8t("report", run)[0] == 0
    assert {name: (run / "plots" / name).read_bytes() for name in files} == files


def test_a_page_that_cannot_be_written_is_one_line_and_code_two(run, so8t):
    code, _, err = so8t("report", run, "--out", run / "config.yaml" / "page.html")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "page.html cannot be written" in err


def test_every_figure_of_probabilities_is_shown_with_its_interval(run):
    told = json.loads((run / "test.json").read_text())["intervals_95"]["all"]["SO8T"]
    told["auroc_not_allow"] = [0.111, 0.999]
    scores = json.loads((run / "test.json").read_text())
    scores["intervals_95"]["all"]["SO8T"] = told
    (run / "test.json").write_text(json.dumps(scores))
    (title,) = (title for title in tables_of(run, "metrics") if title.startswith("mixed test split: "))
    row = tables_of(run, "metrics")[title][0]
    assert row[0] == "SO8T"
    assert any(cell.endswith(" [0.11,\N{NO-BREAK SPACE}1.00]") for cell in row)


def test_what_is_decided_along_the_tokens_is_shown_with_its_intervals(run):
    scores = json.loads((run / "test.json").read_text())
    scores["metrics"] |= {"detected": 0.8125, "time_to_detection": 7.25, "decision_changes": 3.5}
    scores["metrics"]["false_alarms_per_1000_tokens"] = None
    scores["intervals_95"]["all"]["SO8T"] |= {"detected": [0.7, 0.9], "decision_changes": [2.0, 5.0]}
    (run / "test.json").write_text(json.dumps(scores))
    (row,) = tables_of(run, "stream")["along the tokens"]
    nbsp = "\N{NO-BREAK SPACE}"
    assert row == ["mixed test split", f"0.812 [0.70,{nbsp}0.90]", "7.2", f"3.50 [2.00,{nbsp}5.00]", "-"]


# -- calibration, and what was trained on ------------------------------------------------------------------------------


def test_a_run_that_was_never_calibrated_says_that_its_figures_are_uncalibrated(run):
    page = page_of(run)
    assert "all figures on this page are of uncalibrated decisions" in page.text["calibration"]
    assert "calibration" not in {key for key in page.text if "by the policy" in page.text[key]}


@pytest.fixture
def calibrated(run) -> Path:
    """Under a policy that never allows, and refuses as before."""
    digest = adapter_digest(run / "adapter")
    never, always = Threshold(None, 0.05, 0.1, 321, 0.0, 0.0123), Threshold(0.0, 0.9, 0.1, 123, 0.25, 0.3)
    save_policy(run / "adapter", Policy(1.234, never, always, 77, "held_out.jsonl", 0.071, 0.042, digest))
    return run


def test_the_calibration_panel_tells_what_is_promised_and_on_which_rows(calibrated):
    promises = tables_of(calibrated, "calibration")["what is promised, and the rows on which it was tested"]
    assert promises == [
        ["ALLOW", "never given", "ESCALATE, REFUSE", "321", "0.00 %", "1.23 %", "5 %", "10 %"],
        ["REFUSE", "P(REFUSE) = 0.0000", "ALLOW", "123", "25.00 %", "30.00 %", "90 %", "10 %"],
    ]
    text = page_of(calibrated).text["calibration"]
    for told in ("1.234", "77 rows (held_out.jsonl)", "On the 444 other ones", "0.071 before and 0.042 after"):
        assert told in text


def test_the_calibration_panel_tells_what_the_policy_costs_on_the_run_s_own_rows(calibrated):
    before, after = tables_of(calibrated, "calibration")["what it costs: decisions before and after"]
    figures = json.loads((calibrated / "test.json").read_text())["metrics"]
    assert before[:2] == ["mixed test split", "uncalibrated"]
    assert before[5:] == [f"{figures[key]:.3f}" for key in ("false_allow_rate", "over_refusal_rate", "ece")]
    told = read_run(calibrated).predictions["test"]
    shares = [100 * np.mean(told.decisions == label) for label in range(3)]
    assert before[2:5] == [f"{share:.1f} %" for share in shares]
    assert after[2:7] == ["0.0 %", f"{shares[0] + shares[1]:.1f} %", f"{shares[2]:.1f} %", "0.000", "1.000"]
    tempered = calibrated_probabilities(torch.from_numpy(told.probabilities), 1.234)
    error = calibration_error(tempered, torch.from_numpy(told.labels))
    assert float(after[7]) == pytest.approx(error, abs=6e-4)


def test_the_calibration_error_is_told_before_and_after_with_its_interval_and_by_group(calibrated):
    path = calibrated / "test_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] * 4
    rows = [{**row, "language": "ja" if k < ENOUGH - 1 else "en"} for k, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, costs, groups = calibration_panel(read_run(calibrated)).tables
    told = read_run(calibrated).predictions["test"]
    tempered = calibrated_probabilities(torch.from_numpy(told.probabilities), 1.234).float().double().numpy()

    def errors(part: slice) -> list[str]:
        of_part = [(chances[part], told.labels[part]) for chances in (told.probabilities, tempered)]
        return [figure_cell(reliability(*of).error, ece_interval(*of)) for of in of_part]

    assert [row[-1] for row in costs.rows] == errors(slice(None))
    assert groups.rows == [
        ["mixed test split", "language en", str(len(rows) - ENOUGH + 1), *errors(slice(ENOUGH - 1, None))],
        ["mixed test split", "language ja", str(ENOUGH - 1), *errors(slice(ENOUGH - 1))],
    ]
    assert ["[" in cell for row in groups.rows for cell in row[3:]] == [True, True, False, False]


def test_the_reliability_after_calibration_is_drawn_beside_the_one_before(calibrated):
    before, after = next(panel for panel in panels(read_run(calibrated)) if panel.key == "reliability").pictures
    errors = [row[7].split()[0] for row in calibration_panel(read_run(calibrated)).tables[1].rows]
    assert (before.name, after.name) == ("reliability_test", "reliability_test_calibrated")
    assert before.alt == f"Reliability diagram, mixed test split: ECE {errors[0]}"
    assert after.alt == f"Reliability diagram, mixed test split, calibrated: ECE {errors[1]}"
    assert before.png != after.png


def test_the_rows_of_a_run_are_told_by_source_part_and_label(run, tmp_path):
    sources = {}
    for k, name in enumerate(("town", "a/b")):
        path = write_rows(tmp_path / f"{k}.jsonl", [{"source": name, **row} for row in synthetic_rows(90, seed=k)])
        sources[name] = SourceSpec(kind="file", path=str(path))
    data = SafetyData(DataSpec(sources=sources, holdout_sources=("a/b",)), seed=0)
    data.setup()
    write_data(run, DataRows(data.describe(), {**data.skipped, "town": 7}, ["source lost is left out: no network"]))
    shown = tables_of(run, "setup")
    table = {row[0]: row[1:] for row in shown["rows by source (ALLOW / ESCALATE / REFUSE)"]}
    counted = [
        " / ".join(str(sum(r.safety_label.name == name for r in rows)) for name in LABELS) if rows else "-"
        for rows in (data.train, data.val, data.test, data.unseen)
    ]
    assert list(table) == ["a/b", "town", "all"]
    assert table["all"] == counted
    assert table["a/b"] == ["-", "-", "-", counted[3]]
    assert ["town", "7"] in shown["rows left out"]
    assert ["source lost is left out: no network", "all"] in shown["rows left out"]
    (run / "data.json").unlink()
    older = tables_of(run, "setup")
    assert not any(title.startswith("rows") for title in older), "and nothing is said of it"


def test_groups_are_shown_with_their_intervals(run):
    scores = json.loads((run / "test.json").read_text())
    scores["intervals_95"]["form"]["unknown"] |= {"macro_f1": [0.111, 0.888], "ece": [0.222, 0.333]}
    (run / "test.json").write_text(json.dumps(scores))
    shown = tables_of(run, "metrics")
    title, other = (title for title in shown if "by form" in title)
    assert [cell.endswith(" [0.22,\N{NO-BREAK SPACE}0.33]") for cell in shown[other][0]] == [False] * 5 + [True]
    assert shown[title][0][0] == "unknown", "these rows tell no form"
    assert any(cell.endswith(" [0.11,\N{NO-BREAK SPACE}0.89]") for cell in shown[title][0])
    assert any("by language" in title for title in shown)


def test_the_worst_mistakes_show_what_was_decided_after_each_of_their_tokens(run, finished_run):
    table = panels(read_run(run))[-1].tables[0]
    rows = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    told = {row["user_request"]: row for row in rows}
    agent = load_agent(finished_run)
    assert 0 < len(table.rows) <= MOST
    for (request, _, label, decision, *_), parts in zip(table.rows, table.marked, strict=True):
        assert label != decision
        seen = list(stream(agent, request, told[request].get("context")))
        assert parts == [(token.text, token.label.name) for token in seen][-len(parts) :]
        assert "".join(text for text, _ in parts) == request
    assert sum("tokens" in row for row in rows) == len(table.rows), "and no other row"
    page = page_of(run)
    assert {told.get("class") for tag, told in page.tags if tag == "span"} <= set(LABELS)


def test_a_long_request_is_cut_off_in_the_report(run):
    path = run / "test_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"user_request": "w" * (LONGEST + 1), "tokens": [["w" * 300, "ALLOW"], ["v" * 300, "REFUSE"], ["u", "ALLOW"]]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = panels(read_run(run))[-1].tables[0]
    assert table.rows[0][0] == "w" * LONGEST + "…"
    assert table.marked[0] == [("w" * 300, "ALLOW"), ("v" * (LONGEST - 300) + "…", "REFUSE")]


def test_the_page_has_no_script_and_loads_nothing(run):
    page = page_of(run)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value[:60]}"


def test_markup_in_a_request_and_in_the_settings_is_shown_and_does_nothing(run):
    hostile = "</td><script>alert('x')</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"
    rows = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    rows[0] |= {"user_request": hostile, "source": hostile, "safety_label": "REFUSE", "decision": "ALLOW"}
    rows[0]["probabilities"] = {"ALLOW": 0.999, "ESCALATE": 0.001, "REFUSE": 0.0}
    rows[0]["tokens"] = [[hostile[:20], "ALLOW"], [hostile[20:], "REFUSE"]]
    (run / "test_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  name: tiny$", f"  name: {json.dumps(hostile)}", config))
    page = page_of(run)
    assert page.cells.count(hostile) == 2, "as the request and as the source of the worst mistake"
    assert any(cell.startswith(f"base.name {hostile}") for cell in page.cells)
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(tag == "img" for tag, _ in page.tags) == sum(PICTURES.values())


@pytest.mark.parametrize(
    ("gone", "panels"),
    [
        ("config.yaml", ["setup", "memory"]),
        ("csv/metrics.csv", ["group", "losses"]),
        ("test.json", ["metrics", "stream", "confusion"]),
        ("test_predictions.jsonl", ["reliability", "trade-off", "risk-coverage", "grouped-curves", "mistakes"]),
        ("adapter/adapter.safetensors", ["setup", "calibration", "gates"]),
    ],
)
def test_a_file_that_is_missing_is_named_where_it_would_be_shown(run, gone, panels):
    (run / gone).unlink()
    page = page_of(run)
    assert [key for key, text in page.text.items() if f"not shown: {gone}\n" in text] == panels
    assert not any(page.pictures[key] for key in panels)


def test_a_run_without_evaluation_still_shows_its_training(run):
    for part in ("test.json", "test_predictions.jsonl"):
        (run / part).unlink()
    page = page_of(run)
    assert [key for key, pictures in page.pictures.items() if pictures] == ["group", "losses", "gates", "memory"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_run_is_an_error_and_nothing_is_written(tmp_path, there, capsys):
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder)])
    assert stopped.value.code == 2
    assert "not a run's folder" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- only\n- a list\n"),
        ("data.json", '{"rows": {"train": ["starter/ALLOW"]}, "skipped": {}, "missing": []}'),
        ("csv/metrics.csv", "step,train/loss\n1,many\n"),
        ("test.json", "{}"),
        ("test_predictions.jsonl", '{"user_request": "half a row"'),
        ("adapter/adapter.json", "{}"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(run, file, content):
    (run / file).write_text(content)
    with pytest.raises(ArtefactError, match=rf"{Path(file).parts[0]}.*is damaged"):
        read_run(run)


def test_what_gates_cost_the_base_in_language_is_told_beside_the_figures(run):
    figures = json.loads((run / "test.json").read_text())["metrics"]
    told = f"perplexity {figures['task_perplexity']:.1f} a token of answers behind all gates, "
    told += f"{figures['task_perplexity_base']:.1f} of the base alone"
    assert [title for title in tables_of(run, "metrics") if told in title] == [next(iter(tables_of(run, "metrics")))]


@pytest.mark.parametrize("name", ["page.txt", "test.json"])
def test_the_page_is_never_written_over_something_that_is_no_page(run, name, capsys):
    before = (run / "test.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["report", str(run), "--out", str(run / name)])
    assert "ends in .html" in capsys.readouterr().err
    assert (run / "test.json").read_bytes() == before


def test_rows_that_failed_are_no_mistakes_and_enter_no_curve(run):
    path = run / "test_predictions.jsonl"
    before = read_run(run).predictions["test"]
    failed = {"user_request": "FAILED", "decision": "ESCALATE", "safety_label": "ALLOW", "source": "x", "failure": "not finite"}
    numbers = '"probabilities": {"ALLOW": NaN, "ESCALATE": NaN, "REFUSE": NaN}'
    path.write_text(path.read_text() + json.dumps(failed)[:-1] + f", {numbers}}}\n")
    after = read_run(run).predictions["test"]
    assert after.failures == 1
    assert np.array_equal(after.probabilities, before.probabilities)
    assert "FAILED" not in page_of(run).cells


def test_a_gate_that_turns_one_plane_is_as_far_from_the_identity_as_the_plane_s_angle_says(run):
    path = run / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    turned = torch.zeros_like(tensors["gates.last.cmd.coords"])
    turned[3, 0] = torch.pi / 2  # a quarter turn: two of the eight axes move by sqrt(2) each
    save_file({**tensors, "gates.last.cmd.coords": turned}, path)
    angles = read_run(run).angles["last cmd"]
    assert angles[3] == pytest.approx(2, abs=1e-6)
    assert np.delete(angles, 3) == pytest.approx(0)


def test_pet_s_phases_are_told_with_their_strength_and_the_steps_that_were_logged_in_them(run, monkeypatch):
    monkeypatch.setattr("so8t.losses_panel.drawn", lambda *_, wide: None)
    rows = [f"{step},1.0,{0 if step < 4 else 0.1 if step < 12 else 1}" for step in range(20)]
    rows = ["step,train/loss,train/pet_phase", *rows]
    (run / "csv" / "metrics.csv").write_text("\n".join(rows) + "\n")
    settings = OmegaConf.load(run / "config.yaml")
    settings.pet.update({"weight": 0.5, "exploration_end": 0.2, "transition_end": 0.6})
    OmegaConf.save(settings, run / "config.yaml")
    assert losses_panel(read_run(run)).tables[0].rows == [
        ["exploration", "0 % to 20 %", "0 to 3", "0", "0"],
        ["transition", "20 % to 60 %", "4 to 11", "0.1", "0.05"],
        ["stabilisation", "60 % to 100 %", "12 to 19", "1", "0.5"],
    ]
    settings.pet.exploration_end = 0.0
    OmegaConf.save(settings, run / "config.yaml")
    assert [row[0] for row in losses_panel(read_run(run)).tables[0].rows] == ["transition", "stabilisation"]


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        ((1, 1, 1), [["exploration, transition, stabilisation", "0 % to 100 %", "0 to 19"]]),
        ((0, 0, 1), [["exploration, transition", "0 % to 60 %", "0 to 11"], ["stabilisation", "60 % to 100 %", "12 to 19"]]),
        (
            (1, 0.1, 1),
            [
                ["exploration", "0 % to 20 %", "0 to 3"],
                ["transition", "20 % to 60 %", "4 to 11"],
                ["stabilisation", "60 % to 100 %", "12 to 19"],
            ],
        ),
    ],
)
def test_phases_of_equal_strength_are_told_together_where_nothing_lies_between_them(factors, told):
    spec = PetSpec(exploration=factors[0], transition=factors[1], stabilisation=factors[2])
    logged = [(step, float(np.float32(spec.factor(step / 20)))) for step in range(20)]
    assert [row[:3] for row in phases(spec, {"train/pet_phase": logged})] == told
    assert [row[2] for row in phases(spec, {})] == ["-"] * len(told)


@pytest.mark.parametrize("how", ["off", "no settings", "settings of another version"])
def test_without_pet_there_are_no_phases(run, how, monkeypatch):
    monkeypatch.setattr("so8t.losses_panel.drawn", lambda *_, wide: None)
    settings = OmegaConf.load(run / "config.yaml")
    if how == "off":
        settings.pet.weight = 0.0
    elif how == "no settings":
        del settings["pet"]
    else:
        settings.pet.softness = 2
    OmegaConf.save(settings, run / "config.yaml")
    panel = losses_panel(read_run(run))
    assert panel.pictures
    assert not panel.tables


def test_the_memory_panel_tells_what_the_plan_of_the_run_s_settings_says(run):
    planned = plan(validate(OmegaConf.load(run / "config.yaml")))
    page = page_of(run)
    sizes = [f"{1024 * sum(parts.values()):.1f} MiB" for parts in planned.phases.values()]
    at = page.cells.index("together")
    assert page.cells[at + 1 : at + 3] == sizes
    assert "The run itself logged" in page.text["memory"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("source: random", "source: hub\n  model_id: nobody/knows", "the sizes of base tiny are not at hand"),
        ("interior: safe", "interior: safe\n  spins: 2", "gate.spins: unknown key"),
    ],
)
def test_settings_that_cannot_be_planned_here_are_told_and_the_rest_is_shown(run, before, after, told):
    config = run / "config.yaml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    page = page_of(run)
    assert told in page.text["memory"]
    assert {key: len(pictures) for key, pictures in page.pictures.items()} == {**PICTURES, "memory": 0}
