"""Finished sequences read once more, on the engine's thread between its steps: at once when it is idle, else slowly."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from monitor.engines.embedded.attention import KVCache
from monitor.engines.embedded.streams import Streams
from monitor.reread import Pooled
from monitor.types import Turn

_CHUNK = 64
_EVERY_S = 1.0


class _Reading:
    """One sequence; cache.length of its tokens have been read. sums: (n_spans, n_layers, d_model) float64"""

    def __init__(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        self.ids, self.spans, self.layers, self.done = list(ids), spans, layers, done
        self.cache = KVCache(len(ids))
        self.sums: list[list[Any]] = [[0.0] * len(layers) for _ in spans]

    def add(self, streams: dict[int, torch.Tensor], first: int, n: int) -> None:
        for span, sums in zip(self.spans, self.sums, strict=True):
            rows = slice(max(span.start - first, 0), max(min(span.end - first, n), 0))
            if rows.start < rows.stop:
                for column, layer in enumerate(self.layers):
                    sums[column] = sums[column] + streams[layer][rows].double().sum(0)

    @property
    def means(self) -> Pooled:
        per_span = [torch.stack(sums) / (s.end - s.start) for s, sums in zip(self.spans, self.sums, strict=True)]
        pooled: Pooled = torch.stack(per_span).float().cpu().numpy()
        return pooled


class Rereading:
    """See `Rereader`. While sequences run it gets one pass of a few tokens a second: that is all it may cost them.

    layers: those that are tapped now; wake: the engine's lock, notified when there is something to read
    max_tokens: of a step of the engine, whose tap sees these tokens too, and forgets them
    """

    def __init__(
        self, module: Any, layers: Callable[[], tuple[int, ...]], wake: threading.Condition, max_tokens: int
    ) -> None:
        self._module, self._layers, self._wake = module, layers, wake
        self._chunk = min(_CHUNK, max_tokens)
        self._reading: _Reading | None = None
        self._not_before = 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        return self._layers()

    @property
    def waits(self) -> bool:
        """There is something to read."""
        return self._reading is not None

    def reread(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        with self._wake:
            self._reading = _Reading(ids, spans, layers, done)
            self._wake.notify()

    def step(self, busy: bool) -> None:
        """On the engine's thread, between two steps of it. busy: sequences run or wait"""
        reading, now = self._reading, time.monotonic()
        if reading is None or (busy and now < self._not_before):
            return
        self._not_before = now + _EVERY_S
        first = reading.cache.length
        chunk = reading.ids[first : first + self._chunk]
        try:
            streams = Streams(self._module, reading.layers)
            try:
                reading.add(streams.run([chunk], [reading.cache]), first, len(chunk))
            finally:
                streams.close()
        except RuntimeError as error:  # torch's kind: it costs a feature, not everybody's answers
            print(f"midstream: a finished sequence can't be read again: {error}", file=sys.stderr)
            self._end(reading, None)
        else:
            if reading.cache.length == len(reading.ids):
                self._end(reading, reading.means)

    def _end(self, reading: _Reading, pooled: Pooled | None) -> None:
        self._reading = None
        reading.done(pooled)
