"""The books of one sequence: which positions have a score, which never will, and why; how long its tokens waited."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from monitor.types import Cause, Coverage, Scores


class Ledger:
    """Rows without gaps, from position 0 on: NaN stands where a score is missing.

    n_scored: rows so far
    """

    def __init__(self, n_prompt: int, width: int) -> None:
        self.n_prompt = n_prompt
        self.n_scored = 0
        self._width = width
        self._rows: list[Scores] = []
        self._causes: Counter[str] = Counter()
        self._n_bad = self._n_bad_prompt = 0

    def add(self, first: int, rows: Scores) -> tuple[int, Scores]:
        """What of `rows` is new, and its position: an engine that recomputes replays rows. first: at most n_scored"""
        skip = self.n_scored - first
        if skip:
            first, rows = first + skip, rows[skip:]
        if len(rows):
            self._rows.append(rows)
            self.n_scored = first + len(rows)
        return first, rows

    def gap(self, until: int, cause: Cause) -> list[int]:
        """Positions from n_scored up to `until` will never have a score."""
        positions = list(range(self.n_scored, until))
        self._rows.append(np.full((len(positions), self._width), np.nan, dtype=np.float32))
        self.n_scored = until
        self.miss(positions, cause)
        return positions

    def miss(self, positions: list[int], cause: Cause) -> None:
        if not positions:
            return
        self._causes[cause] += len(positions)
        self._n_bad_prompt += sum(1 for p in positions if p < self.n_prompt)
        self._n_bad += len(positions)

    @property
    def rows(self) -> Scores:
        """(n_scored, K) float32, of a sequence's own probes"""
        return np.concatenate(self._rows) if self._rows else np.empty((0, self._width), dtype=np.float32)

    def coverage(self, n_sampled: int) -> Coverage:
        """n_sampled: tokens of the answer, released or not"""
        total = self.n_prompt + n_sampled
        seen = min(self.n_scored, total)
        unseen = total - seen
        final = 1 if n_sampled and unseen else 0
        return Coverage(
            prompt_tokens=self.n_prompt,
            response_tokens=n_sampled,
            prompt_scored=min(seen, self.n_prompt) - self._n_bad_prompt,
            response_scored=max(0, seen - self.n_prompt) - (self._n_bad - self._n_bad_prompt),
            final_unscored=final,
            unmonitored=self._n_bad,
            not_computed=unseen - final,
            causes=dict(self._causes),
        )


class Waits:
    """How long the tokens of an answer waited to be released. longest: in seconds, of those released so far"""

    __slots__ = ("_since", "longest")

    def __init__(self) -> None:
        self.longest = 0.0
        self._since: deque[float] = deque()  # when each that is held was sampled, the oldest first

    def step(self, now: float, n_new: int, n_held: int) -> None:
        """n_new tokens were sampled now; n_held are left, all others have gone out. now: in seconds, of one clock"""
        since = self._since
        for _ in range(n_new):
            since.append(now)
        while len(since) > n_held:
            waited = now - since.popleft()
            if waited > self.longest:
                self.longest = waited
