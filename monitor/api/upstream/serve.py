"""`midstream serve --upstream URL`: load the observer, self-test, listen; drain, flush, exit code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from rich.console import Console

from monitor.api.admin.control import Serving
from monitor.api.door import admin_door, listening, open_socket, plainly
from monitor.api.edge import Edge
from monitor.api.hangup import remember_hangups
from monitor.api.judging import Judging
from monitor.api.others import other_routes
from monitor.api.serve import Server, summary
from monitor.api.sinks import Sinks, announce
from monitor.api.upstream.app import create_app
from monitor.api.upstream.observers import Observers
from monitor.api.upstream.routes import Proxy
from monitor.config import Settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.metrics.expose import pulse
from monitor.metrics.processes import shared_folder
from monitor.observer.load import load
from monitor.observer.reader import LocalObserver
from monitor.upstream.choice import Lag
from monitor.upstream.engine import ObserverEngine, ObserverScorer
from monitor.upstream.transport import Bounds, Upstream


def serve(settings: Settings) -> int:
    """Run until a signal; returns the exit code. raises: MidstreamError before anything is served"""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_socket(settings.host, settings.port))
        remember_hangups()
        shared_folder()  # an unusable one is known before the model is loaded
        if settings.dtype is not None:
            raise ConfigInvalid(
                f"setting 'dtype' has value {settings.dtype!r}, but the observer behind --upstream is float32; unset "
                "it (observer_int8 makes the observer smaller)"
            )
        if settings.log_features:
            raise ConfigInvalid(
                "log_features needs an engine of ours: the observer behind --upstream gives scores, never activations; "
                "turn it off, or serve the model with --engine embedded or vllm"
            )
        upstream = connect(settings)
        metrics = Metrics()
        edge = Edge.of(settings, metrics, lambda key: sinks.offenders.refused_for(key), lambda: sinks.traffic)
        door = stack.enter_context(admin_door(edge))
        console = Console(stderr=True)
        with console.status(f"loading the observer of {settings.model} …"):
            loaded = load(settings, settings.observer_int8)
        sinks = Sinks(settings, metrics, edge.spans)
        stack.callback(sinks.close)
        observer, live = loaded.observer, loaded.live
        lag = Lag(settings.observer_lag_tokens, settings.observer_lag_s, settings.observer_pause_s)
        engine = Watched(observer, live, sinks, lag, lambda: upstream.state)
        announce(observer.model.name, live, lambda: engine.describe()["active"], sinks)
        judging = Judging(ObserverScorer(engine), observer.template, settings, observer.model.name)
        proxy = Proxy(engine, upstream, settings, judging)
        app = create_app(proxy, metrics, edge, other_routes(judging, lambda: engine.live))
        bound_s = max(1, round(settings.shutdown_timeout_s))
        config = uvicorn.Config(app, timeout_graceful_shutdown=bound_s, **edge.server_options())
        observers = Observers(settings, engine, loaded)
        beside = closing(upstream, door.beside(serving(engine, observers), sinks, plainly(console)))
        server = Server(config, cast(Any, engine), beside)  # all it needs is `drain`
        observer.start()
        stack.callback(observers.stop)
        stack.callback(engine.stop)
        console.print(summary(observer.model.name, observer.model.dtype, live, loaded.off))
        host, port = listening(listener)
        where = f"http://{host}:{port}/v1  ->  {shown(settings.upstream or '')}"
        console.print(f"[bold]midstream ready[/] on {where}  (metrics: /metrics)", highlight=False)
        with pulse(metrics, engine.readiness, sinks.beat):
            server.run(sockets=[listener])
        return 0


class Watched(ObserverEngine):
    """With the state of the observer's own thread."""

    def readiness(self) -> str | None:
        return super().readiness() or cast(LocalObserver, self.observer).readiness()

    def describe(self) -> Mapping[str, Any]:
        return {**cast(LocalObserver, self.observer).describe(), **super().describe()}


def connect(settings: Settings) -> Upstream:
    """raises: ConfigInvalid for a URL with a key in it, or a variable that is not set"""
    url, name = settings.upstream or "", settings.upstream_key_env
    parts = urlsplit(url)
    if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
        raise ConfigInvalid("setting 'upstream' must be like https://HOST/v1, without a key or a query in it")
    if name is not None and not os.environ.get(name):
        raise ConfigInvalid(f"upstream_key_env names {name}, which is not set; set it, or leave the setting out")
    if parts.path in ("", "/"):
        url = url.rstrip("/") + "/v1"
    bounds = Bounds(
        connections=settings.max_concurrent,
        first_s=settings.upstream_first_s,
        read_s=settings.upstream_read_s,
        retries=settings.upstream_retries,
    )
    return Upstream(url, None if name is None else os.environ[name], bounds)


@contextlib.asynccontextmanager
async def closing(upstream: Upstream, beside: contextlib.AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    async with beside:
        try:
            yield
        finally:
            await upstream.close()


def serving(engine: ObserverEngine, observers: Observers) -> Serving:
    scorer = ObserverScorer(engine)
    return Serving(engine.describe, lambda: engine.live, observers.put, observers.stage, scorer, engine.observer.model)


def shown(url: str) -> str:
    return url[:100]
