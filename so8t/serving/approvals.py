"""What a person approved goes to the upstream after all: looked for in the queue, watched against REFUSE alone, its reply kept.

Approving is a change in the queue, by whatever means; the guard needs no way in for it. The reply is for whoever has the
request's ticket. An upstream that fails is asked again later. Of several guards with one queue, each sends what is for its own
upstream, and of those before one upstream one alone does.
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
LATER = (401, 403, 408, 429)
"""What may be well the next time, when there is a key or room, beside 500 and up."""


class Approvals:
    """Sends on what was approved, while it is `running`."""

    def __init__(self, guard: Guard):
        self.guard, self.queue = guard, guard.service.queue
        self._sending: set[asyncio.Task] = set()

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Until the server stops; what is on its way then is sent once more by the next one."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            ending = {task, *self._sending}
            for each in ending:
                each.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _run(self) -> None:
        # the decision and then the answer take their time each, and no other guard may send it meanwhile
        seconds = 2 * self.guard.service.limits.seconds + AGAIN_SECONDS
        while True:
            try:
                for held in await run_in_threadpool(self.queue.to_send, self.guard.upstream.url, seconds=seconds):
                    task = asyncio.create_task(self._send(held))
                    self._sending.add(task)
                    task.add_done_callback(self._sending.discard)
            except Exception:
                log.exception("what was approved could not be looked for")
            await asyncio.sleep(EVERY_SECONDS)

    async def _send(self, held: Held) -> None:
        """Keeps the reply, or lets the request be sent again: later, or by the next server at once if this one stops."""
        again = AGAIN_SECONDS
        try:
            try:
                reply, said = await self.guard.approved(held)
            except WireError as error:
                log.warning("escalation %d, approved, was not answered: %s", held.number, error)
                if error.status >= 500 or error.status in LATER:
                    return
                reply, said = error.body.model_dump_json(), str(error)
            await run_in_threadpool(self.queue.keep_reply, held.number, reply, said)
        except asyncio.CancelledError:
            again = 0.0
            raise
        except Exception:
            log.exception("escalation %d, approved, could not be sent on", held.number)
        finally:
            self.queue.send_again(held.number, seconds=again)


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
