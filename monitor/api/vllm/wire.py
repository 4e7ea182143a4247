"""What a block looks like on each route of vLLM, for the client library that reads it.

vLLM ends a blocked answer as it would any other; what it says of the ending is put right here, in its JSON and in its
server-sent events. Only answers with a blocked choice are looked into.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from monitor.api.errors import ApiError
from monitor.engines.vllm.call import Call

FILTERED = "content_filter"


class Wire:
    """One answer. `whole` rewrites a JSON body, `event` one server-sent event; both only after a block."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.first = b""  # the first events that went out, for the envelope of an event of ours

    def opened(self, events: bytes) -> None:
        self.first = self.first or events

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        """data: None for OpenAI's [DONE]"""
        raise NotImplementedError

    def error(self, error: ApiError) -> dict[str, Any]:
        return {"error": error.error}

    def error_event(self, error: ApiError) -> bytes:
        return sse(None, self.error(error))


def sse(name: str | None, data: object) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


Event = tuple[str | None, dict[str, Any] | None]


def parse_event(raw: bytes) -> Event | None:
    """(name, data) of a server-sent event, data None for [DONE]; None for a comment or what holds no JSON object"""
    name, data = None, b""
    for line in raw.splitlines():
        if line.startswith(b"event:"):
            name = line[6:].strip().decode(errors="replace")
        elif line.startswith(b"data:"):
            data += line[5:].strip()
    if data == b"[DONE]":
        return name, None
    try:
        parsed = json.loads(data)
    except ValueError:
        return None
    return (name, parsed) if isinstance(parsed, dict) else None


class _Choices(Wire):
    """Routes that answer with `choices`."""

    ending: dict[str, Any]
    prefix: str
    chunk: str

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._ended: set[int] = set()

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        for choice in body["choices"]:
            if choice["index"] in self.call.blocked:
                choice["finish_reason"], choice["stop_reason"] = FILTERED, None
                self.strip(choice.get("message", {}))
        return body

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None or not data.get("choices"):  # [DONE], or the usage before it
            # vLLM sends no chunk at all for a choice that ends before its first token.
            for index in sorted(set(self.call.blocked) - self._ended):
                self._ended.add(index)
                yield sse(None, self._envelope() | {"choices": [{"index": index} | self.ending]})
        else:
            for choice in data["choices"]:
                if choice["index"] in self.call.blocked:
                    self.strip(choice.get("delta", {}))
                    if choice.get("finish_reason"):
                        choice["finish_reason"], choice["stop_reason"] = FILTERED, None
                        self._ended.add(choice["index"])
        yield b"data: [DONE]\n\n" if data is None else sse(name, data)

    def strip(self, message: dict[str, Any]) -> None:
        """A tool must not run on half a call."""
        message.pop("function_call", None)
        if message.pop("tool_calls", None) and message.get("content", "") is None:
            message["content"] = ""

    def _envelope(self) -> dict[str, Any]:
        own = {"id": f"{self.prefix}-{self.call.id}", "object": self.chunk, "created": int(time.time())}
        parsed = parse_event(self.first.partition(b"\n\n")[0])
        first = parsed[1] if parsed is not None and parsed[1] is not None else {}
        return own | {"model": self.call.model} | {key: first[key] for key in (*own, "model") if key in first}


class ChatWire(_Choices):
    prefix, chunk = "chatcmpl", "chat.completion.chunk"
    ending = {"delta": {}, "logprobs": None, "finish_reason": FILTERED}  # noqa: RUF012


class CompletionWire(_Choices):
    prefix, chunk = "cmpl", "text_completion"
    ending = {"text": "", "logprobs": None, "finish_reason": FILTERED}  # noqa: RUF012


_SAID = ("message", "reasoning")  # what an answer says; every other item calls something


class ResponsesWire(Wire):
    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        output = [item | {"status": "incomplete"} for item in body["output"] if item["type"] in _SAID]
        return body | {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": output}

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None:
            yield b"data: [DONE]\n\n"
            return
        kind, item = data["type"], data.get("item")
        if kind in ("response.completed", "response.failed"):
            kind = "response.incomplete"
            data = data | {"type": kind, "response": self.whole(data["response"])}
        elif "_call" in kind or (item is not None and item["type"] not in _SAID):
            return
        elif kind == "response.output_item.done":
            data = data | {"item": data["item"] | {"status": "incomplete"}}
        yield sse(kind, data)

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

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        content = [block for block in body["content"] if block["type"] in ("text", "thinking")]
        return body | self.refusal | {"content": content}

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None:
            yield b"data: [DONE]\n\n"
            return
        if data["type"] == "message_delta":
            data = data | {"delta": data["delta"] | self.refusal}
        elif data.get("delta", {}).get("type") == "input_json_delta":
            return
        elif data.get("content_block", {}).get("type") == "tool_use":
            self._dropped.add(data["index"])
            return
        elif data["type"] == "content_block_stop" and data["index"] in self._dropped:
            return
        yield sse(data["type"], data)

    def error(self, error: ApiError) -> dict[str, Any]:
        kind = _ANTHROPIC.get(error.status, "overloaded_error" if error.status == 503 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.error["message"]}}

    def error_event(self, error: ApiError) -> bytes:
        return sse("error", self.error(error))


WIRES: dict[str, type[Wire]] = {
    "/v1/chat/completions": ChatWire,
    "/v1/chat/completions/batch": ChatWire,
    "/v1/completions": CompletionWire,
    "/v1/responses": ResponsesWire,
    "/v1/messages": MessagesWire,
}
"""The routes that generate. A route that is not here and generates does not exist (see `mount`)."""
