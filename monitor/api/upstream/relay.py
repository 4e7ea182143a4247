"""One answer from the upstream to the client: read along, and let go of piece by piece as it is judged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

import anyio
from starlette.types import Receive, Scope, Send

from monitor.api.errors import ApiError, ended_badly
from monitor.api.events import EventStream
from monitor.api.upstream.wire import Wire
from monitor.upstream.choice import Choice
from monitor.upstream.errors import TooSlow, Truncated, Unreachable, Unsendable, UpstreamError
from monitor.upstream.incoming import Arrived, Incoming
from monitor.upstream.sse import json_object
from monitor.upstream.transport import Reply

Close = Callable[[], Awaitable[None]]


async def whole(wire: Wire, reply: Reply) -> bytes:
    """The body of an answer that is not streamed, as it came if nothing in it was blocked.

    raises: UpstreamError, ApiError for a choice that may not be answered
    """
    raw = await reply.whole()
    judged = wire.whole(json_object(raw))
    await asyncio.gather(*(c.read(wire.finishes.get(c.index)) for c in wire.choices))
    _check(wire.choices)
    body = judged()
    return raw if body is None else json.dumps(body, separators=(",", ":")).encode()


class Relay:
    """A stream. close: ends the request to the upstream; may be called twice

    pause_s: without new text, after which what the tokenizer might still change is read as it is
    """

    def __init__(self, wire: Wire, reply: Reply, close: Close, max_bytes: int, pause_s: float) -> None:
        self._wire, self._close, self._pause_s = wire, close, pause_s
        self._incoming = Incoming(reply.pieces(), max_bytes)
        self._busy_until = 0.0  # when the observer had read what was taken last
        for choice in wire.choices:
            choice.changed = self._incoming.wake

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Whole events. An error after the 200 can only be an event, and no [DONE] follows: it is not a normal end."""
        wire = self._wire
        self._incoming.start()
        try:
            while not self._over():
                frames = await self._incoming.take(self._pause_s if self._waiting else None)
                self._feed(frames)
                # Before anything is read: what needs no verdict (a policy that only flags) must not wait for one.
                if ready := wire.released():
                    yield ready
                await self._judge(pause=not frames)
                if ready := wire.released():
                    yield ready
                _check(wire.choices)
            await self._stop()
            if ending := wire.ending():
                yield ending
        except UpstreamError as error:
            await self._stop()
            await self._judge(pause=True)
            for choice in wire.choices:
                choice.end("engine_error")
            if ready := wire.released():
                yield ready
            if not wire.told:  # its own error may stand behind text that is held: then nothing has told the client
                yield wire.error(told(error))
        except ApiError as error:
            await self._stop()
            yield wire.error(error)
        finally:
            # Unshielded, an await here never ends after a disconnect.
            with anyio.CancelScope(shield=True):
                await self._stop()

    async def _stop(self) -> None:
        await self._incoming.stop()
        await self._close()

    @property
    def _waiting(self) -> bool:
        """Whether the tokenizer keeps text back that more text might change."""
        return any(choice.words.waiting and not choice.ended for choice in self._wire.choices)

    def _feed(self, frames: Sequence[Arrived]) -> None:
        # The newest piece is not behind: the observer has not had a chance at it.
        for arrived in frames[:-1]:
            self._wire.take(arrived.frame, late=arrived.at < self._busy_until)
        for arrived in frames[-1:]:
            self._wire.take(arrived.frame)

    async def _judge(self, pause: bool) -> None:
        finishes = self._wire.finishes
        read = await asyncio.gather(*(c.read(finishes.get(c.index), pause) for c in self._wire.choices))
        if any(read):  # what came meanwhile found it busy
            self._busy_until = time.monotonic()

    def _over(self) -> bool:
        """raises: UpstreamError if the upstream has ended too early"""
        wire, incoming = self._wire, self._incoming
        if wire.cut_short or (wire.done and wire.all_ended):
            return True
        if not (wire.done or incoming.over):
            return False
        if incoming.failure is not None and not wire.done:
            raise incoming.failure
        if not wire.all_ended:
            raise Truncated("the upstream's answer ended before it was whole")
        return True


class RelayStream(EventStream):
    """close: ends the request to the upstream; closed: called last"""

    def __init__(self, relay: Relay, headers: Mapping[str, str], close: Close, closed: Callable[[], None]) -> None:
        events = relay.events()
        super().__init__(events, events, headers, closed)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # If the client left before the first event, the generator has never begun, and its `finally` does nothing.
            with anyio.CancelScope(shield=True):
                await self._close()


def _check(choices: Sequence[Choice]) -> None:
    """raises: ApiError for a choice that may not be answered: no scores, and a policy that fails closed"""
    for choice in choices:
        if choice.record is not None and (error := ended_badly(choice.record)):
            raise error


def told(error: UpstreamError) -> ApiError:
    """What the client gets for an upstream that does not answer as it should."""
    if isinstance(error, Unreachable):
        seconds = error.retry_after_s
        return ApiError(503, str(error), kind="server_error", code="upstream_unreachable", retry_after_s=seconds)
    if isinstance(error, TooSlow):
        return ApiError(504, str(error), kind="server_error", code="upstream_timeout")
    code = {Truncated: "upstream_truncated", Unsendable: "upstream_unsendable"}.get(type(error), "upstream_unreadable")
    return ApiError(502, str(error), kind="server_error", code=code)
