"""OpenAI's Responses: an answer of items, streamed as named events that repeat at the end what was said in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.output_item import closing, message, numbered, streamed
from monitor.api.upstream.wire import FILTERED, Json, Piece, Wire, expect
from monitor.types import FinishReason
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text, cut, texts, unspell

_ENDS: dict[str, FinishReason] = {"response.completed": "stop", "response.incomplete": "length"}
_OPENS = ("response.created", "response.queued", "response.in_progress")
_FAILS = ("response.failed", "response.cancelled")
_SAID = ("message", "reasoning")  # what an answer says; every other item calls something
_BEGINS, _TEXT = "response.content_part.added", "response.output_text.delta"
_PLACE = ("item_id", "output_index", "content_index", "summary_index")
_NO_TEXT = frozenset({"response", "obfuscation", "error"})
"""Of an event. A response is looked into, see `_rest`."""
_ERROR = frozenset({"code", "message", "param"})
_ENVELOPE = frozenset(
    {"id", "object", "created_at", "model", "metadata", "instructions", "temperature", "top_p", "tools", "tool_choice"}
    | {"parallel_tool_calls", "max_output_tokens", "max_tool_calls", "previous_response_id", "reasoning", "text"}
    | {"truncation", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "background", "error"}
)
"""Fields of a response that name it, or repeat what the client has asked for."""
_UNREAD = (
    _ENVELOPE
    | {"status", "incomplete_details", "output", "usage", "billing"}
    | {"input_messages", "prompt_cache_retention", "prompt_cache_options"}
)


class Said:
    """An event. end: place of its last text; last: nothing of the answer follows"""

    def __init__(self, wire: ResponsesWire, raw: bytes, data: Json, placed: list[tuple[Text, int]], last: bool) -> None:
        self._wire, self._raw, self._data, self._placed, self._last = wire, raw, data, placed, last
        self._end = wire.choice.words.length

    def release(self) -> bytes | None:
        choice, wire = self._wire.choice, self._wire
        if choice.cut and (self._end > choice.released or self._last):
            if wire.closed:
                return b""
            wire.closed = True
            return self._begun() + (wire.incomplete() if choice.blocked else b"")
        if choice.ended and choice.watch.finish in ("stop", "length"):
            return self._raw
        judged = self._end <= choice.released and not self._last
        return self._noted() if judged else None

    def _noted(self) -> bytes:
        self._wire.note(self._data)
        return self._raw

    def _begun(self) -> bytes:
        """What of a delta stands before the block."""
        wire, kind, released = self._wire, self._data["type"], self._wire.choice.released
        if not kind.endswith(".delta") or not any(begin < released for _, begin in self._placed):
            return b""
        if "_call" in kind or not isinstance(self._data.get("delta"), str):  # a tool must not run on half a call
            return b""
        cut(self._placed, released)
        kept = {name: self._data[name] for name in ("type", "sequence_number", *_PLACE, "delta") if name in self._data}
        kept |= {"logprobs": []} if "logprobs" in self._data else {}
        wire.note(kept)
        return frame(kept, kind)


class ResponsesWire(Wire):
    """One choice. Texts that repeat what the deltas said are not read twice; what they say anew is.

    closed: nothing more goes out
    """

    def __init__(self, choices: Sequence[Choice], with_usage: bool, n: int) -> None:
        super().__init__(choices, with_usage)
        self.choice = choices[0]
        self.closed = False
        self._deltas: dict[str, str] = {}  # place -> text so far
        self._whole: set[str] = set()  # texts that were read as wholes
        self._response: Json = {}
        # Of what has gone out: the number of the next event and of the next item, its messages, and those with an end.
        self._number = self._items = 0
        self._said: dict[str, tuple[int, Json]] = {}
        self._ended: set[tuple[str, str]] = set()

    def piece(self, raw: bytes, data: Json, late: bool, fails: bool) -> Piece:
        kind = data.get("type")
        expect(isinstance(kind, str), "an event has no type")
        if kind in _OPENS and isinstance(data.get("response"), dict):
            self._response = data["response"]  # a later one tells how long the whole answer was
        if b'"logprobs"' in raw and unspell(data):
            raw = frame(data, str(kind))
        found = [*(self._said_in(data) if str(kind).endswith(".delta") else ()), *self._new(data)]
        placed = [(t, self.choice.add(t.value, t.channel, late)) for t in found if t.value]
        last = kind in _ENDS
        if last:
            self.finishes[0] = _ENDS[str(kind)]
        self.failed = kind in _FAILS
        self.done = last or fails or self.failed
        return Said(self, raw, data, placed, last)

    def _place(self, data: Json) -> str:
        return ".".join([str(data["type"]).removesuffix(".delta"), *(str(data.get(name)) for name in _PLACE)])

    def _said_in(self, data: Json) -> list[Text]:
        """The piece of text that a delta brings."""
        place, delta = self._place(data), data.get("delta")
        expect(data["type"] != _TEXT or isinstance(delta, str), "a piece of text is none")
        found = [Text(place, data, "delta", delta)] if isinstance(delta, str) else texts(delta, place)
        self._deltas[place] = self._deltas.get(place, "") + "".join(t.value for t in found)
        return found

    def _new(self, data: Json) -> list[Text]:
        """Texts of an event that no delta has brought."""
        kind, response = data["type"], data.get("response")
        read = _NO_TEXT | ({"delta"} if kind.endswith(".delta") else _ERROR if kind == "error" else frozenset())
        inside = {k: v for k, v in data.items() if k not in read}
        inside["response"] = response.get("output") if isinstance(response, dict) else response
        found = texts(inside, "whole") + _rest(response)
        if not found:
            return []
        known = self._whole | set(self._deltas.values())
        new = [t for t in found if t.value not in known]
        self._whole.update(t.value for t in new)
        return new

    def note(self, data: Json) -> None:
        """It goes out: what an answer that is cut has to know of it."""
        kind, number, index = data["type"], data.get("sequence_number"), data.get("output_index")
        self._number = number + 1 if isinstance(number, int) else self._number
        if isinstance(index, int):
            self._items = max(self._items, index + 1)
        inner, part = data.get("item"), data.get("part")
        item = str(data.get("item_id") or (inner.get("id") if isinstance(inner, dict) else ""))
        begins = kind == _BEGINS and isinstance(part, dict) and part.get("type") == "output_text"
        if begins or kind == _TEXT:
            own = message("", "") | {"id": item}
            said = self._said.setdefault(item, (index or 0, own))[1]["content"][0]
            said["text"] += data["delta"] if kind == _TEXT else ""
        elif kind.endswith(".done"):
            self._ended.add((kind, item))

    def incomplete(self) -> bytes:
        """The last events of an answer that was blocked: ends of what it has begun to say, and the policy's text."""
        begun = [event for index, item in self._said.values() for event in closing(item, index)]
        events = [e for e in begun if (e["type"], e.get("item_id") or e["item"]["id"]) not in self._ended]
        output = [item for _, item in self._said.values()]
        if self.terms.replacement is not None:
            output.append(own := message(self._identity(self._response), self.terms.replacement))
            events += streamed(own, self._items)
        response = self._filtered(self._response, output)
        events.append({"type": "response.incomplete", "response": response})
        return b"".join(frame(event, event["type"]) for event in numbered(events, self._number))

    def _identity(self, response: Json) -> str:
        return f"{response.get('id')}_replaced"

    def _filtered(self, response: Json, output: list[Json]) -> Json:
        """The upstream's response with this output."""
        ended = {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": output}
        return self.enveloped(response) | ended

    def enveloped(self, response: Json) -> Json:
        """What may stand beside the output once it was cut: whatever else is there may tell of what."""
        kept = {name: value for name, value in response.items() if name in _ENVELOPE}
        if isinstance(response.get("usage"), dict):
            given = response["usage"].get("input_tokens")
            read = given if isinstance(given, int) else self.n_prompt_tokens
            said = self.n_released
            kept["usage"] = {"input_tokens": read, "output_tokens": said, "total_tokens": read + said}
        return kept

    def ending(self) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        fields = {key: error.error[key] for key in ("code", "message", "param")}
        return frame({"type": "error", "sequence_number": self._number} | fields, "error")

    def whole(self, body: Json) -> Callable[[], Json | None]:
        output = body.get("output")
        expect(isinstance(output, list), "no output")
        placed = [(t, self.choice.add(t.value, t.channel)) for t in texts(output, "output")]
        said = {text.value for text, _ in placed}
        for text in _rest(body):
            if text.value not in said:
                self.choice.add(text.value, text.channel)
        self.finishes[0] = "length" if body.get("status") == "incomplete" else "stop"
        return lambda: self._judged(body, placed)

    def _judged(self, body: Json, placed: list[tuple[Text, int]]) -> Json | None:
        if not self.choice.blocked:
            return body if unspell(body["output"]) else None
        if self.terms.replacement is not None:
            return self._filtered(body, [message(self._identity(body), self.terms.replacement)])
        cut(placed, self.choice.released)
        unspell(body["output"])  # of a text that was cut, the logprobs are another one's
        said = [i | {"status": "incomplete"} for i in body["output"] if isinstance(i, dict) and i.get("type") in _SAID]
        return self._filtered(body, said)


def _rest(response: Any) -> list[Text]:
    """Texts beside the output: a field that we do not know may spell it once more, or what is not in it."""
    rest = {k: v for k, v in response.items() if k not in _UNREAD} if isinstance(response, dict) else {}
    return texts(rest, "beside", strict=False)
