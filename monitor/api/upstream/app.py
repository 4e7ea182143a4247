"""The proxy's application: its routes, health and metrics; the edge around it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.types import ASGIApp

from monitor.api.app import bare_app, state_routes
from monitor.api.edge import Edge
from monitor.api.upstream.routes import Proxy, upstream_routes
from monitor.metrics import Metrics


def create_app(proxy: Proxy, metrics: Metrics, edge: Edge, others: Sequence[APIRouter] = ()) -> ASGIApp:
    """others: routes beside those that go on to the upstream"""
    app, engine = bare_app(metrics), proxy.engine
    app.include_router(upstream_routes(proxy))
    for routes in others:
        app.include_router(routes)

    state_routes(app, metrics, engine.readiness, engine.describe)
    return edge.around(app)
