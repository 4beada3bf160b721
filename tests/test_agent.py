"""The agent at work: the order of decision and answer, the watch, what fails closed, and what is written down."""

import json

import pytest
import torch

from so8t.adapter import Agent, load_agent
from so8t.agent import SPOKEN, SafeAgent
from so8t.audit import AuditLog, files_of, verify
from so8t.cli import main
from so8t.conversation import Prompt
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue
from so8t.gates import GateSpec
from so8t.labels import LABELS, Label
from so8t.model import Decisions, HeadSpec, SO8TModel


class Ruled(Agent):
    """An agent whose head is a rule over what it is asked to decide: `asked` counts, `rule(text, n)` gives the label."""

    def ruled(self, rule):
        self.rule, self.asked = rule, []
        return self

    def decide_many(self, requests):
        labels = []
        for request, _ in requests:
            self.asked.append(request)
            labels.append(int(self.rule(request, len(self.asked))))
        probabilities = torch.full((len(labels), 3), 0.05)
        probabilities[range(len(labels)), labels] = 0.9
        no = torch.zeros(len(labels), dtype=torch.bool)
        return Decisions(probabilities, torch.tensor(labels), no, no)


@pytest.fixture
def ruled(finished_run):
    loaded = load_agent(finished_run)
    return lambda rule: Ruled(loaded.model, loaded.template, loaded.folder).ruled(rule)


@pytest.fixture
def state(tmp_path):
    return AuditLog(tmp_path / "audit"), EscalationQueue(tmp_path / "escalations.sqlite")


def told(audit):
    return [json.loads(line) for file in files_of(audit.folder) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_only_allow_generates(ruled, state, label, monkeypatch):
    agent = ruled(lambda text, n: label)
    monkeypatch.setattr(agent.model.base.causal_lm, "forward", None)  # any call of it would raise
    safe = SafeAgent(agent, audit=state[0], queue=state[1])
    reply = safe.respond("do it")
    assert reply.verdict.label is label
    assert reply.finished
    assert safe.failures == 0
    assert agent.asked == ["do it"]
    assert (reply.escalation == 1) is (label is Label.ESCALATE)
    assert len(state[1].listed()) == (label is Label.ESCALATE)


def test_an_answer_is_watched_and_never_shown_before(ruled, state):
    agent = ruled(lambda text, n: Label.ALLOW)
    replies = list(SafeAgent(agent, audit=state[0], max_new_tokens=12, watch_every=4).stream("hello"))
    assert len(agent.asked) == len(replies) == 4  # the request, and three looks at the answer
    for asked, reply in zip(agent.asked[1:], replies[1:], strict=True):
        assert asked == (f"hello\n\n{reply.text}" if reply.text else "hello")
    assert replies[-1].finished
    assert [reply.finished for reply in replies[:-1]] == [False] * 3
    assert [entry["event"] for entry in told(state[0])] == ["decision", "answer"]


@pytest.mark.parametrize("look", [2, 3, 4])
@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_an_answer_that_leaves_allow_is_stopped_and_its_last_part_not_shown(ruled, state, look, label):
    whole = SafeAgent(ruled(lambda text, n: Label.ALLOW), max_new_tokens=12, watch_every=4)
    texts = [reply.text for reply in whole.stream("hello")]
    agent = ruled(lambda text, n: label if n == look else Label.ALLOW)
    last = SafeAgent(agent, audit=state[0], queue=state[1], max_new_tokens=12, watch_every=4).respond("hello")
    assert last.stopped
    assert last.verdict.label is label
    assert last.text == texts[look - 2]  # what was shown before, and not a token more
    assert len(agent.asked) == look
    assert [entry["event"] for entry in told(state[0])] == ["decision", "stopped"]


def test_the_answer_is_what_the_intact_base_generates(finished_run):
    agent = load_agent(finished_run)
    safe = SafeAgent(agent, max_new_tokens=10, watch_every=3)
    *_, grown = safe._watchable(Prompt("tell me a story"), 10)
    assert grown.end
    assert grown.text == agent.answer("tell me a story", max_new_tokens=10)
    assert agent.model.gates.attached


def test_the_watch_reads_the_real_head(always):
    for label in LABELS:
        reply = SafeAgent(load_agent(always(label)), max_new_tokens=8).respond("hello")
        assert reply.verdict.label.name == label
        assert reply.verdict.probabilities[label] == pytest.approx(0.78699, abs=1e-4)


def broken(text, n):
    raise RuntimeError("out of memory")


def test_an_exception_inside_is_escalate_and_counted_as_a_failure(ruled, state):
    safe = SafeAgent(ruled(broken), audit=state[0], queue=state[1])
    verdict = safe.decide("hello")
    assert verdict.label is Label.ESCALATE
    assert verdict.failed
    reply = safe.respond("hello")
    assert reply.verdict.failed
    assert safe.failures == 2
    assert [entry["failed"] for entry in told(state[0])] == [True, True]
    assert state[1].get(1).reason == "failure"


def test_a_failure_while_answering_stops_the_answer(ruled, state, monkeypatch):
    agent = ruled(lambda text, n: Label.ALLOW)
    monkeypatch.setattr(agent.model.base.causal_lm, "forward", lambda **_: 1 / 0)
    safe = SafeAgent(agent, audit=state[0], queue=state[1])
    reply = safe.respond("hello")
    assert (reply.verdict.label, reply.verdict.failed, reply.stopped, safe.failures) == (Label.ESCALATE, True, True, 1)
    assert agent.model.gates.attached  # and the next decision is taken behind the gates
    assert state[1].get(1).reason == "failure"


def test_an_approved_request_is_answered_and_a_denied_one_refused(ruled, state):
    agent = ruled(lambda text, n: Label.ESCALATE)
    safe = SafeAgent(agent, audit=state[0], queue=state[1], max_new_tokens=4)
    for _ in range(3):
        safe.respond("wire the money")
    with pytest.raises(SO8TError, match="pending"):
        safe.resume(1)
    state[1].decide(1, "approved")
    state[1].decide(2, "denied")
    answered, refused = safe.resume(1), safe.resume(2)
    assert answered.finished
    assert not answered.stopped
    assert answered.text not in SPOKEN.values()
    assert refused.text == SPOKEN[Label.REFUSE]
    before = len(agent.asked)
    agent.rule = lambda text, n: Label.REFUSE if n == before + 2 else Label.ESCALATE
    state[1].decide(3, "approved")
    assert safe.resume(3).stopped  # approval does not switch off the watch
    assert verify(state[0].folder).problems == []


def test_the_audit_log_holds_hashes_unless_texts_are_asked_for(ruled, state, tmp_path):
    agent = ruled(lambda text, n: Label.ALLOW)
    SafeAgent(agent, audit=state[0], max_new_tokens=4).respond("my secret")
    assert "my secret" not in files_of(state[0].folder)[0].read_text()
    kept = AuditLog(tmp_path / "kept")
    reply = SafeAgent(agent, audit=kept, max_new_tokens=4, keep_text=True).respond("my secret")
    decision, answer = told(kept)
    assert (decision["request"], answer["answer"]) == ("my secret", reply.text)
    assert decision["adapter_sha256"]
    assert decision["thresholds"] is None


def test_chat_answers_every_line_and_leaves_a_whole_log(always, tmp_path, capsys, monkeypatch):
    lines = iter(["hello", "and again", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt="": next(lines))
    main(["chat", str(always("ESCALATE")), "--state", str(tmp_path / "state")])
    assert capsys.readouterr().out.count("This is for a person to decide") == 2
    assert verify(tmp_path / "state" / "audit").lines == 2
    assert len(EscalationQueue(tmp_path / "state" / "escalations.sqlite").listed()) == 2


def test_on_the_real_base_the_streamed_answer_is_the_one_of_generate(real_base, tmp_path):
    from so8t.adapter import save_adapter
    from so8t.data.tokenise import Template

    torch.manual_seed(0)
    model = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec())
    template = Template(real_base.tokenizer, system_prompt=None, max_length=128)
    save_adapter(tmp_path / "adapter", model, template, system_prompt=None)
    agent = Agent(model.eval(), template, tmp_path / "adapter")
    try:
        *_, grown = SafeAgent(agent, watch_every=3)._watchable(Prompt("What is the capital of France?"), 8)
        assert "Paris" in grown.text
        assert grown.text == agent.answer("What is the capital of France?", max_new_tokens=8)
    finally:
        model.gates.detach()
