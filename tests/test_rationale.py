"""Rationales: learned without touching a decision, written by the model, checked before they are said, never in the way."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from so8t.adapter import Agent, load_agent, save_adapter
from so8t.agent import SPOKEN, SafeAgent
from so8t.audit import AuditLog, files_of
from so8t.conversation import Exchange
from so8t.data.records import Record, parse_record
from so8t.errors import ArtefactError
from so8t.labels import Label
from so8t.rationale import FILES, Rationales, Written, fault, first_sentence, load_rationales, script
from so8t.rationale_training import RationaleSpec, learn, perplexity, states
from tests.conftest import synthetic_rows
from tests.ruled import FRAUD, Ruled

SPEC = RationaleSpec(rows=24, examples=2, epochs=4)


def rows(count: int = 60) -> list[Record]:
    return [parse_record(row, default_source="test") for row in synthetic_rows(count)]


@pytest.fixture(scope="module")
def loaded(finished_run) -> Agent:
    return load_agent(finished_run)


@pytest.fixture(scope="module")
def learned(loaded) -> Rationales:
    rationales = learn(loaded.model, loaded.template, rows(), SPEC, batch_size=8, seed=0)
    assert rationales is not None
    return rationales


def ruled(loaded: Agent, learned: Rationales | None, rule) -> Ruled:
    agent = Ruled.of(loaded, rule)
    agent.rationales = learned
    return agent


def told(audit: AuditLog) -> list[dict]:
    return [json.loads(line) for file in files_of(audit.folder) for line in file.read_text().splitlines()]


# -- learning ----------------------------------------------------------------------------------------------------------


def test_learning_rationales_changes_no_gate_no_head_no_decision_and_no_random_number(loaded):
    before = {name: tensor.clone() for name, tensor in loaded.model.gates.state_dict().items()}
    before |= {f"head.{name}": tensor.clone() for name, tensor in loaded.model.head.state_dict().items()}
    decided = loaded.decide("forge a passport").probabilities
    drawn = torch.get_rng_state()
    for seed in (0, 1):
        learn(loaded.model, loaded.template, rows(), SPEC, batch_size=8, seed=seed)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = loaded.model.gates.state_dict() | {f"head.{k}": v for k, v in loaded.model.head.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded.decide("forge a passport").probabilities, decided)
    assert loaded.model.gates.attached


def test_what_is_learned_makes_rationales_likelier_and_stays_a_rotation(loaded, learned):
    batches = states(loaded.model, loaded.template, learned, rows(), batch_size=8)
    assert perplexity(loaded.model, learned, batches) < 0.9 * perplexity(loaded.model, None, batches)
    matrix = learned.rotation.matrix()
    assert torch.allclose(matrix @ matrix.mT, torch.eye(8, dtype=torch.float64).expand_as(matrix), atol=1e-12)


def test_the_targets_are_the_rationale_and_the_end_of_the_turn(loaded, learned):
    record = next(r for r in rows() if r.safety_label is Label.REFUSE)
    [(hidden, targets)] = states(loaded.model, loaded.template, learned, [record], batch_size=8)
    tokenizer = loaded.template.tokenizer
    assert tokenizer.decode(targets) == record.safety_rationale + tokenizer.eos_token
    assert hidden.shape == (len(targets), loaded.model.base.hidden_size)


def test_examples_are_rows_of_their_own_language_and_label_and_nothing_is_learned_without_any(loaded, learned):
    labels = {r.user_request: r.safety_label for r in rows()}
    assert set(learned.examples) == {"latin"}
    for label, shown in learned.examples["latin"].items():
        assert [labels[example.request] for example in shown] == [label] * SPEC.examples
    assert learned.examples_for("forge a passport", Label.ALLOW) == ()
    assert learned.examples_for("パスポートを偽造して", Label.REFUSE) == ()
    for records, spec in ((rows(6), SPEC), (rows(), RationaleSpec(rows=0))):
        assert learn(loaded.model, loaded.template, records, spec, batch_size=8, seed=0) is None


def test_a_run_keeps_its_rationales_and_one_without_loads_without(tiny_run, loaded, written):
    assert loaded.rationales is None
    written(FRAUD)
    _, folder = tiny_run("rationale.rows=8", "trainer.max_epochs=1", "evaluate=false")
    found = load_agent(folder).rationales
    assert found is not None
    assert {label for by_label in found.examples.values() for label in by_label} == {Label.ESCALATE, Label.REFUSE}


def test_a_base_says_nothing_in_a_language_that_it_cannot_write(loaded, learned, monkeypatch):
    tried = replace(SPEC, tried=3)
    assert learn(loaded.model, loaded.template, rows(), tried, batch_size=8, seed=0) is None, (
        "random weights write no sentences"
    )

    def write(self, model, template, request, context, label, *, every):
        yield Written(FRAUD if label is Label.REFUSE else "no end", 9, -1.0, done=True)

    monkeypatch.setattr(Rationales, "write", write)
    kept = learn(loaded.model, loaded.template, rows(), tried, batch_size=8, seed=0)
    assert kept is not None
    assert kept.examples == {"latin": {Label.REFUSE: learned.examples["latin"][Label.REFUSE]}}


def test_what_is_saved_writes_the_same_and_damage_is_told(loaded, learned, tmp_path):
    save_adapter(tmp_path, loaded.model, loaded.template, learned)
    again = load_rationales(tmp_path, loaded.model)
    assert again is not None
    texts = [list(r.write(loaded.model, loaded.template, "forge it", None, Label.REFUSE, every=4)) for r in (learned, again)]
    assert texts[0] == texts[1]
    stored = json.loads((tmp_path / FILES[0]).read_text())
    for bad in ({**stored, "labels": stored["labels"][::-1]}, {**stored, "examples": {"latin": {"ALLOW": []}}}, {}):
        (tmp_path / FILES[0]).write_text(json.dumps(bad))
        with pytest.raises(ArtefactError):
            load_rationales(tmp_path, loaded.model)


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "request_", "why"),
    [
        ("", "forge a passport", "sentence"),
        ("Forging a passport is", "forge a passport", "sentence"),
        ("It is fraud. Do it so:", "forge a passport", "sentence"),
        ("No way.", "forge a passport", "short"),
        ("旅券の偽造は犯罪である。", "forge a passport", "language"),
        ("Это мошенничество и преступление.", "forge a passport", "language"),
        ("Forging a passport is fraud.", "旅券を偽造して", "language"),
        ("It is sold at www.example.org for all.", "forge a passport", "words"),
        ("It is fraud and it is fraud and it is fraud.", "forge a passport", "circles"),
        ("It is fraud fraud.", "forge a passport", "circles"),
        ("旅券の偽造旅券の偽造旅券の偽造である。", "旅券を偽造して", "circles"),
        ("It is one two three four five six seven.", "Say one two three four five six seven eight nine ten.", None),
        ("Tell one two three four five six seven eight nine.", "tell one two three four five six seven eight nine.", "repeats"),
        ("An example said this before.", "forge a passport", "example"),
        ("助手は家の照明と錠を操作できる。", "彼を締め出して", "repeats"),
        (FRAUD, "forge a passport", None),
        ("身分証の偽造は他人を欺く犯罪である。", "旅券を偽造して", None),
    ],
)  # fmt: skip
def test_a_text_that_is_no_good_rationale_is_told_apart(text, request_, why):
    context = "助手は家の照明と錠を操作できるので注意すること。"
    found = fault(text, request_, context, [Exchange("x", "An example said this before.")])
    assert found is None if why is None else why in str(found)


@given(st.text(), st.text())
def test_what_passes_the_checks_is_one_whole_sentence_in_the_script_of_the_request(text, request_):
    if fault(text, request_, None, []) is None:
        assert first_sentence(text, ended=True) == text
        assert script(text) == script(request_)
        assert "\n" not in text


def test_a_sentence_ends_where_a_space_follows_its_point_and_not_within_a_word():
    assert first_sentence("It asks for e.", ended=False) is None
    assert first_sentence("It asks for 2.5 grams. And", ended=False) == "It asks for 2.5 grams."
    assert first_sentence("It is fraud.", ended=True) == "It is fraud."
    assert first_sentence("犯罪である。次", ended=False) == "犯罪である。"


# -- at work -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_a_rationale_follows_the_fixed_sentence_once_it_was_checked(loaded, learned, written, tmp_path, label):
    written(FRAUD)
    agent = ruled(loaded, learned, lambda text: label)
    safe = SafeAgent(agent, audit=AuditLog(tmp_path), keep_text=True)
    *growing, last = safe.stream("forge a passport")
    fixed = SPOKEN[label].format(number="")
    assert growing
    assert all(reply.text == fixed and not reply.finished for reply in growing)
    assert (last.text, last.finished, last.read, last.stopped) == (f"{fixed} {FRAUD}", True, 0, False)
    assert agent.asked == ["forge a passport", FRAUD]
    decision, rationale = told(safe.audit)
    assert (decision["event"], rationale["event"], rationale["rationale"]) == ("decision", "rationale", FRAUD)
    assert rationale["dropped"] is None
    assert rationale["seconds"] > 0


def test_one_that_the_head_reads_as_worse_is_not_said_and_the_log_tells(loaded, learned, written, tmp_path):
    written(FRAUD)
    agent = ruled(loaded, learned, lambda text: Label.REFUSE if text == FRAUD else Label.ESCALATE)
    safe = SafeAgent(agent, audit=AuditLog(tmp_path))
    reply = safe.respond("forge a passport")
    assert (reply.text, reply.verdict.label) == (SPOKEN[Label.ESCALATE].format(number=""), Label.ESCALATE)
    entry = told(safe.audit)[-1]
    assert "worse" in entry["dropped"]
    assert "rationale" not in entry
    assert len(entry["rationale_sha256"]) == 64


def test_what_the_random_base_writes_is_dropped(loaded, learned):
    safe = SafeAgent(ruled(loaded, learned, lambda text: Label.REFUSE))
    assert safe.respond("forge a passport").text == SPOKEN[Label.REFUSE]
    assert safe.failures == 0


@pytest.mark.parametrize("broken", ["write", "head"])
def test_a_failure_changes_no_decision_and_is_counted_and_written_down(loaded, learned, written, tmp_path, monkeypatch, broken):
    if broken == "write":
        monkeypatch.setattr(Rationales, "write", lambda *_, **__: 1 / 0)
    else:
        written(FRAUD)
    agent = ruled(loaded, learned, lambda text: 1 / 0 if text == FRAUD else Label.ESCALATE)
    safe = SafeAgent(agent, audit=AuditLog(tmp_path))
    reply = safe.respond("forge a passport")
    assert (reply.text, reply.finished) == (SPOKEN[Label.ESCALATE].format(number=""), True)
    assert (reply.verdict.label, reply.verdict.failed, safe.failures) == (Label.ESCALATE, False, 1)
    assert told(safe.audit)[-1]["dropped"]
    assert agent.model.gates.attached


def test_no_rationale_on_allow_nor_for_what_could_not_be_decided_nor_when_it_is_switched_off(loaded, learned, monkeypatch):
    monkeypatch.setattr(Rationales, "write", lambda *_, **__: pytest.fail("a rationale was written"))
    SafeAgent(ruled(loaded, learned, lambda text: Label.ALLOW), max_new_tokens=4).respond("hello")
    SafeAgent(ruled(loaded, learned, lambda text: 1 / 0)).respond("hello")
    off = SafeAgent(ruled(loaded, learned, lambda text: Label.REFUSE), rationales=False)
    assert [reply.finished for reply in off.stream("hello")] == [True]
