"""vLLM's server with our gate on every route that generates: mounted by allow-list, started, drained."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
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

from monitor.api.app import Front
from monitor.api.serve import EXIT_ENGINE_DIED, Sinks, announce, open_socket, summary
from monitor.api.vllm.gate import Gate
from monitor.api.vllm.wire import WIRES
from monitor.config import Settings
from monitor.engines.vllm.launch import Plan, Started, plan, started
from monitor.metrics import Metrics
from monitor.template import ChatTemplate

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


def mount(app: FastAPI, template: ChatTemplate, settings: Settings, metrics: Metrics) -> None:
    """Keep the harmless routes, put a gate around those that generate, and take every other one away."""
    kept: list[BaseRoute] = []
    for route in app.router.routes:
        path = getattr(route, "path", None)
        if path in WIRES and isinstance(route, Route):
            route.app = Gate(route.app, path, template, settings, metrics)
            kept.append(route)
        elif path in _HARMLESS:
            kept.append(route)
    app.router.routes[:] = kept


def add_ours(app: FastAPI, settings: Settings, ready: Callable[[], str | None], metrics: Metrics) -> None:
    """/ready, and in front of everything the key and the bound on bodies."""

    async def readiness(_request: object) -> Response:
        reason = ready()
        metrics.ready.set(reason is None)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready", "engine": "vllm"})

    app.router.routes.append(Route("/ready", readiness))
    # vLLM has built its own stack of middleware by now; ours goes outside of it.
    inner = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = Front(inner, settings.api_key, settings.max_body_bytes)


def serve(settings: Settings, extra: Sequence[str]) -> int:
    """Run until a signal; returns the exit code. extra: vLLM's arguments

    raises: MidstreamError before anything is served
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_socket(settings.host, settings.port))
        console = Console(stderr=True)
        with console.status(f"reading {settings.model} …"):
            prepared = plan(settings, extra)
        metrics = Metrics(REGISTRY)  # vLLM's own /metrics shows it
        sinks = Sinks(settings, metrics)
        stack.callback(sinks.close)
        code: int = uvloop.run(_serve(prepared, listener, sinks, metrics, console))
        return code


async def _serve(prepared: Plan, listener: socket.socket, sinks: Sinks, metrics: Metrics, console: Console) -> int:
    console.print(f"starting vLLM with {prepared.model.name} …", highlight=False)
    async with started(prepared, sinks) as running:
        app = await build(running, metrics)
        announce(metrics, prepared.live, lambda: float(running.judge.active), sinks)
        console.print(summary(prepared.model.name, running.dtype, prepared.live, running.off))
        host, port = listener.getsockname()[:2]
        ready = f"[bold]midstream ready[/] on http://{host}:{port}/v1  (metrics: /metrics)"
        saying = asyncio.create_task(_say_when_listening(app, console, ready))
        ordered = _note_shutdown(running.engine)
        stopped = await serve_http(
            app, sock=listener, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=5
        )
        saying.cancel()
        died = running.engine.errored and not ordered.is_set()
    await stopped
    return EXIT_ENGINE_DIED if died else 0


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


async def build(running: Started, metrics: Metrics) -> FastAPI:
    """vLLM's application for a started engine, with our gate."""
    engine, arguments, settings = running.engine, running.plan.arguments, running.plan.settings
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    mount(app, running.plan.model.template, settings, metrics)
    add_ours(app, settings, lambda: "the engine has died" if engine.errored else None, metrics)
    return app
