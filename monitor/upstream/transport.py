"""The connections to the upstream: a pool, time-outs, retries before the first byte, and a circuit breaker."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from monitor.upstream.breaker import Breaker, State
from monitor.upstream.errors import TooSlow, Truncated, Unreachable, Unreadable, Unsendable

# What a client may say to the upstream beside its body. No account, no key: those are the operator's.
_REQUEST = (b"accept", b"user-agent", b"traceparent", b"tracestate")
_PLAIN = re.compile(rb"[\t\x20-\x7e]*")
# Never the client's: with another charset the upstream would read another text than was judged.
_JSON = {b"Content-Type": b"application/json"}
_ANSWER = ("content-type", "retry-after", "retry-after-ms", "openai-processing-ms", "openai-version", "x-should-retry")
_ANSWER_LIKE = "x-ratelimit-"
_GATEWAY = (502, 503, 504)
_FIRST_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class Bounds:
    """connections: at most, to the upstream; connect_s: to open one, or to get one of them
    first_s: until an answer begins, read_s: between two pieces of it; max_bytes: of a whole answer, or of one event
    retries: of a request that got no answer at all; failures, pause_s: of the circuit breaker
    """

    connections: int = 256
    connect_s: float = 5.0
    first_s: float = 600.0
    read_s: float = 60.0
    max_bytes: int = 16 * 2**20
    retries: int = 2
    failures: int = 5
    pause_s: float = 10.0


class Reply:
    """An answer that has begun. status; headers: those that a client may see"""

    def __init__(self, response: httpx.Response, bounds: Bounds) -> None:
        self._response, self._bounds = response, bounds
        self.status = response.status_code
        self.kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.headers = {
            k: v for k, v in response.headers.items() if k.lower() in _ANSWER or k.lower().startswith(_ANSWER_LIKE)
        }

    async def pieces(self) -> AsyncIterator[bytes]:
        """Its body as it arrives. raises: Truncated, TooSlow"""
        source = self._response.aiter_bytes()
        while True:
            try:
                async with asyncio.timeout(self._bounds.read_s):
                    piece = await anext(source, None)
            except TimeoutError as error:
                raise TooSlow(f"the upstream said nothing for {self._bounds.read_s:g} s") from error
            except (httpx.HTTPError, httpx.StreamError) as error:
                raise Truncated(f"the upstream's answer broke off ({type(error).__name__})") from error
            if piece is None:
                return
            yield piece

    async def whole(self) -> bytes:
        """raises: Truncated, TooSlow, Unreadable if it is too large"""
        parts, size = [], 0
        async for piece in self.pieces():
            parts.append(piece)
            size += len(piece)
            if size > self._bounds.max_bytes:
                raise Unreadable(f"the upstream's answer has more than {self._bounds.max_bytes} bytes")
        return b"".join(parts)


class Upstream:
    """url: with its version, like https://host/v1; key: the operator's, for the upstream alone"""

    def __init__(self, url: str, key: str | None = None, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self._own = {b"Accept-Encoding": b"identity"}
        if key is not None:
            self._own[b"Authorization"] = b"Bearer " + key.encode()
        self._breaker = Breaker(self.bounds.failures, self.bounds.pause_s)
        limits = httpx.Limits(
            max_connections=self.bounds.connections, max_keepalive_connections=self.bounds.connections
        )
        timeout = httpx.Timeout(self.bounds.connect_s, read=None)  # reading is timed here: two bounds, not one
        # No proxies or .netrc of the environment: they would be one more party that reads along.
        self._client = httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False)

    @property
    def state(self) -> State:
        return self._breaker.state

    @asynccontextmanager
    async def send(
        self, method: str, path: str, body: bytes = b"", headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> AsyncIterator[Reply]:
        """One request; leaving the block closes its connection if the answer was not read to its end.

        path: below the url, like /chat/completions; headers: the client's
        raises: Unreachable, Unsendable, TooSlow before an answer has begun
        """
        given = _kept(headers) | self._own | (_JSON if body else {})
        request = self._client.build_request(method, path.lstrip("/"), content=body or None, headers=given)
        response = await self._answered(request)
        try:
            yield Reply(response, self.bounds)
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._client.aclose()

    async def _answered(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + self.bounds.first_s
        for attempt in range(self.bounds.retries + 1):
            seconds = self._breaker.refuses()
            if seconds is not None:
                raise Unreachable("the upstream has failed repeatedly and is left alone for a while", seconds)
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    response = await self._client.send(request, stream=True)
            except TimeoutError as error:
                self._breaker.failed()
                raise TooSlow(f"the upstream did not begin to answer within {self.bounds.first_s:g} s") from error
            except httpx.PoolTimeout as error:  # a bound of ours: it says nothing of the upstream
                raise Unreachable("all connections to the upstream are in use; try again later") from error
            except httpx.LocalProtocolError as error:  # ours too; and its text may show the operator's key
                raise Unsendable("the request can't be sent to the upstream: a header of it is no HTTP") from error
            except httpx.HTTPError as error:
                self._breaker.failed()
                if attempt == self.bounds.retries:
                    raise Unreachable(f"the upstream can't be reached ({type(error).__name__})") from error
                await asyncio.sleep(_FIRST_WAIT_S * 2**attempt)
                continue
            if response.status_code in _GATEWAY:  # it says itself that it is not there
                self._breaker.failed()
            else:
                self._breaker.succeeded()
            return response
        raise AssertionError("each attempt returns or raises")


def _kept(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Those that go on. One that the other side's parser may refuse does not: it is not worth a failure."""
    stripped = ((name, value.strip(b" \t")) for name, value in headers if name in _REQUEST)
    return {name: value for name, value in stripped if _PLAIN.fullmatch(value)}
