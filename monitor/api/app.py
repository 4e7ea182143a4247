"""The FastAPI application: routes, errors in one shape, health and metrics; the edge around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from monitor import __version__
from monitor.api.edge import Edge
from monitor.api.errors import ApiError, validation
from monitor.api.openai import Service, openai_routes
from monitor.metrics import Metrics
from monitor.metrics.expose import exposition


def create_app(
    service: Service,
    metrics: Metrics,
    ready: Callable[[], str | None],
    edge: Edge,
    others: Sequence[APIRouter] = (),
) -> ASGIApp:
    """ready: None when the server is, else why not; others: routes beside those that generate"""
    app = bare_app(metrics)
    app.include_router(openai_routes(service))
    for routes in others:
        app.include_router(routes)

    state_routes(app, metrics, ready, service.engine.describe)
    return edge.around(app)


def state_routes(
    app: FastAPI, metrics: Metrics, ready: Callable[[], str | None], describe: Callable[[], Mapping[str, Any]]
) -> None:
    """What a supervisor asks: health, readiness, metrics. ready: None when the server is, else why not"""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/ready")
    async def readiness() -> Response:
        reason = ready()
        metrics.ready.set(reason is None)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"} | dict(describe()))

    @app.get("/metrics")
    async def scraped() -> Response:
        metrics.ready.set(ready() is None)
        return Response(exposition(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def bare_app(metrics: Metrics) -> FastAPI:
    """Without routes: every error in OpenAI's shape, and counted."""
    app = FastAPI(title="midstream", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)

    def refuse(error: ApiError) -> JSONResponse:
        metrics.rejected.labels(str(error.status)).inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(validation(error.errors()))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # A bug of ours; starlette logs its traceback. The client gets the shape it can read, and no details.
        return refuse(ApiError(500, "internal error; the server's log says more", kind="server_error"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        hint = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return refuse(ApiError(error.status_code, hint, code="not_found" if error.status_code == 404 else None))

    return app
