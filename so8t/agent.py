"""The trained agent at work: decide first, generate on ALLOW alone, watch the answer, ask a person on ESCALATE, write it down.

The order is fixed. 1. The request is decided. 2. Only ALLOW generates, from the intact base, greedily. 3. The answer is watched
in steps of a few tokens and never shown before it was: the head decides the request with the answer so far behind it, in the
place of a request, where it was trained to read. 4. The finished answer is decided once more. Whatever leaves ALLOW ends the
answer. An exception inside is ESCALATE, counted and written down as a failure, never as a prediction.

In a conversation a request is decided alone and behind the user's earlier requests, in the place of one request, and the
stricter decision counts. Earlier exchanges are what the other side says they were: each is decided like any other, request and
then request with answer, and one that the head does not allow is kept from the base and from later decisions.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from so8t.adapter import REPETITION_PENALTY, Agent
from so8t.audit import AuditLog
from so8t.calibration import adapter_digest
from so8t.conversation import Exchange, Prompt
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue
from so8t.labels import FAIL_CLOSED, LABELS, Label

log = logging.getLogger(__name__)

SPOKEN = {
    Label.ESCALATE: "This is for a person to decide. I have not answered it{number}.",
    Label.REFUSE: "I will not help with this.",
}
"""What is said instead of an answer. The embedded base is too small to explain a decision in words of its own."""

HISTORY = 4
"""A prompt for the base has at most so many times the tokens of one that the head reads; the oldest exchanges go first."""


@dataclass(frozen=True)
class Verdict:
    """One decision, with probabilities by label (with a policy, the calibrated ones). `failed`: it could not be taken, and
    stands for ESCALATE."""

    label: Label
    probabilities: dict[str, float]
    failed: bool = False

    @property
    def strictness(self) -> tuple[int, bool, float]:
        """Orders decisions: REFUSE is the strictest."""
        return int(self.label), self.failed, -self.probabilities[Label.ALLOW.name]


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
        watch_every: tokens of an answer between two looks at it; 1 looks at each.
        keep_text: whether the audit log holds requests and answers, or their SHA-256 alone.
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
    ):
        self.agent, self.audit, self.queue = agent, audit, queue
        self.max_new_tokens, self.watch_every, self.keep_text = max_new_tokens, watch_every, keep_text
        self.failures = 0
        self.digest = adapter_digest(agent.folder)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def decide(self, request: str, context: str | None = None) -> Verdict:
        """The decision on a request, written down."""
        return self.decide_many([(request, context)])[0]

    def decide_many(self, requests: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """The decisions on requests with their contexts, taken in one pass, written down in their order."""
        begun = time.perf_counter()
        verdicts = self._verdicts(requests)
        seconds = time.perf_counter() - begun
        self._write(
            [
                self._entry("decision", Prompt(request, context), verdict, seconds=seconds)
                for (request, context), verdict in zip(requests, verdicts, strict=True)
            ]
        )
        return verdicts

    def _verdicts(self, requests: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """Fails closed: what goes wrong inside is ESCALATE, and counted. What goes wrong with many is tried one by one, so that
        no request fails for another's sake."""
        if not all(request.strip() for request, _ in requests):
            raise SO8TError("the request is empty")
        try:
            decided = self.agent.decide_many(requests)
            rows = zip(decided.labels.tolist(), decided.probabilities.tolist(), decided.failed.tolist(), strict=True)
            verdicts = [Verdict(Label(label), dict(zip(LABELS, p, strict=True)), failed) for label, p, failed in rows]
        except Exception:
            if len(requests) > 1:
                return [verdict for request in requests for verdict in self._verdicts([request])]
            log.exception("a decision failed")
            verdicts = [Verdict(FAIL_CLOSED, dict.fromkeys(LABELS, 1 / len(LABELS)), failed=True)]
        self.failures += sum(verdict.failed for verdict in verdicts)
        return verdicts

    def _verdict(self, prompt: Prompt, answer: str = "") -> Verdict:
        """The stricter decision on the request (with its answer so far) alone and behind the latest earlier ones that fit."""
        last = _with_answer(prompt.request, answer)
        readings = [last]
        before = [exchange.request for exchange in prompt.earlier]
        while before and not self.agent.template.reads_whole("\n\n".join([*before, last]), prompt.context):
            before = before[1:]
        if before:
            readings.append("\n\n".join([*before, last]))
        return max(self._verdicts([(text, prompt.context) for text in readings]), key=lambda verdict: verdict.strictness)

    def _begun(self, prompt: Prompt) -> tuple[Prompt, Verdict]:
        """The conversation with what is allowed of it, and the decision on its request. Fails closed, too."""
        try:
            prompt = self._allowed(prompt)
            return prompt, self._verdict(prompt)
        except SO8TError:
            raise
        except Exception:
            log.exception("a conversation failed")
            self.failures += 1
            return replace(prompt, earlier=()), Verdict(FAIL_CLOSED, dict.fromkeys(LABELS, 1 / len(LABELS)), failed=True)

    def _allowed(self, prompt: Prompt) -> Prompt:
        """With those of the latest exchanges that fit and that the head allows."""
        template, earlier = self.agent.template, prompt.earlier
        while earlier and len(template.encode_conversation(replace(prompt, earlier=earlier))) > HISTORY * template.max_length:
            earlier = earlier[1:]
        if not earlier:
            return replace(prompt, earlier=())
        texts = [text for e in earlier for text in (e.request, _with_answer(e.request, e.answer))]
        allowed = [v.label is Label.ALLOW for v in self._verdicts([(text, prompt.context) for text in texts])]
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
        seconds = time.perf_counter() - begun
        self._write([self._entry("decision", prompt, verdict, seconds=seconds, approved=approved, **more)])
        if verdict.label is not Label.ALLOW and not approved:
            yield self._closed(prompt, verdict, "decision")
            return
        reply = Reply("", verdict)
        yield reply
        most = self.max_new_tokens if max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        try:
            for grown in self._watchable(prompt, most):
                seen = self._verdict(prompt, grown.text)
                if seen.label is not Label.ALLOW and not (approved and seen.label is Label.ESCALATE and not seen.failed):
                    closed = self._closed(prompt, seen, "answer")
                    yield replace(closed, text=reply.text, stopped=True, read=grown.read, written=grown.written)
                    return
                reply = Reply(
                    grown.text,
                    seen,
                    finished=grown.end is not None,
                    cut=grown.end == "length",
                    read=grown.read,
                    written=grown.written,
                )
                if reply.finished:
                    seconds = time.perf_counter() - begun
                    self._write([self._entry("answer", prompt, seen, answer=reply.text, seconds=seconds)])
                yield reply
        except SO8TError:
            raise
        except Exception:
            log.exception("an answer failed")
            self.failures += 1
            broken = Verdict(FAIL_CLOSED, verdict.probabilities, failed=True)
            yield replace(self._closed(prompt, broken, "failure"), text=reply.text, stopped=True)

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
            self._write([self._entry("denied", prompt, verdict, escalation=number)])
            yield Reply(SPOKEN[Label.REFUSE], verdict, finished=True)
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
        ends = causal_lm.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
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
            text = str(tokenizer.decode(sequence[0, read:], skip_special_tokens=True)).strip()
            yield Growth(text, end, read, sequence.shape[1] - read)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _closed(self, prompt: Prompt, verdict: Verdict, reason: str) -> Reply:
        """The reply without an answer; what is for a person goes into the queue."""
        number = None
        if verdict.label is Label.ESCALATE and self.queue is not None:
            why = "failure" if verdict.failed else reason
            number = self.queue.add(prompt.request, prompt.context, verdict.probabilities, why, prompt.earlier)
        if reason != "decision":
            self._write([self._entry("stopped", prompt, verdict, escalation=number)])
        told = "" if number is None else f" (escalation {number})"
        return Reply(SPOKEN[verdict.label].format(number=told), verdict, finished=True, escalation=number)

    def _write(self, entries: Sequence[Mapping[str, object]]) -> None:
        """Lines of the audit log."""
        if self.audit is not None:
            self.audit.extend(entries)

    def _entry(self, event: str, prompt: Prompt, verdict: Verdict, **more: object) -> dict[str, object]:
        """One line of the audit log."""
        policy = self.agent.policy
        texts = {"request": prompt.request, "context": prompt.context}
        if prompt.earlier:
            texts["earlier"] = json.dumps([asdict(exchange) for exchange in prompt.earlier], ensure_ascii=False)
        if "answer" in more:
            texts["answer"] = str(more.pop("answer"))
        if not self.keep_text:
            texts = {f"{k}_sha256": None if v is None else hashlib.sha256(v.encode()).hexdigest() for k, v in texts.items()}
        thresholds = None if policy is None else {"ALLOW": policy.allow.at, "REFUSE": policy.refuse.at}
        return {
            "event": event,
            "decision": verdict.label.name,
            "probabilities": {k: round(v, 6) for k, v in verdict.probabilities.items()},
            "failed": verdict.failed,
            "thresholds": thresholds,
            "adapter_sha256": self.digest,
            **texts,
            **more,
        }


def _with_answer(request: str, answer: str) -> str:
    """How the head reads an answer: behind its request, in the place of a request."""
    return f"{request}\n\n{answer}" if answer.strip() else request
