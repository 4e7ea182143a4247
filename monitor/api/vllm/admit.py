"""What a client may send to a generating route of vLLM: fields that reach past the monitor are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monitor.api.errors import ApiError
from monitor.config import Settings
from monitor.types import Format

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
# Values that are refused where the field itself is harmless.
_REFUSED_VALUES: Mapping[str, tuple[Any, str]] = {
    "use_beam_search": (True, "samples tokens that are never fed back, so no token of the answer would be judged"),
    "add_generation_prompt": (False, _POSITIONS),
    "continue_final_message": (True, _POSITIONS),
    "background": (True, "answers when nobody is connected any more"),
}

Message = dict[str, str]


def admit(body: Mapping[str, Any], settings: Settings) -> None:
    """raises: ApiError 400 for a field that may not be sent, or more choices or prompts than the server allows"""
    for field, why in _REFUSED.items():
        if body.get(field) is not None:
            raise ApiError(400, f"field {field!r} {why}; remove it", param=field, code="unsupported_field")
    for field, (value, why) in _REFUSED_VALUES.items():
        if body.get(field) == value:
            raise ApiError(400, f"{field}={value} {why}; remove it", param=field, code="unsupported_field")
    if choices(body) > settings.max_n:
        raise ApiError(400, f"n is {body['n']}; send at most {settings.max_n}", param="n")
    if n_prompts(body) > settings.max_prompts:
        raise ApiError(400, f"{n_prompts(body)} prompts in one request; send at most {settings.max_prompts}")


def choices(body: Mapping[str, Any]) -> int:
    """Answers per prompt. What is not a number is for vLLM's own validation to refuse."""
    n = body.get("n")
    return n if isinstance(n, int) and n > 0 else 1


def n_prompts(body: Mapping[str, Any]) -> int:
    """Prompts of a completions or a batch request; 1 for the others."""
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        return len(messages)
    return 1


def chat_messages(body: Mapping[str, Any]) -> list[Message]:
    """A conversation as roles and texts, of chat's, Responses' or Anthropic's fields. Empty if it holds more than text:
    then nothing is history and the whole conversation is judged as the newest turn."""
    leading = body.get("system") or body.get("instructions")
    items = body.get("messages") or body.get("input")
    if not isinstance(items, list):
        return []
    found: list[Message] = []
    if leading:
        found.append({"role": "system", "content": _text(leading)})
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            return []
        try:
            found.append({"role": item["role"], "content": _text(item.get("content"))})
        except TypeError:
            return []
    return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise TypeError("content is not text")


def route_format(path: str) -> Format:
    return "raw" if path == "/v1/completions" else "chat"
