"""Blocks on OpenAI's Responses and Anthropic's Messages: answers made of items and blocks, streamed as named events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.output_item import message, numbered, streamed
from monitor.api.vllm.wire import FILTERED, Wire, sse
from monitor.engines.vllm.call import Call

_SAID = ("message", "reasoning")  # what an answer says; every other item calls something


class ResponsesWire(Wire):
    """A stream has said some of its text already: a text that replaces the rest is an item of its own behind it."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._items = 0  # that a client was told of
        self._number: int | None = None  # of the next event, once some of them are ours or left out

    def opened(self, events: bytes) -> None:
        super().opened(events)
        if not self.rewrites:
            self._items += events.count(b"event: response.output_item.added\n")

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        said = [] if self.terms.replacement is None else [message(self.call.id, self.terms.replacement)]
        return self._incomplete(body if not said else body | {"output": said})

    def _incomplete(self, body: dict[str, Any]) -> dict[str, Any]:
        output = [item | {"status": "incomplete"} for item in body["output"] if item["type"] in _SAID]
        if body.get("output_messages"):  # the raw tokens: of what a text replaces, or of half a call
            body = body | {"output_messages": None}
        return body | {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": output}

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None:
            yield b"data: [DONE]\n\n"
            return
        if self._number is None:
            self._number = data.get("sequence_number")
        events = self._kept(data)
        if self._number is not None:
            events = numbered(events, self._number)
            self._number += len(events)
        for event in events:
            yield sse(event["type"], event)

    def _kept(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The event as a client may see it, ours before it, or nothing."""
        kind, item = data["type"], data.get("item")
        if kind in ("response.completed", "response.failed"):
            response, ours = self._incomplete(data["response"]), []
            if self.terms.replacement is not None:
                own = message(self.call.id, self.terms.replacement)
                ours = streamed(own, self._items)
                response["output"].append(own)
            return [*ours, data | {"type": "response.incomplete", "response": response}]
        if "_call" in kind or (item is not None and item["type"] not in _SAID):
            return []
        if kind == "response.output_item.done":
            data = data | {"item": data["item"] | {"status": "incomplete"}}
        self._items += kind == "response.output_item.added"
        return [data]

    def error_event(self, error: ApiError) -> bytes:
        fields = {key: error.error[key] for key in ("code", "message", "param")}
        return sse("error", {"type": "error", "sequence_number": 0} | fields)


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
}


class MessagesWire(Wire):
    refusal = {  # noqa: RUF012
        "stop_reason": "refusal",
        "stop_sequence": None,
        "stop_details": {
            "type": "refusal",
            "category": None,
            "explanation": "The safety monitor ended this answer.",
        },
    }

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._dropped: set[int] = set()  # blocks that were never begun
        self._next = 0  # the index of a block of ours

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        content = [block for block in body["content"] if block["type"] in ("text", "thinking")]
        if self.terms.replacement is not None:
            content = [{"type": "text", "text": self.terms.replacement}]
        return body | self.refusal | {"content": content}

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None:
            yield b"data: [DONE]\n\n"
            return
        if data["type"] == "message_delta":
            if self.terms.replacement is not None:
                yield from self._block(self.terms.replacement)
            data = data | {"delta": data["delta"] | self.refusal}
        elif data.get("delta", {}).get("type") == "input_json_delta":
            return
        elif data.get("content_block", {}).get("type") == "tool_use":
            self._dropped.add(data["index"])
            self._next = max(self._next, data["index"])
            return
        elif data.get("index") in self._dropped:
            return
        elif "index" in data:
            self._next = max(self._next, data["index"] + 1)
        yield sse(data["type"], data)

    def _block(self, text: str) -> Iterator[bytes]:
        at = {"index": self._next}
        start = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}}
        delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}
        for event in (start, delta, {"type": "content_block_stop"}):
            yield sse(str(event["type"]), event | at)

    def error(self, error: ApiError) -> dict[str, Any]:
        kind = _ANTHROPIC.get(error.status, "overloaded_error" if error.status == 503 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.error["message"]}}

    def error_event(self, error: ApiError) -> bytes:
        return sse("error", self.error(error))
