"""Observers side by side: each is built for one set of probes, and a conversation ends on the one it began with."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

from monitor.config import Settings
from monitor.errors import Overloaded
from monitor.live import LiveProbes
from monitor.observer.load import Loaded, observer_of
from monitor.observer.reader import LocalObserver
from monitor.upstream.engine import ObserverEngine

_LOOK_S = 0.5


class Observers:
    """The observer in service and the one before, kept for a roll-back; with a third the oldest goes.

    engine: what reads by them; loaded: the first, started by the caller
    """

    def __init__(self, settings: Settings, engine: ObserverEngine, loaded: Loaded) -> None:
        self._settings, self._engine = settings, engine
        self._held = {loaded.live.versions: loaded.observer}
        self._leaving: set[asyncio.Task[None]] = set()

    async def stage(self, live: LiveProbes) -> None:
        """raises: ConfigInvalid if no observer is built for these probes, ProbeMismatch, Overloaded"""
        if live.versions in self._held:
            return
        if self._leaving:
            raise Overloaded("conversations are still read for the probes before the last ones; try again later")
        first = self._engine.observer
        loaded = await asyncio.to_thread(observer_of, self._settings, first.model, first.tokenizer, live)
        for versions in [v for v in self._held if v != self._engine.live.versions]:
            self._let_go(self._held.pop(versions))
        loaded.observer.start()
        self._held[live.versions] = loaded.observer

    def put(self, live: LiveProbes) -> None:
        """Serve probes that were staged, or those in service under another policy."""
        if live.versions != self._engine.live.versions:
            self._engine.observer = self._held[live.versions]
        self._engine.live = live

    def _let_go(self, observer: LocalObserver) -> None:
        task = asyncio.get_running_loop().create_task(_when_idle(observer))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def stop(self) -> None:
        """All that are held. Those that were let go end with the process: their threads are no reason to wait."""
        for observer in self._held.values():
            observer.stop()


async def _when_idle(observer: LocalObserver) -> None:
    while cast(int, observer.describe()["active"]):  # noqa: ASYNC110 - a thread counts, without an event
        await asyncio.sleep(_LOOK_S)
    threading.Thread(target=observer.stop, daemon=True).start()
