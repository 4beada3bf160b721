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
from so8t.cli import main
from so8t.config import Config, validate
from so8t.errors import ArtefactError
from so8t.labels import LABELS
from so8t.memory import Plan, plan
from so8t.mistakes import MOST
from so8t.report import LONGEST, panels, render
from so8t.run_folder import read_run
from so8t.streaming import stream

PICTURES = {
    "setup": 0, "metrics": 0, "confusion": 1, "reliability": 1, "trade-off": 1, "risk-coverage": 1, "robustness": 0,
    "group": 1, "losses": 1,
    "gates": 1, "memory": 1, "mistakes": 0,
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


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a tiny run, to be mended and broken."""
    folder = tmp_path / "a_run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("prefix", "checkpoints", "baselines"))
    return folder


def page_of(folder: Path) -> Page:
    return Page(render(read_run(folder)))


def test_every_panel_has_its_picture_and_the_missing_set_is_named(run, capsys):
    main(["report", str(run)])
    assert "report.html" in capsys.readouterr().out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert {key: len(pictures) for key, pictures in page.pictures.items()} == PICTURES
    for picture in (p for pictures in page.pictures.values() for p in pictures):
        assert base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    for key in ("metrics", "confusion"):
        assert "unseen.json" in page.text[key]
    for key in ("reliability", "trade-off", "risk-coverage", "mistakes"):
        assert "unseen_predictions.jsonl" in page.text[key]
    figures = json.loads((run / "test.json").read_text())["metrics"]
    assert {f"{figures[key]:.3f}" for key in ("macro_f1", "auprc_not_allow", "aurc")} <= set(page.cells)


def test_groups_are_shown_with_their_intervals(run):
    scores = json.loads((run / "test.json").read_text())
    scores["intervals_95"]["form"]["unknown"]["macro_f1"] = [0.111, 0.888]
    (run / "test.json").write_text(json.dumps(scores))
    shown = {table.title: table.rows for table in panels(read_run(run))[1].tables}
    (title,) = (title for title in shown if "by form" in title)
    assert shown[title][0][0] == "unknown", "these rows tell no form"
    assert any(cell.endswith(" [0.11, 0.89]") for cell in shown[title][0])
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
    page = Page(render(read_run(run)))
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
        ("test.json", ["metrics", "confusion"]),
        ("test_predictions.jsonl", ["reliability", "trade-off", "risk-coverage", "mistakes"]),
        ("adapter/adapter.safetensors", ["setup", "gates"]),
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
