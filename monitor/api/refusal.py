"""Refusal texts: what a client gets for a blocked prompt where its policy answers instead of an error.

A complete, normal 200 answer, as each API ends a blocked one: for clients that hide or retry every 400.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from monitor.api.output_item import message, numbered, streamed

FILTERED = "content_filter"
_EXPLANATION = "The safety monitor blocked this prompt."

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One answer that refuses.

    id: our request id; model: the name that the client asked for; n: choices, those of every prompt together
    created: seconds since 1970; include_usage: the client's stream_options of that name; prompt_tokens: for the usage
    extra: fields for the top level of chat's and completions' answers (annotations), in a stream on its first chunk
    """

    id: str
    model: str
    text: str
    created: int
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    prompt_tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def refuse(route: str, refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer, with its length. route: a key of ROUTES; headers: more of them (decision, policy)"""
    own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} if refusal.stream else {}
    kind = "text/event-stream" if refusal.stream else "application/json"
    return Response(ROUTES[route](refusal), 200, own | dict(headers or {}), kind)


def chat(refusal: Refusal) -> bytes:
    """/v1/chat/completions: finish_reason content_filter. The text is `content`: clients show no other field."""

    def whole(index: int) -> Json:
        said = {"role": "assistant", "content": refusal.text, "refusal": None}
        return {"index": index, "message": said, "logprobs": None, "finish_reason": FILTERED}

    def chunks(index: int) -> Iterator[Json]:
        for delta in ({"role": "assistant", "content": ""}, {"content": refusal.text}):
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": FILTERED}

    return _choices(refusal, "chatcmpl-", ("chat.completion", "chat.completion.chunk"), whole, chunks)


def completions(refusal: Refusal) -> bytes:
    """/v1/completions: finish_reason content_filter."""

    def choice(index: int, text: str = refusal.text, finish: str | None = FILTERED) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def chunks(index: int) -> Iterator[Json]:
        yield choice(index, finish=None)
        yield choice(index, text="")

    return _choices(refusal, "cmpl-", ("text_completion", "text_completion"), choice, chunks)


def responses(refusal: Refusal) -> bytes:
    """/v1/responses: status incomplete with incomplete_details content_filter, last event response.incomplete."""
    whole = message(refusal.id, refusal.text)
    begun = {
        "id": f"resp_{refusal.id}",
        "object": "response",
        "created_at": refusal.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": refusal.model,
        "output": [],
        "parallel_tool_calls": False,
        "temperature": None,
        "tool_choice": "none",
        "tools": [],
        "top_p": None,
        "usage": None,
    }
    usage = {
        "input_tokens": refusal.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": refusal.prompt_tokens,
    }
    ended = begun | {
        "status": "incomplete",
        "incomplete_details": {"reason": FILTERED},
        "output": [whole],
        "usage": usage,
    }
    if not refusal.stream:
        return _compact(ended)
    events: list[Json] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *streamed(whole, 0),
        {"type": "response.incomplete", "response": ended},
    ]
    return _named(numbered(events, 0))


def messages(refusal: Refusal) -> bytes:
    """Anthropic's /v1/messages: stop_reason refusal, with stop_details."""
    usage = {"input_tokens": refusal.prompt_tokens, "output_tokens": 0}
    stop = {
        "stop_reason": "refusal",
        "stop_sequence": None,
        "stop_details": {"type": "refusal", "category": None, "explanation": _EXPLANATION},
    }
    begun: Json = {
        "id": f"msg_{refusal.id}",
        "type": "message",
        "role": "assistant",
        "model": refusal.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    text = {"type": "text", "text": refusal.text}
    if not refusal.stream:
        return _compact(begun | {"content": [text]} | stop)
    return _named(
        [
            {"type": "message_start", "message": begun},
            {"type": "content_block_start", "index": 0, "content_block": text | {"text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": refusal.text}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": stop, "usage": usage},
            {"type": "message_stop"},
        ]
    )


ROUTES: Mapping[str, Callable[[Refusal], bytes]] = {
    "chat": chat,
    "chat-batch": chat,
    "completions": completions,
    "responses": responses,
    "messages": messages,
}
"""By the route's name in a Caller."""


def _choices(
    refusal: Refusal,
    prefix: str,
    objects: tuple[str, str],
    whole: Callable[[int], Json],
    chunks: Callable[[int], Iterator[Json]],
) -> bytes:
    """An answer of `choices`. objects: what it is called, whole and as a chunk"""
    head: Json = {"id": prefix + refusal.id, "object": objects[refusal.stream], "created": refusal.created}
    head["model"] = refusal.model
    usage = {"prompt_tokens": refusal.prompt_tokens, "completion_tokens": 0, "total_tokens": refusal.prompt_tokens}
    if not refusal.stream:
        return _compact(head | {"choices": [whole(i) for i in range(refusal.n)], "usage": usage} | dict(refusal.extra))
    pending: Json = {"usage": None} if refusal.include_usage else {}
    events = [head | {"choices": [c]} | pending for index in range(refusal.n) for c in chunks(index)]
    events[0] |= refusal.extra
    if refusal.include_usage:
        events.append(head | {"choices": [], "usage": usage})  # OpenAI's own: the one chunk without a choice
    return b"".join(b"data: " + _compact(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


def _named(events: Iterable[Json]) -> bytes:
    return b"".join(b"event: " + e["type"].encode() + b"\ndata: " + _compact(e) + b"\n\n" for e in events)


def _compact(data: Json) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
