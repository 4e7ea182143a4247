"""One turn of a conversation, or an item of Responses' input, as the observer reads it: every string of it.

What it can't read is refused: the upstream would get it unjudged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monitor.api.errors import ApiError

_LABELS = frozenset({"role", "type", "id", "call_id", "tool_call_id", "item_id", "status", "format"})
_MAX_LABEL = 64
_MAX_SHOWN = 32
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "summary_text", "reasoning_text")
_WORDS = ("text", "refusal", "thinking")
# Upstreams tell a part without a type by its fields, so one field more makes a picture of it.
_OF_A_PART = frozenset(
    {"type", "text", "annotations", "logprobs", "signature", "cache_control", "prompt_cache_breakpoint"}
)
_MINE = ("reasoning", "function_call", "custom_tool_call")
_ITEMS = ("message", "function_call_output", "custom_tool_call_output", *_MINE)
# What a tool says is given to the model, like a user's turn. A role is a text too, which templates print: no others.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("assistant", "model"), "assistant"),
    **dict.fromkeys(("user", "tool", "function"), "user"),
}

Message = dict[str, str]


def turn(item: Mapping[str, Any], field: str) -> Message:
    """raises: ApiError 400"""
    role, kind = item.get("role"), item.get("type")
    if kind is not None and kind not in _ITEMS:
        raise _refused(field, f"an item of type {_shown(kind)} can't be judged; remove it")
    if role is None and kind in (None, "message"):
        raise _refused(field, "an item without a role names a text that is not here to be judged; send the text")
    if item.get("audio") is not None:
        raise _refused(field, "audio can't be judged; send its text")
    if role is None:
        role = "assistant" if kind in _MINE else "tool"
    if not isinstance(role, str) or role not in _ROLES:
        raise _refused(field, f"the role {_shown(role)} is not known; send one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": utf8(joined(_said(item, field)), field)}


def _said(item: Mapping[str, Any], field: str) -> Iterator[str]:
    """Every string of it: its content first, then its calls and whatever else is in it."""
    for name in ("content", "output"):
        if item.get(name) is not None:
            _check_parts(item[name], field)
            # Without anything between: a word may be parted by parts.
            yield "".join(strings(item[name]))
    yield from strings({k: v for k, v in item.items() if k not in ("content", "output")})


def _check_parts(given: Any, field: str) -> None:
    """A text, or parts that are nothing but text. raises: ApiError 400"""
    if isinstance(given, str):
        return
    for part in given if isinstance(given, list) else [given]:
        if isinstance(part, str):
            continue
        if not isinstance(part, dict):
            raise _refused(field, f"a part is neither text nor an object, but {type(part).__name__}; remove it")
        kind = part.get("type")
        if kind is not None and kind not in _TEXT_PARTS:
            raise _refused(field, f"a part of type {_shown(kind)} can't be judged; remove it")
        for name, value in part.items():
            if name not in _OF_A_PART and name != kind:
                raise _refused(field, f"a part with a field {_shown(name)} can't be judged; remove it")
            if name in _WORDS and value is not None:
                _check_parts(value, field)


def _refused(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field}: {what}", param=field, code="bad_value")


def _shown(value: Any) -> str:
    return repr(str(value)[:_MAX_SHOWN])


def strings(value: Any, names: bool = False) -> Iterator[str]:
    """names: also those of fields"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, names)
    elif isinstance(value, dict):
        for key, item in value.items():
            if names and key not in _LABELS:
                yield key
            if not (key in _LABELS and isinstance(item, str) and _is_label(item)):
                yield from strings(item, names)


def _is_label(value: str) -> bool:
    """Not a text that hides in a field for something else."""
    return len(value) <= _MAX_LABEL and not any(c.isspace() for c in value)


def joined(found: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(text for text in found if text)


def utf8(text: str, field: str) -> str:
    """raises: ApiError 400"""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused(field, "half a surrogate pair; send valid Unicode") from None
    return text
