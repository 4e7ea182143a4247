"""The proxy's routes: the prompt is judged, then the request goes on as it came, and its answer is read along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from monitor.api.errors import ApiError, PromptBlocked, blocked_readings, ended_badly, from_domain
from monitor.api.judging import Judging, Session, unless_gone
from monitor.api.refusal import Refusal, refuse
from monitor.api.upstream.ask import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Asked, asked, body_of, inputs
from monitor.api.upstream.choices import ChatWire, CompletionWire
from monitor.api.upstream.items import ResponsesWire
from monitor.api.upstream.relay import Relay, RelayStream, told, whole
from monitor.api.upstream.wire import Wire
from monitor.api.verdicts import known, prompt_annotation, verdict_headers
from monitor.config import Settings
from monitor.errors import Overloaded, RequestInvalid
from monitor.types import Caller, Phase
from monitor.upstream.choice import Choice
from monitor.upstream.engine import ObserverEngine
from monitor.upstream.errors import Unreadable, UpstreamError
from monitor.upstream.transport import Reply, Upstream

_MAX_NAME = 128
_WIRES: dict[str, type[ChatWire] | type[CompletionWire] | type[ResponsesWire]] = {
    CHAT: ChatWire,
    COMPLETIONS: CompletionWire,
    RESPONSES: ResponsesWire,
}
_NAMES = {CHAT: "chat", COMPLETIONS: "completions", RESPONSES: "responses"}


@dataclass(frozen=True, slots=True)
class Proxy:
    """What the routes need. judging: of texts that are only judged"""

    engine: ObserverEngine
    upstream: Upstream
    settings: Settings
    judging: Judging


def upstream_routes(proxy: Proxy) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    engine, upstream, settings = proxy.engine, proxy.upstream, proxy.settings

    @routes.get("/models")
    async def models(http: Request) -> Response:
        return await unless_gone(http, passed("GET", "/models", b"", http))

    @routes.post(CHAT)
    async def chat(http: Request) -> Response:
        return await respond(CHAT, http)

    @routes.post(COMPLETIONS)
    async def completions(http: Request) -> Response:
        return await respond(COMPLETIONS, http)

    @routes.post(RESPONSES)
    async def responses(http: Request) -> Response:
        return await respond(RESPONSES, http)

    @routes.post(EMBEDDINGS)
    async def embeddings(http: Request) -> Response:
        raw = await http.body()
        body = body_of(raw)
        session = Session(proxy.judging, http, "embeddings", _name_of(str(body.get("model", ""))))
        try:
            texts = inputs(body, settings)
            records = await session.judge([await session.turn(text) for text in texts])
        except (RequestInvalid, Overloaded) as error:
            raise from_domain(error) from error
        for index, record in enumerate(records):
            if blocked_readings(record, Phase.PROMPT):
                raise PromptBlocked(record, index, len(records), engine.live.choose(session.caller).terms)
            if failed := ended_badly(record):
                raise failed
        policy, verdicts = records[0].policy, [r.verdict for r in records]
        return await unless_gone(http, passed("POST", EMBEDDINGS, raw, http, verdict_headers(policy, verdicts)))

    async def passed(
        method: str, path: str, raw: bytes, http: Request, headers: dict[str, str] | None = None
    ) -> Response:
        """An answer without text, as it comes."""
        try:
            async with upstream.send(method, path, raw, http.scope["headers"]) as reply:
                return Response(await reply.whole(), reply.status, reply.headers | (headers or {}))
        except UpstreamError as error:
            raise told(error) from error

    async def respond(path: str, http: Request) -> Response:
        raw = await http.body()
        body = body_of(raw)
        try:
            ask = await asyncio.to_thread(asked, path, body, engine.observer.template, settings)
        except RequestInvalid as error:
            raise from_domain(error) from error
        return await unless_gone(http, judged(path, http, raw, ask))

    async def judged(path: str, http: Request, raw: bytes, ask: Asked) -> Response:
        identity = http.state.midstream_id
        caller = Caller(http.state.midstream_key, _NAMES[path], _name_of(ask.model))
        try:
            choices = await engine.open(identity, ask.prompts, ask.n, caller)
        except Overloaded as error:
            raise from_domain(error) from error
        sending = AsyncExitStack()
        handed_over = False
        try:
            if (refusal := _refused(choices, ask, identity)) is not None:
                return refusal
            reply = await sending.enter_async_context(upstream.send("POST", path, raw, http.scope["headers"]))
            response = await relayed(reply, _WIRES[path](choices, ask.with_usage, ask.n), sending, identity)
            handed_over = isinstance(response, RelayStream)
            return response
        except UpstreamError as error:
            for choice in choices:
                choice.end("engine_error")
            raise told(error) from error
        finally:
            if not handed_over:
                engine.close(identity)
                await sending.aclose()

    async def relayed(reply: Reply, wire: Wire, sending: AsyncExitStack, identity: str) -> Response:
        if reply.status != 200:
            if reply.status < 400:  # a client may take whatever stands in it for an answer
                raise Unreadable(f"the upstream answered with status {reply.status}, neither 200 nor an error")
            for choice in wire.choices:
                choice.end("engine_error")
            return Response(await reply.whole(), reply.status, reply.headers)
        if reply.kind == "text/event-stream":
            relay = Relay(wire, reply, sending.aclose, upstream.bounds.max_bytes, engine.lag.pause_s)
            headers = reply.headers | _verdicts(wire.choices) | {"Cache-Control": "no-cache"}
            return RelayStream(relay, headers, sending.aclose, lambda: engine.close(identity))
        body = await whole(wire, reply)
        return Response(body, 200, reply.headers | _verdicts(wire.choices))

    return routes


def _name_of(model: str) -> str:
    """The client's name for a model, as records have it. raises: ApiError 400 for one that a terminal would act on"""
    if not model.isprintable():
        message = "field 'model': it holds characters that can't be printed; send the name of a model"
        raise ApiError(400, message, param="model", code="bad_value")
    return model[:_MAX_NAME]


def _verdicts(choices: Sequence[Choice]) -> dict[str, str]:
    openings = {c.index: c.opening for c in choices if c.opening is not None}
    records = {c.index: c.record for c in choices if c.record is not None}
    return verdict_headers(choices[0].policy.terms.policy, known(openings, records))


def _refused(choices: list[Choice], ask: Asked, identity: str) -> Response | None:
    """A refusal by the policy's text. raises: ApiError for a prompt that may not be answered"""
    for choice in choices:
        record = choice.record
        if record is None:
            continue
        if blocked_readings(record, Phase.PROMPT):
            blocked = PromptBlocked(record, choice.index // ask.n, len(ask.prompts), choice.policy.terms)
            if blocked.terms.refusal is None:
                raise blocked
            return _kindly(blocked, choices, ask, identity)
        if choice.too_long:
            n = len(choice.prompt.token_ids)
            message = f"the prompt has {n} tokens, more than the safety monitor can read; shorten it"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        if error := ended_badly(record):
            raise error
    return None


def _kindly(blocked: PromptBlocked, choices: list[Choice], ask: Asked, identity: str) -> Response:
    """The policy's text, as an answer."""
    caller = choices[0].caller
    refusal = Refusal(
        id=identity,
        model=ask.model,
        text=blocked.terms.refusal or "",
        created=int(time.time()),
        n=len(choices),
        stream=ask.stream,
        include_usage=ask.with_usage,
        prompt_tokens=sum(len(p.token_ids) for p in ask.prompts),
        extra=prompt_annotation(blocked.terms, {c.index: c.opening for c in choices if c.opening is not None}, ask.n),
    )
    return refuse(caller.route, refusal, blocked.headers)
