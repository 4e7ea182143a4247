"""The ledger of one sequence: which positions have a score, which never will, and why."""

from __future__ import annotations

from collections import Counter

import numpy as np

from monitor.types import Coverage, Scores


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

    def gap(self, until: int, cause: str) -> list[int]:
        """Positions from n_scored up to `until` will never have a score."""
        positions = list(range(self.n_scored, until))
        self._rows.append(np.full((len(positions), self._width), np.nan, dtype=np.float32))
        self.n_scored = until
        self.miss(positions, cause)
        return positions

    def miss(self, positions: list[int], cause: str) -> None:
        self._causes[cause] += len(positions)
        self._n_bad_prompt += sum(1 for p in positions if p < self.n_prompt)
        self._n_bad += len(positions)

    @property
    def rows(self) -> Scores:
        """(n_scored, K) float32, of a sequence's own probes; without rows (0, 0)"""
        return np.concatenate(self._rows) if self._rows else np.empty((0, 0), dtype=np.float32)

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
