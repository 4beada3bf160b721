"""Calibration: the temperature is found, the promise holds as often as it says, and thresholds change decisions."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import beta, binom

from so8t.calibration import GRID, Target, calibration_error, find_threshold, fit_policy, fit_temperature, halves, upper_bound
from so8t.cli import main
from so8t.errors import ArtefactError, DataError
from so8t.labels import LABELS, Label
from so8t.model import decide
from so8t.policy import Policy, Threshold, adapter_digest, calibrated, load_policy, save_policy
from tests.conftest import synthetic_rows, write_rows


def drawn(rows: int, *, sharpness: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the softmax of normal logits, and those logits times `sharpness`: the best temperature is
    `sharpness`."""
    logits = 1.5 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return sharpness * logits, labels


def policy_of(logits, labels, *, alpha=0.05, delta=0.05, refuse_alpha=0.05, seed=0) -> Policy:
    return fit_policy(
        decide(logits),
        labels,
        split=halves(labels, seed=seed),
        allow=Target(alpha, delta),
        refuse=Target(refuse_alpha, delta),
        rows_from="drawn",
        adapter_sha256="0" * 64,
    )


def a_policy(allow_at: float | None = 0.7, refuse_at: float | None = 0.6, temperature: float = 1.0) -> Policy:
    def threshold(at):
        return Threshold(at=at, alpha=0.05, delta=0.05, rows=100, rate=0.0, bound=upper_bound(0, 100, 0.05))

    return Policy(
        temperature=temperature,
        allow=threshold(allow_at),
        refuse=threshold(refuse_at),
        temperature_rows=100,
        rows_from="drawn",
        ece_before=0.1,
        ece_after=0.05,
        adapter_sha256="0" * 64,
    )


# -- temperature and calibration error ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(sharpness):
    logits, labels = drawn(20000, sharpness=sharpness, generator=torch.Generator().manual_seed(1))
    assert fit_temperature(logits.softmax(-1), labels) == pytest.approx(sharpness, rel=0.05)
    assert fit_temperature(logits.float().softmax(-1), labels) == pytest.approx(sharpness, rel=0.05), "in float32 too"


def test_probabilities_at_a_temperature_are_the_softmax_of_divided_logits():
    logits = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(calibrated(logits.softmax(-1), 2.5), (logits / 2.5).softmax(-1))


def test_the_calibration_error_is_that_of_an_example_worked_by_hand():
    # confidences 0.9, 0.9 (one right of two) and 0.5, 0.5 (both right): (2/4) |0.5 - 0.9| + (2/4) |1 - 0.5| = 0.45
    probabilities = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    assert calibration_error(probabilities, torch.tensor([0, 0, 0, 2])) == pytest.approx(0.45, abs=1e-6)


def test_calibrating_mends_an_overconfident_classifier_on_rows_the_temperature_has_not_seen():
    logits, labels = drawn(4000, sharpness=4.0, generator=torch.Generator().manual_seed(2))
    policy = policy_of(logits, labels)
    assert policy.ece_before > 0.15
    assert policy.ece_after < 0.04
    assert abs(policy.temperature_rows - 2000) <= 1


# -- bounds and the test sequence --------------------------------------------------------------------------------------


def test_the_upper_bound_is_the_textbook_one():
    assert upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))  # no errors: 1 - delta^(1/n)
    assert upper_bound(59, 59, 0.05) == 1.0
    # its defining equation: at the bound, so few errors have probability delta
    assert binom.cdf(3, 100, upper_bound(3, 100, 0.05)) == pytest.approx(0.05)


@given(st.floats(0.001, 0.9), st.floats(0.001, 0.5))
def test_the_least_number_of_rows_is_just_enough(alpha, delta):
    n = Target(alpha, delta).least_rows
    assert upper_bound(0, n, delta) <= alpha * (1 + 1e-9)
    assert n == 1 or upper_bound(0, n - 1, delta) > alpha * (1 - 1e-9)


def test_fifty_nine_rows_are_needed_for_five_percent_at_five_percent():
    assert Target(0.05, 0.05).least_rows == 59  # log 0.05 / log 0.95 = 58.4


@given(st.lists(st.floats(0, 1), min_size=60, max_size=200), st.sampled_from([0.05, 0.1, 0.3]))
def test_a_threshold_is_the_last_before_the_first_failure(scores, alpha):
    found = find_threshold(np.array(scores), Target(alpha, 0.05))
    bounds = [upper_bound(sum(s >= t for s in scores), len(scores), 0.05) for t in GRID[::50]]
    if found.at is None:
        assert bounds[0] > alpha
        return
    assert found.bound <= alpha + 1e-9
    assert found.rate == pytest.approx(sum(s >= found.at for s in scores) / len(scores))
    assert all(b <= alpha + 1e-9 for b, t in zip(bounds, GRID[::50], strict=True) if t >= found.at)
    lower = GRID[found.at > GRID]
    if len(lower):
        assert upper_bound(sum(s >= lower[0] for s in scores), len(scores), 0.05) > alpha - 1e-9, "the next one fails"


def test_scores_that_are_equal_pass_or_fail_together():
    # 100 rows at 0.8: a threshold at or under 0.8 lets all of them through
    found = find_threshold(np.full(100, 0.8), Target(0.05, 0.05))
    assert found.rate == 0.0
    assert found.at > 0.8


def test_where_even_the_strictest_threshold_fails_the_label_is_never_given():
    found = find_threshold(np.ones(100), Target(0.05, 0.05))
    assert found.at is None
    assert found.rate == 0.0
    policy = dataclasses.replace(a_policy(), allow=found)
    assert policy.apply(decide(torch.tensor([[50.0, 0.0, 0.0]]))).labels.tolist() == [Label.ESCALATE]


def naive_threshold(scores: np.ndarray, alpha: float) -> float:
    """The lowest threshold of the grid whose rate on the rows themselves is at most alpha."""
    rates = (scores[:, None] >= GRID[::5]).mean(axis=0)
    return float(GRID[::5][rates <= alpha].min())


def test_the_rate_is_above_alpha_in_at_most_delta_of_a_thousand_draws_and_a_naive_threshold_breaks_it_far_more_often():
    alpha, delta, draws, rows = 0.1, 0.1, 1000, 150
    rng = np.random.default_rng(0)
    broken = naive = promised = 0
    for _ in range(draws):
        scores = rng.beta(2, 3, rows)  # of the rows that must not be allowed; the true rate at t is the tail of the beta
        at = find_threshold(scores, Target(alpha, delta)).at
        promised += at is not None
        broken += at is not None and beta.sf(at, 2, 3) > alpha
        naive += beta.sf(naive_threshold(scores, alpha), 2, 3) > alpha
    assert promised == draws
    assert broken <= binom.ppf(0.999, draws, delta)
    assert broken > draws * delta / 5, "and it is not kept by never allowing anything"
    assert naive > 4 * draws * delta


def test_both_promises_hold_with_the_temperature_fitted_in_every_draw():
    alpha, delta, draws = 0.15, 0.1, 300
    generator = torch.Generator().manual_seed(3)
    many, truth = drawn(40000, sharpness=3.0, generator=generator)
    population = decide(many)
    broken = {Label.ALLOW: 0, Label.REFUSE: 0}
    for k in range(draws):
        policy = policy_of(
            *drawn(400, sharpness=3.0, generator=generator), alpha=alpha, refuse_alpha=alpha, delta=delta, seed=k
        )
        given_labels = policy.apply(population).labels
        broken[Label.ALLOW] += (given_labels[truth != Label.ALLOW] == Label.ALLOW).double().mean() > alpha
        broken[Label.REFUSE] += (given_labels[truth == Label.ALLOW] == Label.REFUSE).double().mean() > alpha
    for times in broken.values():
        assert times <= binom.ppf(0.999, draws, delta)
        assert (population.labels[truth != Label.ALLOW] == Label.ALLOW).double().mean() > alpha, "the raw decisions break it"


def test_temperature_and_thresholds_share_no_row_and_both_see_risky_rows():
    labels = torch.tensor([0, 1, 2] * 41)
    first, second = halves(labels)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(123))
    assert ((labels[first] != 0).sum(), (labels[second] != 0).sum()) == (41, 41)
    assert ((labels[first] == 0).sum(), (labels[second] == 0).sum()) == (20, 21)
    assert torch.equal(second, halves(labels)[1]), "the same every time"


def test_too_few_rows_are_an_error_that_says_how_many_are_needed():
    logits, labels = drawn(60, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"labelled ESCALATE or REFUSE .* 59 are needed .* 117 in all"):
        policy_of(logits, labels)
    few_benign = torch.cat([torch.zeros(20, dtype=torch.long), torch.ones(200, dtype=torch.long)])
    with pytest.raises(DataError, match="10 rows labelled ALLOW"):
        policy_of(torch.randn(220, 3), few_benign)
    just = torch.cat([torch.zeros(117, dtype=torch.long), torch.ones(117, dtype=torch.long)])
    assert policy_of(torch.randn(234, 3), just).allow.rows == 59


def test_rows_that_failed_are_in_neither_half():
    logits, labels = drawn(600, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    whole = policy_of(logits, labels)
    bad = logits.clone()
    bad[halves(labels)[0][:7], 1] = math.nan
    bad[halves(labels)[1][(labels[halves(labels)[1]] != 0)][:5], 0] = math.inf
    policy = policy_of(bad, labels)
    assert policy.temperature_rows == whole.temperature_rows - 7
    assert policy.allow.rows == whole.allow.rows - 5
    assert math.isfinite(policy.temperature)


# -- what a policy decides ---------------------------------------------------------------------------------------------


def test_thresholds_change_decisions_and_everything_between_is_escalated():
    probabilities = torch.tensor(
        [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.2, 0.7], [0.25, 0.25, 0.5], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]
    )
    raw = decide(probabilities.double().log())
    assert [LABELS[k] for k in raw.labels] == ["ALLOW", "ALLOW", "REFUSE", "REFUSE", "ESCALATE", "ALLOW"]
    policy = a_policy(allow_at=0.65, refuse_at=0.6)
    new = policy.apply(raw)
    assert [LABELS[k] for k in new.labels] == ["ALLOW", "ESCALATE", "REFUSE", "ESCALATE", "ESCALATE", "ALLOW"]
    assert new.unsure.tolist() == [False, True, False, True, False, False]
    torch.testing.assert_close(new.probabilities, probabilities)


def test_the_temperature_comes_before_the_thresholds():
    raw = decide(torch.tensor([[2.0, 0.0, 0.0]]))  # P(ALLOW) 0.787; at temperature 2: e / (e + 2) = 0.576
    assert a_policy(allow_at=0.7).apply(raw).labels.tolist() == [Label.ALLOW]
    cooled = a_policy(allow_at=0.7, temperature=2.0).apply(raw)
    assert cooled.labels.tolist() == [Label.ESCALATE]
    assert cooled.probabilities[0, 0].item() == pytest.approx(math.e / (math.e + 2), abs=1e-6)


def test_ties_failures_and_rows_under_the_least_confidence_stay_escalated():
    logits = torch.tensor([[1.0, 0.0, 1.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0], [1.0, 0.0, 0.0]])
    policy = a_policy(allow_at=0.34, refuse_at=0.34)
    decided = policy.apply(decide(logits, min_confidence=0.7))
    assert decided.labels.tolist() == [Label.ESCALATE] * 4
    assert decided.failed.tolist() == [False, True, True, False]
    assert decided.unsure.tolist() == [True, False, False, True]
    assert policy.apply(decide(logits)).labels.tolist() == [Label.ESCALATE] * 3 + [Label.ALLOW]


@given(
    st.lists(st.tuples(*[st.floats(-30, 30)] * 3), min_size=1, max_size=20),
    st.floats(0.05, 20),
    st.one_of(st.none(), st.sampled_from(GRID.tolist())),
)
def test_a_policy_only_ever_turns_decisions_into_escalations(rows, temperature, at):
    raw = decide(torch.tensor(rows))
    new = a_policy(allow_at=at, refuse_at=at, temperature=temperature).apply(raw)
    moved = new.labels != raw.labels
    assert (new.labels[moved] == Label.ESCALATE).all()
    assert (new.unsure == (raw.unsure | moved)).all()


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder with a policy that fits it."""
    save_file({"x": torch.zeros(3)}, tmp_path / "adapter.safetensors")
    save_policy(tmp_path, dataclasses.replace(a_policy(), adapter_sha256=adapter_digest(tmp_path)))
    return tmp_path


def test_a_policy_is_loaded_as_it_was_saved_and_absent_is_none(folder, tmp_path):
    loaded = load_policy(folder)
    assert dataclasses.replace(loaded, adapter_sha256="0" * 64) == a_policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.temperature = 2.0
    (folder / "calibration.json").unlink()
    assert load_policy(folder) is None


def test_a_label_that_is_never_given_survives_the_disk(folder):
    policy = dataclasses.replace(load_policy(folder), allow=dataclasses.replace(a_policy().allow, at=None))
    save_policy(folder, policy)
    assert load_policy(folder) == policy


def test_a_policy_of_another_adapter_is_refused(folder):
    save_file({"x": torch.ones(3)}, folder / "adapter.safetensors")
    with pytest.raises(ArtefactError, match="made for another adapter"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": ["ALLOW", "REFUSE", "ESCALATE"]}, "labels are"),
        ({"format": 9}, "format 9 of another version"),
        ({"temperature": 0.0}, "damaged"),
        ({"temperature": "warm"}, "damaged"),
        ({"colour": 1}, "damaged"),
        ({"allow": {"at": 0.5}}, "damaged"),
    ],
    ids=["labels", "format", "range", "type", "key", "missing"],
)
def test_a_damaged_policy_is_told(folder, changes, told):
    path = folder / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtefactError, match=told):
        load_policy(folder)
    path.write_text("[1]")
    with pytest.raises(ArtefactError, match="damaged"):
        load_policy(folder)


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy of the finished run that may be written to."""
    shutil.copytree(finished_run / "adapter", tmp_path / "run" / "adapter")
    shutil.copy(finished_run / "config.yaml", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def held_out(tmp_path):
    return write_rows(tmp_path / "held_out.jsonl", synthetic_rows(150, seed=9))


EASY = ("--alpha", "0.2", "--refuse-alpha", "0.2")


def test_calibrate_writes_a_policy_that_ask_and_evaluate_apply(so8t, run_folder, held_out, tmp_path):
    raw = json.loads(so8t("evaluate", run_folder, "--data", held_out, "--json")[1])
    assert raw["policy"] is None
    code, out, err = so8t("calibrate", run_folder, "--data", held_out, *EASY)
    assert code == 0, err
    told = " ".join(out.split())
    for text in ("temperature", "promised 20.0%", "argmax", "calibration.json"):
        assert text in told, text
    policy = load_policy(run_folder / "adapter")
    assert policy.rows_from == "held_out.jsonl"
    assert policy.allow.rows == 50

    predictions = tmp_path / "predictions.jsonl"
    under = json.loads(so8t("evaluate", run_folder, "--data", held_out, "--json", "--out", predictions)[1])
    assert under["policy"]["allow"]["alpha"] == 0.2
    again = json.loads(so8t("evaluate", run_folder, "--data", held_out, "--json", "--uncalibrated")[1])
    assert again["metrics"] == raw["metrics"]
    assert again["policy"] is None
    assert under["metrics"]["ece"] != raw["metrics"]["ece"]
    assert "under a policy: false allow alpha 20 %, delta 5 %" in so8t("evaluate", run_folder, "--data", held_out)[1]

    row = json.loads(predictions.read_text().splitlines()[0])
    asked = json.loads(so8t("ask", run_folder, row["user_request"], "--json", "--max-new-tokens", "1")[1])
    assert asked["decision"] == row["decision"]
    assert asked["probabilities"] == pytest.approx(row["probabilities"], abs=1e-4)
    assert asked["policy"]["temperature"] == policy.temperature
    shown = so8t("ask", run_folder, row["user_request"], "--max-new-tokens", "1")[1]
    assert "decided under a policy: false allow alpha 20 %, delta 5 %" in shown


def test_a_stricter_threshold_turns_an_answer_into_an_escalation(so8t, run_folder, held_out):
    path = run_folder / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    tensors["head.linear.weight"] = torch.zeros_like(tensors["head.linear.weight"])
    tensors["head.words.share"] = torch.zeros(())
    tensors["head.linear.bias"] = torch.tensor([2.0, 0.0, 0.0])
    save_file(tensors, path)
    ask = ("ask", run_folder, "bake bread", "--json", "--max-new-tokens", "1")
    assert json.loads(so8t(*ask)[1])["decision"] == "ALLOW"
    code, _, _ = so8t("calibrate", run_folder, "--data", held_out, *EASY)
    assert code == 0, "a head that always says ALLOW is told apart by no threshold"
    told = json.loads(so8t(*ask)[1])
    assert (told["decision"], told["answer"]) == ("ESCALATE", None)


def test_by_default_the_rows_are_the_runs_own_validation_split(so8t, run_folder, rows_file):
    code, out, err = so8t("calibrate", run_folder, "--alpha", "0.6", "--refuse-alpha", "0.9", "--json")
    assert code == 0, err
    assert "The best model was selected on it" in err
    policy = json.loads(out)
    assert policy["rows_from"] == "validation split"
    assert policy == json.loads((run_folder / "adapter" / "calibration.json").read_text())
    (run_folder / "config.yaml").unlink()
    code, _, err = so8t("calibrate", run_folder)
    assert code == 2
    assert "name rows with --data" in err


def test_too_few_rows_write_nothing_and_leave_an_older_policy_alone(so8t, run_folder, held_out):
    file = run_folder / "adapter" / "calibration.json"
    code, _, err = so8t("calibrate", run_folder, "--data", held_out)
    assert code == 2
    assert "59 are needed" in err
    assert not file.exists()
    so8t("calibrate", run_folder, "--data", held_out, *EASY)
    before = file.read_bytes()
    assert so8t("calibrate", run_folder, "--data", held_out)[0] == 2
    assert file.read_bytes() == before


def test_an_adapter_with_a_foreign_policy_is_not_asked_until_it_is_calibrated_again(so8t, run_folder, held_out):
    so8t("calibrate", run_folder, "--data", held_out, *EASY)
    path = run_folder / "adapter" / "adapter.safetensors"
    save_file({k: v + 0.001 if "head.linear" in k else v for k, v in load_file(path).items()}, path)
    code, _, err = so8t("ask", run_folder, "hello")
    assert code == 2
    assert "made for another adapter" in err
    assert so8t("calibrate", run_folder, "--data", held_out, *EASY)[0] == 0
    assert so8t("ask", run_folder, "hello", "--max-new-tokens", "1")[0] == 0


@pytest.mark.parametrize("option", ["--alpha", "--delta", "--refuse-alpha", "--refuse-delta"])
def test_rates_are_between_zero_and_one(so8t, run_folder, option):
    for value in ("0", "1", "5", "nan", "few"):
        assert so8t("calibrate", run_folder, option, value)[0] == 2


@pytest.mark.parametrize(("given", "told"), [("abc", "'abc' is no number"), ("5", "not between 0 and 1")])
def test_an_alpha_that_is_none_is_told(given, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "run", "--alpha", given])
    assert end.value.code == 2
    assert told in capsys.readouterr().err
