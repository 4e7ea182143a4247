"""Chat and completions: answers made of `choices`, whole and as chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from monitor.api.render import usage
from monitor.api.upstream.wire import FILTERED, Json, Piece, Plain, Wire, expect, finish_of
from monitor.api.verdicts import answer_annotation
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text, cut, strip_calls, texts, worded

_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")


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
        spelled = (token for token in _spelled(self.data.get("logprobs")) if not self.choice.words.is_added(token))
        return bool(self.data.get("logprobs")) and "".join(spelled) != own

    @property
    def cut(self) -> bool:
        """Whether it is the part in which the verdict fell."""
        return self.choice.cut and (self.end > self.choice.released or self.finish is not None)


class Chunk:
    """A frame with choices in it."""

    def __init__(self, wire: ChoicesWire, raw: bytes, data: Json, parts: list[Part]) -> None:
        self._wire, self._raw, self._data, self._parts = wire, raw, data, parts

    def release(self) -> bytes | None:
        if not all(part.judged for part in self._parts):
            return None
        wire, kept, endings = self._wire, list[Json](), list[Json]()
        changed = bool(wire.unsent)
        for part in self._parts:
            if part.dropped or part.choice.index in wire.closed:
                changed = True
            elif part.cut:
                changed = True
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
        wire, data = self._wire, self._data
        extra, wire.unsent = wire.unsent, {}
        if wire.any_blocked:  # what else stands here may tell what was cut
            data = {k: v for k, v in data.items() if k in _ENVELOPE} | wire.counted(data)
        wire.usage_came = wire.usage_came or bool(data.get("usage"))
        return frame(data | {"choices": choices} | extra)


class Usage:
    """The frame of usage at the end: of an answer that was blocked the client had less than the upstream counted."""

    def __init__(self, wire: ChoicesWire, raw: bytes, data: Json) -> None:
        self._wire, self._raw, self._data = wire, raw, data

    def release(self) -> bytes | None:
        self._wire.usage_came = self._wire.usage_came or bool(self._data.get("usage"))
        return frame(self._data | self._wire.counted(self._data)) if self._wire.any_blocked else self._raw


class ChoicesWire(Wire):
    """closed: choices of which nothing more goes out; unsent: annotations for the first chunk; usage_came: and went out

    part_of: where the text of a chunk's choice is; cut_off: the fields of an ending of ours
    """

    part_of: str | None
    whole_of: str | None
    cut_off: Json

    def __init__(self, choices: Sequence[Choice], with_usage: bool, n: int) -> None:
        super().__init__(choices, with_usage)
        self.closed: set[int] = set()
        self.unsent = self.prompts_annotation(n)
        self._n = n
        self._envelope: Json = {}
        self.usage_came = False

    def piece(self, raw: bytes, data: Json, late: bool) -> Piece:
        found = data.get("choices")
        if self.failed:  # nothing of an answer stands in this frame, or comes after it
            self.done = True
            return Plain(raw if found is None else frame({k: v for k, v in data.items() if k != "choices"}))
        if found is None:
            return Plain(raw)
        self._envelope = {k: v for k, v in data.items() if k not in ("choices", "usage")}
        parts = [self._part(choice, self.part_of, late) for choice in _listed(found)]
        return Chunk(self, raw, data, parts) if parts else Usage(self, raw, data)

    def _part(self, data: Any, where: str | None, late: bool = False) -> Part:
        expect(isinstance(data, dict), "a choice is no object")
        index, finish = data.get("index"), data.get("finish_reason")
        expect(type(index) is int and 0 <= index < len(self.choices), f"a choice has the index {str(index)[:16]}")
        expect(finish is None or isinstance(finish, str), "a finish_reason is no text")
        choice, found = self.choices[index], self._texts(data, where)
        if index in self.finishes:
            return Part(choice, data, where or "text", [], dropped=bool(found) or finish is not None)
        placed = [(t, choice.words.length if t.again else choice.add(t.value, t.channel, late)) for t in found]
        if finish is not None:
            self.finishes[index] = finish_of(finish)
        return Part(choice, data, where or "text", placed)

    def _texts(self, data: Json, where: str | None) -> list[Text]:
        if where is None:
            expect(isinstance(data.get("text", ""), str), "a text is none")
            return [Text("text", data, "text", data["text"])] if data.get("text") else []
        holder = data.get(where)
        expect(holder is None or isinstance(holder, dict), f"{where} is no object")
        return texts(holder)

    def shortened(self, part: Part) -> Json:
        """A choice without what was not judged, or blocked, and without fields that we do not know: they may spell it
        once more, as token ids do."""
        cut(part.texts, part.choice.released)
        data = {k: part.data[k] for k in ("index", part.where, "finish_reason", "logprobs") if k in part.data}
        if isinstance(said := data.get(part.where), dict):
            data[part.where] = said = worded(said)
            strip_calls(said)
        if data.get("logprobs"):
            own = "".join(t.value[: max(0, part.choice.released - begin)] for t, begin in part.texts if not t.again)
            data["logprobs"] = _only(data["logprobs"], own)
        return data

    def counted(self, data: Json) -> Json:
        """The usage of what was released, if the upstream tells any."""
        if not isinstance(data.get("usage"), dict):
            return {}
        given = data["usage"].get("prompt_tokens")
        prompt = given if isinstance(given, int) else self.n_prompt_tokens
        return {"usage": usage(prompt, self.n_released)}

    def block(self, choice: Choice) -> Json:
        """The ending of a choice that was blocked, as a chunk's."""
        data = {"index": choice.index} | self.cut_off | {"logprobs": None, "finish_reason": FILTERED}
        if self.terms.replacement is not None:
            self.replace(data, self.terms.replacement)
        return data | self.annotation(choice)

    def annotation(self, choice: Choice) -> Json:
        return {} if choice.record is None else answer_annotation(self.terms, choice.record)

    @abstractmethod
    def replace(self, data: Json, text: str) -> None: ...

    def ending(self) -> bytes:
        own = b""
        if self.any_blocked and self.with_usage and not self.usage_came:
            counted = usage(self.n_prompt_tokens, self.n_released)
            own = frame(self._envelope | {"choices": [], "usage": counted})
        return own + super().ending()

    # --- whole answers -----------------------------------------------------------------------------------------------

    def whole(self, body: Json) -> Callable[[], Json | None]:
        found = body.get("choices")
        expect(found is not None, "no choices")
        parts = [self._part(choice, self.whole_of) for choice in _listed(found)]
        for choice in {part.choice.index for part in parts}:
            self.finishes.setdefault(choice, "stop")
        expect(len(self.finishes) == len(parts) == len(self.choices), f"{len(parts)} choices")
        return lambda: self._judged(body, parts)

    def _judged(self, body: Json, parts: list[Part]) -> Json | None:
        spelling = [part for part in parts if part.spells_more and not part.choice.blocked]
        if not (self.any_blocked or self.terms.annotate or spelling):
            return None
        for part in spelling:
            part.data["logprobs"] = None
        for part in parts:
            if part.choice.blocked:
                data = self.shortened(part) | {"finish_reason": FILTERED}
                part.data.clear()
                part.data |= data
                if self.terms.replacement is not None:
                    cut(part.texts, 0)
                    part.data["logprobs"] = None
                    self.replace(part.data, self.terms.replacement)
            part.data |= self.annotation(part.choice)
        if self.any_blocked:
            body |= self.counted(body)
        return body | self.unsent


class ChatWire(ChoicesWire):
    part_of, whole_of = "delta", "message"
    cut_off = {"delta": {}}  # noqa: RUF012

    def replace(self, data: Json, text: str) -> None:
        if "message" in data:
            data["message"]["content"] = text
        else:
            data["delta"] = {"content": text}


class CompletionWire(ChoicesWire):
    part_of = whole_of = None
    cut_off = {"text": ""}  # noqa: RUF012

    def replace(self, data: Json, text: str) -> None:
        data["text"] = text


def _spelled(logprobs: Any) -> Iterator[str]:
    """The tokens of logprobs: chat's are objects, completions' are strings."""
    lists = [logprobs.get(name) for name in ("content", "refusal", "tokens")] if isinstance(logprobs, dict) else []
    for entry in (entry for found in lists if isinstance(found, list) for entry in found):
        yield str(entry.get("token") if isinstance(entry, dict) else entry)


def _only(logprobs: Any, text: str) -> Any:
    """Logprobs of the tokens that spell the beginning of a text: all their lists, cut."""
    n = at = 0
    for token in _spelled(logprobs):
        if not text.startswith(token, at):
            break
        n, at = n + 1, at + len(token)
    return {k: v[:n] if isinstance(v, list) else v for k, v in logprobs.items()} if n else None


def _listed(found: Any) -> list[Any]:
    expect(isinstance(found, list), "choices is no list")
    return list(found)
