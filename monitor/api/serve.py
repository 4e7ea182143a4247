"""Start-up and shutdown of a server: load, verify, self-test, listen; drain, flush, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import traceback
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from monitor.api.admin.control import Serving
from monitor.api.app import create_app
from monitor.api.door import admin_door, listening, open_socket, plainly
from monitor.api.edge import Edge
from monitor.api.hangup import remember_hangups
from monitor.api.judging import Judging
from monitor.api.openai import Service
from monitor.api.others import other_routes
from monitor.api.sinks import Sinks, announce
from monitor.config import Settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.live import LiveProbes, ServedModel, load_live, names_of
from monitor.metrics import Metrics
from monitor.metrics.expose import pulse
from monitor.metrics.processes import shared_folder
from monitor.types import Format, Phase
from probes_store.store import Store

EXIT_ENGINE_DIED = 3
_ROUTES: dict[Format, str] = {"chat": "chat", "raw": "completions"}


class Server(uvicorn.Server):
    """uvicorn, told to drain the engine at the signal and not only when the last connection is gone.

    beside: entered in the event loop, for as long as it serves
    """

    def __init__(
        self, config: uvicorn.Config, engine: EmbeddedEngine, beside: contextlib.AbstractAsyncContextManager[None]
    ) -> None:
        super().__init__(config)
        self._engine, self._beside = engine, beside

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        with self.capture_signals():  # also while what is beside it starts and stops
            async with self._beside:
                await self._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Off this frame: the handler may have interrupted a holder of the engine's lock.
        threading.Thread(target=self._engine.drain, daemon=True).start()
        super().handle_exit(sig, frame)
        # uvicorn raises the signal again once it has stopped; then our own exit code and flushing would never happen.
        self._captured_signals.clear()


def load(settings: Settings) -> tuple[LoadedModel, LiveProbes]:
    """The model and its verified probes. raises: MidstreamError"""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = load_model(
        settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype or "float32"
    )
    return model, load_live(model.served(), Store(settings.store), settings)


def serve(settings: Settings) -> int:
    """Run until a signal; returns the exit code. raises: MidstreamError before anything is served"""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_socket(settings.host, settings.port))
        remember_hangups()
        shared_folder()  # an unusable one is known before the model is loaded
        metrics = Metrics()
        edge = Edge.of(settings, metrics, lambda key: sinks.offenders.refused_for(key), lambda: sinks.traffic)
        door = stack.enter_context(admin_door(edge))
        console = Console(stderr=True)
        with console.status(f"loading {settings.model} …"):
            model, live = load(settings)
        sinks = Sinks(settings, metrics, edge.spans)
        stack.callback(sinks.close)
        failed = threading.Event()
        server: list[Server] = []

        def died(error: BaseException) -> None:
            failed.set()
            server[0].should_exit = True
            # Where, and not what it says: that may quote an answer.
            at = traceback.extract_tb(error.__traceback__)[-1:]
            where = "".join(f" in {frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in at)
            console.print(f"the engine has died: {type(error).__name__}{where}", style="red", markup=False)

        features = sinks.keep_features(settings, model.served())
        engine = EmbeddedEngine(model, live, settings, sinks, died, None if features is None else features.offer)
        stack.callback(engine.stop, 0.0)
        off = engine.check_canaries()
        if features is not None:
            features.attach(engine.rereading)
        announce(model.name, live, lambda: engine.describe()["active"], sinks)
        metrics.read("waiting_prompts", lambda: engine.describe()["waiting"])
        names = frozenset(names_of(model.served(), settings))
        vocabulary = model.module.config.get_text_config().vocab_size
        service = Service(engine, model.template, settings, names, vocabulary)
        judging = Judging(EmbeddedScorer(engine), model.template, settings, model.name)
        others = other_routes(judging, lambda: engine.live)
        app = create_app(service, metrics, engine.readiness, edge, others)
        bound_s = max(1, round(settings.shutdown_timeout_s))
        config = uvicorn.Config(app, timeout_graceful_shutdown=bound_s, **edge.server_options())
        beside = door.beside(embedded(engine, model.served()), sinks, plainly(console))
        server.append(Server(config, engine, beside))
        engine.start()
        console.print(summary(model.name, model.dtype, live, off))
        host, port = listening(listener)
        console.print(f"[bold]midstream ready[/] on http://{host}:{port}/v1  (metrics: /metrics)", highlight=False)
        with pulse(metrics, engine.readiness, sinks.beat):
            server[0].run(sockets=[listener])
        return EXIT_ENGINE_DIED if failed.is_set() else 0


def embedded(engine: EmbeddedEngine, model: ServedModel) -> Serving:
    def put(live: LiveProbes) -> None:
        engine.live = live

    async def stage(live: LiveProbes) -> None:
        await asyncio.to_thread(engine.try_out, live)

    return Serving(engine.describe, lambda: engine.live, put, stage, EmbeddedScorer(engine), model)


def summary(name: str, dtype: str, live: LiveProbes, off: float) -> Table:
    """What the server prints when it is ready."""
    table = Table(title=f"{name} · {dtype} · self-test within {off:.1g}")
    for column in ("probe", "layers", "route", "prompt", "response"):
        table.add_column(column)
    for probe in live.probes:
        named, blocks = f"{probe.name} {probe.card.version}", probe.card.blocks
        routes = {_ROUTES[form]: _modes(live, form, probe.name) for form in live.rules}
        if len(set(routes.values())) == 1:
            routes = {"all": routes["chat"]}
        for route, cells in routes.items():
            table.add_row(named, blocks, route, *cells)
    return table


def _modes(live: LiveProbes, form: Format, probe: str) -> tuple[str, ...]:
    own = {r.phase: r for r in live.rules[form] if r.probe == probe}
    return tuple(f"{own[p].mode}{_above(own[p].threshold)}" for p in Phase)


def _above(threshold: float | None) -> str:
    """Two digits after the point, or three in all: so that a table of a probe fits into 80 columns."""
    if threshold is None:
        return ""
    return f" > {threshold:.{2 if abs(threshold) < 10 else 1}f}"
