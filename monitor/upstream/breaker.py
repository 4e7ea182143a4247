"""A circuit breaker: an upstream that keeps failing is left alone for a while, then asked now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens after `failures` in a row; after each `pause_s` one request may try, until one succeeds. clock: seconds

    Not thread safe: it lives in one event loop.
    """

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._pause_s, self._clock = failures, pause_s, clock
        self._failed = 0
        self._opened: float | None = None

    @property
    def state(self) -> State:
        if self._opened is None:
            return "closed"
        return "open" if self._left() > 0 else "half-open"

    def refuses(self) -> float | None:
        """None if a request may be sent now, and its outcome must be told; else the seconds until one may."""
        if self._opened is None:
            return None
        if self._left() > 0:
            return max(1.0, self._left())
        # Its outcome may take minutes, or never be told (who asked may leave): the next one does not wait for it.
        self._opened = self._clock()
        return None

    def succeeded(self) -> None:
        self._failed, self._opened = 0, None

    def failed(self) -> None:
        self._failed += 1
        if self._opened is not None or self._failed >= self._limit:
            self._opened = self._clock()

    def _left(self) -> float:
        return 0.0 if self._opened is None else self._opened + self._pause_s - self._clock()
