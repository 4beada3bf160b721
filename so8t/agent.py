"""The trained agent at work: decide first, generate on ALLOW alone, watch the answer, ask a person on ESCALATE, write it down.

The order is fixed. 1. The request is decided. 2. Only ALLOW generates, from the intact base, greedily. 3. The answer is watched
in steps of a few tokens and never shown before it was: the head decides the request with the answer so far behind it, in the
place of a request, where it was trained to read. 4. The finished answer is decided once more. Whatever leaves ALLOW ends the
answer. An exception inside is ESCALATE, counted and written down as a failure, never as a prediction.

In a conversation a request is decided alone and behind the user's earlier requests, in the place of one request, and the
stricter decision counts: harmless requests before a risky one hide it from the second reading. Earlier exchanges are what the
other side says they were: each is decided like any other, request and then request with answer, and one that the head does not
allow is kept from the base and from later decisions.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from so8t.adapter import REPETITION_PENALTY, Agent
from so8t.audit import AuditLog
from so8t.conversation import Exchange, Prompt, Reading, latest, readings, readings_of
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue
from so8t.labels import FAIL_CLOSED, LABELS, Label
from so8t.policy import adapter_digest
from so8t.rationale import fault

log = logging.getLogger(__name__)

SPOKEN = {
    Label.ESCALATE: "This is for a person to decide. I have not answered it{number}.",
    Label.REFUSE: "I will not help with this.",
}
"""What is said instead of an answer; where the agent has learned to say why, its rationale follows."""

HELD = "Approved. The guard that holds this request sends it on."
"""What is said of a request that is not for this agent to answer, until its reply is there."""

HISTORY = 4
"""A prompt for the base has at most so many times the tokens of one that the head reads; the oldest exchanges go first."""


@dataclass(frozen=True)
class Verdict:
    """One decision, with probabilities by label (with a policy, the calibrated ones). `failed`: it could not be taken, and
    stands for ESCALATE. `unread`: the text is too long to be read whole, and so ESCALATE at least."""

    label: Label
    probabilities: dict[str, float]
    failed: bool = False
    unread: bool = False

    @classmethod
    def not_taken(cls) -> "Verdict":
        """What stands for a decision that could not be taken."""
        return cls(FAIL_CLOSED, dict.fromkeys(LABELS, 1 / len(LABELS)), failed=True)

    @property
    def strictness(self) -> tuple[int, bool, bool, float]:
        """Orders decisions: REFUSE is the strictest."""
        return int(self.label), self.failed, self.unread, -self.probabilities[Label.ALLOW.name]


@dataclass(frozen=True)
class Reply:
    """What the agent says, or has said so far: `verdict` is the latest decision, on the request at first and then on request
    and answer. `stopped` tells that an answer had begun and left ALLOW, `cut` that it ended at its greatest length;
    `escalation` is its number in the queue. `read` and `written` count the base's tokens."""

    text: str
    verdict: Verdict
    finished: bool = False
    stopped: bool = False
    escalation: int | None = None
    cut: bool = False
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Growth:
    """An answer so far, and how it ended; tokens read and written."""

    text: str
    end: Literal["stop", "length"] | None
    read: int
    written: int


class SafeAgent:
    """A loaded agent with its audit log and its queue, each optional.

    Args:
        watch_every: tokens of an answer between two looks at it; 1 looks at each. Never more than a look surely has in view.
        keep_text: whether the audit log holds requests and answers, or their SHA-256 alone.
        rationales: whether what is not answered is explained by the model.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        audit: AuditLog | None = None,
        queue: EscalationQueue | None = None,
        max_new_tokens: int = 128,
        watch_every: int = 8,
        keep_text: bool = False,
        rationales: bool = True,
    ):
        self.agent, self.audit, self.queue = agent, audit, queue
        self.watch_every = min(watch_every, max(1, agent.template.room // 3))
        self.max_new_tokens, self.keep_text = max_new_tokens, keep_text
        self.rationales = agent.rationales if rationales else None
        self.failures = 0
        self.digest = adapter_digest(agent.folder)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def decide(self, request: str, context: str | None = None) -> Verdict:
        """The decision on a request, written down."""
        return self.decide_many([(request, context)])[0]

    def decide_many(self, requests: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """The decisions on requests with their contexts, taken together, written down in their order."""
        begun = time.perf_counter()
        asked = [Reading(request, context) for request, context in requests]
        verdicts = self.verdicts(asked)
        self.write_decisions(list(zip(asked, verdicts, strict=True)), time.perf_counter() - begun)
        return verdicts

    def verdicts(self, asked: Sequence[Reading]) -> list[Verdict]:
        """Fails closed: what goes wrong inside is ESCALATE, and counted. What goes wrong with many is tried one by one, so that
        no request fails for another's sake."""
        if not all(reading.text.strip() for reading in asked):
            raise SO8TError("the request is empty")
        try:
            decided = self.agent.read(asked)
            columns = (decided.labels, decided.probabilities, decided.failed, decided.unread)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            verdicts = [Verdict(Label(label), dict(zip(LABELS, p, strict=True)), *how) for label, p, *how in rows]
        except Exception:
            if len(asked) > 1:
                return [verdict for reading in asked for verdict in self.verdicts([reading])]
            log.exception("a decision failed")
            verdicts = [Verdict.not_taken()]
        self.failures += sum(verdict.failed for verdict in verdicts)
        return verdicts

    def verdict(self, prompt: Prompt, answer: str = "") -> Verdict:
        """The strictest decision of all `readings`, taken together."""
        return strictest(self.verdicts(readings(prompt, answer, self.agent.template.reads_whole)))

    def _begun(self, prompt: Prompt) -> tuple[Prompt, Verdict]:
        """The conversation with what is allowed of it, and the decision on its request. Fails closed, too."""
        try:
            prompt = self._allowed(prompt)
            return prompt, self.verdict(prompt)
        except SO8TError:
            raise
        except Exception:
            log.exception("a conversation failed")
            self.failures += 1
            return replace(prompt, earlier=()), Verdict.not_taken()

    def _allowed(self, prompt: Prompt) -> Prompt:
        """With those of the latest exchanges that fit and that the head allows."""
        template, earlier = self.agent.template, prompt.earlier

        def fits(number: int) -> bool:
            some = replace(prompt, earlier=earlier[-number:])
            return len(template.encode_conversation(some)) <= HISTORY * template.max_length

        earlier = latest(earlier, fits)
        if not earlier:
            return replace(prompt, earlier=())
        allowed = [verdict.label is Label.ALLOW for verdict in self.verdicts(readings_of(earlier, prompt.context))]
        kept = [e for k, e in enumerate(earlier) if allowed[2 * k] and allowed[2 * k + 1]]
        return replace(prompt, earlier=tuple(kept))

    # -- answers -------------------------------------------------------------------------------------------------------

    def respond(self, request: str, context: str | None = None, earlier: Sequence[Exchange] = ()) -> Reply:
        """The finished reply to one request, after earlier exchanges."""
        *_, last = self.stream(request, context, earlier)
        return last

    def stream(
        self,
        request: str,
        context: str | None = None,
        earlier: Sequence[Exchange] = (),
        *,
        max_new_tokens: int | None = None,
    ) -> Iterator[Reply]:
        """The reply as it grows; the last one is `finished`. `max_new_tokens`: of this answer, if fewer than the agent's."""
        return self._stream(Prompt(request, context, tuple(earlier)), max_new_tokens, approved=False)

    def _stream(self, prompt: Prompt, max_new_tokens: int | None, *, approved: bool) -> Iterator[Reply]:
        """`approved`: a person has allowed this request, so an answer is generated whatever the head says of the request, and
        watched against REFUSE alone."""
        begun = time.perf_counter()
        told = len(prompt.earlier)
        prompt, verdict = self._begun(prompt)
        more = {"left_out": told - len(prompt.earlier)} if told else {}
        watch = Watch(self, prompt, verdict, approved=approved, begun=begun, **more)
        yield from watch.explained() if watch.reply.finished else (watch.reply,)
        most = self.max_new_tokens if max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        try:
            for grown in () if watch.reply.finished else self._watchable(prompt, most):
                reply = watch.look(grown.text)
                if grown.end is not None and not reply.stopped:
                    reply = replace(watch.end("answer", grown.text), cut=grown.end == "length")
                yield replace(reply, read=grown.read, written=grown.written)
                if reply.stopped:
                    return
        except SO8TError:
            raise
        except Exception:
            log.exception("an answer failed")
            yield watch.fail()

    def resume(self, number: int) -> Reply:
        """What becomes of an escalated request after a person decided: the answer, or the refusal.

        Raises:
            SO8TError: there is no queue, no such request, or nobody has decided yet.
        """
        *_, last = self.resumed(number)
        return last

    def resumed(self, number: int) -> Iterator[Reply]:
        """`resume`, as the reply grows."""
        if self.queue is None:
            raise SO8TError("this agent has no queue of escalations")
        found = self.queue.get(number)
        prompt = Prompt(found.request, found.context, found.earlier)
        if found.state == "pending":
            raise SO8TError(f"escalation {number} is pending: approve or deny it first")
        if found.state == "denied":
            verdict = Verdict(Label.REFUSE, found.probabilities)
            self.write([self.entry("denied", prompt, verdict, escalation=number)])
            yield Reply(SPOKEN[Label.REFUSE], verdict, finished=True)
            return
        if found.held:
            yield Reply(found.reply or HELD, Verdict(Label.ESCALATE, found.probabilities), finished=True)
            return
        yield from self._stream(prompt, None, approved=True)

    @torch.no_grad()
    def _watchable(self, prompt: Prompt, max_new_tokens: int) -> Iterator[Growth]:
        """The whole text so far after every few tokens; greedy, with a key-value cache."""
        model, tokenizer = self.agent.model, self.agent.template.tokenizer
        causal_lm = model.base.causal_lm
        sequence = torch.tensor([self.agent.template.encode_conversation(prompt)], device=model.base.device)
        read, fresh, cache = sequence.shape[1], sequence, DynamicCache()
        penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY)])
        ends = model.base.end_tokens
        end: Literal["stop", "length"] | None = None
        while end is None:
            with model.without_gates():
                for _ in range(self.watch_every):
                    scores = causal_lm(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                    fresh = penalty(sequence, scores.float()).argmax(-1, keepdim=True)
                    if int(fresh) in ends:
                        end = "stop"
                        break
                    sequence = torch.cat([sequence, fresh], dim=1)
                    if sequence.shape[1] - read >= max_new_tokens:
                        end = "length"
                        break
            text = str(tokenizer.decode(sequence[0, read:], skip_special_tokens=True))
            if end is None:
                text = text.rstrip("\ufffd")  # a character whose last token is still to come
            yield Growth(text.strip(), end, read, sequence.shape[1] - read)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[Mapping[str, object]]) -> None:
        """Lines of the audit log."""
        if self.audit is not None and entries:
            self.audit.extend(entries)

    def write_decisions(self, taken: Sequence[tuple[Reading, Verdict]], seconds: float) -> None:
        """A line each for decisions that were taken together, in so many seconds."""
        self.write([self.entry("decision", Prompt(r.text, r.context), verdict, seconds=seconds) for r, verdict in taken])

    def entry(self, event: str, prompt: Prompt, verdict: Verdict, **more: object) -> dict[str, object]:
        """One line of the audit log."""
        policy = self.agent.policy
        texts = {"request": prompt.request, "context": prompt.context}
        if prompt.earlier:
            texts["earlier"] = json.dumps([asdict(exchange) for exchange in prompt.earlier], ensure_ascii=False)
        for name in ("answer", "rationale"):
            if name in more:
                texts[name] = str(more.pop(name))
        if not self.keep_text:
            texts = {f"{k}_sha256": None if v is None else hashlib.sha256(v.encode()).hexdigest() for k, v in texts.items()}
        thresholds = None if policy is None else {"ALLOW": policy.allow.at, "REFUSE": policy.refuse.at}
        return {
            "event": event,
            "decision": verdict.label.name,
            "probabilities": {k: round(v, 6) for k, v in verdict.probabilities.items()},
            "failed": verdict.failed,
            "unread": verdict.unread,
            "thresholds": thresholds,
            "adapter_sha256": self.digest,
            **texts,
            **more,
        }


class Watch:
    """A decided request, and the answer that whoever gives it is about to give: written down, looked at as it grows, closed.

    `reply` is the latest: of the request alone at first, `finished` where that was not allowed. `approved`: a person has
    allowed the request, and its answer is watched against REFUSE alone. `begun` is when its reading began.
    """

    def __init__(self, safe: SafeAgent, prompt: Prompt, verdict: Verdict, *, approved: bool, begun: float, **more: object):
        self.safe, self.prompt, self.approved, self.begun = safe, prompt, approved, begun
        self.reply = Reply("", verdict)
        self._write("decision", verdict, seconds=self._seconds(), approved=approved, **more)
        if verdict.label is not Label.ALLOW and not approved:
            self.reply = self._closed(verdict, "decision")

    def look(self, text: str) -> Reply:
        """Decides on all of the answer so far: it may be shown, unless the reply is `stopped`."""
        return self.saw(text, self.safe.verdict(self.prompt, text))

    def allows(self, seen: Verdict) -> bool:
        """Whether an answer on which this was decided may be shown."""
        return seen.label is Label.ALLOW or (self.approved and seen.label is Label.ESCALATE and not seen.failed)

    def saw(self, text: str, seen: Verdict) -> Reply:
        """`look`, when the decision has been taken elsewhere."""
        if not self.allows(seen):
            return self._stopped(seen, "answer")
        self.reply = Reply(text, seen)
        return self.reply

    def end(self, event: Literal["answer", "interrupted"], text: str) -> Reply:
        """Writes down that the answer is over, and what of it was looked at."""
        self.reply = replace(self.reply, finished=True)
        self._write(event, self.reply.verdict, answer=text, seconds=self._seconds())
        return self.reply

    def fail(self) -> Reply:
        """What becomes of the answer when something broke."""
        self.safe.failures += 1
        return self._stopped(replace(self.reply.verdict, label=FAIL_CLOSED, failed=True), "failure")

    def explained(self) -> Iterator[Reply]:
        """The reply to what is not answered; with the model's rationale behind it in the end, if there is one that may be said.

        A rationale is written and checked as a whole before any of it is shown. It is held to one sentence without links or
        code, and the head must not read it as worse than the request was decided. What goes wrong leaves the reply as it is.
        """
        rationales, verdict, said = self.safe.rationales, self.reply.verdict, self.reply
        request, context, agent = self.prompt.request, self.prompt.context, self.safe.agent
        if rationales is None or verdict.failed or not (examples := rationales.examples_for(request, verdict.label)):
            yield said
            return
        begun, text, tokens, wrong = time.perf_counter(), "", 0, None
        try:
            writing = rationales.write(
                agent.model, agent.template, request, context, verdict.label, every=self.safe.watch_every
            )
            for written in writing:
                text, tokens = written.text, written.tokens
                yield replace(said, finished=False)
            wrong = fault(text, request, context, examples)
            seen = None if wrong else self.safe.verdicts([Reading(text)])[0]
            if seen is not None and (seen.failed or seen.label > verdict.label):
                wrong = "the head reads it as worse than the request"
        except Exception:
            log.exception("a rationale failed")
            self.safe.failures += 1
            wrong = "failure"
        seconds = time.perf_counter() - begun
        self._write("rationale", verdict, rationale=text, dropped=wrong, tokens=tokens, seconds=seconds)
        if wrong is None:
            self.reply = replace(said, text=f"{said.text} {text}")
        yield self.reply

    def _stopped(self, verdict: Verdict, reason: str) -> Reply:
        self.reply = replace(self._closed(verdict, reason), text=self.reply.text, stopped=True)
        return self.reply

    def _closed(self, verdict: Verdict, reason: str) -> Reply:
        """The reply without an answer; what is for a person goes into the queue."""
        queue, prompt, number = self.safe.queue, self.prompt, None
        if verdict.label is Label.ESCALATE and queue is not None:
            why = "failure" if verdict.failed else "length" if verdict.unread else reason
            number = queue.add(prompt.request, prompt.context, verdict.probabilities, why, prompt.earlier)
        if reason != "decision":
            self._write("stopped", verdict, escalation=number)
        return Reply(spoken(verdict, number), verdict, finished=True, escalation=number)

    def _seconds(self) -> float:
        return time.perf_counter() - self.begun

    def _write(self, event: str, verdict: Verdict, **more: object) -> None:
        self.safe.write([self.safe.entry(event, self.prompt, verdict, **more)])


def strictest(verdicts: Iterable[Verdict]) -> Verdict:
    """The one that counts."""
    return max(verdicts, key=lambda verdict: verdict.strictness)


def spoken(verdict: Verdict, escalation: int | None) -> str:
    """What is said instead of an answer."""
    return SPOKEN[verdict.label].format(number="" if escalation is None else f" (escalation {escalation})")
