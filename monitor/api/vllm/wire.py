"""What a block looks like on each route of vLLM, for the client library that reads it.

vLLM ends a blocked answer as it would any other; what it says of the ending is put right here, in its JSON and in its
server-sent events. Only answers with a blocked choice are looked into, or all where the policy annotates.
"""

from __future__ import annotations

import abc
import copy
import json
import time
from collections.abc import Iterator
from typing import Any

from monitor.api.errors import ApiError
from monitor.api.verdicts import answer_annotation, prompt_annotation
from monitor.engines.vllm.call import Call
from monitor.types import Terms

FILTERED = "content_filter"


class Wire(abc.ABC):
    """One answer. `whole` rewrites a JSON body, `event` one server-sent event; both only if it `rewrites`."""

    annotated = False
    """Whether this route's answers have a place for Azure's annotations."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.first = b""  # the first events that went out, for the envelope of an event of ours

    @property
    def rewrites(self) -> bool:
        return bool(self.call.blocked) or (self.annotated and self.terms.annotate)

    @property
    def terms(self) -> Terms:
        return self.call.terms or Terms()

    def opened(self, events: bytes) -> None:
        self.first = self.first or events

    @abc.abstractmethod
    def whole(self, body: dict[str, Any]) -> dict[str, Any]: ...

    @abc.abstractmethod
    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        """data: None for OpenAI's [DONE]"""

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

    annotated = True
    ending: dict[str, Any]
    prefix: str
    chunk: str

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._ended: set[int] = set()
        self._unsent = True  # the annotation of the prompts

    @abc.abstractmethod
    def replace(self, choice: dict[str, Any], text: str) -> None:
        """Put the text in place of what was said, or behind what a stream has said."""

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        for choice in body["choices"]:
            if choice["index"] in self.call.blocked:
                self.strip(choice.get("message", {}))
            self._end(choice)
        return body | self._prompts()

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None or not data.get("choices"):  # [DONE], or the usage before it
            # vLLM sends no chunk at all for a choice that ends before its first token.
            for index in sorted(set(self.call.blocked) - self._ended):
                choice = copy.deepcopy(self.ending) | {"index": index}
                self._end(choice)
                yield sse(None, self._envelope() | {"choices": [choice]} | self._prompts())
        else:
            for choice in data["choices"]:
                if choice["index"] in self.call.blocked:
                    self.strip(choice.get("delta", {}))
                if choice.get("finish_reason"):
                    self._end(choice)
            data |= self._prompts()
        yield b"data: [DONE]\n\n" if data is None else sse(name, data)

    def _end(self, choice: dict[str, Any]) -> None:
        """A choice that is whole, or the last chunk of one."""
        index = choice["index"]
        self._ended.add(index)
        if index in self.call.blocked:
            choice["finish_reason"], choice["stop_reason"] = FILTERED, None
            if self.terms.replacement is not None:
                self.replace(choice, self.terms.replacement)
        if index in self.call.records:
            choice |= answer_annotation(self.terms, self.call.records[index])

    def _prompts(self) -> dict[str, Any]:
        if not self._unsent:
            return {}
        self._unsent = False
        return prompt_annotation(self.terms, self.call.openings, self.call.n)

    def strip(self, message: dict[str, Any]) -> None:
        """A tool must not run on half a call."""
        message.pop("function_call", None)
        if message.pop("tool_calls", None) and message.get("content", "") is None:
            message["content"] = ""

    def _envelope(self) -> dict[str, Any]:
        own = {"id": f"{self.prefix}-{self.call.id}", "object": self.chunk, "created": int(time.time())}
        parsed = parse_event(self.first.partition(b"\n\n")[0])
        first = parsed[1] if parsed is not None and parsed[1] is not None else {}
        return own | {"model": self.call.asked} | {key: first[key] for key in (*own, "model") if key in first}


class ChatWire(_Choices):
    prefix, chunk = "chatcmpl", "chat.completion.chunk"
    ending = {"delta": {}, "logprobs": None, "finish_reason": FILTERED}  # noqa: RUF012

    def replace(self, choice: dict[str, Any], text: str) -> None:
        if "delta" in choice:
            choice["delta"]["content"] = (choice["delta"].get("content") or "") + text
            return
        message = choice["message"]
        message["content"], choice["logprobs"] = text, None
        for name in ("reasoning", "reasoning_content"):
            message.pop(name, None)


class CompletionWire(_Choices):
    prefix, chunk = "cmpl", "text_completion"
    ending = {"text": "", "logprobs": None, "finish_reason": FILTERED}  # noqa: RUF012

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.terms.replacement is not None:
            for choice in body["choices"]:
                if choice["index"] in self.call.blocked:
                    choice["text"], choice["logprobs"] = "", None
        return super().whole(body)

    def replace(self, choice: dict[str, Any], text: str) -> None:
        choice["text"] += text


_SAID = ("message", "reasoning")  # what an answer says; every other item calls something


class ResponsesWire(Wire):
    """A stream is cut, never replaced: its text belongs to events that are numbered and repeated at the end."""

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.terms.replacement is not None:
            part = {"type": "output_text", "text": self.terms.replacement, "annotations": [], "logprobs": []}
            item = {"id": f"msg_{self.call.id}", "type": "message", "role": "assistant", "status": "incomplete"}
            body = body | {"output": [item | {"content": [part]}]}
        return self._incomplete(body)

    def _incomplete(self, body: dict[str, Any]) -> dict[str, Any]:
        output = [item | {"status": "incomplete"} for item in body["output"] if item["type"] in _SAID]
        return body | {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": output}

    def event(self, name: str | None, data: dict[str, Any] | None) -> Iterator[bytes]:
        if data is None:
            yield b"data: [DONE]\n\n"
            return
        kind, item = data["type"], data.get("item")
        if kind in ("response.completed", "response.failed"):
            kind = "response.incomplete"
            data = data | {"type": kind, "response": self._incomplete(data["response"])}
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


WIRES: dict[str, type[Wire]] = {
    "/v1/chat/completions": ChatWire,
    "/v1/chat/completions/batch": ChatWire,
    "/v1/completions": CompletionWire,
    "/v1/responses": ResponsesWire,
    "/v1/messages": MessagesWire,
}
"""The routes that generate. A route that is not here and generates does not exist (see `mount`)."""
