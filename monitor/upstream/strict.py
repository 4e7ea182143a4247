"""JSON in which every reader finds the same: of two values under one name we would judge one, others take the other."""

from __future__ import annotations

import json
from typing import Any


def strict_object(raw: bytes) -> dict[str, Any]:
    """raises: ValueError for anything but one JSON object without a name that stands twice"""
    try:
        parsed = json.loads(raw, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"a JSON {type(parsed).__name__} instead of an object")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found
