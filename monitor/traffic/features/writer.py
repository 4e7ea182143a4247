"""The writer of features: a thread behind a bounded queue; files now and then, retention, and erasing in turn."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from monitor.errors import ConfigInvalid
from monitor.reread import Pooled
from monitor.traffic.erase import DAY_S
from monitor.traffic.features.files import (
    Feature,
    check_parquet,
    erase_features,
    locked,
    new_path,
    write_features,
)
from monitor.traffic.features.retention import SWEEP_S, sweep
from monitor.traffic.features.sample import Kept
from monitor.traffic.rows import Mark
from monitor.types import Phase, Record, Turn

Dropped = Literal["queue_full", "not_read", "not_finite", "no_record", "not_written"]
"""Too many wait; the engine could not read it; NaN, or too large for float16; its record is gone; a failing disk."""
_FLUSH_ROWS = 256
_FLUSH_S = 300.0
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Origin:
    """What the vectors are of, as a card names it."""

    fingerprint: str
    template_hash: str
    position_rule: str


@dataclass(frozen=True, slots=True)
class Events:
    """Who is told. kept: by reason; dropped: by cause; seen: each vector of the uniform slice, (n_layers, d_model)

    mark: the record of each (request id, choice, q) is told the name of the file that will hold its features; returns
    those whose record is there. raises: ConfigInvalid
    """

    mark: Callable[[str, Sequence[Mark]], set[tuple[str, int]]]
    kept: Callable[[str], None]
    dropped: Callable[[Dropped], None]
    seen: Callable[[Phase, tuple[int, ...], Pooled], None] = lambda phase, layers, vectors: None


@dataclass(slots=True)
class Sequel:
    """A sequence between its end and its file. ids: up to the last position that is averaged; erased: goes nowhere"""

    record: Record
    kept: Kept
    ids: tuple[int, ...]
    spans: dict[Phase, Turn]
    layers: tuple[int, ...] = ()
    pooled: Pooled | None = None
    erased: bool = False


@dataclass(frozen=True, slots=True)
class Erasure:
    """Of an API key's name, or of a request with all that it named ID-1, ID-2, ..."""

    key: str | None
    request_id: str | None
    done: Future[int] = field(default_factory=Future)

    def matches(self, record: Record) -> bool:
        if self.key is not None:
            return record.key == self.key
        return record.request_id == self.request_id or record.request_id.startswith(f"{self.request_id}-")


@dataclass(frozen=True, slots=True)
class Flush:
    """What was put before is to lie in a file now."""

    done: Future[None] = field(default_factory=Future)


class FeatureWriter:
    """`put` what was read, `close` writes what is left.

    queue_size: sequences that wait at most; days: older ones go, None: never; flush_s: how long features wait for
    their file at most; clock: seconds since the epoch
    raises: ConfigInvalid if pyarrow is missing or the folder can't be made
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        events: Events,
        queue_size: int,
        days: float | None = None,
        flush_s: float = _FLUSH_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_parquet()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigInvalid(f"features {str(folder)!r}: {error.strerror}; set MIDSTREAM_FEATURES") from error
        self._folder, self._origin, self._events = folder, origin, events
        self._days, self._flush_s, self._clock = days, flush_s, clock
        self._queue: queue.Queue[Sequel | Erasure | Flush | None] = queue.Queue(queue_size)
        self._rows: list[Sequel] = []
        self._flush_at = self._sweep_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="midstream-features", daemon=True)
        self._thread.start()

    # --- any thread -----------------------------------------------------------------------------------------------

    def put(self, one: Sequel) -> None:
        """Never waits: where there is no room it is dropped, and counted."""
        try:
            self._queue.put_nowait(one)
        except queue.Full:
            self._events.dropped("queue_full")

    def erase(self, erasure: Erasure) -> int:
        """After what was put before; returns the rows that left files. raises: ConfigInvalid"""
        try:
            self._queue.put(erasure, timeout=_WAIT_S)
            return erasure.done.result(_WAIT_S)
        except (queue.Full, TimeoutError):
            raise ConfigInvalid("the feature log is busy; try again later") from None
        except OSError as error:
            raise ConfigInvalid(f"features can't be erased from {self._folder}: {error.strerror}; try again") from error

    def flush(self) -> None:
        """Write what was put before. raises: ConfigInvalid if the writer is too busy"""
        flush = Flush()
        try:
            self._queue.put(flush, timeout=_WAIT_S)
            flush.done.result(_WAIT_S)
        except (queue.Full, TimeoutError):
            raise ConfigInvalid("the feature log is busy; try again later") from None

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    # --- the writer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            item = self._take()
            if isinstance(item, Sequel):
                self._add(item)
            elif isinstance(item, Erasure):
                self._erase(item)
            full = item is None or isinstance(item, Flush) or len(self._rows) >= _FLUSH_ROWS
            if self._rows and (full or time.monotonic() >= self._flush_at):
                self._flush()
            if isinstance(item, Flush):
                item.done.set_result(None)
            if item is None:
                return
            self._sweep()

    def _take(self) -> Sequel | Erasure | Flush | Literal["nothing"] | None:
        until = [self._flush_at] * bool(self._rows) + [self._sweep_at] * (self._days is not None)
        try:
            return self._queue.get(timeout=max(0.001, min(until) - time.monotonic()) if until else None)
        except queue.Empty:
            return "nothing"

    def _add(self, one: Sequel) -> None:
        pooled = one.pooled
        if pooled is None or not np.isfinite(pooled).all() or np.abs(pooled).max() > np.finfo(np.float16).max:
            self._events.dropped("not_finite")
            return
        if one.kept.uniform:
            for phase, vectors in zip(one.spans, pooled, strict=True):
                self._events.seen(phase, one.layers, vectors)
        if not self._rows:
            self._flush_at = time.monotonic() + self._flush_s
        self._rows.append(one)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        kinds: dict[tuple[int, ...], list[Sequel]] = {}
        for one in rows:  # a file has rows of the same layers: a swap may have come in between
            kinds.setdefault(one.layers, []).append(one)
        for of_kind in kinds.values():
            self._write(of_kind)

    def _write(self, rows: list[Sequel]) -> None:
        path = new_path(self._folder)
        try:
            marks = [(w.record.request_id, w.record.index, w.kept.q) for w in rows]
            # Whoever erases, also from another process, takes records first and then files under this lock: so what
            # finds its record here is in a file by then.
            with locked(self._folder):
                there = self._events.mark(path.name, marks)
                written = [w for w in rows if (w.record.request_id, w.record.index) in there]
                if written:
                    write_features(self._folder, [f for w in written for f in self._features(w)], path)
        except (OSError, ConfigInvalid) as error:  # a full disk costs features, never traffic; each is counted
            print(f"midstream: {len(rows)} features can't be written ({error})", file=sys.stderr)
            for _ in rows:
                self._events.dropped("not_written")
            return
        for w in written:
            self._events.kept(w.kept.reason)
        for _ in range(len(rows) - len(written)):  # erased in the meantime, or never written
            self._events.dropped("no_record")

    def _features(self, one: Sequel) -> list[Feature]:
        record, kept, origin, pooled = one.record, one.kept, self._origin, one.pooled
        return [
            Feature(
                request_id=record.request_id,
                choice=record.index,
                key=record.key,
                created=record.created,
                phase=phase,
                q=kept.q,
                reason=kept.reason,
                fingerprint=origin.fingerprint,
                template_hash=origin.template_hash,
                position_rule=origin.position_rule,
                n_tokens=span.end - span.start,
                layers=one.layers,
                vectors=vectors.astype(np.float16),
                rate=kept.rate,
            )
            for (phase, span), vectors in zip(one.spans.items(), () if pooled is None else pooled, strict=True)
        ]

    def _erase(self, erasure: Erasure) -> None:
        self._rows = [w for w in self._rows if not erasure.matches(w.record)]
        try:
            erasure.done.set_result(erase_features(self._folder, erasure.key, erasure.request_id))
        except BaseException as error:  # is whoever waits for it's
            erasure.done.set_exception(error)

    def _sweep(self) -> None:
        if self._days is not None and time.monotonic() >= self._sweep_at:
            sweep(self._folder, self._clock() - self._days * DAY_S)
            self._sweep_at = time.monotonic() + SWEEP_S
