"""What a client may send to a generating route of vLLM: fields that reach past the monitor are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from monitor.api.errors import ApiError
from monitor.config import Settings
from monitor.types import Format

CHAT, COMPLETIONS, BATCH = "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/batch"
_PLUGIN = "reaches vLLM's plugins past the monitor"
_POSITIONS = "moves the positions that the probes were calibrated on"
_REFUSED: Mapping[str, str] = {
    "vllm_xargs": _PLUGIN,
    "kv_transfer_params": _PLUGIN,
    "ec_transfer_params": _PLUGIN,
    "logits_processors": _PLUGIN,
    "prompt_embeds": "has no text that could be judged",
    "chat_template": _POSITIONS,
    "chat_template_kwargs": _POSITIONS,
    "documents": _POSITIONS,
    "mm_processor_kwargs": _POSITIONS,
    "previous_response_id": "names an answer that is not kept here",
}
# What vLLM turns into arguments of a chat template that knows about reasoning.
_SWITCHES = ("reasoning_effort", "reasoning", "thinking", "output_config")
# Switches of which only one position is monitored. vLLM reads strings and numbers as booleans too ("on", 1): so
# anything but that position, spelled as JSON spells it, is refused.
_FIXED: Mapping[str, tuple[bool, str]] = {
    "use_beam_search": (False, "samples tokens that are never fed back, so no token of the answer would be judged"),
    "add_generation_prompt": (True, _POSITIONS),
    "continue_final_message": (False, _POSITIONS),
    "add_special_tokens": (False, _POSITIONS),
    "background": (False, "answers when nobody is connected any more"),
}

_BOOL = TypeAdapter(bool)

Message = dict[str, str]


def admit(path: str, body: Mapping[str, Any], settings: Settings, switches: bool = False) -> tuple[int, int]:
    """(answers per prompt, prompts) of a request to a generating route.

    switches: the chat template has switches for reasoning, which these fields would turn
    raises: ApiError 400 for a field that may not be sent, or more choices or prompts than the server allows
    """
    for field, why in _REFUSED.items():
        if body.get(field) is not None:
            raise _unsupported(field, field, why)
    for field in _SWITCHES if switches else ():
        if body.get(field) is not None:
            raise _unsupported(field, field, _POSITIONS)
    for field, (fixed, why) in _FIXED.items():
        value = body.get(field)
        allowed = value is None or value is fixed or (field == "add_special_tokens" and path == COMPLETIONS)
        if not allowed:
            raise _unsupported(field, f"{field}={str(value)[:32]!r}", why)
    side = body.get("truncation_side")
    if side not in (None, "left") and route_format(path) == "chat":
        why = "cuts off the template's closing tokens, which the probes were calibrated on"
        raise _unsupported("truncation_side", f"truncation_side={str(side)[:32]!r}", why)
    items = body.get("input")
    newest = items[-1] if isinstance(items, list) and items else None
    if isinstance(newest, dict) and newest.get("status") not in (None, "completed"):
        raise _unsupported("input", "an input item that is not completed", _POSITIONS)
    n, prompts = _choices(path, body), _prompts(path, body)
    if n > settings.max_n:
        raise ApiError(400, f"n is {n}; send at most {settings.max_n}", param="n")
    if prompts > settings.max_prompts:
        raise ApiError(400, f"{prompts} prompts in one request; send at most {settings.max_prompts}")
    return n, prompts


def _unsupported(field: str, what: str, why: str) -> ApiError:
    return ApiError(400, f"{what} {why}; remove it", param=field, code="unsupported_field")


def _choices(path: str, body: Mapping[str, Any]) -> int:
    n = body.get("n") if path in (CHAT, COMPLETIONS) else None
    if n is None:
        return 1
    if type(n) is not int or n < 1:
        raise ApiError(400, f"n is {str(n)[:32]!r}; send a whole number from 1 on", param="n")
    return n


def _prompts(path: str, body: Mapping[str, Any]) -> int:
    field = {COMPLETIONS: "prompt", BATCH: "messages"}.get(path)
    given = body.get(field) if field else None
    if not isinstance(given, list) or not given:
        return 1
    if field == "messages":
        return len(given)
    if all(type(item) is int for item in given):
        return 1  # one prompt, as token ids
    if all(isinstance(item, (str, list)) for item in given):
        return len(given)
    raise ApiError(400, "prompt is neither text, nor token ids, nor a list of these; correct it", param="prompt")


def chat_messages(body: Mapping[str, Any]) -> list[Message]:
    """A conversation as roles and texts, of chat's, Responses' or Anthropic's fields. Empty if it holds more than text:
    then nothing is history and the whole conversation is judged as the newest turn."""
    leading = body.get("system") or body.get("instructions")
    items = body.get("messages") or body.get("input")
    if not isinstance(items, list) or not all(isinstance(i, dict) and isinstance(i.get("role"), str) for i in items):
        return []
    # vLLM joins the parts of a message by newlines, and those of Anthropic's system text by nothing.
    found = [] if not leading else [("system", _text(leading, ""))]
    found += [(item["role"], _text(item.get("content"), "\n")) for item in items]
    return [] if any(text is None for _, text in found) else [{"role": r, "content": t or ""} for r, t in found]


def _text(content: Any, between: str) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return between.join(part["text"] for part in content)
    return None


def route_format(path: str) -> Format:
    return "raw" if path == COMPLETIONS else "chat"


def is_true(value: Any) -> bool:
    """As vLLM's fields read it, by pydantic: 1, "true" and "on" are true too."""
    try:
        return _BOOL.validate_python(value)
    except ValidationError:
        return False
