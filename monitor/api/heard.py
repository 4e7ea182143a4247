"""What went out of an answer, by choice, read from the bytes of any of the routes. Only where texts are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_CHARACTERS = 2**18
"""Of one choice; what comes behind is not kept."""


class Heard:
    """`take` the pieces as they go out; `texts` at the end."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str]] = {}
        self._sizes: dict[int, int] = {}
        self._rest = b""

    def take(self, body: bytes, streams: bool) -> None:
        """streams: server-sent events, whole or in parts; else one JSON text"""
        if not streams:
            self._add(body)
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._add(line[6:])

    def texts(self) -> dict[int, str]:
        """Of each choice of which something went out."""
        return {i: "".join(parts) for i, parts in self._parts.items()}

    def _add(self, data: bytes) -> None:
        try:
            content = json.loads(data)
        except ValueError:  # [DONE], or a body that is no answer
            return
        if isinstance(content, dict):
            for index, text in _said(content):
                size = self._sizes.get(index, 0)
                self._parts.setdefault(index, []).append(text[: max(0, MAX_CHARACTERS - size)])
                self._sizes[index] = size + len(text)


def _said(content: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(choice, text) of an event or a body: chat, completions, messages or responses."""
    for choice in content.get("choices") or ():
        index = choice.get("index", 0)
        message = choice.get("delta") or choice.get("message") or {}
        for text in (choice.get("text"), message.get("content"), message.get("reasoning_content")):
            if isinstance(text, str):
                yield index, text
        for call in message.get("tool_calls") or ():
            yield index, (call.get("function") or {}).get("arguments") or ""
    kind, delta = content.get("type"), content.get("delta")
    if kind == "response.output_text.delta" and isinstance(delta, str):
        yield 0, delta
    elif kind == "content_block_delta" and isinstance(delta, dict):
        yield 0, delta.get("text") or delta.get("partial_json") or ""
    elif kind == "message" or content.get("object") == "response":
        items = [content] if kind == "message" else content.get("output") or ()
        for part in (p for item in items for p in item.get("content") or ()):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield 0, part["text"]
