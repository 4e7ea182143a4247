"""What a client asks of the upstream, as the observer reads it. What it can't read is refused: it would go on unjudged.

The body itself goes on byte for byte; so whatever another reader could find in it is judged here. A field we do not
know may reach the model: its strings are read with the system's text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.vllm.admit import admit
from monitor.config import Settings
from monitor.template import ChatTemplate
from monitor.types import Prompt

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "/chat/completions", "/completions", "/responses", "/embeddings"
_CONTROL = frozenset(
    {"model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"}
    | {"encoding_format", "prompt_cache_key", "prompt_cache_retention", "reasoning", "reasoning_effort", "verbosity"}
    | {"tool_choice", "truncation", "include", "modalities", "stop", "logit_bias"}
)
"""Fields whose strings are no text for the model."""
_LABELS = frozenset({"role", "type", "id", "call_id", "tool_call_id", "item_id", "status", "format"})
_MAX_LABEL = 64
_READ: Mapping[str, Sequence[str]] = {CHAT: ("messages",), RESPONSES: ("input", "instructions")}
"""What `_conversation` reads on a route. There a field of the other one's is like any that is not known: words."""
_ELSEWHERE: Mapping[str, Sequence[str]] = {
    CHAT: (),
    COMPLETIONS: (),
    RESPONSES: ("conversation", "prompt"),
    EMBEDDINGS: (),
}
"""Fields that name a text which is kept at the upstream."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "summary_text", "reasoning_text")
_MINE = ("reasoning", "function_call", "custom_tool_call")
_ITEMS = ("message", "function_call_output", "custom_tool_call_output", *_MINE)
_ROLES = {"system": "system", "developer": "system", "assistant": "assistant", "model": "assistant"}

Message = dict[str, str]


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

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ApiError(400, "a field stands twice in one object; send it once", code="bad_json")
        return found

    try:
        body = json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:80]}", code="bad_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object", code="bad_json")
    return body


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
    n, _ = admit("/v1" + path, body, settings)
    if path == COMPLETIONS:
        prompts = [template.raw(_joined([*_extra(body, "prompt"), p])) for p in _texts_of(body, "prompt", settings)]
    else:
        messages = _conversation(path, body)
        prompts = [template.encode(_with_system(messages, _extra(body, *_READ[path])))]
    options = body.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    return Asked(model, stream is True, usage, n, tuple(prompts))


def inputs(body: Mapping[str, Any], settings: Settings) -> list[str]:
    """The texts of an embeddings request. raises: ApiError 400"""
    extra = _extra(body, "input")
    return [_joined([*extra, text]) for text in _texts_of(body, "input", settings)]


def _texts_of(body: Mapping[str, Any], field: str, settings: Settings) -> list[str]:
    given = body.get(field)
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        what = "text or a list of texts; the observer can't read another model's token ids"
        raise ApiError(400, f"field {field!r}: send {what}", param=field, code="bad_value")
    most = settings.max_prompts if field == "prompt" else settings.max_messages
    if len(found) > most:
        raise ApiError(400, f"{field} has {len(found)} entries; send at most {most}", param=field)
    return [_utf8(text, field) for text in found]


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
    return ([{"role": "system", "content": _utf8(lead, "instructions")}] if lead else []) + [
        _message(item, field) for item in given
    ]


def _message(item: Mapping[str, Any], field: str) -> Message:
    role, kind = item.get("role"), item.get("type")
    if kind is not None and kind not in _ITEMS:
        raise ApiError(400, f"{field}: an item of type {str(kind)[:32]!r} can't be judged; remove it", param=field)
    if role is None:  # an item of Responses
        role = "assistant" if kind in _MINE else "tool"
    if not isinstance(role, str):
        raise ApiError(400, f"{field}: a role is a {type(role).__name__}, not text", param=field, code="bad_value")
    # What a tool or an unknown role says is given to the model, like a user's turn.
    return {"role": _ROLES.get(role, "user"), "content": _utf8(_joined(_said(item, field)), field)}


def _said(message: Mapping[str, Any], field: str) -> Iterator[str]:
    """Every string of a message: its content first, then its calls and whatever else is in it."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind not in _TEXT_PARTS:
                raise ApiError(
                    400, f"{field}: a part of type {str(kind)[:32]!r} can't be judged; remove it", param=field
                )
        # Without anything between: a word may be parted by parts.
        yield "".join(_strings(content))
    elif content is not None:
        yield from _strings(content)
    yield from _strings({k: v for k, v in message.items() if k != "content"})


def _extra(body: Mapping[str, Any], *read: str) -> list[str]:
    """Fields that are neither known nor read elsewhere and hold words, as templates show them: tools, schemas, ..."""
    found = [v for k, v in body.items() if k not in _CONTROL and k not in read and any(_strings(v, names=True))]
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in found]


def _with_system(messages: list[Message], extra: Sequence[str]) -> list[Message]:
    if not extra:
        return messages
    text = _utf8(_joined(extra), "body")
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": _joined([messages[0]["content"], text])}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _strings(value: Any, names: bool = False) -> Iterator[str]:
    """names: also those of fields"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, names)
    elif isinstance(value, dict):
        for key, item in value.items():
            if names and key not in _LABELS:
                yield key
            if not (key in _LABELS and isinstance(item, str) and _is_label(item)):
                yield from _strings(item, names)


def _is_label(value: str) -> bool:
    """Not a text that hides in a field for something else."""
    return len(value) <= _MAX_LABEL and not any(c.isspace() for c in value)


def _joined(found: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(text for text in found if text)


def _utf8(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{field} holds half a surrogate pair; send valid Unicode", param=field) from None
    return text
