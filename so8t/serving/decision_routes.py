"""Our own endpoints: decisions, and the escalations that a person approves or denies."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from so8t.agent import Reply
from so8t.errors import SO8TError
from so8t.escalations import Escalation
from so8t.serving.service import Service, decided, last
from so8t.serving.wire import Decided, Text, WireError

Number = Annotated[int, Path(ge=1, lt=2**63)]
"""Of an escalation."""


class DecisionRequest(BaseModel):
    """`POST /v1/decisions`: one request or several, and the context that all of them share."""

    request: Text | None = None
    requests: list[Text] | None = None
    context: Text | None = None


class Decision(BaseModel):
    """One of them; a failed decision stands for ESCALATE, and so does one on a text that is too long to be read whole."""

    label: str
    probabilities: dict[str, float]
    failed: bool
    unread: bool


class Decisions(BaseModel):
    """In the order of the requests; `latency_ms` is from their arrival to the last decision."""

    model: str
    decisions: list[Decision]
    latency_ms: float


class Note(BaseModel):
    """Why, kept beside a person's decision."""

    note: Text | None = None


class Outcome(BaseModel):
    """What followed from a person's decision: the answer, or the refusal."""

    escalation: int
    text: str
    so8t: Decided


def decision_routes(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    agent, queue = service.agent, service.queue

    @routes.post("/v1/decisions")
    async def decide(request: DecisionRequest) -> Decisions:
        if (request.request is None) == (request.requests is None):
            raise WireError(400, "give either request, a text, or requests, a list of texts", param="request")
        texts = [request.request] if request.request is not None else request.requests or []
        begun = time.perf_counter()
        verdicts = await service.decide([(text, request.context) for text in texts])
        return Decisions(
            model=service.model,
            decisions=[
                Decision(label=v.label.name, probabilities=v.probabilities, failed=v.failed, unread=v.unread) for v in verdicts
            ],
            latency_ms=1e3 * (time.perf_counter() - begun),
        )

    @routes.get("/escalations")
    def listed(state: Literal["pending", "approved", "denied", "all"] = "pending") -> dict[str, list[dict[str, object]]]:
        return {"escalations": [asdict(item) for item in queue.listed(None if state == "all" else state)]}

    def found(number: int) -> Escalation:
        try:
            return queue.get(number)
        except SO8TError:
            raise WireError(404, f"there is no escalation {number}") from None

    @routes.get("/escalations/{number}")
    def one(number: Number) -> dict[str, object]:
        return asdict(found(number))

    @routes.post("/escalations/{number}/{action}")
    async def settle(number: Number, action: Literal["approve", "deny", "answer"], note: Note) -> Outcome:
        """`answer` gives the reply once more, of one that was decided before. The body is JSON, `{}` at the least: what a
        foreign page in a browser can send without asking is none."""
        await run_in_threadpool(found, number)

        def begin() -> Iterator[Reply]:
            if action != "answer":
                queue.decide(number, "approved" if action == "approve" else "denied", note.note)
            yield from agent.resumed(number)

        try:
            reply = await last(service.answer(begin))
        except WireError:
            raise
        except SO8TError as error:
            raise WireError(409, str(error)) from None
        return Outcome(escalation=number, text=reply.text, so8t=decided(reply.verdict, reply))

    return routes
