"""What of a sequence is sampled and not yet judged: its newest token with its logprobs, kept from vLLM's outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

# What vLLM sends once, with the first output of a request: it goes on with the first output that does.
_ONCE = ("prefill_stats", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "trace_headers")


class Held:
    """Rewrites EngineCoreOutputs. sent: tokens that have gone on"""

    __slots__ = ("_logprobs", "_tokens", "_waiting", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self._tokens: list[int] = []
        self._logprobs: Any = None
        self._waiting: Any = None

    def exchange(self, output: Any, released: int, final: bool) -> bool:
        """Put the output's tokens behind those held, and as many as are released now into it.

        released: tokens of the answer that may have gone on by now; final: what is left is dropped
        returns: False if nothing goes on yet; the output is then kept and joined to the next
        """
        n = released - self.sent
        if 0 < n == len(self._tokens) and self._waiting is self._logprobs is output.new_logprobs is None:
            # What was held goes on, what is new is held: nearly every step.
            output.new_token_ids, self._tokens = self._tokens, output.new_token_ids
            self.sent = released
            return True
        tokens = self._tokens + output.new_token_ids
        logprobs = _joined(self._logprobs, output.new_logprobs)
        output.new_token_ids, self._tokens = tokens[:n], tokens[n:]
        output.new_logprobs = None if logprobs is None or n == 0 else _part(logprobs, slice(0, n))
        self._logprobs = None if logprobs is None or not self._tokens else _part(logprobs, slice(n, None))
        self.sent = released
        if self._waiting is not None:
            _take_over(output, self._waiting)
            self._waiting = None
        if n == 0 and not final:
            self._waiting = output
            return False
        return True


def _joined(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    # The rows of a step are as wide as its most demanding request wants; each has at least what its own asked for.
    width = min(first[0].shape[1], second[0].shape[1])
    columns = [np.concatenate([_cut(a, width), _cut(b, width)]) for a, b in zip(first[:3], second[:3], strict=True)]
    return type(second)(*columns)


def _cut(column: Any, width: int) -> Any:
    return column[:, :width] if column.ndim == 2 else column  # ranks have one dimension


def _part(logprobs: Any, rows: slice) -> Any:
    return type(logprobs)(*(column[rows] for column in logprobs[:3]))


def _take_over(output: Any, earlier: Any) -> None:
    for name in _ONCE:
        if getattr(output, name) is None:
            setattr(output, name, getattr(earlier, name))
    if earlier.events:
        output.events = earlier.events + (output.events or [])
