"""Start-up and shutdown of a server: load, verify, self-test, listen; drain, flush, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from monitor.api.admin.control import Serving, operations, show_probes
from monitor.api.admin.feed import Feed
from monitor.api.admin.port import check_admin_key, controlled
from monitor.api.app import create_app
from monitor.api.edge import Edge
from monitor.api.features import eraser, feature_log
from monitor.api.hangup import Say, remember_hangups
from monitor.api.judging import Judging
from monitor.api.openai import Service
from monitor.api.others import other_routes
from monitor.api.spans import Spans
from monitor.audit import Audit
from monitor.config import Settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.errors import ConfigInvalid, MidstreamError
from monitor.live import LiveProbes, ServedModel, load_live
from monitor.metrics import Metrics
from monitor.metrics.expose import pulse
from monitor.metrics.processes import shared_folder
from monitor.notice import Outbox, Webhook, notice, print_line
from monitor.offenders import Offenders
from monitor.traffic import Cipher, TrafficLog
from monitor.traffic.features import FeatureLog
from monitor.types import Phase, Record
from probes_store.store import Store, model_slug

EXIT_ENGINE_DIED = 3


class Sinks:
    """The engine's observer: one Record to metrics, traffic log, live view, offenders, stdout, webhook, spans."""

    def __init__(self, settings: Settings, metrics: Metrics, spans: Spans | None = None) -> None:
        self.metrics, self.spans = metrics, spans
        self.traffic = TrafficLog(
            settings.log,
            settings.max_records,
            settings.record_queue,
            metrics.records_dropped.inc,
            days=settings.log_days,
            required=settings.log_required,
            wait_s=settings.log_wait_s,
            cipher=Cipher(settings.log_key) if settings.log_text else None,
        )
        self.feed = Feed()
        self.features: FeatureLog | None = None
        self.lines = Outbox(
            settings.webhook_queue, print_line, lambda result: metrics.notice_lines.labels(result).inc()
        )
        self.webhook: Webhook | None = None
        if settings.webhook_url is not None:
            self.webhook = Webhook(
                settings.webhook_url,
                settings.webhook_queue,
                settings.webhook_attempts,
                lambda result: metrics.webhook.labels(result).inc(),
            )
        self.offenders = Offenders(
            metrics.key_events,
            self._tell,
            window_s=settings.offender_window_s,
            limit=settings.offender_limit,
            block_s=settings.offender_block_s,
            metric_keys=settings.offender_metric_keys,
        )

    def record(self, record: Record) -> None:
        self.metrics.record(record)
        self.traffic.put(record)
        self.feed.put(record)
        event = notice(record)
        if event is not None:
            self._tell(event)
        self.offenders.note(record)
        if self.spans is not None:
            self.spans.record(record)

    def _tell(self, event: Mapping[str, Any]) -> None:
        self.lines.put(event)
        if self.webhook is not None:
            self.webhook.put(event)

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.metrics.scored(seconds, n_tokens)

    def beat(self) -> None:
        """Every few seconds: what is too slow for a scrape."""
        try:
            backlog: float = self.traffic.backlog()
        except MidstreamError:  # a log that can't be read: its losses are counted, its backlog is not known
            backlog = math.nan
        self.metrics.review_backlog.set(backlog)

    def keep_features(self, settings: Settings, model: ServedModel) -> FeatureLog | None:
        """Before an engine is made that offers its sequences; None unless the setting is on. raises: ConfigInvalid"""
        self.features = feature_log(settings, model, self.traffic, self.metrics)
        return self.features

    def close(self) -> None:
        if self.features is not None:
            self.features.close()
        self.traffic.close()
        self.lines.close()
        if self.webhook is not None:
            self.webhook.close()
        if self.spans is not None:
            self.spans.close()


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


def open_socket(host: str, port: int, instead: str = "--port or --host") -> socket.socket:
    """Bind before the model is loaded: a taken port is known in a moment. raises: ConfigInvalid"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigInvalid(f"can't listen on {host}:{port}: {error.strerror}; choose another {instead}") from error
    return listener


@dataclass(frozen=True, slots=True)
class Door:
    """What the admin port needs before the model is loaded. listener: bound; None without an admin key"""

    edge: Edge
    listener: socket.socket | None
    audit: Audit

    def beside(self, serving: Serving, sinks: Sinks, say: Say) -> contextlib.AbstractAsyncContextManager[None]:
        """The admin port and SIGHUP, to be entered in the event loop of the data server."""
        settings, metrics = self.edge.settings, sinks.metrics
        erase = eraser(settings, sinks.traffic, sinks.features)
        what = operations(
            serving,
            settings,
            self.edge.keys,
            self.audit,
            sinks.offenders,
            metrics,
            erase,
            say=say,
            feed=sinks.feed,
            features=sinks.features,
        )

        def counted(outcome: str) -> None:
            metrics.admin_requests.labels(outcome).inc()

        return controlled(what, settings, self.listener, counted, self.edge.limited, say)


@contextlib.contextmanager
def admin_door(edge: Edge) -> Iterator[Door]:
    """raises: ConfigInvalid for an admin key that is a data key, a taken port, an audit log that can't be written"""
    settings = edge.settings
    check_admin_key(settings, edge.keys)
    with contextlib.ExitStack() as stack:
        listener = None
        if settings.admin_key is not None:
            where = settings.admin_host, settings.admin_port
            listener = stack.enter_context(open_socket(*where, "MIDSTREAM_ADMIN_PORT or MIDSTREAM_ADMIN_HOST"))
        yield Door(edge, listener, stack.enter_context(contextlib.closing(Audit(settings.audit))))


def plainly(console: Console) -> Say:
    """Lines as they are: what comes out of a file may look like markup."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


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
            console.print(f"[red]the engine has died: {type(error).__name__}: {error}[/]")
            server[0].should_exit = True

        features = sinks.keep_features(settings, model.served())
        engine = EmbeddedEngine(model, live, settings, sinks, died, None if features is None else features.offer)
        stack.callback(engine.stop, 0.0)
        off = live.check_canaries(model.template, engine.prefill, settings.canary_tolerance)
        if features is not None:
            features.attach(engine.rereading)
        announce(model.name, live, lambda: engine.describe()["active"], sinks)
        metrics.read("waiting_prompts", lambda: engine.describe()["waiting"])
        names = frozenset({settings.model, model.name, model_slug(model.name)})
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
        host, port = listener.getsockname()[:2]
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


def announce(model: str, live: LiveProbes, active: Callable[[], float], sinks: Sinks) -> None:
    """Metrics of what serves. active: sequences in the engine"""
    metrics = sinks.metrics
    metrics.model = model
    show_probes(metrics, live)
    metrics.read("active_sequences", active)
    metrics.read("record_queue_depth", lambda: sinks.traffic.depth)


def summary(name: str, dtype: str, live: LiveProbes, off: float) -> Table:
    """What the server prints when it is ready."""
    table = Table(title=f"{name} · {dtype} · self-test passed (largest difference {off:.1g})")
    for column in ("probe", "version", "layer", "route", "prompt", "response"):
        table.add_column(column)
    for probe in live.probes:
        for form, rules in live.rules.items():
            own = {r.phase: r for r in rules if r.probe == probe.name}
            cells = [f"{own[p].mode}" + ("" if (t := own[p].threshold) is None else f" above {t:.2f}") for p in Phase]
            layers = ",".join(map(str, probe.card.layers))
            route = "chat" if form == "chat" else "completions"
            table.add_row(probe.name, probe.card.version, layers, route, *cells)
    return table
