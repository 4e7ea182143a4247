"""Frames of chat's and completions' streams that wait: what of each goes out when its texts are judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from monitor.api.upstream.wire import Json
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text

if TYPE_CHECKING:
    from monitor.api.upstream.choices import ChoicesWire


class Part:
    """One choice in one chunk, or in a whole answer.

    where: the field that its texts stand in; texts: each with its place in the choice's text; end: place where the last
    one ends; finish: the upstream's reason
    dropped: text or an ending that came after the choice had ended
    """

    def __init__(
        self, choice: Choice, data: Json, where: str, found: list[tuple[Text, int]], dropped: bool = False
    ) -> None:
        self.choice, self.data, self.where, self.texts, self.dropped = choice, data, where, found, dropped
        self.finish: str | None = data.get("finish_reason")
        self.end = choice.words.length

    @property
    def judged(self) -> bool:
        choice = self.choice
        if choice.cut or choice.watch.finish in ("stop", "length"):
            return True
        return self.end <= choice.released and (self.finish is None or self.dropped)

    @property
    def spells_more(self) -> bool:
        """Whether its logprobs spell another text than its own: one that was not judged."""
        own = "".join(text.value for text, _ in self.texts if not text.again)
        tokens = (token for token in spelled(self.data.get("logprobs")) if not self.choice.words.is_added(token))
        return bool(self.data.get("logprobs")) and "".join(tokens) != own

    @property
    def cut(self) -> bool:
        """Whether it is the part in which the verdict fell."""
        return self.choice.cut and (self.end > self.choice.released or self.finish is not None)


class Chunk:
    """A frame with choices in it. beside: a part that stands for the texts beside them, if there are new ones"""

    def __init__(self, wire: ChoicesWire, raw: bytes, data: Json, parts: list[Part], beside: list[Part]) -> None:
        self._wire, self._raw, self._data, self._parts, self._beside = wire, raw, data, parts, beside

    def release(self) -> bytes | None:
        if not all(part.judged for part in (*self._parts, *self._beside)):
            return None
        wire, kept, endings = self._wire, list[Json](), list[Json]()
        changed = bool(wire.unsent) or wire.any_cut
        for part in self._parts:
            if part.dropped or part.choice.index in wire.closed:
                changed = True
            elif part.cut:
                wire.closed.add(part.choice.index)
                if any(begin < part.choice.released for _, begin in part.texts):
                    kept.append(wire.shortened(part) | {"finish_reason": None})
                if part.choice.blocked:
                    endings.append(wire.block(part.choice))
            else:
                if part.spells_more:
                    changed, part.data["logprobs"] = True, None
                if part.finish is not None and (annotation := wire.annotation(part.choice)):
                    changed = True
                    part.data |= annotation
                kept.append(part.data)
        if not changed:
            wire.usage_came = wire.usage_came or bool(self._data.get("usage"))
            return self._raw
        return b"".join(self._made(choices) for choices in (kept, *([e] for e in endings)) if choices)

    def _made(self, choices: list[Json]) -> bytes:
        wire = self._wire
        data = wire.enveloped(self._data) if wire.any_cut else self._data
        extra, wire.unsent = wire.unsent, {}
        wire.usage_came = wire.usage_came or bool(data.get("usage"))
        return frame(data | {"choices": choices} | extra)


class Rest:
    """A frame without choices: usage at the end, what keeps the connection alive, whatever we do not know.

    Of an answer that was cut the client had less than the upstream counted.
    """

    def __init__(self, wire: ChoicesWire, raw: bytes, data: Json, beside: list[Part]) -> None:
        self._wire, self._raw, self._data, self._beside = wire, raw, data, beside

    def release(self) -> bytes | None:
        if not all(part.judged for part in self._beside):
            return None
        wire, has_usage = self._wire, bool(self._data.get("usage"))
        wire.usage_came = wire.usage_came or has_usage
        if not wire.any_cut:
            return self._raw
        return frame(wire.enveloped(self._data) | {"choices": []}) if has_usage else b""


def spelled(logprobs: Any) -> Iterator[str]:
    """The tokens of logprobs: chat's are objects, completions' are strings."""
    lists = [logprobs.get(name) for name in ("content", "refusal", "tokens")] if isinstance(logprobs, dict) else []
    for entry in (entry for found in lists if isinstance(found, list) for entry in found):
        yield str(entry.get("token") if isinstance(entry, dict) else entry)


def spelling(logprobs: Any, text: str) -> Any:
    """Logprobs of the tokens that spell the beginning of a text: all their lists, cut."""
    n = at = 0
    for token in spelled(logprobs):
        if not text.startswith(token, at):
            break
        n, at = n + 1, at + len(token)
    return {k: v[:n] if isinstance(v, list) else v for k, v in logprobs.items()} if n else None
