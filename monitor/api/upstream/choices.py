"""Chat and completions: answers made of `choices`, whole and as chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence, Set
from typing import Any

from monitor.api.render import usage
from monitor.api.upstream.chunks import Chunk, Part, Rest, spelling
from monitor.api.upstream.wire import FILTERED, Json, Piece, Plain, Wire, expect, finish_of
from monitor.api.verdicts import answer_annotation
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text, cut, strip_calls, texts, worded

_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")
_SAFE = frozenset(
    {*_ENVELOPE, "choices", "usage", "service_tier", "provider", "error", "obfuscation", "prompt_filter_results"}
    | {"prompt_logprobs"}
)
"""What stands beside the choices and is no text of an answer. Of the prompt: that was judged."""
_SAFE_IN_CHOICE = frozenset(
    {"index", "finish_reason", "native_finish_reason", "stop_reason", "matched_stop", "logprobs"}
    | {"content_filter_results", "prompt_logprobs"}
)


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
        self._newest: Json = {}  # chunk
        self.usage_came = False
        # What was read: of each choice its own text, by channel, and what stood beside it; under None, beside them all.
        self._said: dict[tuple[int, str], str] = {}
        self._stood: set[tuple[int | None, str]] = set()

    def piece(self, raw: bytes, data: Json, late: bool, fails: bool) -> Piece:
        found = data.get("choices")
        if fails:  # nothing of an answer stands in this frame, or comes after it
            self.done = True
            return Plain(raw if found is None else frame({k: v for k, v in data.items() if k != "choices"}))
        reads = next((choice for choice in self.choices if choice.index not in self.finishes), None)
        parts = [] if found is None else [self._part(choice, self.part_of, late) for choice in _listed(found)]
        if found is not None:
            self._newest = data
        beside = self._beside(None, data, _SAFE)
        held = list[Part]()
        if beside and reads is not None:
            self._read(reads, None, beside, late)
            held = [Part(reads, {}, "", [])]  # says nothing, and waits until they are judged
        elif beside:  # it came after all that is read
            data = {k: v for k, v in data.items() if k in _SAFE}
            raw = frame(data) if data else b""
        return Chunk(self, raw, data, parts, held) if parts else Rest(self, raw, data, held)

    def _beside(self, index: int | None, data: Json, safe: Set[str]) -> list[Text]:
        """Texts in fields that we do not know and that were not read yet: some upstreams repeat in every chunk what
        they have said, or where they have it from."""
        rest = {k: v for k, v in data.items() if k not in safe}
        if not rest:
            return []
        found = {t.value: t for t in texts(rest, "beside", strict=False) if (index, t.value) not in self._stood}
        said = tuple(text for (choice, _), text in self._said.items() if index in (None, choice))
        return [text for value, text in found.items() if not any(one.startswith(value) for one in said)]

    def _read(self, choice: Choice, index: int | None, beside: Sequence[Text], late: bool = False) -> None:
        for text in beside:
            self._stood.add((index, text.value))
            choice.add(text.value, text.channel, late)

    def _part(self, data: Any, where: str | None, late: bool = False) -> Part:
        expect(isinstance(data, dict), "a choice is no object")
        index, finish = data.get("index"), data.get("finish_reason")
        expect(type(index) is int and 0 <= index < len(self.choices), f"a choice has the index {str(index)[:16]}")
        expect(finish is None or isinstance(finish, str), "a finish_reason is no text")
        choice, found = self.choices[index], self._texts(data, where)
        own = where or "text"
        if index in self.finishes:
            more = bool(found) or bool(self._beside(index, data, _SAFE_IN_CHOICE | {own}))
            return Part(choice, data, own, [], dropped=more or finish is not None)
        placed = [(t, choice.words.length if t.again else choice.add(t.value, t.channel, late)) for t in found]
        for text in found:
            self._said[index, text.channel] = self._said.get((index, text.channel), "") + text.value
        self._read(choice, index, self._beside(index, data, _SAFE_IN_CHOICE | {own}), late)
        if finish is not None:
            self.finishes[index] = finish_of(finish)
        return Part(choice, data, own, placed)

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
            data["logprobs"] = spelling(data["logprobs"], own)
        return data

    def enveloped(self, data: Json) -> Json:
        """What may stand beside the choices once one was cut: whatever else is there may tell of what."""
        return {k: v for k, v in data.items() if k in _ENVELOPE} | self.counted(data)

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
        # Cut by a text that stood beside the choices: no chunk of its own has brought its end.
        unended = [c for c in self.choices if c.blocked and c.index not in self.closed]
        own = [frame(self.enveloped(self._newest) | {"choices": [self.block(choice)]}) for choice in unended]
        if self.any_blocked and self.with_usage and not self.usage_came:
            counted = usage(self.n_prompt_tokens, self.n_released)
            own.append(frame(self.enveloped(self._newest) | {"choices": [], "usage": counted}))
        return b"".join(own) + super().ending()

    # --- whole answers -----------------------------------------------------------------------------------------------

    def whole(self, body: Json) -> Callable[[], Json | None]:
        found = body.get("choices")
        expect(found is not None, "no choices")
        parts = [self._part(choice, self.whole_of) for choice in _listed(found)]
        for choice in {part.choice.index for part in parts}:
            self.finishes.setdefault(choice, "stop")
        expect(len(self.finishes) == len(parts) == len(self.choices), f"{len(parts)} choices")
        self._read(self.choices[0], None, self._beside(None, body, _SAFE))
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
            body = self.enveloped(body) | {"choices": body["choices"]}
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


def _listed(found: Any) -> list[Any]:
    expect(isinstance(found, list), "choices is no list")
    return list(found)
