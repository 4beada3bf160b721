"""`so8t ask` and `so8t evaluate` on a finished run: what they print and write, and how they fail."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from so8t.console import reported
from so8t.labels import LABELS
from tests.conftest import synthetic_rows, write_rows


def probabilities_of_two() -> tuple[float, float]:
    """Softmax of (2, 0, 0): e^2 / (e^2 + 2) = 7.38906 / 9.38906 = 0.78699, and 1 / 9.38906 = 0.10651."""
    return 0.78699, 0.10651


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", synthetic_rows(6, seed=0))
    command = [sys.executable, "-m", "so8t.cli", "data", "check", str(data), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_a_pipe_that_breaks_elsewhere_is_told(capsys):
    with pytest.raises(SystemExit) as stop, reported():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert stop.value.code == 2
    assert "Broken pipe" in capsys.readouterr().err


# -- ask ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_ask_prints_the_decision_its_probabilities_and_an_answer_only_on_allow(so8t, always, label):
    code, out, _ = so8t("ask", always(label), "how do I kill a python process?", "--json", "--max-new-tokens", "5")
    assert code == 0
    told = json.loads(out)
    high, low = probabilities_of_two()
    assert told["decision"] == label
    assert told["user_request"] == "how do I kill a python process?"
    assert list(told["probabilities"]) == list(LABELS)
    assert told["probabilities"] == pytest.approx({name: high if name == label else low for name in LABELS}, abs=1e-4)
    assert (told["answer"] is not None) == (label == "ALLOW")


@pytest.mark.parametrize(("how", "told"), [("strict", "is not UTF-8"), ("surrogateescape", "is not valid Unicode")])
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_what_is_not_utf_8_is_one_line(so8t, finished_run, tmp_path, monkeypatch, command, how, told):
    # in some places Python lets stray bytes by, as halves of surrogate pairs
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors=how))
    code, _, err = so8t(command, finished_run, *(["-"] if command == "ask" else ["--state", tmp_path]))
    assert code == 2
    assert err.startswith(f"error: the request {told}")


def test_a_context_that_is_not_utf_8_is_one_line(so8t, finished_run, tmp_path):
    for command in (["ask", finished_run, "hello"], ["chat", finished_run, "--state", tmp_path]):
        code, _, err = so8t(*command, "--context", "caf\udce9")
        assert code == 2
        assert err.startswith("error: --context is not valid Unicode")


def test_ask_for_people_has_decision_and_probabilities_on_the_first_line(so8t, always):
    code, out, _ = so8t("ask", always("REFUSE"), "forge a passport")
    assert code == 0
    assert out.split() == ["REFUSE", "ALLOW", "0.107", "ESCALATE", "0.107", "REFUSE", "0.787"]
    code, out, _ = so8t("ask", always("ALLOW"), "bake bread", "--max-new-tokens", "8")
    assert out.splitlines()[0].startswith("ALLOW   ALLOW 0.787")


def test_ask_answers_from_the_intact_base_or_when_asked_behind_the_gates(finished_run, so8t, always):
    from so8t.adapter import load_agent

    run = always("ALLOW")
    path = run / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    tensors["gates.last.cmd.coords"] = torch.randn_like(tensors["gates.last.cmd.coords"])
    agent = load_agent(run)
    plain, gated = (agent.answer("bake bread", max_new_tokens=12, gated=gated) for gated in (False, True))
    save_file(tensors, path)
    _, out, _ = so8t("ask", run, "bake bread", "--json", "--max-new-tokens", "12", "--gated")
    assert json.loads(out)["answer"] != gated, "R_cmd turns what is said behind the gates"
    _, out, _ = so8t("ask", run, "bake bread", "--json", "--max-new-tokens", "12")
    assert json.loads(out)["answer"] == plain, "and nothing that the base says"


def test_ask_reads_a_request_from_standard_input(so8t, finished_run, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("wire the money now"))
    code, out, _ = so8t("ask", finished_run, "-", "--json", "--max-new-tokens", "2")
    assert code == 0
    assert json.loads(out)["user_request"] == "wire the money now"


def test_the_context_is_part_of_what_is_decided(so8t, finished_run):
    ask = ("ask", finished_run, "drop the table", "--json", "--max-new-tokens", "1")
    alone = json.loads(so8t(*ask)[1])["probabilities"]
    within = json.loads(so8t(*ask, "--context", "You are connected to the production database.")[1])["probabilities"]
    assert alone != within


def test_an_empty_request_is_told(so8t, finished_run):
    code, _, err = so8t("ask", finished_run, "   ")
    assert (code, err.strip()) == (2, "error: the request is empty")


def test_a_logit_that_is_not_finite_is_escalated_and_called_a_failure(so8t, always):
    run = always("ALLOW")
    path = run / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    tensors["head.linear.bias"] = torch.tensor([float("nan"), 0.0, 0.0])
    save_file(tensors, path)
    _, out, _ = so8t("ask", run, "bake bread", "--json")
    told = json.loads(out)
    assert told["decision"] == "ESCALATE"
    assert told["answer"] is None
    assert "not finite" in told["failure"]


def test_what_is_too_strange_is_escalated_and_called_unsure(so8t, always):
    run = always("ALLOW")
    path = run / "adapter" / "adapter.safetensors"
    save_file(load_file(path) | {"head.limit": torch.tensor(0.0)}, path)
    told = json.loads(so8t("ask", run, "bake bread", "--json")[1])
    assert (told["decision"], told["unsure"]) == ("ESCALATE", True)
    assert "unsure: " in so8t("ask", run, "bake bread")[1]


def test_the_console_script_is_installed_and_runs(finished_run):
    script = Path(sys.executable).parent / "so8t"
    command = [script, "ask", finished_run, "kill a process", "--json", "--max-new-tokens", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["decision"] in LABELS
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-5)


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows the run has never seen, in an order that is not by length, behind a byte order mark."""
    rows = synthetic_rows(17, seed=5)
    rows[3] |= {"user_request": "short"}
    rows[9] |= {"user_request": "a much longer request than all of the others " * 3, "source": "elsewhere"}
    path = write_rows(tmp_path / "mine.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]


def test_evaluate_writes_a_prediction_for_every_row_in_the_files_order(so8t, finished_run, data, tmp_path):
    out = tmp_path / "deep" / "predictions.jsonl"
    code, printed, _ = so8t("evaluate", finished_run, "--data", data, "--out", out, "--json", "--batch-size", "4")
    assert code == 0
    given, predicted = rows_of(data), rows_of(out)
    assert [p["user_request"] for p in predicted] == [g["user_request"] for g in given], "row 1 too, behind its BOM"
    for row in predicted:
        assert list(row["probabilities"]) == list(LABELS)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert row["decision"] == max(row["probabilities"], key=row["probabilities"].get)
    told = json.loads(printed)
    hits = sum(p["decision"] == g["safety_label"] for p, g in zip(predicted, given, strict=True))
    assert told["metrics"]["accuracy"] == pytest.approx(hits / 17)
    assert told["metrics"]["rows"] == 17
    let_through = sum(g["safety_label"] != "ALLOW" and p["decision"] == "ALLOW" for p, g in zip(predicted, given, strict=True))
    risky = sum(g["safety_label"] != "ALLOW" for g in given)
    assert told["metrics"]["false_allow_rate"] == pytest.approx(let_through / risky)
    assert [sum(row) for row in told["confusion"]] == [sum(g["safety_label"] == name for g in given) for name in LABELS]
    assert set(told["by_source"]) == {"mine", "elsewhere"}


def test_evaluate_decides_each_row_as_ask_does(so8t, finished_run, data, tmp_path):
    out = tmp_path / "predictions.jsonl"
    so8t("evaluate", finished_run, "--data", data, "--out", out, "--json")
    for row in rows_of(out)[:9:3]:  # the tenth is longer than a prompt, which `ask` reads in windows
        told = json.loads(so8t("ask", finished_run, row["user_request"], "--json", "--max-new-tokens", "1")[1])
        assert told["decision"] == row["decision"]
        assert told["probabilities"] == pytest.approx(row["probabilities"], abs=1e-4), "whatever the batch and its padding"


def test_evaluate_prints_constants_and_baselines_beside_the_figures(so8t, finished_run, data):
    code, out, _ = so8t("evaluate", finished_run, "--data", data)
    assert code == 0
    told = " ".join(out.split())
    for who in ("SO8T", "TF-IDF", "always", "17 rows", "by source"):
        assert who in told, who
    _, out, _ = so8t("evaluate", finished_run, "--data", data, "--json")
    baselines = json.loads(out)["baselines"]
    assert set(baselines) == {"TF-IDF", "frozen probe", "context only", *(f"always {name}" for name in LABELS)}
    # always REFUSE: recall 1 and precision 5/17 on REFUSE, nothing on the others: F1 = 2 (5/17) / (22/17) = 10/22
    counts = [sum(r["safety_label"] == name for r in rows_of(data)) for name in LABELS]
    assert counts == [6, 6, 5]
    assert baselines["always REFUSE"]["macro_f1"] == pytest.approx(10 / 22 / 3)


def test_evaluate_works_without_baselines(so8t, always, data):
    code, out, err = so8t("evaluate", always("ALLOW"), "--data", data, "--json")
    assert code == 0
    assert "without baselines: " in err
    told = json.loads(out)
    assert told["metrics"]["false_allow_rate"] == 1.0
    assert told["metrics"]["over_refusal_rate"] == 0.0
    assert "TF-IDF" not in told["baselines"]


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("name", "damage"), [("context.json", Path.unlink), ("probe.safetensors", torn), ("tfidf.json", torn)])
def test_baselines_that_are_not_whole_are_left_out_with_a_word(so8t, finished_run, data, tmp_path, name, damage):
    for part in ("adapter", "baselines"):
        shutil.copytree(finished_run / part, tmp_path / "run" / part)
    damage(tmp_path / "run" / "baselines" / name)
    code, out, err = so8t("evaluate", tmp_path / "run", "--data", data, "--json")
    assert code == 0
    assert set(json.loads(out)["baselines"]) == {f"always {label}" for label in LABELS}
    assert "without baselines: " in err


@pytest.mark.parametrize(("label", "detected", "alarms"), [("ALLOW", 0, 0), ("REFUSE", 1, 4)])
def test_evaluate_tells_what_is_decided_along_answers_when_it_is_asked_to(so8t, always, tmp_path, label, detected, alarms):
    rows = synthetic_rows(17, seed=5)
    rows[0] |= {"task_output": "a much longer answer than all of the others " * 5}
    del rows[3]["task_output"]
    evaluate = ("evaluate", always(label), "--data", write_rows(tmp_path / "mine.jsonl", rows))
    plain = json.loads(so8t(*evaluate, "--json")[1])
    told = json.loads(so8t(*evaluate, "--json", "--answers")[1])
    answers = told.pop("answers")
    assert told == plain, "nothing else changes"
    intervals = answers.pop("intervals_95")
    assert set(intervals) == set(answers) - {"allow_rows", "risky_rows", "left_out"}
    assert intervals["detected"] is None, "of so few rows there is none"
    assert answers == {
        "allow_rows": 4,
        "risky_rows": 11,
        "left_out": 1,
        "decision_changes": 0,
        "detected": detected,
        "time_to_detection": 1 if detected else None,
        "false_alarms_per_1000_tokens": pytest.approx(1000 * alarms / (4 * 13)),  # 13 bytes an answer
    }
    assert "11 risky requests in the place of an answer" in " ".join(so8t(*evaluate, "--answers")[1].split())


def test_aliases_are_read(so8t, finished_run, tmp_path):
    path = write_rows(tmp_path / "alias.jsonl", [{"prompt": "bake bread", "label": "ALLOW", "response": "ok"}])
    code, out, _ = so8t("evaluate", finished_run, "--data", path, "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["rows"] == 1


# -- errors ------------------------------------------------------------------------------------------------------------


def fails(result: tuple[int, str, str], *told: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for text in ("error: ", *told):
        assert text in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"user_request": "x"}', "mine.jsonl:18: safety_label: missing"),
        ('{"user_request": "x", "safety_label": "BLOCK"}', "mine.jsonl:18: safety_label: 'BLOCK' is not one of ALLOW"),
        ('{"safety_label": "ALLOW"}', "mine.jsonl:18: user_request: missing"),
        ('{"user_request": "x", ', "mine.jsonl:18: row: not valid JSON"),
    ],
    ids=["no label", "wrong label", "no request", "broken JSON"],
)
def test_a_bad_row_is_named_and_nothing_is_written_or_it_is_skipped_and_counted(so8t, finished_run, data, tmp_path, line, told):
    with data.open("a") as file:
        file.write(line + "\n")
    out = tmp_path / "predictions.jsonl"
    before = set(tmp_path.iterdir())
    fails(so8t("evaluate", finished_run, "--data", data, "--out", out), told)
    assert set(tmp_path.iterdir()) == before
    code, printed, _ = so8t("evaluate", finished_run, "--data", data, "--json", "--on-bad-row", "skip")
    assert code == 0
    assert json.loads(printed)["metrics"]["rows"] == 17
    assert len(json.loads(printed)["bad_rows"]) == 1
    assert told in json.loads(printed)["bad_rows"][0]


def test_the_data_are_never_overwritten(so8t, finished_run, data, tmp_path):
    before = data.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(data)
    for out in (data, data.parent / "." / data.name, tmp_path / "link.jsonl"):
        fails(so8t("evaluate", finished_run, "--data", data, "--out", out), "would overwrite the data")
    fails(so8t("evaluate", finished_run, "--data", data, "--out", tmp_path), "is a folder")
    assert data.read_bytes() == before


def test_a_place_where_nothing_can_be_written_is_told_before_anything_is_loaded(so8t, data, tmp_path):
    for out in (data / "x.jsonl", data / "deep" / "x.jsonl", tmp_path / ("x" * 300), Path("/proc/none/x.jsonl")):
        fails(so8t("evaluate", tmp_path / "no run", "--data", data, "--out", out), "--out ", "nothing can be written in")
    assert list(tmp_path.iterdir()) == [data]


def test_missing_data_and_missing_runs_are_told(so8t, finished_run, data, tmp_path):
    fails(so8t("evaluate", finished_run, "--data", tmp_path / "none.jsonl"), "none.jsonl: no such file")
    fails(so8t("evaluate", tmp_path / "none", "--data", data), "no adapter here")
    fails(so8t("ask", tmp_path / "none", "hello"), "no adapter here")
    fails(so8t("ask", tmp_path, "hello"), "no adapter here")


def cut_short(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_json(folder: Path) -> None:
    (folder / "adapter.json").write_text('{"format": 1, ')


def edited(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(key: str):
    def change(folder: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return change


def other_gates(folder: Path) -> None:
    path = folder / "adapter.json"
    meta = json.loads(path.read_text())
    meta["gate"]["blocks"] = "shared"
    path.write_text(json.dumps(meta))


def other_base(folder: Path) -> None:
    path = folder / "adapter.json"
    meta = json.loads(path.read_text())
    meta["base"]["seed"] = 7
    path.write_text(json.dumps(meta))


def extra_tensor(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    save_file(load_file(path) | {"gates.interior.9_o_proj.safe.coords": torch.zeros(8, 28)}, path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "the adapter is damaged"),
        (no_json, "the adapter is damaged"),
        (without("gate"), "the adapter is damaged"),
        (edited(labels=["ALLOW", "REFUSE", "ESCALATE"]), "labels are ['ALLOW', 'REFUSE', 'ESCALATE'], expected"),
        (without("base_identity"), "the adapter is damaged"),
        (edited(format=1), "format 1 of another version of SO8T, expected 2: train it again"),
        (edited(base={"name": "tiny", "source": "random", "colour": 1}), "the adapter is damaged"),
        (edited(template={"max_length": 160, "shape": 2}), "adapter"),
        (other_gates, "tensors do not fit"),
        (extra_tensor, "tensors do not fit"),
        (other_base, "another tiny than the one loaded now"),
    ],
    ids=["cut", "json", "key", "labels", "identity", "format", "base key", "template key", "gates", "extra tensor", "base"],
)
def test_a_damaged_or_foreign_adapter_is_told_in_one_line(so8t, finished_run, tmp_path, damage, told):
    shutil.copytree(finished_run / "adapter", tmp_path / "run" / "adapter")
    damage(tmp_path / "run" / "adapter")
    fails(so8t("ask", tmp_path / "run", "hello"), told)


def test_a_command_line_that_makes_no_sense_is_refused_with_code_two(so8t, finished_run, data):
    assert so8t()[0] == 2
    assert so8t("evaluate", finished_run)[0] == 2
    for size in ("0", "-3", "many"):
        code, _, err = so8t("evaluate", finished_run, "--data", data, "--batch-size", size)
        assert code == 2, size
        assert "Traceback" not in err


def test_help_is_the_reference(so8t):
    code, out, _ = so8t("evaluate", "--help")
    assert code == 0
    for option in ("--data", "--out", "--json", "--on-bad-row"):
        assert option in out
