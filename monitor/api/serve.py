"""Start-up and shutdown of a server: load, verify, self-test, listen; drain, flush, exit code."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from monitor.api.app import create_app
from monitor.api.openai import Service
from monitor.config import Settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.live import LiveProbes, load_live
from monitor.metrics import Metrics
from monitor.notice import Outbox, Webhook, notice, print_line
from monitor.traffic import TrafficLog
from monitor.types import ConfigInvalid, Phase, Record
from probes_store.store import Store, model_slug

EXIT_ENGINE_DIED = 3


class Sinks:
    """The engine's observer: one Record to metrics, traffic log, stdout and webhook."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.metrics = metrics
        self.traffic = TrafficLog(
            settings.records, settings.max_records, settings.record_queue, metrics.records_dropped.inc
        )
        self.lines = Outbox(settings.webhook_queue, print_line, lambda result: metrics.lines.labels(result).inc())
        self.webhook: Webhook | None = None
        if settings.webhook_url is not None:
            self.webhook = Webhook(
                settings.webhook_url,
                settings.webhook_queue,
                settings.webhook_attempts,
                lambda result: metrics.webhook.labels(result).inc(),
            )

    def record(self, record: Record) -> None:
        self.metrics.record(record)
        self.traffic.put(record)
        event = notice(record)
        if event is not None:
            self.lines.put(event)
            if self.webhook is not None:
                self.webhook.put(event)

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.metrics.scored(seconds, n_tokens)

    def close(self) -> None:
        self.traffic.close()
        self.lines.close()
        if self.webhook is not None:
            self.webhook.close()


class Server(uvicorn.Server):
    """uvicorn, told to drain the engine at the signal and not only when the last connection is gone."""

    def __init__(self, config: uvicorn.Config, engine: EmbeddedEngine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Off this frame: the handler may have interrupted a holder of the engine's lock.
        threading.Thread(target=self._engine.drain, daemon=True).start()
        super().handle_exit(sig, frame)
        # uvicorn raises the signal again once it has stopped; then our own exit code and flushing would never happen.
        self._captured_signals.clear()


def open_socket(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded: a taken port is known in a moment. raises: ConfigInvalid"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigInvalid(
            f"can't listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
    return listener


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
        console = Console(stderr=True)
        with console.status(f"loading {settings.model} …"):
            model, live = load(settings)
        metrics = Metrics()
        sinks = Sinks(settings, metrics)
        stack.callback(sinks.close)
        failed = threading.Event()
        server: list[Server] = []

        def died(error: BaseException) -> None:
            failed.set()
            console.print(f"[red]the engine has died: {type(error).__name__}: {error}[/]")
            server[0].should_exit = True

        engine = EmbeddedEngine(model, live, settings, sinks, died)
        stack.callback(engine.stop, 0.0)
        off = live.check_canaries(model.template, engine.prefill, settings.canary_tolerance)
        announce(metrics, live, lambda: engine.describe()["active"], sinks)
        metrics.gauge("waiting_prompts", "Prompts in the queue.", lambda: engine.describe()["waiting"])
        names = frozenset({settings.model, model.name, model_slug(model.name)})
        vocabulary = model.module.config.get_text_config().vocab_size
        app = create_app(Service(engine, model.template, settings, names, vocabulary), metrics, engine.readiness)
        bound_s = max(1, round(settings.shutdown_timeout_s))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=bound_s)
        server.append(Server(config, engine))
        engine.start()
        console.print(summary(model.name, model.dtype, live, off))
        host, port = listener.getsockname()[:2]
        console.print(f"[bold]midstream ready[/] on http://{host}:{port}/v1  (metrics: /metrics)", highlight=False)
        server[0].run(sockets=[listener])
        return EXIT_ENGINE_DIED if failed.is_set() else 0


def announce(metrics: Metrics, live: LiveProbes, active: Callable[[], float], sinks: Sinks) -> None:
    """Metrics of what serves. active: sequences in the engine"""
    cards = [p.card for p in live.probes]
    metrics.probes([(c.name, c.version, c.sha256, ",".join(map(str, c.layers))) for c in cards], live.rules)
    metrics.gauge("active_sequences", "Sequences in the engine.", active)
    metrics.gauge("record_queue_depth", "Records not yet written.", lambda: sinks.traffic.depth)


def summary(name: str, dtype: str, live: LiveProbes, off: float) -> Table:
    """What the server prints when it is ready."""
    table = Table(title=f"{name} · {dtype} · self-test passed (largest difference {off:.1g})")
    for column in ("probe", "version", "layer", "route", "prompt", "response"):
        table.add_column(column)
    for probe in live.probes:
        for form, rules in live.rules.items():
            own = {r.phase: r for r in rules if r.probe == probe.card.name}
            cells = [f"{own[p].mode}" + ("" if (t := own[p].threshold) is None else f" above {t:.2f}") for p in Phase]
            layers = ",".join(map(str, probe.card.layers))
            route = "chat" if form == "chat" else "completions"
            table.add_row(probe.card.name, probe.card.version, layers, route, *cells)
    return table
