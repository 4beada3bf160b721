"""One thread owns the model. It decides what waits in batches, and takes answers forward a few tokens at a time in between.

What is accepted is finished, also when the worker is told to stop; what would not fit into the queue is refused at once (503).
Knows nothing of HTTP.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from so8t.agent import Reply, SafeAgent, Verdict
from so8t.conversation import Reading
from so8t.errors import SO8TError
from so8t.serving.metrics import Metrics
from so8t.serving.wire import WireError

log = logging.getLogger(__name__)

T = TypeVar("T")

Deliver = Callable[[Reply | Exception | None], None]
"""Takes an answer's replies, `None` at the end, or what ended it."""


@dataclass(frozen=True)
class Limits:
    """`batch`: decisions taken in one pass. `wait`: seconds that the first of a batch waits for others; while answers are on
    their way nothing waits. `queue`: decisions and answers that may wait. `answers`: on their way at the same time. `seconds`:
    that a request may take."""

    batch: int = 16
    wait: float = 0.005
    queue: int = 256
    answers: int = 4
    seconds: float = 120.0


@dataclass
class _Decision:
    reading: Reading
    written: bool
    accepted: float
    future: Future[Verdict] = field(default_factory=Future)


@dataclass(eq=False)
class Answering:
    """An answer on its way. `cancel` ends it at the next step: nobody waits for it any more."""

    begin: Callable[[], Iterator[Reply]]
    deliver: Deliver
    replies: Iterator[Reply] | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Nothing is delivered from now on."""
        self.cancelled = True


@dataclass
class _Task:
    act: Callable[[], object]
    future: Future = field(default_factory=Future)


class Worker:
    """Batches for an agent, within limits."""

    def __init__(self, agent: SafeAgent, limits: Limits, metrics: Metrics):
        self.agent, self.limits, self.metrics = agent, limits, metrics
        self._changed = threading.Condition()
        self._decisions: deque[_Decision] = deque()
        self._asked: deque[Answering] = deque()
        self._tasks: deque[_Task] = deque()
        self._answering: list[Answering] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="so8t-worker", daemon=True)
        metrics.waiting.set_function(lambda: self.waiting)

    # -- for any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Accepts nothing more, finishes what was accepted, and returns when that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether what is accepted will be done."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Decisions and answers that wait."""
        return len(self._decisions) + len(self._asked) + len(self._tasks)

    def decide(self, requests: Sequence[tuple[str, str | None]]) -> list[Future[Verdict]]:
        """Puts requests with their contexts into the queue, or none of them; their decisions are written down. A future that is
        cancelled in time is not decided.

        Raises:
            WireError: 503, the queue is full or the worker stops.
        """
        jobs = [_Decision(Reading(*request), True, time.monotonic()) for request in requests]
        with self._room_for(len(jobs)):
            self._decisions.extend(jobs)
        return [job.future for job in jobs]

    def read(self, asked: Sequence[Reading]) -> list[Future[Verdict]]:
        """Has texts of a request that was accepted before decided in the same batches; whoever asks writes down what follows.

        Raises:
            WireError: 503, the worker has stopped.
        """
        jobs = [_Decision(reading, False, time.monotonic()) for reading in asked]
        with self._running():
            self._decisions.extend(jobs)
        return [job.future for job in jobs]

    def answer(self, begin: Callable[[], Iterator[Reply]], deliver: Deliver) -> Answering:
        """Puts an answer into the queue; `begin` and `deliver` are called in the worker's thread.

        Raises:
            WireError: 503, the queue is full or the worker stops.
        """
        job = Answering(begin, deliver)
        with self._room_for(1):
            self._asked.append(job)
        return job

    def have_done(self, act: Callable[[], T], *, accepted: bool = False) -> Future[T]:
        """Has something done in the worker's thread; one that is cancelled in time is not done. `accepted`: it belongs to a
        request that was accepted before, so it finds room.

        Raises:
            WireError: 503, the queue is full or the worker stops.
        """
        task = _Task(act)
        with self._running() if accepted else self._room_for(1):
            self._tasks.append(task)
        return task.future

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Under the lock, if what is added will still be done."""
        with self._changed:
            if not self._thread.is_alive():
                raise WireError(503, "the server has stopped", code="overloaded")
            yield
            self._changed.notify()

    @contextmanager
    def _room_for(self, jobs: int) -> Iterator[None]:
        """Under the lock, if there is room."""
        with self._changed:
            full = self.waiting + jobs > self.limits.queue
            if full or not self.alive:
                self.metrics.turned_away.inc()
                why = "the queue is full" if full else "the server is stopping"
                raise WireError(503, f"{why}: try again in a moment", code="overloaded", headers={"Retry-After": "1"})
            yield
            self._changed.notify()

    # -- in the worker's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            self._decide(self._batch())
            for job in list(self._answering):
                if not self._step(job):
                    self._answering.remove(job)
            self._do(len(self._tasks))

    def _wait_for_work(self) -> bool:
        """Returns when there is something to do, or with False when the worker stops and nothing is left."""
        with self._changed:
            while not (self._decisions or self._asked or self._answering or self._tasks):
                if self._stopping:
                    return False
                self._changed.wait()
            if self._decisions and not (self._asked or self._answering or self._tasks):
                deadline = self._decisions[0].accepted + self.limits.wait
                while len(self._decisions) < self.limits.batch and not (self._asked or self._tasks or self._stopping):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
            while self._asked and len(self._answering) < self.limits.answers:
                self._answering.append(self._asked.popleft())
            return True

    def _batch(self) -> list[_Decision]:
        with self._changed:
            taken = [self._decisions.popleft() for _ in range(min(self.limits.batch, len(self._decisions)))]
        return [job for job in taken if job.future.set_running_or_notify_cancel()]

    def _decide(self, jobs: list[_Decision]) -> None:
        if not jobs:
            return
        self.metrics.batch.observe(len(jobs))
        begun = time.perf_counter()
        try:
            pairs = list(zip(jobs, self.agent.verdicts([job.reading for job in jobs]), strict=True))
            written = [(job.reading, verdict) for job, verdict in pairs if job.written]
            self.agent.write_decisions(written, time.perf_counter() - begun)
        except Exception as error:  # the audit log cannot be written, say: no decision leaves without it
            log.exception("a batch of decisions failed")
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, verdict in pairs:
            if job.written:
                self.metrics.decided(verdict)
            job.future.set_result(verdict)

    def _do(self, tasks: int) -> None:
        for _ in range(tasks):
            task = self._tasks.popleft()
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                task.future.set_result(task.act())
            except Exception as error:
                task.future.set_exception(error)

    def _step(self, job: Answering) -> bool:
        """Takes an answer one reply further; whether it goes on."""
        if job.cancelled:
            job.replies = None  # closes the generator
            return False
        try:
            if job.replies is None:
                job.replies = job.begin()
            reply = next(job.replies, None)
        except Exception as error:
            if not isinstance(error, SO8TError):
                log.exception("an answer failed")
            job.deliver(error)
            return False
        if reply is not None and reply.finished:
            self.metrics.decided(reply.verdict)
        job.deliver(reply)
        return reply is not None
