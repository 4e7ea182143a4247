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
            if line.startswith(b"data:"):  # a space may follow, which JSON overlooks
                self._add(line[5:])

    def texts(self) -> dict[int, str]:
        """Of each choice of which something went out."""
        return {i: "".join(parts) for i, parts in self._parts.items()}

    def _add(self, data: bytes) -> None:
        """Never raises, whatever an upstream says: its answer goes on, and only what we keep of it is less."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):  # [DONE], or a body that is no answer
            return
        for index, text in _said(_object(content)):
            if isinstance(text, str) and isinstance(index, int):
                size = self._sizes.get(index, 0)
                self._parts.setdefault(index, []).append(text[: max(0, MAX_CHARACTERS - size)])
                self._sizes[index] = size + len(text)


def _said(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(choice, text) of an event or a body: chat, completions, messages or responses. Either may be anything."""
    for choice in _objects(content.get("choices")):
        index = choice.get("index", 0)
        message = _object(choice.get("delta")) or _object(choice.get("message"))
        thought, again = message.get("reasoning_content"), message.get("reasoning")  # some spell it twice
        for text in (choice.get("text"), message.get("content"), thought, None if again == thought else again):
            yield index, text
        for call in _objects(message.get("tool_calls")):
            yield index, _object(call.get("function")).get("arguments")
    kind, delta = content.get("type"), content.get("delta")
    if isinstance(kind, str) and kind.startswith("response.") and kind.endswith(".delta"):
        yield 0, delta  # text, reasoning, the arguments of a call
    elif kind == "content_block_delta":
        yield 0, _object(delta).get("text") or _object(delta).get("partial_json")
    elif kind == "message" or content.get("object") == "response":
        for item in [content] if kind == "message" else _objects(content.get("output")):
            for part in (*_objects(item.get("summary")), *_objects(item.get("content"))):
                yield 0, part.get("text")
            for text in (item.get("arguments"), item.get("input")):
                yield 0, text


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
