"""Server-sent events as an upstream sends them: pieces of bytes -> whole frames, not a byte of them changed."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from monitor.upstream.errors import Unreadable
from monitor.upstream.strict import strict_object

# A lone CR ends a line too, but at the end of a piece it may be the first half of CR LF: it waits for one more byte.
_LINE_END = rb"(?:\r\n|\n|\r(?=[^\n]))"
_BLANK_LINE = re.compile(_LINE_END + _LINE_END)
_DONE = b"[DONE]"


class Event(NamedTuple):
    """name: of its `event:` line; data: None for a comment, which keeps the connection alive"""

    name: str | None
    data: bytes | None

    @property
    def is_done(self) -> bool:
        return self.data is not None and self.data.strip() == _DONE

    def json(self) -> dict[str, Any]:
        """raises: Unreadable if the data is not one JSON object in UTF-8"""
        return json_object(self.data or b"")


class Frames:
    """Pieces in, frames out; a frame ends with its blank line. max_bytes: of one frame"""

    def __init__(self, max_bytes: int) -> None:
        self._rest = b""
        self._max_bytes = max_bytes

    def feed(self, piece: bytes) -> list[bytes]:
        """raises: Unreadable for a frame that never ends"""
        seen = max(0, len(self._rest) - 3)  # a blank line may have begun before this piece
        data, frames, start = self._rest + piece, [], 0
        for found in _BLANK_LINE.finditer(data, seen):
            frames.append(data[start : found.end()])
            start = found.end()
        self._rest = data[start:]
        if len(self._rest) > self._max_bytes:
            raise Unreadable(f"the upstream sent an event of more than {self._max_bytes} bytes")
        return frames

    def end(self) -> bytes:
        """What is left when the connection has ended: half a frame, or [DONE] without its blank line."""
        return self._rest


def parse(frame: bytes) -> Event:
    """The fields of one frame, by the rules of server-sent events."""
    name, data = None, list[bytes]()
    for line in frame.removeprefix(b"\xef\xbb\xbf").splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ").decode(errors="replace")
    return Event(name, b"\n".join(data) if data else None)


def frame(data: object, name: str | None = None) -> bytes:
    """One frame of ours."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object of an upstream's. raises: Unreadable, also for a name that stands there twice"""
    try:
        return strict_object(data)
    except ValueError as error:
        raise Unreadable(f"the upstream sent no JSON that can be read: {str(error)[:80]}") from error
