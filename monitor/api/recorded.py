"""The end of an answer waits for its record: next to the routes of both engines, between them and the traffic log."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.api.errors import ApiError
from monitor.api.front import OPEN_PATHS, own_id, shaped
from monitor.api.heard import Heard
from monitor.traffic import Receipt, Said, TrafficLog

_PROMPT = ("messages", "prompt", "input", "system", "instructions", "texts", "tools")
"""Fields of a request that hold what a model reads, on any route."""


class Recorded:
    """Plain ASGI. limited, rejected: told of each refusal by `record` and its status

    An engine hands a record over before the last piece of its answer. So whatever is sent waits until the log has
    every record of its request; with `log_required` it is not sent at all if the log can't take one.
    """

    def __init__(
        self,
        app: ASGIApp,
        log: Callable[[], TrafficLog],
        limited: Callable[[str], None],
        rejected: Callable[[int], None],
    ) -> None:
        self.app = app
        self._log, self._limited, self._rejected = log, limited, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        log = self._log()
        if log.refuses:
            self._refused()
            await shaped(_unrecorded(), scope["path"])(scope, receive, send)
            return
        identity = own_id(scope)
        with log.followed(identity, lambda: Said(identity, asked.prompt, ending.heard.texts())) as receipt:
            asked = _Asked(log, receipt, receive)
            ending = _Ending(log, receipt, send, scope, self._refused)
            await self.app(scope, asked, ending)

    def _refused(self) -> None:
        self._limited("record")
        self._rejected(503)


class _Asked:
    """The `receive` of one request. prompt: what of its body the model reads; kept only if the log keeps texts"""

    def __init__(self, log: TrafficLog, receipt: Receipt, receive: Receive) -> None:
        self.prompt: Any = None
        self._log, self._receipt, self._receive = log, receipt, receive

    async def __call__(self) -> Message:
        message = await self._receive()
        if message.get("body"):  # whole: it was read and judged further out
            self._read(message["body"])
        return message

    def _read(self, body: bytes) -> None:
        try:
            data = from_json(body, cache_strings="none")
        except ValueError:
            return  # the route says what is wrong with it; nothing is judged, nothing recorded
        prompt = {name: data[name] for name in _PROMPT if name in data} if isinstance(data, dict) else {}
        if prompt:
            self._receipt.digest = self._log.digest(prompt)
            many = {"n": data["n"]} if "n" in data else {}  # tells which of several prompts a choice answers
            self.prompt = prompt | many if self._log.keeps_texts else None


class _Ending:
    """The `send` of one answer."""

    def __init__(
        self, log: TrafficLog, receipt: Receipt, send: Send, scope: Scope, refused: Callable[[], None]
    ) -> None:
        self.heard = Heard()
        self._log, self._receipt, self._send = log, receipt, send
        self._scope, self._refused = scope, refused
        self._start: Message | None = None  # waits for the first piece: until then an error can be a status
        self._streams = self._done = False

    async def __call__(self, message: Message) -> None:
        if self._done:
            return
        if message["type"] == "http.response.start":
            self._start = message
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            return
        if not await self._log.kept(self._receipt):
            await self._refuse()
            return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        if self._log.keeps_texts:
            self.heard.take(message.get("body", b""), self._streams)
        await self._send(message)
        self._receipt.whole = not message.get("more_body", False)

    async def _refuse(self) -> None:
        self._done = True
        self._refused()
        error, path = _unrecorded(), self._scope["path"]
        if self._start is not None:
            response = shaped(error, path)
            await self._send({"type": "http.response.start", "status": 503, "headers": response.raw_headers})
            await self._send({"type": "http.response.body", "body": response.body})
            return
        # After the 200 an error can only be an event, and what follows it is missing: this is not a normal end.
        await self._send({"type": "http.response.body", "body": _event(error, path)})


def _unrecorded() -> ApiError:
    message = "the traffic log can't take this request's record, and it has to; try again later"
    return ApiError(503, message, kind="server_error", code="record")


def _event(error: ApiError, path: str) -> bytes:
    """As the client library of the route reads an error in a stream."""
    content: Any = {"error": error.error}
    head = b""
    if path.startswith("/v1/messages"):
        content, head = json.loads(bytes(shaped(error, path).body)), b"event: error\n"
    elif path.startswith("/v1/responses"):
        fields = {key: error.error[key] for key in ("code", "message", "param")}
        content, head = {"type": "error", "sequence_number": 0} | fields, b"event: error\n"
    return head + b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
