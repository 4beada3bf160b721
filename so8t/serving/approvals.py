"""What a person approved goes to the upstream after all: looked for in the queue, watched against REFUSE alone, its reply kept.

Approving is a change in the queue, by whatever means; the guard needs no way in for it. The reply is for whoever has the
request's ticket. An upstream that fails is asked again later.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from so8t.agent import Reply, Verdict, spoken
from so8t.escalations import EscalationQueue, Held
from so8t.labels import Label
from so8t.serving.guard import Guard, closed
from so8t.serving.service import decided
from so8t.serving.wire import WireError

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
"""Between two looks into the queue."""
AGAIN_SECONDS = 60.0
"""Until an upstream that failed is asked again."""
LATER = (408, 429)
"""What may be well the next time, beside 500 and up."""


class Approvals:
    """Sends on what was approved, while it is `running`."""

    def __init__(self, guard: Guard):
        self.guard, self.queue = guard, guard.service.queue
        self._not_before: dict[int, float] = {}

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Until the server stops; what is on its way then is sent once more by the next one."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            try:
                approved = await run_in_threadpool(self.queue.to_send)
                await asyncio.gather(*(self._send(h) for h in approved if self._not_before.get(h.number, 0.0) <= now()))
            except Exception:
                log.exception("what was approved could not be sent on")
            await asyncio.sleep(EVERY_SECONDS)

    async def _send(self, held: Held) -> None:
        self._not_before[held.number] = asyncio.get_running_loop().time() + AGAIN_SECONDS
        try:
            reply, said = await self.guard.approved(held)
        except WireError as error:
            log.warning("escalation %d, approved, was not answered: %s", held.number, error)
            if error.status >= 500 or error.status in LATER:
                return
            reply, said = error.body.model_dump_json(), str(error)
        await run_in_threadpool(self.queue.keep_reply, held.number, reply, said)


def completion(queue: EscalationQueue, ticket: str) -> tuple[int, str]:
    """Status and body of what there is under a ticket: the kept reply, or what is said instead so far.

    Raises:
        WireError: 404, there is no such ticket.
    """
    held = queue.held(ticket)
    if held is None:
        raise WireError(404, "there is no such completion", param="completion_id")
    if held.reply is not None:
        return 502 if "error" in json.loads(held.reply) else 200, held.reply
    found = queue.get(held.number)
    verdict = Verdict(Label.REFUSE if found.state == "denied" else Label.ESCALATE, found.probabilities)
    reply = Reply(spoken(verdict, held.number), verdict, finished=True, escalation=held.number)
    return 200, closed(json.loads(held.body)["model"], reply, decided(verdict, reply, ticket)).model_dump_json()
