"""An upstream's answer on the way to the client: which text is in it, what may go out, and what a block looks like.

Every frame that holds nothing of a block goes out as it came, byte for byte, when all of its text has been judged, and
in the order in which it came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from monitor.api.errors import ApiError
from monitor.api.verdicts import prompt_annotation
from monitor.types import FinishReason, Terms
from monitor.upstream.choice import Choice
from monitor.upstream.errors import Unreadable
from monitor.upstream.sse import DONE, frame, parse

FILTERED = "content_filter"
Json = dict[str, Any]


class Piece(Protocol):
    """A frame that waits. `release`: what of it goes out; None: not yet"""

    def release(self) -> bytes | None: ...


class Plain:
    """A frame without text of an answer: a comment, an error."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def release(self) -> bytes | None:
        return self._raw


class Wire(ABC):
    """What the routes of one shape have in common. finishes: of choices whose answer is whole, until they are read

    done: the upstream has said that nothing follows; failed: it has said that something went wrong
    """

    def __init__(self, choices: Sequence[Choice], with_usage: bool) -> None:
        self.choices, self.with_usage = choices, with_usage
        self.finishes: dict[int, FinishReason] = {}
        self.done = self.failed = False
        self._waiting: deque[Piece] = deque()

    @property
    def terms(self) -> Terms:
        return self.choices[0].policy.terms

    @property
    def all_ended(self) -> bool:
        return all(choice.ended for choice in self.choices)

    @property
    def cut_short(self) -> bool:
        """Nothing that the upstream may still say would go out."""
        return self.all_ended and any(choice.blocked for choice in self.choices)

    def take(self, raw: bytes, late: bool = False) -> None:
        """One frame. late: it came while the observer was reading. raises: Unreadable"""
        event = parse(raw)
        if self.done:
            return
        if event.data is None:
            self._waiting.append(Plain(raw))
        elif event.is_done:
            self.done = True
        else:
            data = event.json()
            fails = bool(data.get("error")) or event.name == "error"
            self._waiting.append(self.piece(raw, data, late, fails))
            self.failed = self.failed or fails

    def released(self) -> bytes:
        """Frames that may go out now."""
        parts = []
        while self._waiting:
            part = self._waiting[0].release()
            if part is None:
                break
            parts.append(part)
            self._waiting.popleft()
        return b"".join(parts)

    @property
    def told(self) -> bool:
        """Whether the client has the upstream's own word that something went wrong."""
        return self.failed and not self._waiting

    @abstractmethod
    def piece(self, raw: bytes, data: Json, late: bool, fails: bool) -> Piece:
        """fails: it says that something went wrong. raises: Unreadable"""

    def ending(self) -> bytes:
        """What follows when every choice has ended: the upstream's own [DONE], or ours after a block."""
        return DONE if self.done or self.any_blocked else b""

    def error(self, error: ApiError) -> bytes:
        return frame({"error": error.error})

    @abstractmethod
    def whole(self, body: Json) -> Callable[[], Json | None]:
        """Take the texts of a whole answer. When they are read, what is returned gives the body as the client gets it;
        None: as it came. raises: Unreadable"""

    def prompts_annotation(self, n: int) -> Json:
        openings = {c.index: c.opening for c in self.choices if c.opening is not None}
        return prompt_annotation(self.terms, openings, n)

    @property
    def n_prompt_tokens(self) -> int:
        return sum({id(c.prompt): len(c.prompt.token_ids) for c in self.choices}.values())

    @property
    def any_blocked(self) -> bool:
        return any(choice.blocked for choice in self.choices)

    @property
    def any_cut(self) -> bool:
        return any(choice.cut for choice in self.choices)

    @property
    def n_released(self) -> int:
        return sum(c.watch.released for c in self.choices)


def finish_of(reason: str) -> FinishReason:
    """What a record calls it; tool_calls, and whatever else an upstream calls a normal end, is a stop."""
    return "length" if reason in ("length", "max_tokens", "max_output_tokens") else "stop"


def expect(holds: bool, what: str) -> None:
    """raises: Unreadable"""
    if not holds:
        raise Unreadable(f"the upstream's answer can't be judged: {what}")
