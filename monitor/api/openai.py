"""/v1/models, /v1/chat/completions and /v1/completions: OpenAI's bytes <-> our types."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from monitor.api.answer import Answer, as_event_error
from monitor.api.errors import ApiError, PromptBlocked, from_domain
from monitor.api.refusal import Refusal, refuse
from monitor.api.render import ChatShape, CompletionShape, envelope, usage
from monitor.api.schema import ChatRequest, CompletionRequest, Generate
from monitor.config import Settings
from monitor.errors import RequestInvalid
from monitor.template import ChatTemplate
from monitor.types import Caller, Engine, GenerationRequest, Prompt

_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need. names: all names a client may call the model"""

    engine: Engine
    template: ChatTemplate
    settings: Settings
    names: frozenset[str]
    vocabulary: int


def openai_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    engine, settings = service.engine, service.settings

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        ids = sorted(service.names)
        return {
            "object": "list",
            "data": [{"id": i, "object": "model", "created": 0, "owned_by": "midstream"} for i in ids],
        }

    @routes.post("/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        prompt = await _encode(lambda: service.template.encode([m.plain() for m in body.messages]))
        limit = body.max_completion_tokens or body.max_tokens
        shape = ChatShape(bool(body.logprobs))
        return await respond(http, body, [prompt], limit, body.wanted_logprobs(), shape, "chat")

    @routes.post("/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        given = body.prompts()
        most = min(settings.max_prompts, settings.max_sequences + settings.max_queue)  # more never find room at once
        if not 0 < len(given) <= most:
            raise ApiError(400, f"prompt has {len(given)} entries; send 1 to {most}", param="prompt")
        for ids in given:
            if not isinstance(ids, str) and len(ids) > engine.max_model_len:
                raise ApiError(
                    400, f"prompt has {len(ids)} tokens, the model takes {engine.max_model_len}", param="prompt"
                )
            if not isinstance(ids, str) and not all(0 <= i < service.vocabulary for i in ids):
                raise ApiError(400, f"prompt holds a token id outside 0 to {service.vocabulary - 1}", param="prompt")
        prompts = [await _encode(functools.partial(service.template.raw, p)) for p in given]
        shape = CompletionShape(body.logprobs is not None)
        limit = body.max_tokens if body.max_tokens is not None else 16  # OpenAI's default for this route
        return await respond(http, body, prompts, limit, body.logprobs, shape, "completions")

    async def respond(
        http: Request,
        body: Generate,
        prompts: Sequence[Prompt],
        limit: int | None,
        logprobs: int | None,
        shape: ChatShape | CompletionShape,
        route: str,
    ) -> Response:
        caller = Caller(http.state.midstream_key, route, engine.model_name)
        request = plan(http.state.midstream_id, body, prompts, limit, logprobs, caller)
        answer = Answer(engine, request)
        try:
            await answer.judge_prompts(http)
        except PromptBlocked as blocked:
            return refused(blocked, answer, body)
        n_prompt = sum(len(p.token_ids) for p in prompts)
        base = envelope(shape, request.id, body.model, chunk=body.stream)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = stream(answer, shape, base, n_prompt if with_usage else None)
            return JudgedStream(answer, events, media_type="text/event-stream", headers=_SSE | answer.headers)
        async with answer.guarded(http):
            choices = await gather(answer, shape)
        content = base | {"choices": choices, "usage": usage(n_prompt, answer.released)}
        return JSONResponse(content | answer.annotations, headers=answer.headers)

    def plan(
        request_id: str,
        body: Generate,
        prompts: Sequence[Prompt],
        limit: int | None,
        logprobs: int | None,
        caller: Caller,
    ) -> GenerationRequest:
        if body.model not in service.names:
            raise ApiError(
                404,
                f"model {body.model[:64]!r} is not served here; use {sorted(service.names)[0]!r}",
                param="model",
                code="model_not_found",
            )
        n = body.n or 1
        if n > min(settings.max_n, settings.max_sequences):
            raise ApiError(400, f"n is {n}; send at most {min(settings.max_n, settings.max_sequences)}", param="n")
        longest = max(len(p.token_ids) for p in prompts)
        room = engine.max_model_len - longest
        if room < 1 or (limit is not None and limit > room):
            wanted = f"{longest} prompt tokens" + (f" + max_tokens {limit}" if limit else "")
            raise ApiError(
                400,
                f"{wanted} do not fit into the model's {engine.max_model_len}; shorten the prompt or max_tokens",
                param="messages" if caller.route == "chat" else "prompt",
                code="context_length_exceeded",
            )
        try:
            sampling = body.sampling(limit or min(room, settings.default_max_tokens), service.vocabulary, logprobs)
        except RequestInvalid as error:
            raise from_domain(error) from error
        return GenerationRequest(request_id, tuple(prompts), n, sampling, caller)

    return routes


def refused(blocked: PromptBlocked, answer: Answer, body: Generate) -> Response:
    """What the policy has for a blocked prompt: its text, or the 400. raises: PromptBlocked"""
    text, request = blocked.terms.refusal, answer.request
    if text is None:
        raise blocked
    refusal = Refusal(
        id=request.id,
        model=body.model,
        text=text,
        created=int(time.time()),
        n=answer.n_choices,
        stream=body.stream,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        prompt_tokens=sum(len(p.token_ids) for p in request.prompts),
        extra=answer.annotations,
    )
    return refuse(request.caller.route, refusal, blocked.headers)


async def _encode(encode: Callable[[], Prompt]) -> Prompt:
    """Off the event loop: a long prompt takes a second to tokenise, and other streams go on meanwhile."""
    try:
        prompt = await asyncio.to_thread(encode)
    except RequestInvalid as error:
        raise from_domain(error) from error
    return prompt


class JudgedStream(StreamingResponse):
    """Aborts the request however the response ends, also if the client left before its first event."""

    def __init__(self, answer: Answer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.abort()  # changes nothing for a request that has ended


async def gather(answer: Answer, shape: ChatShape | CompletionShape) -> list[dict[str, Any]]:
    texts: list[list[str]] = [[] for _ in range(answer.n_choices)]
    tokens: list[list[Any]] = [[] for _ in range(answer.n_choices)]
    finishes = [""] * answer.n_choices
    async for delta in answer.deltas():
        texts[delta.index].append(delta.text)
        tokens[delta.index].extend(delta.tokens)
        finishes[delta.index] = delta.finish or ""
        if delta.finish == "content_filter" and answer.terms.replacement is not None:
            texts[delta.index], tokens[delta.index] = [answer.terms.replacement], []
    return [
        shape.whole(i, "".join(texts[i]), tokens[i], finishes[i]) | answer.annotation(i)
        for i in range(answer.n_choices)
    ]


async def stream(
    answer: Answer, shape: ChatShape | CompletionShape, base: dict[str, Any], n_prompt: int | None
) -> AsyncIterator[bytes]:
    """Server-sent events. n_prompt: prompt tokens if the client asked for usage"""

    def event(data: object) -> bytes:
        return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"

    unsent = answer.annotations  # on the first chunk, which has a choice: clients stumble over one without

    def chunk(choice: dict[str, Any]) -> bytes:
        nonlocal unsent
        extra, unsent = unsent, {}
        return event(base | {"choices": [choice]} | ({"usage": None} if n_prompt is not None else {}) | extra)

    try:
        for index in range(answer.n_choices):
            if opening := shape.opening(index):
                yield chunk(opening)
        async for delta in answer.deltas():
            if delta.text or delta.tokens or delta.finish:
                if delta.finish == "content_filter" and answer.terms.replacement is not None:
                    delta = replace(delta, text=delta.text + answer.terms.replacement)
                yield chunk(shape.part(delta) | (answer.annotation(delta.index) if delta.finish else {}))
        if n_prompt is not None:
            yield event(base | {"choices": [], "usage": usage(n_prompt, answer.released)})
        yield b"data: [DONE]\n\n"
    except ApiError as error:  # after the 200 an error can only be an event; no [DONE]: this is not a normal end
        yield event(as_event_error(error))
