"""Chat and completions: answers made of `choices`, whole and as chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from monitor.api.render import usage
from monitor.api.upstream.wire import FILTERED, Json, Piece, Plain, Wire, expect, finish_of
from monitor.api.verdicts import answer_annotation
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text, cut, strip_calls, texts


class Part:
    """One choice in one chunk, or in a whole answer.

    texts: each with its place in the choice's text; end: place where the last one ends; finish: the upstream's reason
    dropped: text or an ending that came after the choice had ended
    """

    def __init__(self, choice: Choice, data: Json, found: list[tuple[Text, int]], dropped: bool) -> None:
        self.choice, self.data, self.texts, self.dropped = choice, data, found, dropped
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
            return self._raw
        return b"".join(self._made(choices) for choices in (kept, *([e] for e in endings)) if choices)

    def _made(self, choices: list[Json]) -> bytes:
        extra, self._wire.unsent = self._wire.unsent, {}
        return frame(self._data | {"choices": choices} | extra)


class ChoicesWire(Wire):
    """closed: choices of which nothing more goes out; unsent: annotations for the first chunk

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
        self._usage_came = False

    def piece(self, raw: bytes, data: Json, late: bool) -> Piece:
        self._usage_came = self._usage_came or bool(data.get("usage"))
        found = data.get("choices")
        if found is None or self.failed:
            return Plain(raw)
        self._envelope = {k: v for k, v in data.items() if k not in ("choices", "usage")}
        parts = [self._part(choice, self.part_of, late) for choice in _listed(found)]
        return Chunk(self, raw, data, parts) if parts else Plain(raw)

    def _part(self, data: Any, where: str | None, late: bool = False) -> Part:
        expect(isinstance(data, dict), "a choice is no object")
        index, finish = data.get("index"), data.get("finish_reason")
        expect(type(index) is int and 0 <= index < len(self.choices), f"a choice has the index {str(index)[:16]}")
        expect(finish is None or isinstance(finish, str), "a finish_reason is no text")
        choice, found = self.choices[index], self._texts(data, where)
        if index in self.finishes:
            return Part(choice, data, [], dropped=bool(found) or finish is not None)
        placed = [(t, choice.words.length if t.again else choice.add(t.value, t.channel, late)) for t in found]
        if finish is not None:
            self.finishes[index] = finish_of(finish)
        return Part(choice, data, placed, dropped=False)

    def _texts(self, data: Json, where: str | None) -> list[Text]:
        if where is None:
            expect(isinstance(data.get("text", ""), str), "a text is none")
            return [Text("text", data, "text", data["text"])] if data.get("text") else []
        holder = data.get(where)
        expect(holder is None or isinstance(holder, dict), f"{where} is no object")
        return texts(holder)

    def shortened(self, part: Part) -> Json:
        """A choice without what was not judged, or blocked."""
        cut(part.texts, part.choice.released)
        strip_calls(part.data.get(self.part_of or "") or part.data.get(self.whole_of or "") or {})
        if not part.data.get("logprobs"):
            return part.data
        own = "".join(t.value[: max(0, part.choice.released - begin)] for t, begin in part.texts if not t.again)
        return part.data | {"logprobs": _only(part.data["logprobs"], own)}

    def block(self, choice: Choice) -> Json:
        """The ending of a choice that was blocked, as a chunk's."""
        data = {"index": choice.index} | self.cut_off | {"logprobs": None, "finish_reason": FILTERED}
        if self.terms.replacement is not None:
            self.replace(data, self.terms.replacement)
        return data | self.annotation(choice)

    def annotation(self, choice: Choice) -> Json:
        return {} if choice.record is None else answer_annotation(self.terms, choice.record)

    def replace(self, data: Json, text: str) -> None:
        raise NotImplementedError

    def ending(self) -> bytes:
        own = b""
        if any(c.blocked for c in self.choices) and self.with_usage and not self._usage_came:
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
        if not any(part.choice.blocked for part in parts) and not self.terms.annotate:
            return None
        for part in parts:
            if part.choice.blocked:
                part.data |= self.shortened(part) | {"finish_reason": FILTERED}
                if self.terms.replacement is not None:
                    cut(part.texts, 0)
                    part.data["logprobs"] = None
                    self.replace(part.data, self.terms.replacement)
            part.data |= self.annotation(part.choice)
        if isinstance(body.get("usage"), dict) and any(part.choice.blocked for part in parts):
            given = body["usage"].get("prompt_tokens")
            prompt = given if isinstance(given, int) else self.n_prompt_tokens
            body["usage"] = body["usage"] | usage(prompt, self.n_released)
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
