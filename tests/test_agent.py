"""The agent at work: the order of decision and answer, the watch, what fails closed, and what is written down."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from so8t.adapter import Agent, load_agent
from so8t.agent import HELD, SPOKEN, Growth, SafeAgent
from so8t.audit import AuditLog, files_of, verify
from so8t.cli import main
from so8t.conversation import Exchange, Prompt, latest
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue
from so8t.gates import GateSpec
from so8t.labels import LABELS, Label
from so8t.model import HeadSpec, SO8TModel
from so8t.policy import Policy, Threshold
from tests.ruled import Ruled


@pytest.fixture
def ruled(finished_run):
    loaded = load_agent(finished_run)
    return lambda rule: Ruled.of(loaded, rule)


@pytest.fixture
def state(tmp_path):
    return AuditLog(tmp_path / "audit"), EscalationQueue(tmp_path / "escalations.sqlite")


def told(audit):
    return [json.loads(line) for file in files_of(audit.folder) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_only_allow_generates(ruled, state, label, monkeypatch):
    agent = ruled(lambda text: label)
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
    agent = ruled(lambda text: Label.ALLOW)
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
    whole = SafeAgent(ruled(lambda text: Label.ALLOW), max_new_tokens=12, watch_every=4)
    texts = [reply.text for reply in whole.stream("hello")]
    agent = ruled(lambda text: label if len(agent.passes) == look else Label.ALLOW)
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


def says(agent, text, monkeypatch):
    """From now on the base says this, whatever it is asked; once."""
    base, tokenizer = agent.model.base, agent.template.tokenizer
    tokens = iter([*tokenizer(text, add_special_tokens=False)["input_ids"], min(base.end_tokens)])

    def forward(**_):
        logits = torch.zeros(1, 1, base.causal_lm.lm_head.out_features)
        logits[..., next(tokens)] = 1
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(base.causal_lm, "forward", forward)


def test_a_character_is_neither_read_nor_shown_before_its_last_token_is_there(ruled, monkeypatch):
    agent = ruled(lambda text: Label.ALLOW)
    says(agent, "包丁 🔪 と \ufffd", monkeypatch)
    replies = list(SafeAgent(agent, watch_every=1).stream("hello"))
    *before, last = [reply.text for reply in replies]
    assert last == "包丁 🔪 と \ufffd", "what was really said stays"
    assert not any("\ufffd" in text for text in before)
    assert not any("\ufffd" in text for text in agent.asked[:-1])
    assert all(later.startswith(sooner) for sooner, later in zip(before, [*before[1:], last], strict=True))
    assert "包丁 🔪" in before


def broken(text):
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
    agent = ruled(lambda text: Label.ALLOW)
    monkeypatch.setattr(agent.model.base.causal_lm, "forward", lambda **_: 1 / 0)
    safe = SafeAgent(agent, audit=state[0], queue=state[1])
    reply = safe.respond("hello")
    assert (reply.verdict.label, reply.verdict.failed, reply.stopped, safe.failures) == (Label.ESCALATE, True, True, 1)
    assert agent.model.gates.attached  # and the next decision is taken behind the gates
    assert state[1].get(1).reason == "failure"


def test_an_approved_request_is_answered_and_a_denied_one_refused(ruled, state):
    agent = ruled(lambda text: Label.ESCALATE)
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
    before = len(agent.passes)
    agent.rule = lambda text: Label.REFUSE if len(agent.passes) == before + 2 else Label.ESCALATE
    state[1].decide(3, "approved")
    assert safe.resume(3).stopped  # approval does not switch off the watch
    assert verify(state[0].folder).problems == []


def test_no_more_of_an_answer_comes_between_two_looks_than_a_look_has_in_view(ruled):
    agent = ruled(lambda text: Label.ALLOW)
    room = agent.template.room
    assert SafeAgent(agent, watch_every=4).watch_every == 4
    assert SafeAgent(agent, watch_every=10_000).watch_every == room // 3
    text = "a b c d e f g h " * room
    begin, end = agent.template.encode(text).span
    assert end - begin - room // 2 >= room // 3, "the end of a long text that is read with its beginning"


@given(st.integers(0, 40), st.integers(0, 50))
def test_the_latest_exchanges_are_as_many_as_fit(told, room):
    exchanges = tuple(Exchange(str(k), "") for k in range(told))
    assert latest(exchanges, lambda number: number <= room) == exchanges[max(0, told - room) :]


def test_of_a_long_conversation_little_is_put_together(ruled, monkeypatch):
    agent = ruled(lambda text: Label.ALLOW)
    earlier = tuple(Exchange(f"question {k}", f"answer {k}") for k in range(3_000))
    asked = []
    encode = agent.template.encode_conversation

    def counted(prompt):
        asked.append(len(prompt.earlier))
        return encode(prompt)

    monkeypatch.setattr(agent.template, "encode_conversation", counted)
    kept = SafeAgent(agent)._allowed(Prompt("and now?", None, earlier)).earlier
    assert 1 < len(kept) < 100
    assert kept == earlier[-len(kept) :]
    assert max(asked) <= 2 * len(kept)
    assert len(asked) < 20


def test_what_a_guard_holds_is_not_answered_here(ruled, state):
    agent = ruled(lambda text: Label.ESCALATE)
    safe = SafeAgent(agent, queue=state[1])
    safe.respond("wire the money")
    state[1].hold(1, "ticket", "{}", "http://localhost/v1")
    state[1].decide(1, "approved")
    assert safe.resume(1).text == HELD
    state[1].keep_reply(1, "{}", "it is done")
    assert safe.resume(1).text == "it is done"
    assert agent.asked == ["wire the money"]


def test_the_audit_log_holds_hashes_unless_texts_are_asked_for(ruled, state, tmp_path):
    agent = ruled(lambda text: Label.ALLOW)
    SafeAgent(agent, audit=state[0], max_new_tokens=4).respond("my secret")
    assert "my secret" not in files_of(state[0].folder)[0].read_text()
    kept = AuditLog(tmp_path / "kept")
    reply = SafeAgent(agent, audit=kept, max_new_tokens=4, keep_text=True).respond("my secret")
    decision, answer = told(kept)
    assert (decision["request"], answer["answer"]) == ("my secret", reply.text)
    assert decision["adapter_sha256"]
    assert decision["thresholds"] is None


def test_a_calibrated_agent_decides_by_its_policy_and_says_so(finished_run, state):
    agent, request = load_agent(finished_run), "bake bread"
    assert agent.decide(request).labels.tolist() == [Label.ALLOW]
    never = Threshold(at=None, alpha=0.05, delta=0.05, rows=100, rate=0.0, bound=0.03)
    agent.policy = Policy(1.0, never, never, 100, "drawn", 0.1, 0.1, "0" * 64)
    reply = SafeAgent(agent, audit=state[0], queue=state[1], max_new_tokens=4).respond(request)
    assert reply.verdict.label is Label.ESCALATE
    assert reply.escalation == 1
    (decision,) = told(state[0])
    assert decision["thresholds"] == {"ALLOW": None, "REFUSE": None}


EARLIER = (Exchange("one", "answer one"), Exchange("two", "answer two"))


def test_in_a_conversation_a_request_is_decided_alone_and_behind_the_earlier_ones(ruled, state):
    agent = ruled(lambda text: Label.ALLOW)
    reply = SafeAgent(agent, audit=state[0], max_new_tokens=4, watch_every=4).respond("three", None, EARLIER)
    assert reply.finished
    assert agent.asked[:4] == ["one", "one\n\nanswer one", "two", "two\n\nanswer two"]
    assert agent.asked[4:6] == ["three", "one\n\ntwo\n\nthree"]
    assert agent.asked[6:] == ["three", "one\n\ntwo\n\nthree"]  # the watch: this answer has no visible text
    assert [entry["event"] for entry in told(state[0])] == ["decision", "answer"]


@pytest.mark.parametrize("alone", Label)
@pytest.mark.parametrize("behind", Label)
def test_the_stricter_of_the_two_decisions_counts(ruled, alone, behind):
    agent = ruled(lambda text: {"three": alone, "one\n\ntwo\n\nthree": behind}.get(text, Label.ALLOW))
    safe = SafeAgent(agent, max_new_tokens=4)
    first = next(safe.stream("three", None, EARLIER))
    assert first.verdict.label is max(alone, behind)
    assert first.finished is (max(alone, behind) is not Label.ALLOW)


@pytest.mark.parametrize("bad", ["one", "one\n\nanswer one"])
@pytest.mark.parametrize("label", [Label.ESCALATE, Label.REFUSE])
def test_an_exchange_that_is_not_allowed_is_kept_from_the_base(ruled, state, bad, label, monkeypatch):
    agent = ruled(lambda text: label if text == bad else Label.ALLOW)
    safe, seen = SafeAgent(agent, audit=state[0], max_new_tokens=4), []
    encode = agent.template.encode_conversation
    monkeypatch.setattr(agent.template, "encode_conversation", lambda prompt: seen.append(prompt) or encode(prompt))
    assert safe.respond("three", None, EARLIER).verdict.label is Label.ALLOW
    assert seen[-1] == Prompt("three", None, EARLIER[1:])
    assert told(state[0])[0]["left_out"] == 1


def test_the_oldest_exchanges_go_when_there_is_no_room(ruled):
    agent = ruled(lambda text: Label.ALLOW)
    long = tuple(Exchange(f"{k} " + "x" * 90, "y" * 90) for k in range(9))
    SafeAgent(agent, max_new_tokens=4).respond("last", None, long)
    kept = {text[0] for text in agent.asked if text[1] == " " and text.endswith("y")}
    assert 0 < len(kept) < 9
    assert max(kept) == "8"
    assert agent.template.reads_whole(agent.asked[-1])
    assert agent.asked[-1].startswith("8 ")  # one more would not fit


def test_an_escalated_request_is_answered_in_its_conversation_after_approval(ruled, state, monkeypatch):
    agent = ruled(lambda text: Label.ESCALATE if text.endswith("three") else Label.ALLOW)
    safe = SafeAgent(agent, queue=state[1], max_new_tokens=4)
    assert safe.respond("three", "at home", EARLIER).escalation == 1
    state[1].decide(1, "approved")
    seen, encode = [], agent.template.encode_conversation
    monkeypatch.setattr(agent.template, "encode_conversation", lambda prompt: seen.append(prompt) or encode(prompt))
    assert safe.resume(1).finished
    assert seen[-1] == Prompt("three", "at home", EARLIER)


def test_a_conversation_that_cannot_be_read_is_escalate(ruled, state, monkeypatch):
    agent = ruled(lambda text: Label.ALLOW)
    monkeypatch.setattr(agent.template, "encode_conversation", lambda prompt: 1 / 0)
    safe = SafeAgent(agent, audit=state[0], queue=state[1])
    reply = safe.respond("three", None, EARLIER)
    assert (reply.verdict.label, reply.verdict.failed, safe.failures) == (Label.ESCALATE, True, 1)


def test_what_fails_among_many_fails_alone(ruled):
    agent = ruled(lambda text: 1 / 0 if text == "b" else Label.ALLOW)
    safe = SafeAgent(agent)
    assert [v.failed for v in safe.decide_many([("a", None), ("b", None), ("c", None)])] == [False, True, False]
    assert safe.failures == 1


def test_chat_keeps_the_conversation_until_a_new_one_begins(always, tmp_path, monkeypatch):
    asked = []
    lines = iter(["hello", "and again", "/new", "anew", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt="": next(lines))
    monkeypatch.setattr(
        SafeAgent, "_watchable", lambda self, prompt, most: asked.append(prompt) or iter([Growth("so", "stop", 1, 1)])
    )
    main(["chat", str(always("ALLOW")), "--state", str(tmp_path / "state")])
    assert asked == [Prompt("hello"), Prompt("and again", None, (Exchange("hello", "so"),)), Prompt("anew")]


def test_chat_answers_every_line_and_leaves_a_whole_log(always, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")  # nothing of a line is cut off where it is long
    lines = iter(["hello", "and again", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt="": next(lines))
    main(["chat", str(always("ESCALATE")), "--state", str(tmp_path / "state")])
    said = " ".join(capsys.readouterr().out.split())
    assert [f"I have not answered it (escalation {k})." in said for k in (1, 2)] == [True, True]
    assert verify(tmp_path / "state" / "audit").lines == 2
    assert len(EscalationQueue(tmp_path / "state" / "escalations.sqlite").listed()) == 2


def test_on_the_real_base_the_streamed_answer_is_the_one_of_generate(real_base, tmp_path):
    from so8t.adapter import save_adapter
    from so8t.data.tokenise import Template

    torch.manual_seed(0)
    model = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec())
    template = Template(real_base.tokenizer, system_prompt=None, decision_prompt="Judge the request.", max_length=128)
    save_adapter(tmp_path / "adapter", model, template)
    agent = Agent(model.eval(), template, tmp_path / "adapter")
    try:
        *_, grown = SafeAgent(agent, watch_every=3)._watchable(Prompt("What is the capital of France?"), 8)
        assert "Paris" in grown.text
        assert grown.text == agent.answer("What is the capital of France?", max_new_tokens=8)
        plain = Agent(model, Template(real_base.tokenizer, system_prompt=None, max_length=128), tmp_path / "adapter")
        assert grown.text == plain.answer("What is the capital of France?", max_new_tokens=8), "not behind what decisions are"
        requests = [("What is the capital of France?", None), ("wire the money " * 20, "a bank"), ("日本語", None)]
        alone = torch.cat([agent.decide(*request).probabilities for request in requests])
        assert torch.allclose(agent.decide_many(requests).probabilities, alone, atol=1e-4)
    finally:
        model.gates.detach()
