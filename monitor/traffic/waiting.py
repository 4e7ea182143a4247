"""The queue in front of the writer: records, their texts and jobs, in the order they came, bounded twice."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine

from monitor.traffic.receipts import Receipt
from monitor.traffic.text import Said
from monitor.types import Record

BATCH = 1024
"""Most items that are written together."""
_MAX_TEXTS = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    record: Record
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Job:
    """Something that has to come after every record before it."""

    act: Callable[[Engine], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self, engine: Engine) -> None:
        try:
            self.done.set_result(self.act(engine))
        except BaseException as error:  # is whoever waits for it's
            self.done.set_exception(error)


Item = Entry | Said | Job | None
"""None: the end."""


class Waiting:
    """Put from any thread, taken by one. size: items that wait at most; texts have a bound of characters too."""

    def __init__(self, size: int) -> None:
        self._items: queue.Queue[Item] = queue.Queue(size)
        self._texts = 0  # characters of them that wait
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        return self._items.qsize()

    @property
    def full(self) -> bool:
        return self._items.full()

    def put(self, entry: Entry) -> bool:
        """False: there is no room."""
        try:
            self._items.put_nowait(entry)
        except queue.Full:
            return False
        return True

    def say(self, said: Said) -> bool:
        """False: there is no room."""
        with self._lock:
            if self._texts + said.size > _MAX_TEXTS:
                return False
            try:
                self._items.put_nowait(said)
            except queue.Full:
                return False
            self._texts += said.size
            return True

    def ask(self, job: Job | None, timeout: float | None) -> bool:
        """Waits for room. False: there was none in `timeout` seconds"""
        try:
            self._items.put(job, timeout=timeout)
        except queue.Full:
            return False
        return True

    def take(self, timeout: float | None) -> list[Item]:
        """What waits, BATCH at most; empty if nothing came in `timeout` seconds. Its texts count until `written`."""
        try:
            batch = [self._items.get(timeout=timeout)]
        except queue.Empty:
            return []
        while len(batch) < BATCH and not self._items.empty():
            batch.append(self._items.get())
        return batch

    def written(self, texts: Sequence[Said]) -> None:
        """They take no more room, written or lost."""
        with self._lock:
            self._texts -= sum(t.size for t in texts)
