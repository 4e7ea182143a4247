"""A kept conversation as the console shows it: turns, and each token's part of the text where the two still fit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from monitor.errors import RequestInvalid
from monitor.template import ChatTemplate
from monitor.traffic.redact import PATTERNS

_STRUCK_OUT = re.compile("|".join(re.escape(f"[{name}]") for name in {p.name for p in PATTERNS}))


def turns_of(prompt: Any, choice: int, n_choices: int) -> list[dict[str, str]]:
    """{role, content} of what a client sent, on any route; role "" where the text is no conversation.

    choice, n_choices: of a list of prompts each has as many choices as the others
    """
    if not isinstance(prompt, Mapping):
        return []
    turns = [{"role": "system", "content": _text(prompt[n])} for n in ("system", "instructions") if prompt.get(n)]
    if isinstance(prompt.get("messages"), list):
        return turns + [_turn(m) for m in prompt["messages"]]
    given = next((prompt[n] for n in ("prompt", "input", "texts") if prompt.get(n)), None)
    if isinstance(given, list) and given and all(isinstance(m, Mapping) and "role" in m for m in given):
        return turns + [_turn(m) for m in given]
    if isinstance(given, list) and given and all(isinstance(text, str) for text in given):
        given = given[min(choice * len(given) // max(1, n_choices), len(given) - 1)]
    return turns if given is None else [*turns, {"role": "user" if turns else "", "content": _text(given)}]


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


def is_struck_out(text: str) -> bool:
    """Whether it may have been redacted. Then its tokens are not those that were scored."""
    return _STRUCK_OUT.search(text) is not None


def spell_prompt(template: ChatTemplate, turns: list[dict[str, str]], body: Mapping[str, Any]) -> list[str] | None:
    """Each position's part of a record's prompt; None where they can't be told: other tokens than were scored."""
    if not turns or any(is_struck_out(turn["content"]) for turn in turns):
        return None
    try:
        is_chat = body["format"] == "chat"
        text = template.render(turns) if is_chat else "".join(turn["content"] for turn in turns)
        pieces = template.pieces(text, specials=not is_chat)
    except RequestInvalid:
        return None
    return pieces if len(pieces) == body["coverage"]["prompt_tokens"] else None


def spell_answer(template: ChatTemplate, answer: str, body: Mapping[str, Any]) -> list[str] | None:
    """Each position's part of a record's answer, as far as it went out; None as above."""
    if not answer or is_struck_out(answer):
        return None
    pieces = template.pieces(answer, specials=False)
    sampled, released = body["coverage"]["response_tokens"], body["released_tokens"]
    # The token that ends an answer has no text.
    return pieces if len(pieces) in {sampled, sampled - 1, released, released - 1} else None
