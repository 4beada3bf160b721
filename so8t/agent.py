"""The trained agent at work: decide first, generate on ALLOW alone, watch the answer, ask a person on ESCALATE, write it down.

The order is fixed. 1. The request is decided. 2. Only ALLOW generates, from the intact base, greedily. 3. The answer is watched
in steps of a few tokens and never shown before it was: the head decides the request with the answer so far behind it, in the
place of a request, where it was trained to read. 4. The finished answer is decided once more. Whatever leaves ALLOW ends the
answer. An exception inside is ESCALATE, counted and written down as a failure, never as a prediction.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from so8t.adapter import REPETITION_PENALTY, Agent
from so8t.audit import AuditLog
from so8t.calibration import adapter_digest
from so8t.errors import SO8TError
from so8t.escalations import EscalationQueue
from so8t.labels import FAIL_CLOSED, LABELS, Label

log = logging.getLogger(__name__)

SPOKEN = {
    Label.ESCALATE: "This is for a person to decide. I have not answered it{number}.",
    Label.REFUSE: "I will not help with this.",
}
"""What is said instead of an answer. The embedded base is too small to explain a decision in words of its own."""


@dataclass(frozen=True)
class Verdict:
    """One decision, with probabilities by label (with a policy, the calibrated ones). `failed`: it could not be taken, and
    stands for ESCALATE."""

    label: Label
    probabilities: dict[str, float]
    failed: bool = False


@dataclass(frozen=True)
class Reply:
    """What the agent says, or has said so far: `verdict` is the latest decision, on the request at first and then on request
    and answer. `stopped` tells that an answer had begun and left ALLOW; `escalation` is its number in the queue."""

    text: str
    verdict: Verdict
    finished: bool = False
    stopped: bool = False
    escalation: int | None = None


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
        begun = time.perf_counter()
        verdict = self._verdict(request, context)
        self._write("decision", request, context, verdict, seconds=time.perf_counter() - begun)
        return verdict

    def _verdict(self, request: str, context: str | None) -> Verdict:
        """Fails closed: what goes wrong inside is ESCALATE, and counted."""
        if not request.strip():
            raise SO8TError("the request is empty")
        try:
            decided = self.agent.decide(request, context)
            probabilities = dict(zip(LABELS, decided.probabilities[0].tolist(), strict=True))
            verdict = Verdict(Label(int(decided.labels[0])), probabilities, bool(decided.failed[0]))
        except Exception:
            log.exception("a decision failed")
            verdict = Verdict(FAIL_CLOSED, dict.fromkeys(LABELS, 1 / len(LABELS)), failed=True)
        self.failures += verdict.failed
        return verdict

    # -- answers -------------------------------------------------------------------------------------------------------

    def respond(self, request: str, context: str | None = None) -> Reply:
        """The finished reply to one request."""
        *_, last = self.stream(request, context)
        return last

    def stream(self, request: str, context: str | None = None, *, approved: bool = False) -> Iterator[Reply]:
        """The reply as it grows; the last one is `finished`. `approved`: a person has allowed this request, so an answer is
        generated whatever the head says of the request, and watched against REFUSE alone."""
        begun = time.perf_counter()
        verdict = self._verdict(request, context)
        self._write("decision", request, context, verdict, seconds=time.perf_counter() - begun, approved=approved)
        if verdict.label is not Label.ALLOW and not approved:
            yield self._closed(request, context, verdict, "decision")
            return
        reply = Reply("", verdict)
        yield reply
        try:
            for text, over in self._watchable(request, context):
                seen = self._verdict(f"{request}\n\n{text}" if text.strip() else request, context)
                if seen.label is not Label.ALLOW and not (approved and seen.label is Label.ESCALATE and not seen.failed):
                    yield replace(self._closed(request, context, seen, "answer"), text=reply.text, stopped=True)
                    return
                reply = Reply(text, seen, finished=over)
                if over:
                    self._write("answer", request, context, seen, answer=text, seconds=time.perf_counter() - begun)
                yield reply
        except SO8TError:
            raise
        except Exception:
            log.exception("an answer failed")
            self.failures += 1
            broken = Verdict(FAIL_CLOSED, verdict.probabilities, failed=True)
            yield replace(self._closed(request, context, broken, "failure"), text=reply.text, stopped=True)

    def resume(self, number: int) -> Reply:
        """What becomes of an escalated request after a person decided: the answer, or the refusal.

        Raises:
            SO8TError: there is no queue, no such request, or nobody has decided yet.
        """
        if self.queue is None:
            raise SO8TError("this agent has no queue of escalations")
        found = self.queue.get(number)
        if found.state == "pending":
            raise SO8TError(f"escalation {number} is pending: approve or deny it first")
        if found.state == "denied":
            verdict = Verdict(Label.REFUSE, found.probabilities)
            self._write("denied", found.request, found.context, verdict, escalation=number)
            return Reply(SPOKEN[Label.REFUSE], verdict, finished=True)
        *_, last = self.stream(found.request, found.context, approved=True)
        return last

    @torch.no_grad()
    def _watchable(self, request: str, context: str | None) -> Iterator[tuple[str, bool]]:
        """The whole text so far after every few tokens, and whether it is over; greedy, with a key-value cache."""
        model, tokenizer = self.agent.model, self.agent.template.tokenizer
        causal_lm = model.base.causal_lm
        sequence = torch.tensor([self.agent.template.encode(request, context).tokens], device=model.base.device)
        prompt, fresh, cache = sequence.shape[1], sequence, DynamicCache()
        penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY)])
        ends = causal_lm.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        over = False
        while not over:
            with model.without_gates():
                for _ in range(self.watch_every):
                    scores = causal_lm(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                    fresh = penalty(sequence, scores.float()).argmax(-1, keepdim=True)
                    over = int(fresh) in ends
                    if over:
                        break
                    sequence = torch.cat([sequence, fresh], dim=1)
                    over = sequence.shape[1] - prompt >= self.max_new_tokens
                    if over:
                        break
            yield str(tokenizer.decode(sequence[0, prompt:], skip_special_tokens=True)).strip(), over

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _closed(self, request: str, context: str | None, verdict: Verdict, reason: str) -> Reply:
        """The reply without an answer; what is for a person goes into the queue."""
        number = None
        if verdict.label is Label.ESCALATE and self.queue is not None:
            number = self.queue.add(request, context, verdict.probabilities, "failure" if verdict.failed else reason)
        if reason != "decision":
            self._write("stopped", request, context, verdict, escalation=number)
        told = "" if number is None else f" (escalation {number})"
        return Reply(SPOKEN[verdict.label].format(number=told), verdict, finished=True, escalation=number)

    def _write(self, event: str, request: str, context: str | None, verdict: Verdict, **more: object) -> None:
        """One line of the audit log."""
        if self.audit is None:
            return
        policy = self.agent.policy
        texts = {"request": request, "context": context, **({"answer": more.pop("answer")} if "answer" in more else {})}
        if not self.keep_text:
            texts = {
                f"{k}_sha256": None if v is None else hashlib.sha256(str(v).encode()).hexdigest() for k, v in texts.items()
            }
        thresholds = None if policy is None else {"ALLOW": policy.allow.at, "REFUSE": policy.refuse.at}
        self.audit.append(
            {
                "event": event,
                "decision": verdict.label.name,
                "probabilities": {k: round(v, 6) for k, v in verdict.probabilities.items()},
                "failed": verdict.failed,
                "thresholds": thresholds,
                "adapter_sha256": self.digest,
                **texts,
                **more,
            }
        )
