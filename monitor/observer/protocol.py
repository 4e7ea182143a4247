"""What the proxy needs of an observer: open a stream with a prompt, read what comes after it, close it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from monitor.errors import RequestInvalid
from monitor.live import ServedModel
from monitor.template import ChatTemplate
from monitor.types import Scores


class TooLong(RequestInvalid):
    """More tokens than the observer's model reads, or than its memory could ever hold."""


class Stream(Protocol):
    """One conversation that is read along. One `read` at a time.

    scores: (n_prompt, k) float32 logits of the tokens it was opened with, > 0 leans harmful
    """

    scores: Scores

    async def read(self, token_ids: Sequence[int]) -> Scores:
        """(n, k) float32 logits of the next n tokens; (0, k) for none.

        raises: TooLong, RequestInvalid for an id that is no token, Overloaded if memory is short or the observer
        stops, MidstreamError if a step failed. After an error of a step, or when it is cancelled, the stream is
        closed: what it has read is not known. TooLong and RequestInvalid change nothing.
        """
        ...

    def fork(self) -> Stream:
        """Another one that has read the same; each goes on by itself, and is closed by itself.

        Not while it reads, nor after it is closed. raises: Overloaded if memory is short or the observer stops
        """
        ...

    def close(self) -> None:
        """Free its memory. Any number of times, from any thread, also while a step runs."""
        ...


class Observer(Protocol):
    """columns: (name, version) of the probe of each column of the scores, in the order of ProbeBank"""

    model: ServedModel
    tokenizer: Any
    template: ChatTemplate
    columns: tuple[tuple[str, str], ...]

    async def open(self, token_ids: Sequence[int]) -> Stream:
        """A stream that has read these tokens, chunk by chunk among other streams' work.

        token_ids: from the first position on, as `template` gives them; cancelling it frees everything
        raises: TooLong, RequestInvalid for an id that is no token, Overloaded when a bound is reached,
        MidstreamError if a step failed
        """
        ...
