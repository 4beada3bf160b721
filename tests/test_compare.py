"""`so8t compare`: groups by what runs differ in, paired intervals, plain verdicts, and nothing compared that cannot be."""

import functools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sklearn.metrics import f1_score

from so8t.compare import FIGURES, PAIRED, _rate, compare, sweep_folders
from so8t.data.records import Record
from so8t.errors import ArtefactError, SO8TError
from so8t.evaluation import Predictions, evaluate, write_predictions
from so8t.files import write_json
from so8t.intervals import macro_f1, resampled
from so8t.labels import Label
from so8t.streaming import Stream
from tests.conftest import composed

RECORDS = {
    "test": [Record(f"request {i}", Label(i % 3), source="a", sounds_dangerous=i % 6 == 0) for i in range(150)],
    "unseen": [Record(f"other {i}", Label(i % 3), source="b") for i in range(90)],
}
MIXED, UNSEEN, FALSE_ALLOW = FIGURES[:3]


@functools.cache
def figures(part: str, wrong: float, seed: int) -> dict:
    """What `test.json` and `unseen.json` hold."""
    return evaluate(part, RECORDS[part], decided(part, wrong, seed), None, None).as_json()


@functools.cache
def decided(part: str, wrong: float, seed: int) -> Predictions:
    """Probabilities that put a share `wrong` of the rows on the next label, and decisions along 20 tokens."""
    rng = random.Random(seed)
    return deciding(part, [(int(r.safety_label) + (rng.random() < wrong)) % 3 for r in RECORDS[part]], seed)


def deciding(part: str, labels: list[int], seed: int = 0) -> Predictions:
    """Predictions of these labels, more or less restless along the tokens by the seed."""
    n, rng = len(labels), random.Random(seed)
    probabilities = torch.full((n, 3), 0.1)
    probabilities[torch.arange(n), torch.tensor(labels)] = 0.8
    predictions = Predictions.of_probabilities(probabilities)
    predictions.flicker = torch.tensor([rng.random() for _ in range(n)])
    predictions.changes = torch.tensor([float(rng.randint(0, 9)) for _ in range(n)])
    alarms = torch.tensor([float(rng.randint(0, 3)) for _ in range(n)])
    detection = torch.tensor([float(rng.randint(1, 20)) for _ in range(n)])
    predictions.stream = Stream(torch.full((n,), 20.0), detection, alarms)
    return predictions


def write_sets(folder: Path, wrong: float, draw: int) -> None:
    for part, rows in RECORDS.items():
        write_json(folder / f"{part}.json", figures(part, wrong, draw))
        write_predictions(folder / f"{part}_predictions.jsonl", rows, decided(part, wrong, draw))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Writes the folder of a run with a share of wrong decisions, through the code that writes real ones."""
    known = {}

    def write(folder: Path, *overrides: str, wrong: float = 0.3, seed: int = 0) -> Path:
        if overrides not in known:
            known[overrides] = composed(
                "base=tiny", "data=starter", *overrides, output_dir=tmp_path_factory.mktemp("x") / "OWN"
            )
        config = OmegaConf.to_yaml(known[overrides]).replace(known[overrides].paths.output_dir, str(folder))
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(re.sub(r"(?m)^seed: 0$", f"seed: {seed}", config))
        write_sets(folder, wrong, seed)
        return folder

    return write


@pytest.fixture
def made(make, tmp_path):
    """The same by a name."""
    return lambda name, *overrides, wrong=0.3, seed=0: make(tmp_path / name, *overrides, wrong=wrong, seed=seed)


# -- groups and names --------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_folder_logger_cache_and_how_files_are_written_alone_are_one_variant(made):
    runs = [
        made("a"),
        made("b", "logger=csv_wandb", "cache.max_gib=0", "trainer.plugins=null", seed=1),
        made("c", "gate.map=cayley"),
    ]
    found = compare(runs)
    assert [v.name for v in found.variants] == ["gate.map=exp", "gate.map=cayley"]
    assert [v.seeds for v in found.variants] == [[0, 1], [0]]


def test_a_variant_is_named_by_every_setting_in_which_variants_differ_or_by_its_tags(made):
    runs = [made("a"), made("b", "gate.interior=none", "gate.sites=[o_proj]"), made("c", "loss.class_weights=null")]
    assert [v.name for v in compare(runs).variants] == [
        "gate.interior=safe gate.sites=[o_proj,down_proj] loss.class_weights=balanced",
        "gate.interior=none gate.sites=[o_proj] loss.class_weights=balanced",
        "gate.interior=safe gate.sites=[o_proj,down_proj] loss.class_weights=null",
    ]
    tagged = [made("d", "experiment=costs/none"), made("e", "experiment=costs/strict")]
    found = compare(tagged).variants
    assert [v.name for v in found] == ["costs/none", "costs/strict"]
    assert found[0].differences["loss.cost_weight"] == "0"


def test_a_second_run_of_the_same_settings_and_seed_is_left_out_and_told(made):
    found = compare([made("a"), made("b"), made("c", seed=1)])
    assert [v.seeds for v in found.variants] == [[0, 1]]
    assert [(left.folder.name, "same settings and seed" in left.why) for left in found.left_out] == [("b", True)]


# -- figures and intervals ---------------------------------------------------------------------------------------------


def test_resampled_macro_f1_is_that_of_the_rows_drawn():
    rng = np.random.default_rng(3)
    labels, decisions = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    confusions = resampled(labels.tolist(), decisions.tolist(), draws=5, seed=7)
    again = np.random.default_rng(7)
    for matrix in confusions:
        rows = again.integers(0, 40, 40)
        assert macro_f1(matrix, np.arange(3)) == pytest.approx(f1_score(labels[rows], decisions[rows], average="macro"))


def test_what_is_drawn_again_of_all_rows_once_is_the_run_s_own_figure(made):
    variant = compare([made("a", seed=0, wrong=0.3)]).variants[0]
    for figure in PAIRED:
        told = variant.runs[0].predictions[figure.part]
        confusion = np.zeros((3, 3), dtype=np.int64)
        np.add.at(confusion, (told.labels, told.decisions), 1)
        assert _rate(figure.key, confusion, np.unique(told.labels)) == pytest.approx(variant.values(figure)[0]), figure
    assert len({figure.key for figure in PAIRED}) == 5


def test_the_mean_and_spread_over_seeds_are_those_of_the_runs_own_figures(made, so8t):
    runs = [made("a", seed=0, wrong=0.2), made("b", seed=1, wrong=0.4)]
    code, out, _ = so8t("compare", *runs, "--json")
    assert code == 0
    told = json.loads(out)["variants"][0]["figures"]
    for part, key in (("test", "macro_f1"), ("unseen", "macro_f1"), ("test", "false_allow_rate"), ("test", "ece")):
        values = [json.loads((run / f"{part}.json").read_text())["metrics"][key] for run in runs]
        assert told[f"{part}/{key}"]["mean"] == pytest.approx(np.mean(values))
        assert told[f"{part}/{key}"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert told["test/sounds_dangerous_allowed"]["mean"] is not None


ALONG = ("detected", "time_to_detection", "decision_changes", "false_alarms_per_1000_tokens")


def test_what_gates_cost_the_base_in_language_has_a_column_where_it_was_measured(made, so8t):
    runs = [made("a"), made("b", "gate.map=cayley")]
    assert "perplexity" not in so8t("compare", *runs)[1]
    for run, perplexity in zip(runs, (23.5, 31.25), strict=True):
        told = json.loads((run / "test.json").read_text())
        told["metrics"]["task_perplexity"] = perplexity
        write_json(run / "test.json", told)
    assert "perplexity" in so8t("compare", *runs)[1]
    cayley = json.loads(so8t("compare", *runs, "--json")[1])["variants"][1]["figures"]["test/task_perplexity"]
    assert (cayley["mean"], cayley["gain"]) == (31.25, 7.75)


def test_figures_along_the_tokens_are_compared_seed_by_seed(made, so8t):
    runs = [made(f"a{seed}", seed=seed) for seed in (0, 1, 5)]
    runs += [made(f"b{seed}", "gate.map=cayley", seed=seed) for seed in (0, 1, 5)]
    for k, run in enumerate(runs[3:]):
        told = json.loads((run / "test.json").read_text())
        told["metrics"] |= {key: told["metrics"][key] * (1.1 + k * k) for key in ALONG}
        write_json(run / "test.json", told)
    code, out, _ = so8t("compare", *runs, "--json")
    assert code == 0
    first, second = (v["figures"] for v in json.loads(out)["variants"])
    for key in ALONG:
        values = [json.loads((run / "test.json").read_text())["metrics"][key] for run in runs]
        differences = np.subtract(values[3:], values[:3])
        told = second[f"test/{key}"]
        assert told["mean"] == pytest.approx(np.mean(values[3:]))
        assert told["sd"] == pytest.approx(np.std(values[3:], ddof=1))
        assert told["gain_by_seed"] == pytest.approx(differences)
        assert told["gain"] == pytest.approx(differences.mean())
        assert told["gain_sd"] == pytest.approx(differences.std(ddof=1))
        assert "gain" not in first[f"test/{key}"], "the baseline gains nothing over itself"


def test_without_the_same_seeds_nothing_is_compared_seed_by_seed(made, so8t):
    runs = [made("a", seed=0), made("b", "gate.map=cayley", seed=1)]
    _, out, _ = so8t("compare", *runs, "--json")
    second = json.loads(out)["variants"][1]["figures"]
    assert second["test/decision_changes"]["mean"] is not None
    assert not any(key.startswith("gain") for key in second["test/decision_changes"])
    assert "gain_by_seed" not in second["test/macro_f1"]
    assert second["test/macro_f1"]["verdict"], "rows are the same"


def test_a_gain_is_paired_over_rows(made):
    """Two variants that err on almost the same rows: each is uncertain, their difference is not."""
    found = compare([made("a", wrong=0.30), made("b", "gate.map=cayley", wrong=0.36)])
    low, high = found.variants[1].interval(MIXED)
    _, (worst, best) = found.variants[1].gain(MIXED, found.baseline)
    assert best - worst < 0.6 * (high - low)
    assert found.variants[1].verdict(MIXED, found.baseline) == "worse"


@settings(max_examples=3, deadline=None)
@given(st.floats(0.05, 0.6), st.floats(0.05, 0.6))
def test_gains_change_their_sign_with_the_baseline_and_a_variant_gains_nothing_over_itself(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("pair")
    for name, wrong in (("a", first), ("b", second)):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(f"seed: 0\nwrong: {name}\n")
        write_sets(folder / name, wrong, 0)
    a, b = compare(sweep_folders(folder)).variants
    for figure in PAIRED:
        gain, (low, high) = a.gain(figure, b)
        back, (other_low, other_high) = b.gain(figure, a)
        assert (gain, low, high) == pytest.approx((-back, -other_high, -other_low))
        assert a.gain(figure, a) == (0.0, (0.0, 0.0))
        assert a.verdict(figure, a) == "no difference shown"


def test_a_seed_that_happens_to_be_good_does_not_make_a_variant_help(made):
    """The same error rates on average; one seed is far better, another far worse, and the interval knows."""
    base = [made(f"a{s}", seed=s, wrong=0.3) for s in range(3)]
    wild = [made(f"b{s}", "gate.map=cayley", seed=s, wrong=w) for s, w in enumerate((0.1, 0.1, 0.55))]
    found = compare([*base, *wild])
    assert found.variants[1].verdict(MIXED, found.baseline) == "no difference shown"
    alone = compare([base[0], wild[0]])
    assert alone.variants[1].helps(alone.baseline)


def test_a_variant_that_is_more_right_and_allows_more_harm_does_not_help(made, so8t, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    runs = [made("a", wrong=0.6), made("b", "gate.map=cayley")]
    for part, records in RECORDS.items():
        # half of the risky rows of either label are allowed, and nothing else is wrong
        predictions = deciding(part, [int(r.safety_label) * (i // 3 % 2) for i, r in enumerate(records)])
        write_json(runs[1] / f"{part}.json", evaluate(part, records, predictions, None, None).as_json())
        write_predictions(runs[1] / f"{part}_predictions.jsonl", records, predictions)
    found = compare(runs)
    harmful = found.variants[1]
    assert harmful.verdict(MIXED, found.baseline) == "better"
    assert harmful.verdict(FALSE_ALLOW, found.baseline) == "worse"
    assert harmful.more_right(found.baseline)
    assert harmful.helps(found.baseline) is False
    code, out, _ = so8t("compare", *runs, "--out", runs[0] / "p.png")
    assert code == 0
    assert re.search(r"gate.map=cayley: more right, but allows more harm \(.*false allow, mixed worse", out)
    assert "does NOT help" not in out


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_tells_plainly_what_helps_and_what_does_not(made, so8t, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    runs = [
        made("a", wrong=0.4), made("b", "gate.map=cayley", wrong=0.1), made("c", "gate.blocks=shared", wrong=0.41),
        made("d", "gate.blocks=leading", wrong=0.8),
    ]  # fmt: skip
    code, out, _ = so8t("compare", *runs, "--out", tmp_path / "p.png")
    assert code == 0
    told = {line.split(":")[0]: line for line in out.splitlines() if ": " in line}
    assert "better" in told["gate.blocks=independent gate.map=cayley"]
    assert "does NOT help (no difference shown" in told["gate.blocks=shared gate.map=exp"]
    assert "does NOT help (macro-F1, mixed worse" in told["gate.blocks=leading gate.map=exp"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = so8t("compare", *runs, "--baseline", "leading", "--json")
    told = json.loads(out)
    assert told["baseline"] == "gate.blocks=leading gate.map=exp"
    assert [v["helps"] for v in told["variants"]] == [True, True, True, None]


def test_every_table_is_whole_within_eighty_columns(made, so8t, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    overrides = ("gate.sites=[o_proj]", "gate.blocks=shared", "pet.target=hidden")
    runs = [made(f"{k}{seed}", *overrides[:k], seed=seed) for k in (0, 3) for seed in range(2)]
    code, out, _ = so8t("compare", *runs, "--out", runs[0] / "p.png")
    assert code == 0
    lines = [line for line in out.splitlines() if not line.startswith("picture: ")]  # a path is as long as it is
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    rows = [line.split() for line in out.splitlines() if re.match(r" +2 ", line)]
    assert len(rows) == 11, "the variant, and its figures and differences in five tables each"
    assert [row.count("±") for row in rows] == [0, 4, 4, 4, 4, 3, 0, 0, 2, 4, 3]
    for figure in FIGURES:
        if figure.key != "task_perplexity":  # was not measured
            assert set(figure.title.split()) <= set(out.split()), figure.title


def test_of_a_sweep_what_did_not_finish_is_listed_and_the_picture_lies_in_it(made, so8t, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    made("sweep/0")
    made("sweep/1", "gate.map=cayley")
    for name in ("2", "10"):
        shutil.copytree(made(f"other{name}", seed=3), tmp_path / "sweep" / name)
    (tmp_path / "sweep/2/test.json").write_text("{")
    for file in (tmp_path / "sweep/10").glob("*.json*"):
        file.unlink()
    (tmp_path / "sweep/11").mkdir()
    code, out, _ = so8t("compare", "--sweep", tmp_path / "sweep")
    assert code == 0
    left = [line for line in out.splitlines() if line.startswith("left out")]
    assert [line.split(": ")[1].rsplit("/")[-1] for line in left] == ["2", "10", "11"]
    assert "is damaged" in left[0]
    assert "was not evaluated" in left[1]
    assert (tmp_path / "sweep/compare.png").is_file()


def test_without_predictions_there_are_figures_but_no_verdict(made, so8t, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    runs = [made("a"), made("b", "gate.map=cayley", wrong=0.1)]
    for run in runs:
        for file in run.glob("*_predictions.jsonl"):
            file.unlink()
    code, out, _ = so8t("compare", *runs, "--out", runs[0] / "p.png")
    assert code == 0
    assert "gate.map=cayley: cannot be told: predictions are missing" in out


@pytest.fixture(scope="module")
def broken(make, tmp_path_factory) -> dict[str, Path]:
    """Two whole runs, and others each broken in its own way."""
    root = tmp_path_factory.mktemp("broken")
    folders = {"a": make(root / "a"), "b": make(root / "b", "gate.map=cayley")}
    folders |= {name: make(root / name, seed=1) for name in ("failed", "bare", "broken", "shifted", "counts", "other")}
    scores = json.loads((folders["failed"] / "test.json").read_text())
    scores["metrics"]["failures"] = 1
    write_json(folders["failed"] / "test.json", scores)
    for part in RECORDS:
        (folders["bare"] / f"{part}.json").unlink()
    (folders["broken"] / "test.json").write_text("{}")
    predictions = folders["shifted"] / "test_predictions.jsonl"
    predictions.write_text("".join(sorted(predictions.read_text().splitlines(keepends=True))))
    (folders["counts"] / "test_predictions.jsonl").unlink()
    config = folders["counts"] / "config.yaml"
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 1"))
    predictions = folders["other"] / "test_predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"decision": "ALLOW"', '"decision": "REFUSE"', 1))
    return folders


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name runs"),
        (["none"], "none: not a run's folder"),
        (["--sweep", "none"], "none: no runs in it"),
        (["{a}", "{failed}"], "failed: 1 rows of the mixed test split failed"),
        (["{a}", "{bare}"], "bare: neither test.json nor unseen.json"),
        (["{a}", "{broken}"], "broken/test.json: is damaged"),
        (["{a}", "{shifted}"], "were tested on different rows (mixed test split)"),
        (["{a}", "{counts}"], "were tested on different rows (mixed test split)"),
        (["{a}", "{other}"], "test.json and test_predictions.jsonl are not of the same decisions"),
        (["{a}", "{b}", "--baseline", "gate"], "--baseline gate: several variants fit"),
        (["{a}", "{b}", "--baseline", "nothing"], "--baseline nothing: no variant is named so: gate.map=exp"),
        (["{a}", "--out", "x.pdf"], "the picture is a PNG"),
        (["{a}", "--out", "{a}/config.yaml/p.png"], "a/config.yaml/p.png cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_code_two(broken, so8t, arguments, told):
    code, _, err = so8t("compare", *(str(a).format(**broken) for a in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert told in err


def test_a_sweep_without_a_whole_run_is_an_error(made, tmp_path):
    made("sweep/0")
    (tmp_path / "sweep/0/config.yaml").unlink()
    with pytest.raises(ArtefactError, match=r"none of its 1 runs can be compared: no config\.yaml"):
        compare([], of_sweep=sweep_folders(tmp_path / "sweep"))
    assert issubclass(ArtefactError, SO8TError)
