"""The server as an ASGI application: routes, limits, health, figures. Starting up starts the worker, shutting down finishes."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.trustedhost import TrustedHostMiddleware

from so8t.serving.decision_routes import decision_routes
from so8t.serving.http import BearerToken, BodyLimit, tell_errors
from so8t.serving.metrics import Measured
from so8t.serving.openai_routes import openai_routes
from so8t.serving.page_routes import page_routes
from so8t.serving.service import Service
from so8t.serving.token_routes import token_routes
from so8t.serving.wire import WireError

OPEN_PATHS = frozenset({"/healthz", "/"})
"""What needs no token."""

Routes = Callable[[Service], APIRouter]
ROUTES: tuple[Routes, ...] = (openai_routes, decision_routes, token_routes, page_routes)


def operation_routes(service: Service) -> APIRouter:
    """Health and figures."""
    routes = APIRouter()

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        if not service.worker.alive:
            raise WireError(503, "the worker has stopped")
        return {"status": "ok", "model": service.model}

    @routes.get("/metrics")
    def metrics() -> Response:
        service.metrics.pending.set(len(service.queue.listed()))
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


def make_app(
    service: Service,
    *,
    max_bytes: int,
    token: str | None = None,
    hosts: Sequence[str] = (),
    routes: Sequence[Routes] = ROUTES,
) -> FastAPI:
    """The application. `hosts`: names that a request may call the server by, if not any: on loopback, a foreign page whose name
    leads here must not get through."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(title="so8t", lifespan=lifespan)
    for of in (*routes, operation_routes):
        app.include_router(of(service))
    tell_errors(app)
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    if token is not None:
        app.add_middleware(BearerToken, token=token, open_paths=OPEN_PATHS)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Measured, metrics=service.metrics)
    return app
