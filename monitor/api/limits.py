"""Bounds on what a request may ask, before any route sees it: callers, rate, concurrency, and its body."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from monitor.api.body import BodyBounds, Refused, replay
from monitor.api.front import OPEN_PATHS, shaped
from monitor.errors import ConfigInvalid


class Rate:
    """So many requests a key and time, like "600/minute". In memory: each server counts for itself."""

    def __init__(self, text: str) -> None:
        """raises: ConfigInvalid"""
        import limits  # here: most servers have no rate, and it brings a second's worth of storage back ends
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        try:
            (self._item,) = limits.parse_many(text)
        except ValueError as error:
            raise ConfigInvalid(f"rate_per_key {text!r} is not a rate; write it like '600/minute'") from error
        if self._item.amount < 1:
            raise ConfigInvalid(f"rate_per_key {text!r} lets nobody ask; write it like '600/minute', or unset it")
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, key: str) -> float | None:
        """None if this request may pass, else the seconds until one may."""
        if self._window.hit(self._item, key):
            return None
        return max(1.0, self._window.get_window_stats(self._item, key).reset_time - time.time())


class Limits:
    """Plain ASGI: reads the whole body, judges it, and replays it. Answers of any length pass.

    max_body: bytes; max_concurrent: requests in the app at once, those whose body is still coming apart
    limited, rejected: told of each refusal by its limit and its status
    offender: seconds for which a key is still refused, None if it is not
    """

    def __init__(
        self,
        app: ASGIApp,
        bounds: BodyBounds,
        *,
        max_body: int,
        max_concurrent: int,
        rate: Rate | None,
        limited: Callable[[str], None],
        rejected: Callable[[int], None],
        offender: Callable[[str], float | None],
    ) -> None:
        self.app = app
        self._bounds, self._max_body, self._max_concurrent, self._rate = bounds, max_body, max_concurrent, rate
        self._limited, self._rejected, self._offender = limited, rejected, offender
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        try:
            self._check_caller(scope["state"].get("midstream_key", ""))
            body = await self._read(scope, receive)
            if body is None:
                return  # gone before it had asked
            if body:  # whatever its content type says: no route takes anything but JSON
                self._bounds.check(body)
            self._check_room()
        except Refused as refused:
            self._limited(refused.limit)
            self._rejected(refused.status)
            await shaped(refused, scope["path"])(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self.app(scope, replay(body, receive), send)
        finally:
            self._in_flight -= 1

    def _check_caller(self, key: str) -> None:
        seconds = self._offender(key)
        if seconds is not None:
            raise _too_many("offender", "this key was blocked too often; try again later", "key_suspended", seconds)
        seconds = None if self._rate is None else self._rate.take(key)
        if seconds is not None:
            raise _too_many("rate", "this key has sent too many requests; slow down", "rate_limited", seconds)

    def _check_room(self) -> None:
        # After the body: somebody who sends slowly must not hold a place.
        if self._in_flight >= self._max_concurrent:
            raise _too_many("concurrency", "the server is busy with other requests; try again", "overloaded", None)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client has left. raises: Refused"""
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise Refused("body", 415, "the body is compressed; send it plain", "content_encoding")
            if name == b"content-length" and not _at_most(value, self._max_body):
                raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:  # a chunked body announces no length
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused("body", 413, f"the body is larger than {self._max_body} bytes; send less", "body_too_large")


def _too_many(limit: str, message: str, code: str, seconds: float | None) -> Refused:
    return Refused(limit, 429, message, code, kind="rate_limit_error", retry_after_s=seconds)


def _at_most(digits: bytes, bound: int) -> bool:
    return digits.isdigit() and len(digits) < 16 and int(digits) <= bound
