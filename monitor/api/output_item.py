"""A message of OpenAI's Responses that says a text of ours, or what went out of one: whole, and as events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]


def message(identity: str, text: str) -> Json:
    """The item, ended by the monitor. identity: without its prefix"""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    head = {"id": f"msg_{identity}", "type": "message", "role": "assistant", "status": "incomplete"}
    return head | {"content": [part]}


def streamed(item: Json, output_index: int) -> list[Json]:
    """The events of the whole item, without their numbers. output_index: its place among the items of the answer"""
    (part,) = item["content"]
    at = {"output_index": output_index}
    inside = at | {"item_id": item["id"], "content_index": 0}
    return [
        {"type": "response.output_item.added", "item": item | {"status": "in_progress", "content": []}} | at,
        {"type": "response.content_part.added", "part": part | {"text": ""}} | inside,
        {"type": "response.output_text.delta", "delta": part["text"], "logprobs": []} | inside,
        *closing(item, output_index),
    ]


def closing(item: Json, output_index: int) -> list[Json]:
    """The events that follow the last piece of the item's text."""
    (part,) = item["content"]
    at = {"output_index": output_index}
    inside = at | {"item_id": item["id"], "content_index": 0}
    return [
        {"type": "response.output_text.done", "text": part["text"], "logprobs": []} | inside,
        {"type": "response.content_part.done", "part": part} | inside,
        {"type": "response.output_item.done", "item": item} | at,
    ]


def numbered(events: Iterable[Json], first: int) -> list[Json]:
    """Events number themselves, so that a client sees where one is missing."""
    return [event | {"sequence_number": first + i} for i, event in enumerate(events)]
