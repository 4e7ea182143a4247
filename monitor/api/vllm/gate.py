"""The gate around each generating route: makes the call, holds the answer's start until the prompt has its verdict,
and puts right what a client reads of a block. Plain ASGI, so that streams pass."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.api.body import replay
from monitor.api.errors import ApiError, PromptBlocked, ended_badly, unavailable
from monitor.api.front import ID_HEADER, own_id
from monitor.api.refusal import Refusal, refuse
from monitor.api.verdicts import known, prompt_annotation, verdict_headers
from monitor.api.vllm.admit import admit, chat_messages, is_true, route_format
from monitor.api.vllm.wire import BLANK_LINE, Wire, end_of_events, error_in, parse_event
from monitor.api.vllm.wires import WIRES
from monitor.config import Settings
from monitor.engines.vllm.call import CALL, Call, blocks_prompt
from monitor.metrics import Metrics
from monitor.template import ChatTemplate
from monitor.types import Record, Terms


class Gate:
    """path: the route's, a key of WIRES; model: its own name; names: those a client may call it by"""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        template: ChatTemplate,
        settings: Settings,
        metrics: Metrics,
        model: str = "",
        names: Collection[str] = (),
    ) -> None:
        self.app, self.path = app, path
        self._model, self._names = model, names
        self._template, self._settings, self._metrics = template, settings, metrics
        self._route = path.removeprefix("/v1/").replace("chat/completions", "chat").replace("/", "-")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = scope.get("state", {}).get("midstream_key", "")
        call = Call(self._route, route_format(self.path), key=key, id=own_id(scope))
        outgoing = Outgoing(call, WIRES[self.path](call), send, self._metrics)
        raw = await _read(receive)
        if raw is None:
            return  # gone before it had asked
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None  # vLLM's validation says what is wrong with it
        if isinstance(body, dict):
            try:
                call.n, prompts = admit(self.path, body, self._settings, self._template.switches)
            except ApiError as error:
                await outgoing.refuse(error)
                return
            call.expected = call.n * prompts
            call.asked = str(body.get("model") or self._model)
            # All its names are one to a policy: a client must not choose among them.
            call.model = self._model if call.asked in self._names else call.asked
            outgoing.asked(body)
            await self._know_history(call, body)
        token = CALL.set(call)
        try:
            await self.app(scope, replay(raw, receive), outgoing)
        except Exception:
            if not await outgoing.told_failure():
                raise
        finally:
            CALL.reset(token)

    async def _know_history(self, call: Call, body: dict[str, Any]) -> None:
        messages = chat_messages(body) if call.format == "chat" else []
        if any(m["role"] == "assistant" for m in messages):
            # Off the event loop: a long conversation takes a while to tokenise.
            call.history = await asyncio.to_thread(self._template.history_ids, messages)


class Outgoing:
    """The `send` of one answer. Nothing goes out before every prompt of the call has its verdict."""

    def __init__(self, call: Call, wire: Wire, send: Send, metrics: Metrics) -> None:
        self._call, self._wire, self._send, self._metrics = call, wire, send, metrics
        self._start: MutableMapping[str, Any] = {"headers": []}
        self._held: list[bytes] = []
        self._rest = b""  # of an event that has not arrived whole
        self._begun = self._done = False
        self._wants_stream = self._wants_usage = False

    def asked(self, body: dict[str, Any]) -> None:
        """What a refusal has to look like."""
        self._wants_stream = is_true(body.get("stream"))
        options = body.get("stream_options")
        self._wants_usage = isinstance(options, dict) and is_true(options.get("include_usage"))

    async def __call__(self, message: Message) -> None:
        if self._done:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        self._held.append(message.get("body", b""))
        if self._call.failed is not None:
            await self._fail(self._call.failed)
        elif self._is_stream:
            if more and len(self._call.openings) < self._call.expected:
                return
            await self._stream(more)
        elif not more:
            await self._whole()

    async def told_failure(self) -> bool:
        """The route raised. Whether that is a failure of ours to tell of: a dead engine is vLLM's 500, and our 503."""
        failed = self._call.failed
        if failed is None and (self._call.refused is None or self._begun):
            return False
        if not self._done:
            await (self._refuse_late({}) if failed is None else self._fail(failed))
        return True

    async def refuse(self, error: ApiError) -> None:
        await self._answer(error.response(), self._wire.error(error))

    async def _refuse_late(self, told: dict[str, Any]) -> None:
        """vLLM has refused it once it was streaming. told: within the stream; some routes use other words, or none"""
        if self._call.refused is not None:
            status, why = self._call.refused
            await self.refuse(unavailable(why) if status == 503 else ApiError(status, why))
            return
        code = told["error"].get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 400
        await self._answer(JSONResponse({}, status), told)

    async def _answer(self, response: Response, content: Any) -> None:
        """An error of ours, whatever vLLM had begun to say."""
        self._metrics.rejected.labels(str(response.status_code)).inc()
        self._done = True
        body = json.dumps(content).encode()
        headers = [(k, v) for k, v in response.raw_headers if k != b"content-length"]
        headers += [(b"content-length", str(len(body)).encode()), (ID_HEADER, self._call.id.encode())]
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    @property
    def _is_stream(self) -> bool:
        headers = dict(self._start["headers"])
        return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))

    async def _fail(self, record: Record) -> None:
        call, terms = self._call, self._call.terms or Terms()
        error = ended_badly(record) or unavailable("the answer could not be finished; try again later")
        if blocks_prompt(record):
            error = PromptBlocked(record, record.index // call.n, call.expected // call.n, terms)
            if terms.refusal is not None and not self._begun:
                await self._refuse_kindly(record, terms.refusal, error.headers)
                return
        if not self._begun:
            await self.refuse(error)
            return
        self._done = True
        await self._send({"type": "http.response.body", "body": self._wire.error_event(error)})

    async def _refuse_kindly(self, record: Record, text: str, headers: Mapping[str, str]) -> None:
        """The policy's text, as an answer."""
        call = self._call
        refusal = Refusal(
            id=call.id,
            model=call.asked,
            text=text,
            created=int(time.time()),
            n=call.expected,
            stream=self._wants_stream,
            include_usage=self._wants_usage,
            prompt_tokens=record.coverage.prompt_tokens,
            extra=prompt_annotation(call.terms or Terms(), call.openings, call.n),
        )
        response = refuse(call.route, refusal, headers)
        self._done = True
        own = [*response.raw_headers, (ID_HEADER, call.id.encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": own})
        await self._send({"type": "http.response.body", "body": response.body})

    async def _begin(self, length: int | None = None) -> None:
        self._begun = True
        call = self._call
        headers = [*self._start["headers"], (ID_HEADER, call.id.encode())]
        if call.terms is not None:
            decided = verdict_headers(call.terms.policy, known(call.openings, call.records))
            headers += [(name.encode(), value.encode()) for name, value in decided.items()]
        if length is not None:
            headers = [(k, v) for k, v in headers if k != b"content-length"]
            headers.append((b"content-length", str(length).encode()))
        await self._send({**self._start, "headers": headers})

    async def _whole(self) -> None:
        body, self._held = b"".join(self._held), []
        status = self._start["status"]
        if status >= 400:  # vLLM's own refusal
            self._metrics.rejected.labels(str(status)).inc()
        if self._wire.rewrites and status == 200:
            body = json.dumps(self._wire.whole(json.loads(body)), separators=(",", ":")).encode()
        self._done = True
        await self._begin(len(body))
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, more: bool) -> None:
        arrived, self._held = self._rest + b"".join(self._held), []
        cut = end_of_events(arrived) if more else len(arrived)
        whole, self._rest = arrived[:cut], arrived[cut:]
        if not self._begun:
            if self._call.terms is None and (late := error_in(whole)) is not None:
                await self._refuse_late(late)
                return
            await self._begin()
        self._wire.opened(whole)
        if self._wire.rewrites:
            whole = b"".join(self._rewritten(event) for event in BLANK_LINE.split(whole) if event.strip())
        if whole or not more:
            await self._send({"type": "http.response.body", "body": whole, "more_body": more})

    def _rewritten(self, event: bytes) -> bytes:
        parsed = parse_event(event)
        return event + b"\n\n" if parsed is None else b"".join(self._wire.event(*parsed))


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client has left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
