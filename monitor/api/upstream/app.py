"""The proxy's application: its routes, health and metrics; the edge around it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from monitor.api.app import bare_app
from monitor.api.edge import Edge
from monitor.api.upstream.routes import Proxy, upstream_routes
from monitor.metrics import Metrics
from monitor.metrics.expose import exposition


def create_app(proxy: Proxy, metrics: Metrics, edge: Edge, others: Sequence[APIRouter] = ()) -> ASGIApp:
    """others: routes beside those that go on to the upstream"""
    app, engine = bare_app(metrics), proxy.engine
    app.include_router(upstream_routes(proxy))
    for routes in others:
        app.include_router(routes)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/ready")
    async def readiness() -> Response:
        reason = engine.readiness()
        metrics.ready.set(reason is None)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"} | dict(engine.describe()))

    @app.get("/metrics")
    async def scraped() -> Response:
        metrics.ready.set(engine.readiness() is None)
        return Response(exposition(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return edge.around(app)
