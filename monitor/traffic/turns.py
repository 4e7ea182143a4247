"""A kept prompt as turns of a conversation, whatever the route that it was sent to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def turns_of(prompt: Any, choice: int) -> list[dict[str, str]]:
    """{role, content} of what a client sent, on any route; role "" where the text is no conversation.

    choice: of a list of prompts each has `n`, one after another
    """
    if not isinstance(prompt, Mapping):
        return []
    turns = [{"role": "system", "content": _text(prompt[n])} for n in ("system", "instructions") if prompt.get(n)]
    if isinstance(prompt.get("messages"), list):
        return turns + [_turn(m) for m in prompt["messages"]]
    given = next((prompt[n] for n in ("prompt", "input", "texts") if prompt.get(n)), None)
    if isinstance(given, list) and given and all(isinstance(m, Mapping) and "role" in m for m in given):
        return turns + [_turn(m) for m in given]
    if isinstance(given, list) and given and all(isinstance(each, str | list) for each in given):
        each_has = prompt.get("n")
        each_has = each_has if isinstance(each_has, int) and each_has > 0 else 1
        given = given[min(choice // each_has, len(given) - 1)]
    return turns if given is None else [*turns, {"role": "user" if turns else "", "content": _text(given)}]


def is_text(prompt: Any) -> bool:
    """Whether somebody wrote it: not token ids, which a client may send in place of a text."""
    given = prompt.get("prompt") if isinstance(prompt, Mapping) else None
    return not isinstance(given, list) or all(isinstance(each, str) for each in given)


def _turn(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        return {"role": "", "content": _text(message)}
    return {"role": str(message.get("role", "")), "content": _text(message.get("content"))}


def _text(content: Any) -> str:
    """Text parts as they are, whatever else as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) and _part(part) for part in content):
        return "\n".join(_part(part) for part in content)
    return json.dumps(content, ensure_ascii=False)


def _part(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else ""
