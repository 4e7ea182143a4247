"""The server's end of one connection: deadlines to send a request and to take an answer, and bounds on its bytes.

uvicorn reads headers of any size, waits for ever for a request to arrive whole, and for ever for a client to read what
it was sent; its own timeout only ends connections that idle after an answer.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

_MAX_PIPELINED = 8
_MAX_DISCARDED = 8 * 2**20
_LINGER_S = 1.0
"""Bytes and seconds of what is read and thrown away after a refusal: a client that is still sending can then read it.
Closing at once would reset the connection, and the answer with it."""
_SEND_BUFFER = 128 * 2**10
"""Kernel's, in bytes. It would grow to 2.8 MiB for each client that does not read."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what was not sent


@dataclass(frozen=True, slots=True)
class Bounds:
    """receive_deadline_s: for a whole request, from its first byte or from the connection's start
    write_deadline_s: for one piece of an answer to leave this process
    max_header_bytes: of the URL, the headers and any trailers
    """

    receive_deadline_s: float
    write_deadline_s: float
    max_header_bytes: int
    max_connections: int


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with bounds."""

    bounds: ClassVar[Bounds]

    @staticmethod
    def limited(limit: str) -> None:
        """Told of every end that a bound brings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._begun = self._headed = False  # a request is arriving; its headers are here
        self._head = 0  # bytes of its url and headers
        self._fruitless = 0  # bytes in a row that gave neither a whole header block nor body
        self._fruit = False
        self._discarded = 0
        self._ended = False
        self._earlier: list[RequestResponseCycle] = []  # requests before `cycle` that are not answered yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Paused as soon as the kernel takes no more: so a pause is a client that does not read, and what waits here is
        # one piece of an answer.
        transport.set_write_buffer_limits(high=0)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if len(self.connections) > self.bounds.max_connections:
            self.limited("connections")
            transport.abort()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._flushed()
        for cycle in self._unanswered():  # uvicorn tells the newest one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        size = self.bounds.max_header_bytes
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self._fruit = False
            self._parse(piece)
            # The parser gives nothing of a header, trailer or chunk extension before it is whole.
            self._fruitless = 0 if self._fruit else self._fruitless + len(piece)
            if self._fruitless > size and not self._ended:
                self._end("headers", 431, _too_large(size))
            if self._ended or self.transport.is_closing():
                return
        if self._late is None and (self._begun or not self._answering()):
            self._expect()

    def _parse(self, data: bytes) -> None:
        """As uvicorn does, but without a line in the log for each that fails: a client would choose how many."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if it had not asked; the parser reads nothing more.
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if self._head > self.bounds.max_header_bytes:
                self._end("headers", 431, _too_large(self.bounds.max_header_bytes))
            elif len(self.pipeline) >= _MAX_PIPELINED:
                self._end("connections", 400, "too many requests at once on one connection; wait for answers")
            else:
                self._end(None, 400, "this is not HTTP; check the client, or what stands between it and this server")

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests at once")
        super().on_message_begin()
        self._begun, self._headed = True, False
        self._head = self._discarded = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._measure(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._measure(len(name) + len(value) + 4)

    def _measure(self, n: int) -> None:
        self._head += n
        if self._head > self.bounds.max_header_bytes:
            raise ValueError("headers too large")  # the parser stops: HttpParserError

    def on_headers_complete(self) -> None:
        self._earlier = self._unanswered()
        super().on_headers_complete()
        self._headed = self._fruit = True

    def on_body(self, body: bytes) -> None:
        self._fruit = True
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def _discard(self, n: int) -> None:
        self._discarded += n
        if self._discarded > _MAX_DISCARDED:
            self.transport.close()

    def on_message_complete(self) -> None:
        self._fruit, self._begun, self._headed = True, False, False
        self._arrived()
        super().on_message_complete()

    # Deadlines

    def _expect(self) -> None:
        self._late = self.loop.call_later(self.bounds.receive_deadline_s, self._is_late)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_late(self) -> None:
        self._late = None
        if self._answering():  # an earlier request: the time is that one's
            self._expect()
        else:
            self._end("receive", 408, f"the request did not arrive whole in {self.bounds.receive_deadline_s:g} s")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(self.bounds.write_deadline_s, self._is_stuck)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flushed()

    def _flushed(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _is_stuck(self) -> None:
        self._stuck = None
        self.limited("write")
        raw = self.transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    # Ends

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [c for c in (*self._earlier, self.cycle) if c is not None and not c.response_complete]

    def _answering(self) -> bool:
        """Whether a request that has arrived whole waits for the end of its answer."""
        return any(not cycle.more_body for cycle in self._unanswered())

    def _end(self, limit: str | None, status: int, message: str) -> None:
        """Close, with an error if none of an answer has gone out that it could be taken for a part of."""
        if limit is not None:
            self.limited(limit)
        # Of what is arriving now; or nothing has, on a new connection.
        unanswered = not self.cycle.response_started if self._headed else self._begun or self.cycle is None
        clean = unanswered and not self._answering()
        for cycle in self._unanswered():
            cycle.disconnected = True
            cycle.message_event.set()
        self._arrived()
        self._ended = True
        if clean and self.transport.can_write_eof():
            self.transport.write(_error(status, message))
            self.transport.write_eof()
            self._late = self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()


def _too_large(size: int) -> str:
    return f"the request's headers are larger than {size} bytes; send less"


def _error(status: int, message: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body


def bounded(bounds: Bounds, limited: Callable[[str], None]) -> type[Connection]:
    """The class for uvicorn's `http` argument."""
    return type("BoundedConnection", (Connection,), {"bounds": bounds, "limited": staticmethod(limited)})


def allow_descriptors(max_connections: int) -> None:
    """Room for this many sockets and what else is open. 1024 is the usual bound, and a server at it can't even accept
    a connection to close it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
