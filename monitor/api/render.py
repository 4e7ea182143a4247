"""Judged output -> OpenAI's JSON, for chat and for completions, whole and as chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from monitor.types import Delta, TokenLogprob


class ChatShape:
    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def part(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._render(delta.tokens),
            "finish_reason": delta.finish,
        }

    def whole(self, index: int, text: str, tokens: Sequence[TokenLogprob], finish: str) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._render(tokens),
            "finish_reason": finish,
        }

    def _render(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        return {
            "content": [
                _spelled(t.token, t.logprob) | {"top_logprobs": [_spelled(text, lp) for _, text, lp in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }


def _spelled(token: str, logprob: float) -> dict[str, Any]:
    # Half a character has no text of its own; OpenAI allows null bytes.
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}


class CompletionShape:
    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, delta: Delta) -> dict[str, Any]:
        return self.whole(delta.index, delta.text, delta.tokens, delta.finish)

    def whole(self, index: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._render(index, tokens),
            "finish_reason": finish,
        }

    def _render(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.token)
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{text: lp for _, text, lp in t.top} for t in tokens],
            "text_offset": offsets,
        }


def envelope(shape: ChatShape | CompletionShape, request_id: str, model: str, chunk: bool) -> dict[str, Any]:
    return {
        "id": shape.id_prefix + request_id,
        "object": shape.chunk_name if chunk else shape.object_name,
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
