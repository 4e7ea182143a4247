"""What a body may hold: JSON in UTF-8, of bounded depth and size, with numbers and texts that exist.

The bounds are measured on the bytes before anything is parsed: 2 MiB of `[` would become 2 million objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json
from starlette.types import Message, Receive

from monitor.api.errors import ApiError

_BRACKETS = b"[]{}"
_OTHERS = bytes(b for b in range(256) if b not in _BRACKETS)
_STEPS = bytes({ord("["): 1, ord("{"): 1, ord("]"): 255, ord("}"): 255}.get(b, 0) for b in range(256))  # 255: -1
_LISTS = ("messages", "input", "structured_messages", "texts")
_MAX_SHOWN = 80


class Refused(ApiError):
    """limit: which bound, as the metric calls it"""

    def __init__(self, limit: str, status: int, message: str, code: str, **more: Any) -> None:
        super().__init__(status, message, code=code, **more)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class BodyBounds:
    """max_values: strings, numbers, lists and objects together, names of fields included
    max_messages: entries of `messages` and the like
    """

    max_depth: int
    max_values: int
    max_messages: int

    def check(self, body: bytes) -> None:
        """raises: Refused"""
        self._check_structure(body)
        data = _parse(body)
        if isinstance(data, dict):
            for field in _LISTS:
                if _n_entries(data.get(field)) > self.max_messages:
                    what = f"{field!r} has more than {self.max_messages} entries; send fewer"
                    raise Refused("messages", 400, what, "too_many_messages")

    def _check_structure(self, body: bytes) -> None:
        n_opened = body.count(b"[") + body.count(b"{")
        n_values = n_opened + body.count(b",") + body.count(b":") + 1
        if n_opened <= self.max_depth and n_values <= self.max_values:
            return  # even if none of it stands inside a string
        # Backslashes outside of strings are no JSON: the parser stops at the first, and before it this is exact.
        plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
        if plain.count(b'"') > 2 * self.max_values:
            raise self._too_many()
        outside = b"".join(plain.split(b'"')[::2])
        n_values = sum(outside.count(mark) for mark in (b"[", b"{", b",", b":")) + 1
        if n_values > self.max_values:
            raise self._too_many()
        steps = np.frombuffer(outside.translate(_STEPS, _OTHERS), np.int8)
        if steps.cumsum(dtype=np.int32).max(initial=0) > self.max_depth:
            raise Refused("depth", 400, f"the body is nested deeper than {self.max_depth}; flatten it", "json_too_deep")

    def _too_many(self) -> Refused:
        return Refused("json", 400, f"the body holds more than {self.max_values} values; send fewer", "json_too_large")


def _parse(body: bytes) -> Any:
    try:
        # json.loads would take UTF-16, NaN and halves of surrogate pairs. No cache: it would keep what users write.
        data = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise Refused("json", 400, f"the body is not JSON: {str(error)[:_MAX_SHOWN]}", "bad_json") from error
    if _has_infinity(data):
        raise Refused("json", 400, "the body holds a number that is too large for a float; send less", "bad_json")
    return data


def _has_infinity(data: Any) -> bool:
    """1e999 is JSON, and has become infinite."""
    rest = [data]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, float) and math.isinf(item):
            return True
    return False


def _n_entries(items: Any) -> int:
    """Of a list and of the lists in it: a batch of conversations."""
    return sum(len(item) if isinstance(item, list) else 1 for item in items) if isinstance(items, list) else 0


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what the connection says."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
