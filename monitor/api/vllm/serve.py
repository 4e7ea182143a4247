"""vLLM's server with our gate on every route that generates: mounted by allow-list, started, drained."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop
from fastapi import FastAPI
from prometheus_client import REGISTRY
from rich.console import Console
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http

from monitor.api.admin.control import Serving
from monitor.api.app import bare_app
from monitor.api.door import Door, admin_door, listening, open_socket, plainly
from monitor.api.edge import Edge
from monitor.api.hangup import remember_hangups
from monitor.api.judging import Judging
from monitor.api.others import other_routes
from monitor.api.serve import EXIT_ENGINE_DIED, summary
from monitor.api.sinks import Sinks, announce
from monitor.api.vllm.gate import Gate
from monitor.api.vllm.wires import WIRES
from monitor.config import Settings
from monitor.engines.vllm.launch import Plan, Started, plan, started
from monitor.engines.vllm.selftest import check_canaries
from monitor.errors import ConfigInvalid
from monitor.live import LiveProbes
from monitor.metrics import Metrics
from monitor.metrics.expose import pulse

# Routes of vLLM that do not generate and change nothing.
_HARMLESS = frozenset(
    {
        "/health",
        "/load",
        "/ping",
        "/version",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)


def mount(app: FastAPI, plan: Plan, metrics: Metrics) -> None:
    """Keep the harmless routes, put a gate around those that generate, and take every other one away."""
    model, names = plan.model, frozenset(plan.arguments.served_model_name)
    kept: list[BaseRoute] = []
    for route in app.router.routes:
        path = getattr(route, "path", None)
        if path in WIRES and isinstance(route, Route):
            route.app = Gate(route.app, path, model.template, plan.settings, metrics, model.name, names)
            kept.append(route)
        elif path in _HARMLESS:
            kept.append(route)
    app.router.routes[:] = kept
    app.router.redirect_slashes = False  # a path is a route's or is none; and Location would be the client's own Host


def add_ours(app: FastAPI, running: Started, edge: Edge, metrics: Metrics) -> None:
    """/ready, the routes that only judge, and in front of everything the keys and the limits."""
    engine, judge, model = running.engine, running.judge, running.plan.model

    async def readiness(_request: object) -> Response:
        reason = _unready(engine)
        metrics.ready.set(reason is None)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready", "engine": "vllm"})

    app.router.routes.append(Route("/ready", readiness))
    # An application inside vLLM's, for errors of our shape.
    inside = bare_app(metrics)
    judging = Judging(running.scorer, model.template, running.plan.settings, model.name)
    for routes in other_routes(judging, lambda: judge.banks.current.live):
        inside.include_router(routes)
        for one in [r for r in routes.routes if isinstance(r, Route)]:
            route = Route(one.path, one.endpoint, methods=["POST"])  # vLLM prints each endpoint's name
            route.app = inside
            app.router.routes.append(route)
    # vLLM has built its own stack of middleware by now; ours goes outside of it.
    inner = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = edge.around(inner)


def _unready(engine: Any) -> str | None:
    return "the engine has died" if engine.errored else None


def serve(settings: Settings, extra: Sequence[str]) -> int:
    """Run until a signal; returns the exit code. extra: vLLM's arguments

    raises: MidstreamError before anything is served
    """
    if os.environ.get("VLLM_API_KEY"):
        # vLLM would look for it in a header that goes no further than our own check.
        raise ConfigInvalid("VLLM_API_KEY is set, but the keys are midstream's: unset it and set MIDSTREAM_API_KEY")
    with contextlib.ExitStack() as stack:
        remember_hangups()
        listener = stack.enter_context(open_socket(settings.host, settings.port))
        metrics = Metrics(REGISTRY)  # vLLM's own /metrics shows it
        edge = Edge.of(settings, metrics, lambda key: sinks.offenders.refused_for(key), lambda: sinks.traffic)
        door = stack.enter_context(admin_door(edge))
        console = Console(stderr=True)
        with console.status(f"reading {settings.model} …"):
            prepared = plan(settings, extra)
        sinks = Sinks(settings, metrics, edge.spans)
        stack.callback(sinks.close)
        sinks.keep_features(settings, prepared.model)
        code: int = uvloop.run(_serve(prepared, listener, sinks, door, console))
        return code


async def _serve(prepared: Plan, listener: socket.socket, sinks: Sinks, door: Door, console: Console) -> int:
    console.print(f"starting vLLM with {prepared.model.name} …", highlight=False)
    features = sinks.features
    async with started(prepared, sinks, offer=None if features is None else features.offer) as running:
        if features is not None:
            features.attach(running.rereading)
        app = await build(running, sinks.metrics, door.edge)
        announce(prepared.model.name, prepared.live, lambda: float(running.judge.active), sinks)
        console.print(summary(prepared.model.name, running.dtype, prepared.live, running.off))
        host, port = listening(listener)
        ready = f"[bold]midstream ready[/] on http://{host}:{port}/v1  (metrics: /metrics)"
        saying = asyncio.create_task(_say_when_listening(app, console, ready))
        ordered = _note_shutdown(running.engine)
        async with door.beside(_serving(running), sinks, plainly(console)):
            with pulse(sinks.metrics, lambda: _unready(running.engine), sinks.beat):
                stopped = await serve_http(app, sock=listener, host=host, port=port, **door.edge.server_options())
        saying.cancel()
        died = running.engine.errored and not ordered.is_set()
    await stopped
    return EXIT_ENGINE_DIED if died else 0


def _serving(running: Started) -> Serving:
    judge, model = running.judge, running.plan.model

    def describe() -> Mapping[str, Any]:
        return {"engine": "vllm", "active": judge.active}

    async def stage(live: LiveProbes) -> None:
        bank = await judge.banks.stage(live)
        if bank is not judge.banks.current:
            await check_canaries(running.scorer, running.plan, live, bank)

    return Serving(describe, lambda: judge.banks.current.live, judge.banks.put, stage, running.scorer, model)


async def _say_when_listening(app: FastAPI, console: Console, line: str) -> None:
    while not getattr(getattr(app.state, "server", None), "started", False):  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.05)
    console.print(line, highlight=False)


def _note_shutdown(engine: Any) -> threading.Event:
    """Set when the engine is told to stop: one that was stopped looks like one that died."""
    ordered, shutdown = threading.Event(), engine.shutdown

    def noted(timeout: float | None = None) -> None:
        ordered.set()
        shutdown(timeout=timeout)

    engine.shutdown = noted
    return ordered


async def build(running: Started, metrics: Metrics, edge: Edge | None = None) -> FastAPI:
    """vLLM's application for a started engine, with our gate. edge: None makes one of the settings"""
    engine, arguments, settings = running.engine, running.plan.arguments, running.plan.settings
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    mount(app, running.plan, metrics)
    edge = edge or Edge.of(settings, metrics)
    add_ours(app, running, edge, metrics)
    return app
