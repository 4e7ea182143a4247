"""A kept conversation as the console shows it: turns, and each token's part of the text where the two still fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from monitor.errors import RequestInvalid
from monitor.template import ChatTemplate
from monitor.traffic.redact import PATTERNS

_STRUCK_OUT = re.compile("|".join(re.escape(f"[{name}]") for name in {p.name for p in PATTERNS}))


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
