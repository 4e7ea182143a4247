"""What a client asks of the upstream, as the observer reads it. What it can't read is refused: it would go on unjudged.

The body itself goes on byte for byte; so whatever another reader could find in it is judged here. A field we do not
know may reach the model: its strings are read with the system's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.upstream.turns import Message, joined, strings, turn, utf8
from monitor.api.vllm.admit import admit
from monitor.config import Settings
from monitor.template import ChatTemplate
from monitor.types import Prompt
from monitor.upstream.strict import strict_object

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "/chat/completions", "/completions", "/responses", "/embeddings"
_CONTROL = frozenset(
    {"model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"}
    | {"encoding_format", "prompt_cache_key", "prompt_cache_retention", "reasoning", "reasoning_effort", "verbosity"}
    | {"tool_choice", "truncation", "include", "modalities", "stop", "logit_bias"}
)
"""Fields whose strings are no text for the model."""
_READ: Mapping[str, Sequence[str]] = {CHAT: ("messages",), RESPONSES: ("input", "instructions")}
"""What `_conversation` reads on a route. There a field of the other one's is like any that is not known: words."""
_ELSEWHERE: Mapping[str, Sequence[str]] = {
    CHAT: (),
    COMPLETIONS: (),
    RESPONSES: ("conversation", "prompt"),
    EMBEDDINGS: (),
}
"""Fields that name a text which is kept at the upstream."""
_HOSTED = ("web_search_options", "search_parameters", "plugins")
_TOOLS = ("function", "custom")
"""Tools that the client runs. Every other one the upstream runs, and its model reads what we never see."""


@dataclass(frozen=True, slots=True)
class Asked:
    """prompts: what the upstream's model will read, as the observer's template gives it; n: answers to each
    model: the client's name for it
    """

    model: str
    stream: bool
    with_usage: bool
    n: int
    prompts: tuple[Prompt, ...]


def body_of(raw: bytes) -> dict[str, Any]:
    """raises: ApiError 400 for anything but one JSON object without a name that stands twice"""
    try:
        return strict_object(raw)
    except ValueError as error:
        raise ApiError(400, f"the body is not one JSON object: {str(error)[:80]}", code="bad_json") from error


def asked(path: str, body: Mapping[str, Any], template: ChatTemplate, settings: Settings) -> Asked:
    """Tokenises: call it in a thread.

    raises: ApiError 400, RequestInvalid if the template refuses the conversation
    """
    model, stream = body.get("model"), body.get("stream")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "field 'model': send the name of a model", param="model", code="bad_value")
    if stream not in (None, True, False):
        raise ApiError(400, "field 'stream': send true or false", param="stream", code="bad_value")
    for field in _ELSEWHERE[path]:
        if body.get(field) is not None:
            raise ApiError(400, f"{field} names a text that is not here to be judged; send it", param=field)
    if body.get("modalities") not in (None, ["text"]):
        raise ApiError(400, "modalities: only text can be judged", param="modalities", code="unsupported_field")
    _check_tools(body)
    n, _ = admit("/v1" + path, body, settings)
    if path == COMPLETIONS:
        prompts = [template.raw(joined([*_extra(body, "prompt"), p])) for p in _texts_of(body, "prompt", settings)]
    else:
        messages = _conversation(path, body)
        prompts = [template.encode(_with_system(messages, _extra(body, *_READ[path])))]
    options = body.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    return Asked(model, stream is True, usage, n, tuple(prompts))


def inputs(body: Mapping[str, Any], settings: Settings) -> list[str]:
    """The texts of an embeddings request. raises: ApiError 400"""
    extra = _extra(body, "input")
    return [joined([*extra, text]) for text in _texts_of(body, "input", settings)]


def _check_tools(body: Mapping[str, Any]) -> None:
    """raises: ApiError 400"""
    remedy = "is the upstream's to run and reads what is not here to be judged; run it yourself and send its output"
    for field in _HOSTED:
        if body.get(field) is not None:
            raise ApiError(400, f"{field} {remedy}", param=field, code="unsupported_field")
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else [] if tools is None else [tools]:
        kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
        ours = kind in _TOOLS or (kind is None and ("function" in tool or "name" in tool))
        if not ours:
            what = f"tools: a tool of type {str(kind)[:32]!r}"
            raise ApiError(400, f"{what} {remedy}", param="tools", code="unsupported_field")


def _texts_of(body: Mapping[str, Any], field: str, settings: Settings) -> list[str]:
    given = body.get(field)
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        what = "text or a list of texts; the observer can't read another model's token ids"
        raise ApiError(400, f"field {field!r}: send {what}", param=field, code="bad_value")
    most = settings.max_prompts if field == "prompt" else settings.max_messages
    if len(found) > most:
        raise ApiError(400, f"{field} has {len(found)} entries; send at most {most}", param=field)
    return [utf8(text, field) for text in found]


def _conversation(path: str, body: Mapping[str, Any]) -> list[Message]:
    field = "messages" if path == CHAT else "input"
    given = body.get(field)
    if path == RESPONSES and isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ApiError(400, f"field {field!r}: send a list of messages", param=field, code="bad_value")
    lead = body.get("instructions") if path == RESPONSES else None
    if lead is not None and not isinstance(lead, str):
        raise ApiError(400, "field 'instructions': send text", param="instructions", code="bad_value")
    return ([{"role": "system", "content": utf8(lead, "instructions")}] if lead else []) + [
        turn(item, field) for item in given
    ]


def _extra(body: Mapping[str, Any], *read: str) -> list[str]:
    """Fields that are neither known nor read elsewhere and hold words, as templates show them: tools, schemas, ..."""
    found = [v for k, v in body.items() if k not in _CONTROL and k not in read and any(strings(v, names=True))]
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in found]


def _with_system(messages: list[Message], extra: Sequence[str]) -> list[Message]:
    if not extra:
        return messages
    text = utf8(joined(extra), "body")
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": joined([messages[0]["content"], text])}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
