"""Repeat offenders: flags and blocks of each API key in a sliding window, a notice, and a refusal for a while."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter

from monitor.types import Action, Record

_COUNTED = (Action.FLAG, Action.BLOCK)
# Who asks for a verdict passes on what others wrote: a gateway must not be refused for its users.
_ASKING = ("moderations", "guardrail")
_OTHER = "other"
_MAX_EVENTS = 1_000
"""Events kept for a key where no limit asks for more: above it the counts stand still."""


@dataclass(slots=True)
class _Key:
    """One key: its events (time, request, action) in the window, oldest first."""

    events: deque[tuple[float, str, Action]] = field(default_factory=deque)
    seen: set[tuple[str, Action]] = field(default_factory=set)
    counts: dict[Action, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    told_at: float | None = None
    refused_until: float = 0.0

    def add(self, now: float, request_id: str, action: Action) -> None:
        self.events.append((now, request_id, action))
        self.seen.add((request_id, action))
        self.counts[action] += 1

    def forget_oldest(self) -> None:
        _, request_id, action = self.events.popleft()
        self.seen.discard((request_id, action))
        self.counts[action] -= 1

    def expire(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.forget_oldest()


class Offenders:
    """Told of every record, from any thread; answers which key is refused, for how long.

    In the window a request counts once as a flag and once as a block, however many choices it has; the metric counts
    sequences, as every other one does. Keys are the server's own closed set, and each keeps max(limit, 1000) events;
    key "" (a server without keys) and requests for a mere verdict (moderations, guardrail) are in the metric only.

    events: counts by key and action; window_s: length of the sliding window
    limit: flags + blocks in it that make an offender, None: nobody is one;
    block_s: how long one is refused, 0: never; metric_keys: names that may be a label, the rest is `other`;
    tell: called with one notice per key and window, from the caller's thread; clock: seconds, never going back
    """

    def __init__(
        self,
        events: Counter,
        tell: Callable[[Mapping[str, Any]], None],
        *,
        window_s: float = 3600.0,
        limit: int | None = None,
        block_s: float = 0.0,
        metric_keys: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._clock = tell, clock
        self._window_s, self._limit, self._block_s = window_s, limit, block_s
        self._bound = max(limit or 0, _MAX_EVENTS)
        self._metric_keys = frozenset(metric_keys)
        self._keys: dict[str, _Key] = {}
        self._lock = threading.Lock()
        self._events = events
        for name in (*sorted(self._metric_keys), _OTHER):  # so that rates start at 0
            for action in _COUNTED:
                self._events.labels(name, action)

    def note(self, record: Record) -> None:
        """Count a finished sequence. O(1) amortised."""
        if record.verdict not in _COUNTED:
            return
        self._events.labels(record.key if record.key in self._metric_keys else _OTHER, record.verdict).inc()
        if not record.key or record.route in _ASKING:
            return
        with self._lock:
            event = self._note(record)
        if event is not None:
            self._tell(event)

    def _note(self, record: Record) -> dict[str, Any] | None:
        now = self._clock()
        key = self._keys.setdefault(record.key, _Key())
        key.expire(now - self._window_s)
        if (record.request_id, record.verdict) in key.seen:
            return None
        if len(key.events) == self._bound:
            key.forget_oldest()
        key.add(now, record.request_id, record.verdict)
        if self._limit is None or len(key.events) < self._limit:
            return None
        if self._block_s and key.refused_until <= now:
            key.refused_until = now + self._block_s
        if key.told_at is not None and now - key.told_at < self._window_s:
            return None
        key.told_at = now
        return {
            "event": "midstream.repeat_offender",
            "key": record.key,
            "flags": key.counts[Action.FLAG],
            "blocks": key.counts[Action.BLOCK],
            "window_s": self._window_s,
            "time": record.created,
        }

    def refused_for(self, name: str) -> float | None:
        """Seconds that a key is still refused; None: it is not."""
        with self._lock:
            key = self._keys.get(name)
            left = 0.0 if key is None else key.refused_until - self._clock()
        return left if left > 0 else None

    def describe(self) -> list[dict[str, Any]]:
        """Every key with events in the window or a refusal, the most events first."""
        with self._lock:
            now = self._clock()
            rows = []
            for name, key in list(self._keys.items()):
                key.expire(now - self._window_s)
                refused_s = round(max(0.0, key.refused_until - now), 3)
                if not key.events and not refused_s:
                    del self._keys[name]
                    continue
                flags, blocks = key.counts[Action.FLAG], key.counts[Action.BLOCK]
                rows.append({"key": name, "flags": flags, "blocks": blocks, "refused_for_s": refused_s})
        return sorted(rows, key=lambda row: (-row["flags"] - row["blocks"], row["key"]))

    def clear(self, name: str) -> bool:
        """Forget a key's events and its refusal; False if there was nothing to forget."""
        with self._lock:
            return self._keys.pop(name, None) is not None
