"""The newest records, for whoever watches traffic go by: bounded, without text, told apart by number."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from monitor.types import Record

SIZE = 256
"""Records that are held. Who asks too seldom is told how many went by."""


class Feed:
    """`put` costs an append, whoever watches. Thread-safe."""

    def __init__(self, size: int = SIZE) -> None:
        self._newest: deque[Record] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._n = 0

    def put(self, record: Record) -> None:
        with self._lock:
            self._newest.append(record)
            self._n += 1

    def since(self, n: int) -> tuple[int, list[Record]]:
        """How many there have ever been, and those of them behind the n-th that are still held, the oldest first."""
        with self._lock:
            wanted = min(self._n - n, len(self._newest))
            return self._n, list(self._newest)[len(self._newest) - wanted :] if wanted > 0 else []


def seen(record: Record) -> dict[str, Any]:
    """What the live view says of one record."""
    return {
        "id": record.request_id,
        "choice": record.index,
        "time": record.created,
        "verdict": record.verdict,
        "finish": record.finish,
        "key": record.key,
        "route": record.route,
        "model": record.model,
        "policy": record.policy,
        "prompt_tokens": record.coverage.prompt_tokens,
        "response_tokens": record.coverage.response_tokens,
        "readings": [
            {
                "probe": r.probe,
                "phase": r.phase,
                "mode": r.mode,
                "value": r.value,
                "threshold": r.threshold,
                "action": r.action,
            }
            for r in record.readings
        ],
    }
