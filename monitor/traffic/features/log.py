"""The feature log at work: sampled sequences wait until the engine has read them again, one by one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from random import Random

from monitor.reread import Pooled, Rereader
from monitor.traffic.features.sample import Chances, spans_of
from monitor.traffic.features.writer import Dropped, Erasure, FeatureWriter, Sequel
from monitor.types import Prompt, Record


class FeatureLog:
    """`offer` finished sequences; `attach` an engine that reads them; `close` before the engine is stopped for good.

    queue_size: sequences that wait to be read at most; dropped: called with the cause of each that is lost
    """

    def __init__(
        self,
        writer: FeatureWriter,
        chances: Chances,
        queue_size: int,
        dropped: Callable[[Dropped], None],
        chance: Random | None = None,
    ) -> None:
        self._writer, self._chances, self._size, self._dropped = writer, chances, queue_size, dropped
        self._chance = chance or Random()  # noqa: S311 - a sample, not a secret
        self._reader: Rereader | None = None
        self._lock = threading.Lock()
        self._waiting: deque[Sequel] = deque()
        self._reading: Sequel | None = None

    def attach(self, reader: Rereader) -> None:
        self._reader = reader
        self._read_next()

    def offer(self, record: Record, prompt: Prompt, tokens: Sequence[int]) -> None:
        """A sequence has ended, and its record was put into the traffic log. Never waits; from any thread."""
        kept = self._chances.draw(record, self._chance)
        spans = {} if kept is None else spans_of(record, prompt)
        if kept is None or not spans:
            return
        end = max(span.end for span in spans.values())
        ids = tuple(tokens[:end])
        if len(ids) < end:  # an engine that says more than it shows: nothing is guessed
            self._dropped("not_read")
            return
        with self._lock:
            fits = len(self._waiting) < self._size
            if fits:
                self._waiting.append(Sequel(record, kept, ids, spans))
        if fits:
            self._read_next()
        else:
            self._dropped("queue_full")

    @property
    def depth(self) -> int:
        """Sequences that wait to be read, or are being read."""
        return len(self._waiting) + (self._reading is not None)

    def erase(self, key: str | None = None, request_id: str | None = None) -> int:
        """As `erase_features`, and what is still on its way. Call it after the records were erased: what slips through
        in between has no record any more, so it is not written. raises: ConfigInvalid"""
        erasure = Erasure(key, request_id)
        with self._lock:
            self._waiting = deque(w for w in self._waiting if not erasure.matches(w.record))
            if self._reading is not None and erasure.matches(self._reading.record):
                self._reading.erased = True
        return self._writer.erase(erasure)

    def flush(self) -> None:
        """What has been read lies in a file when it returns. raises: ConfigInvalid"""
        self._writer.flush()

    def close(self) -> None:
        """Write what was read; what still waits to be read is dropped, and counted."""
        with self._lock:
            self._reader = None
            left, reading = len(self._waiting), self._reading
            self._waiting.clear()
            if reading is not None and not reading.erased:
                reading.erased, left = True, left + 1
        for _ in range(left):
            self._dropped("not_read")
        self._writer.close()

    # --- in turn, one at a time -----------------------------------------------------------------------------------

    def _read_next(self) -> None:
        with self._lock:
            reader = self._reader
            if reader is None or self._reading is not None or not self._waiting:
                return
            one = self._reading = self._waiting.popleft()
            one.layers = reader.layers
        reader.reread(one.ids, list(one.spans.values()), one.layers, lambda pooled: self._read(one, pooled))

    def _read(self, one: Sequel, pooled: Pooled | None) -> None:
        with self._lock:
            self._reading, one.pooled = None, pooled
            if pooled is not None and not one.erased:
                self._writer.put(one)
        if pooled is None and not one.erased:
            self._dropped("not_read")
        self._read_next()
