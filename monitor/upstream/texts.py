"""Which strings of a JSON value are text that somebody reads: all but identifiers. A field we do not know is text too.

A list of what to read would miss what an upstream adds next year: reasoning, transcripts, arguments of a new kind of
call. So it is the other way round: a few fields are known not to be text, and everything else is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from monitor.upstream.errors import Unreadable

_NOT_TEXT = frozenset(
    {"role", "id", "type", "index", "format", "status", "object", "call_id", "item_id", "tool_call_id"}
    # Encrypted or signed by the upstream: nobody can read it.
    | {"signature", "encrypted_content"}
    # A copy of the text.
    | {"logprobs"}
)
# Where clients take whatever stands there for text.
_ONLY_TEXT = frozenset({"content", "text", "refusal", "reasoning", "reasoning_content", "arguments", "name", "input"})
_FIRST = ("reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")


class Text(NamedTuple):
    """One string and where it stands.

    channel: what it belongs to; texts of another channel are parted from it when they are read
    again: the same string has been read from a field beside it (some upstreams spell reasoning twice)
    """

    channel: str
    holder: Any
    key: str | int
    value: str
    again: bool = False


def texts(part: Any, channel: str = "", strict: bool = True) -> list[Text]:
    """Every text of a message, a delta or an item, in the order in which a model says it: reasoning before its answer.

    raises: Unreadable, if strict, for a number or a boolean where a client expects text
    """
    found, reasoned = [], set[str]()
    for text in _walk(part, channel, strict):
        reasoning = text.channel.startswith(f"{channel}.reasoning")
        found.append(text._replace(again=reasoning and text.value in reasoned))
        if reasoning:
            reasoned.add(text.value)
    return found


def _walk(part: Any, channel: str, strict: bool) -> Iterator[Text]:
    if isinstance(part, dict):
        for key, value in sorted(part.items(), key=lambda item: not item[0].startswith(_FIRST)):
            if key in _NOT_TEXT:
                continue
            if strict and key in _ONLY_TEXT and isinstance(value, (int, float)):
                raise Unreadable(f"the upstream sent a {type(value).__name__} as {key!r}")
            yield from _one(part, key, value, f"{channel}.{key}", strict)
    elif isinstance(part, list):
        for position, value in enumerate(part):
            # A call's own number: its pieces stand in lists of one.
            number = value.get("index", position) if isinstance(value, dict) else position
            yield from _one(part, position, value, f"{channel}.{number}", strict)


def _one(holder: Any, key: str | int, value: Any, channel: str, strict: bool) -> Iterator[Text]:
    if isinstance(value, str):
        if value:
            yield Text(channel, holder, key, value)
    else:
        yield from _walk(value, channel, strict)


def cut(found: list[tuple[Text, int]], keep: int) -> None:
    """Shorten texts where they stand. found: each with the place where it begins; keep: the place of the cut"""
    for text, begin in found:
        text.holder[text.key] = "" if text.again else text.value[: max(0, keep - begin)]


def strip_calls(part: dict[str, Any]) -> None:
    """A tool must not run on half a call."""
    for name in _CALLS:
        part.pop(name, None)


def worded(part: dict[str, Any]) -> dict[str, Any]:
    """What of a message or a delta is words, or says whose they are; numbers may spell what has been cut."""
    return {k: v for k, v in part.items() if v is None or k in _NOT_TEXT - {"logprobs"} or _speaks(v)}


def _speaks(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_speaks, value.values()))
    return any(map(_speaks, value)) if isinstance(value, list) else isinstance(value, str)


def unspell(value: Any) -> bool:
    """Empty every list of logprobs whose tokens are not the text or the delta beside it; True if there was one."""
    found = False
    if isinstance(value, dict):
        logprobs, said = value.get("logprobs"), value.get("delta", value.get("text"))
        if isinstance(logprobs, list) and logprobs:
            spelled = "".join(str(one.get("token")) if isinstance(one, dict) else str(one) for one in logprobs)
            if spelled != said:
                value["logprobs"], found = [], True
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            found = unspell(one) or found
    return found
