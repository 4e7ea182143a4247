"""Whose turn it is: which streams the next step feeds, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from monitor.observer.session import SHORT, pages


class Waiting(Protocol):
    """left: tokens still to be read; length: tokens read before"""

    @property
    def left(self) -> int: ...

    @property
    def length(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Turns:
    """Answers and prompts take turns while both wait: neither starves, and no answer waits behind a whole prompt.

    max_step_tokens: of all streams in a step; max_batch_tokens: what the caches of a batch may take, padding included
    """

    def __init__(self, max_step_tokens: int, max_batch_tokens: int) -> None:
        self._max_step, self._max_batch = max_step_tokens, max_batch_tokens
        self._prompts_last = False

    def choose(self, waiting: Sequence[W]) -> list[tuple[W, int]]:
        """Who is fed how many tokens.

        waiting: oldest first; the oldest of its kind is always chosen, others join while there is room
        """
        answers, prompts = [w for w in waiting if w.left <= SHORT], [w for w in waiting if w.left > SHORT]
        if prompts and not self._prompts_last:
            answers = []
        self._prompts_last = not answers
        chosen: list[tuple[W, int]] = []
        total = width = span = held = 0
        for one in answers or prompts:
            n = min(one.left, self._max_step)
            own = pages(one.length + n)
            rows, wider, longer = len(chosen) + 1, max(width, n), max(span, own)
            full = total + n > self._max_step or rows * longer > self._max_batch
            # Attention sees a padded batch: a long text beside short ones would be computed for each of them.
            wasteful = rows * longer > 2 * (held + own) or (not answers and rows * wider > 2 * (total + n))
            if chosen and (full or wasteful):
                continue
            chosen.append((one, n))
            total, width, span, held = total + n, wider, longer, held + own
        return chosen
