"""/metrics in Prometheus' text, and the heartbeat in it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from monitor.metrics.observe import Metrics
from monitor.metrics.processes import leave, shared_folder

PULSE_S = 5.0


def exposition(registry: CollectorRegistry) -> bytes:
    """Of this process, or of every process that shares its folder."""
    folder = shared_folder()
    if folder is None:
        return generate_latest(registry)
    for _ in registry.collect():  # so that this process' gauges are fresh in its file
        pass
    every = CollectorRegistry()
    multiprocess.MultiProcessCollector(every, folder)  # type: ignore[no-untyped-call]
    return generate_latest(every)


@contextlib.contextmanager
def pulse(
    metrics: Metrics,
    ready: Callable[[], str | None],
    also: Callable[[], None] | None = None,
    every_s: float = PULSE_S,
) -> Iterator[None]:
    """A heartbeat in a thread of its own, as long as the server is ready; `midstream_ready` with it.

    ready: None when it is, else why not; also: done at every beat, what is too slow for a scrape
    """
    stopped = threading.Event()

    def beat() -> None:
        while True:
            fine = ready() is None
            metrics.ready.set(fine)
            if fine:
                metrics.heartbeat_timestamp_seconds.set(time.time())
            metrics.refresh()
            if also is not None:
                also()
            if stopped.wait(every_s):
                return

    thread = threading.Thread(target=beat, name="midstream-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        metrics.ready.set(0)
        leave()
