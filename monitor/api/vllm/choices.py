"""Blocks on chat and completions: OpenAI's `choices`, with Azure's annotations where the policy wants them."""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Iterator
from typing import Any

from monitor.api.verdicts import answer_annotation, prompt_annotation
from monitor.api.vllm.wire import FILTERED, Wire, parse_event, sse
from monitor.engines.vllm.call import Call


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

    def unsay(self, choice: dict[str, Any]) -> None:
        """What else tells the answer that a text stands in place of."""
        choice["logprobs"] = None
        if choice.get("token_ids"):
            choice["token_ids"] = []

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
        self.unsay(choice)
        message = choice["message"]
        message["content"] = text
        for name in ("reasoning", "reasoning_content"):
            message.pop(name, None)


class CompletionWire(_Choices):
    prefix, chunk = "cmpl", "text_completion"
    ending = {"text": "", "logprobs": None, "finish_reason": FILTERED}  # noqa: RUF012

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.terms.replacement is not None:
            for choice in body["choices"]:
                if choice["index"] in self.call.blocked:
                    self.unsay(choice)
                    choice["text"] = ""
        return super().whole(body)

    def replace(self, choice: dict[str, Any], text: str) -> None:
        choice["text"] += text
