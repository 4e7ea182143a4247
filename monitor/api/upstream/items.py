"""OpenAI's Responses: an answer of items, streamed as named events that repeat at the end what was said in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.upstream.wire import FILTERED, Json, Piece, Wire, expect
from monitor.types import FinishReason
from monitor.upstream.choice import Choice
from monitor.upstream.sse import frame
from monitor.upstream.texts import Text, cut, texts

_ENDS: dict[str, FinishReason] = {"response.completed": "stop", "response.incomplete": "length"}
_FAILS = ("response.failed", "response.cancelled")
_SAID = ("message", "reasoning")  # what an answer says; every other item calls something
_PLACE = ("item_id", "output_index", "content_index", "summary_index")


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
        self._wire.note(self._data, self._placed)
        return self._raw

    def _begun(self) -> bytes:
        """What of a delta stands before the block."""
        released = self._wire.choice.released
        if not self._data["type"].endswith(".delta") or not any(begin < released for _, begin in self._placed):
            return b""
        if "_call" in self._data["type"]:  # a tool must not run on half a call
            return b""
        cut(self._placed, released)
        self._data |= {"logprobs": []} if "logprobs" in self._data else {}
        self._wire.note(self._data, self._placed)
        return frame(self._data, self._data["type"])


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
        self._sequence = 0
        self._output: dict[str, Json] = {}

    def piece(self, raw: bytes, data: Json, late: bool) -> Piece:
        kind = data.get("type")
        expect(isinstance(kind, str), "an event has no type")
        if isinstance(data.get("sequence_number"), int):
            self._sequence = data["sequence_number"]
        if isinstance(data.get("response"), dict):
            self._response = data["response"]
        if str(kind).endswith(".delta"):
            place = self._place(data)
            found = texts(data.get("delta"), place) if not isinstance(data.get("delta"), str) else None
            found = found if found is not None else [Text(place, data, "delta", data["delta"])]
            self._deltas[place] = self._deltas.get(place, "") + "".join(t.value for t in found)
        else:
            found = self._new(data)
        placed = [(t, self.choice.add(t.value, t.channel, late)) for t in found if t.value]
        last = kind in _ENDS
        if last:
            self.finishes[0] = _ENDS[str(kind)]
        self.failed = self.failed or kind in _FAILS
        self.done = last or self.failed
        return Said(self, raw, data, placed, last)

    def _place(self, data: Json) -> str:
        return ".".join([str(data["type"]).removesuffix(".delta"), *(str(data.get(name)) for name in _PLACE)])

    def _new(self, data: Json) -> list[Text]:
        """Texts of an event that no delta has brought."""
        inside = {
            k: v for k, v in data.items() if k in ("item", "part", "text", "refusal", "arguments", "input", "code")
        }
        response = data.get("response")
        if isinstance(response, dict):
            inside["output"] = response.get("output")
        known = self._whole | set(self._deltas.values())
        found = [t for t in texts(inside, "whole") if t.value not in known]
        self._whole.update(t.value for t in found)
        return found

    def note(self, data: Json, placed: list[tuple[Text, int]]) -> None:
        """What has gone out, for the output of an answer that is cut."""
        if data["type"] == "response.output_text.delta":
            item = str(data.get("item_id"))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            own = {"id": item, "type": "message", "role": "assistant", "status": "incomplete", "content": [part]}
            self._output.setdefault(item, own)["content"][0]["text"] += data["delta"]

    def incomplete(self) -> bytes:
        """The last event of an answer that was blocked."""
        response = self._response | self._filtered(list(self._output.values()))
        data = {"type": "response.incomplete", "sequence_number": self._sequence + 1, "response": response}
        return frame(data, "response.incomplete")

    def _filtered(self, output: list[Json]) -> Json:
        return {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": output}

    def ending(self) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        fields = {key: error.error[key] for key in ("code", "message", "param")}
        return frame({"type": "error", "sequence_number": self._sequence + 1} | fields, "error")

    def whole(self, body: Json) -> Callable[[], Json | None]:
        output = body.get("output")
        expect(isinstance(output, list), "no output")
        placed = [(t, self.choice.add(t.value, t.channel)) for t in texts(output, "output")]
        self.finishes[0] = "length" if body.get("status") == "incomplete" else "stop"
        return lambda: self._judged(body, placed)

    def _judged(self, body: Json, placed: list[tuple[Text, int]]) -> Json | None:
        if not self.choice.blocked:
            return None
        if self.terms.replacement is not None:
            part: Any = {"type": "output_text", "text": self.terms.replacement, "annotations": [], "logprobs": []}
            item = {"id": f"msg_{body.get('id')}", "type": "message", "role": "assistant", "status": "incomplete"}
            return body | self._filtered([item | {"content": [part]}])
        cut(placed, self.choice.released)
        said = [i | {"status": "incomplete"} for i in body["output"] if isinstance(i, dict) and i.get("type") in _SAID]
        return body | self._filtered(said)
