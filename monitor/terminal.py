"""What strangers wrote, as a terminal may show it: a client's name for a model, an endpoint's words."""

from __future__ import annotations

from typing import Any


def plain(text: str) -> str:
    """Nothing of it may move the cursor, turn text around or reach the clipboard."""
    return "".join(c if c.isprintable() else "?" for c in text)


def all_plain(value: Any) -> Any:
    """Every text in a value of JSON's, names of fields too."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [all_plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(name): all_plain(item) for name, item in value.items()}
    return value
