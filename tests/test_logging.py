"""Loggers: the CSV is always there, and what an offline wandb run holds is read back from its own file."""

import base64
import csv
import json
import shutil
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf
from wandb.proto import wandb_internal_pb2

from so8t import plots
from so8t.page import Panel
from so8t.pet import PetSpec
from so8t.report import PANELS, panels
from so8t.run_folder import read_run
from tests.conftest import QUICK, composed, synthetic_rows, trained, write_rows


@pytest.fixture(scope="module")
def logged_run(rows_file, tmp_path_factory) -> Path:
    """A tiny run with both loggers."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    settings = (
        "logger=csv_wandb", "trainer.max_epochs=2", "data.batch_size=16", "data.task_rows=2", "trainer.log_every_n_steps=1",
        "callbacks.group.every_n_steps=3", "tags=[first,try]", "seed=3",
    )  # fmt: skip
    trained(composed(*QUICK, f"data.path={rows_file}", *settings, output_dir=folder))
    return folder


def wandb_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """Reads a `.wandb` file: LevelDB's log format, blocks of 32 KiB of chunks with a CRC each, after a header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, whole, at, block = [], b"", 7, 32768
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        crc, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if not size and not kind:
            break
        chunk = data[at + 7 : at + 7 + size]
        assert zlib.crc32(bytes([kind]) + chunk) == crc, "a torn record"
        at += 7 + size
        whole = chunk if kind in (1, 2) else whole + chunk  # 1 full, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
    return records


def ended_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """All of a run that has been finished: its file is written by a process of its own, which may be a little behind."""
    for _ in range(100):
        records = wandb_records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    pytest.fail(f"{path} never ended")


@pytest.fixture(scope="module")
def wandb_run(logged_run) -> tuple[Path, list[wandb_internal_pb2.Record]]:
    folders = list((logged_run / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    return folders[0], ended_records(next(folders[0].glob("*.wandb")))


def item_name(item) -> str:
    return item.key or ".".join(item.nested_key)


def history(records) -> dict[str, list[object]]:
    curves: dict[str, list[object]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                curves.setdefault(item_name(item), []).append(json.loads(item.value_json))
    return curves


def csv_curves(run: Path) -> dict[str, list[float]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(r[name]) for r in rows if r[name] != ""] for name in rows[0]}


@pytest.mark.parametrize("logger", ["csv", "csv_wandb"])
def test_every_logger_setting_writes_the_csv(make_config, logger):
    nodes = make_config("base=tiny", f"logger={logger}").logger
    assert nodes.csv["_target_"] == "lightning.pytorch.loggers.CSVLogger"


def test_wandb_is_offline_unless_asked_otherwise(make_config):
    assert make_config("logger=csv_wandb").logger.wandb.offline is True
    assert make_config("logger=csv_wandb", "logger.wandb.offline=false").logger.wandb.offline is False


def test_the_csv_has_losses_metrics_invariants_learning_rates_and_memory(logged_run):
    curves = csv_curves(logged_run)
    for name in ("train/loss", "train/share_pet", "val/macro_f1", "val/false_allow_rate", "val/over_refusal_rate",
                 "val/refuse_recall", "val/escalate_recall", "val/ece", "val/task_perplexity", "val/flicker",
                 "val/decision_changes", "val/selection", "test/macro_f1", "test/task_perplexity", "test/task_perplexity_base",
                 "lr-AdamW/gates", "lr-AdamW/head",
                 "grad_norm/head", "memory/peak_gib", "group/last/commutator", "group/last.safe/orthogonality"):  # fmt: skip
        assert curves[name], name
    assert len(curves["train/loss"]) == 12, "6 steps in each of 2 epochs"


def test_the_picture_of_the_loss_shows_every_term_that_was_trained_on(logged_run, monkeypatch):
    series = plots.read_metrics(logged_run / "csv" / "metrics.csv")
    shares = {term for name in series if (term := name.removeprefix("train/share_")) != name and f"train/{term}" in series}
    drawn = []
    monkeypatch.setattr(plots, "finish", lambda figure, to: drawn.append(figure))
    plots.plot_losses(series, logged_run / "loss.png")
    left, right = drawn[0].axes
    assert shares >= {"safety", "path", "cost", "task", "pet", "inertia"}
    for axis, more in ((left, {"total", "validation, class loss"}), (right, set())):
        handles, labels = axis.get_legend_handles_labels()
        assert set(labels) == shares | more
        assert len({handle.get_color() for handle in handles}) == len(labels), "no colour twice"


def test_the_picture_of_the_loss_marks_where_each_of_pet_s_phases_begins(logged_run, monkeypatch):
    series, phases = plots.read_metrics(logged_run / "csv" / "metrics.csv"), PetSpec()
    begins: dict[float, int] = {}
    for k in range(12):  # as `PetSpec.factor` says of each optimiser step
        begins.setdefault(phases.factor(k / 12), k)
    assert len(begins) == 3
    drawn = []
    monkeypatch.setattr(plots, "finish", lambda figure, to: drawn.append(figure))
    plots.plot_losses(series, logged_run / "loss.png")
    right = drawn[0].axes[1]
    told = {text.get_text().strip(): text.get_position()[0] for text in right.texts}
    assert told == {f"PET x {factor:g}": step for factor, step in begins.items()}
    lines = {line.get_xdata()[0] for line in right.lines if line.get_linestyle() == ":"}
    assert lines == set(begins.values())


def test_the_config_arrives_in_wandb(wandb_run):
    _, records = wandb_run
    config = {}
    for record in records:
        if record.WhichOneof("record_type") == "config":
            config |= {item_name(item): json.loads(item.value_json) for item in record.config.update}
    assert config["config"]["base"]["name"] == "tiny"
    assert config["config"]["seed"] == 3
    assert config["config"]["gate"]["top_layers"] == 2
    # two layers x two sites of one R_safe and the last R_safe, 8 blocks x 28 numbers each; and one R_cmd
    assert config["parameters/gates_safe"] == 5 * 8 * 28
    assert config["parameters/gates_cmd"] == 8 * 28


def test_the_tags_arrive_in_wandb(wandb_run):
    _, records = wandb_run
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert set(runs[0].tags) == {"first", "try"}
    assert runs[0].project == "so8t"


def test_the_curves_in_wandb_are_those_in_the_csv(logged_run, wandb_run):
    ours, theirs = csv_curves(logged_run), history(wandb_run[1])
    for name in ("train/loss", "train/safety", "val/macro_f1", "test/macro_f1", "lr-AdamW/gates"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name


def test_the_defects_of_every_gate_are_curves_in_wandb(logged_run, wandb_run):
    ours, theirs = csv_curves(logged_run), history(wandb_run[1])
    names = [n for n in ours if n.startswith("group/")]
    assert len(names) == 6 * 5 + 2, "six rotations with two defects twice and an angle, and the last pair's commutator"
    for name in names:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-6, abs=1e-20), name
        assert len(theirs[name]) == 5, "steps 0, 3, 6, 9 and 12"


def assert_arrived(wandb_folder: Path, told: dict[str, list[object]], shown: list[Panel]) -> None:
    """Every picture of the panels, pixel by pixel, and every table but those of whole requests."""
    media = wandb_folder / "files" / "media"
    for panel in shown:
        pictures = list((media / "images" / "report").glob(f"{panel.key}_*.png"))
        assert len(pictures) == len(panel.pictures), panel.key
        for picture, ours in zip(pictures, panel.pictures, strict=True):
            assert np.array_equal(imread(picture), imread(BytesIO(base64.b64decode(ours.base64)))), panel.key
        assert f"report/{panel.key}" in " ".join(told) or not panel.pictures
        for k, table in enumerate(table for table in panel.tables if not table.texts):
            (file,) = (media / "table" / "report").glob(f"{panel.key}_{k}_*.table.json")
            theirs = json.loads(file.read_text(encoding="utf-8"))
            assert (theirs["columns"], theirs["data"]) == (table.head, table.rows)


def test_the_panels_of_the_report_arrive_in_wandb_as_pictures_and_tables(logged_run, wandb_run):
    shown = panels(read_run(logged_run))
    assert {"confusion", "reliability", "trade-off", "risk-coverage", "group", "losses", "gates"} <= {
        panel.key for panel in shown if panel.pictures
    }
    assert_arrived(wandb_run[0], history(wandb_run[1]), shown)


def test_what_was_measured_later_arrives_in_the_same_wandb_run(logged_run, wandb_run, so8t, tmp_path, monkeypatch):
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("SO8T_OFFLINE", "1")  # without rewordings, which would take long
    run = tmp_path / "run"
    shutil.copytree(logged_run, run)
    held_out = write_rows(tmp_path / "held_out.jsonl", synthetic_rows(60, seed=9))
    assert so8t("calibrate", run, "--data", held_out, "--alpha", "0.9", "--refuse-alpha", "0.9")[0] == 0
    assert so8t("robustness", run, "--data", held_out, "--rows", "6")[0] == 0
    code, _, err = so8t("report", run, "--wandb")
    assert code == 0, err
    (later,) = set(run.glob("wandb/offline-run-*")) - {run / "wandb" / wandb_run[0].name}
    records = ended_records(next(later.glob("*.wandb")))
    ids = [next(r.run.run_id for r in told if r.WhichOneof("record_type") == "run") for told in (wandb_run[1], records)]
    assert ids[0] == ids[1]
    new = [panel for panel in PANELS if panel.__name__.strip("_") in ("calibration_panel", "robustness_panel")]
    shown = [panel(read_run(run)) for panel in new]  # drawing all of them again takes long
    assert [panel.key for panel in shown if panel.tables and not panel.absent] == ["calibration", "robustness"]
    assert_arrived(later, history(records), shown)
    texts = b"".join(path.read_bytes() for path in later.rglob("*") if path.is_file())
    assert not [row.user_request for row in read_run(run).predictions["test"].rows if row.user_request.encode() in texts]


@pytest.mark.parametrize("gone", ["logger", "folder"])
def test_a_run_without_wandb_cannot_go_on_there(logged_run, so8t, tmp_path, gone):
    run = tmp_path / "run"
    shutil.copytree(logged_run, run, ignore=shutil.ignore_patterns("wandb") if gone == "folder" else None)
    if gone == "logger":
        settings = OmegaConf.load(run / "config.yaml")
        del settings.logger["wandb"]
        OmegaConf.save(settings, run / "config.yaml")
    code, _, err = so8t("report", run, "--wandb")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "Weights & Biases" in err
    assert not (run / "report.html").exists(), "told before anything is drawn"


def test_no_request_is_sent_to_wandb(logged_run, wandb_run):
    requests = [row.user_request for row in read_run(logged_run).predictions["test"].rows]
    texts = b"".join(path.read_bytes() for path in wandb_run[0].rglob("*") if path.is_file())
    assert b"by source" in texts or b"by_source" in texts or b"macro-F1" in texts
    assert not [request for request in requests if request.encode() in texts]
