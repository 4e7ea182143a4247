"""What a block looks like on each route of vLLM, for the client library that reads it.

vLLM ends a blocked answer as it would any other; what it says of the ending is put right here, in its JSON and in its
server-sent events. Only answers with a blocked choice are looked into, or all where the policy annotates.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Iterator
from typing import Any

from monitor.api.errors import ApiError
from monitor.engines.vllm.call import Call
from monitor.types import Terms

FILTERED = "content_filter"


class Wire(abc.ABC):
    """One answer. `whole` rewrites a JSON body, `event` one server-sent event; both only if it `rewrites`."""

    annotated = False
    """Whether this route's answers have a place for Azure's annotations."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.first = b""  # the first events that went out, for the envelope of an event of ours

    @property
    def rewrites(self) -> bool:
        return bool(self.call.blocked) or (self.annotated and self.terms.annotate)

    @property
    def terms(self) -> Terms:
        return self.call.terms or Terms()

    def opened(self, events: bytes) -> None:
        self.first = self.first or events

    @abc.abstractmethod
    def whole(self, body: dict[str, Any]) -> dict[str, Any]: ...

    @abc.abstractmethod
    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        """data: None for OpenAI's [DONE]"""

    def error(self, error: ApiError) -> dict[str, Any]:
        return {"error": error.error}

    def error_event(self, error: ApiError) -> bytes:
        return sse(None, self.error(error))


def sse(name: str | None, data: object) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


Event = tuple[str | None, dict[str, Any] | None]


def parse_event(raw: bytes) -> Event | None:
    """(name, data) of a server-sent event, data None for [DONE]; None for a comment or what holds no JSON object"""
    name, data = None, b""
    for line in raw.splitlines():
        if line.startswith(b"event:"):
            name = line[6:].strip().decode(errors="replace")
        elif line.startswith(b"data:"):
            data += line[5:].strip()
    if data == b"[DONE]":
        return name, None
    try:
        parsed = json.loads(data)
    except ValueError:
        return None
    return (name, parsed) if isinstance(parsed, dict) else None


BLANK_LINE = re.compile(rb"\r?\n\r?\n")


def end_of_events(data: bytes) -> int:
    """Where the last whole event ends."""
    return max((m.end() for m in BLANK_LINE.finditer(data)), default=0)


def error_in(events: bytes) -> dict[str, Any] | None:
    """The error that a stream begins with: vLLM validates some fields only once it streams."""
    parsed = parse_event(BLANK_LINE.split(events, maxsplit=1)[0])
    content = parsed[1] if parsed is not None else None
    return content if content is not None and isinstance(content.get("error"), dict) else None
