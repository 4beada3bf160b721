"""What Prometheus reads at `/metrics`: requests, decisions, batches, the queue, and the process's memory."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from so8t.agent import Verdict

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("so8t_requests", "HTTP requests answered", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "so8t_request_seconds", "Until the answer's last byte", ("path",), buckets=_SECONDS, registry=self.registry
        )
        self.decisions = Counter("so8t_decisions", "Last decision on each request", ("decision",), registry=self.registry)
        self.failures = Counter("so8t_failures", "Decisions that failed; they count as ESCALATE", registry=self.registry)
        self.batch = Histogram("so8t_batch_rows", "Decisions taken in one pass", buckets=_ROWS, registry=self.registry)
        self.waiting = Gauge("so8t_queue_waiting", "Decisions and answers that wait", registry=self.registry)
        self.pending = Gauge("so8t_escalations_pending", "Escalations that wait for a person", registry=self.registry)
        self.turned_away = Counter("so8t_turned_away", "Requests refused because the queue was full", registry=self.registry)

    def decided(self, verdict: Verdict) -> None:
        """Counts one."""
        self.decisions.labels(verdict.label.name).inc()
        self.failures.inc(verdict.failed)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class Measured:
    """Counts and times every request, by the path as it is written in the route: no visitor can make up new ones."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
