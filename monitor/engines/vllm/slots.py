"""Scores by KV-cache slot, so that a prompt whose tokens come out of the prefix cache still has its scores.

A cached token has no forward pass; its score is the one it had when its slot was filled. Every slot is tagged with the
position, the token and the probe set its score belongs to. A tag that differs reads as NaN: unmonitored, never a guess.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from monitor.types import Scores

Ints = npt.NDArray[np.int32]
EMPTY = -1


def slots_of(table: Ints, block_size: int, positions: Ints) -> npt.NDArray[np.int64]:
    """KV slots of one request's positions. table: (n_blocks,) its block ids, in order"""
    blocks: npt.NDArray[np.int64] = table[positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


class SlotScores:
    """`write` a step's rows, then `read` what the cache hits of the same step need: in this order, since a request may
    hit blocks that another request of the same step fills.

    n_slots: blocks x block size; width: probes per bank; each bank of columns has its own probe set, named by an epoch
    Not thread-safe: one thread writes and reads.
    """

    def __init__(self, n_slots: int, n_banks: int, width: int) -> None:
        self._scores = np.empty((n_slots, n_banks, width), dtype=np.float32)
        self._position = np.full(n_slots, EMPTY, dtype=np.int32)
        self._token = np.full(n_slots, EMPTY, dtype=np.int32)
        self._epoch = np.full((n_slots, n_banks), EMPTY, dtype=np.int32)

    def write(
        self, slots: npt.NDArray[np.int64], positions: Ints, tokens: Ints, epochs: tuple[int, ...], scores: Scores
    ) -> None:
        """scores: (n, n_banks, width); epochs: the probe set in each bank when they were computed"""
        self._scores[slots] = scores
        self._position[slots] = positions
        self._token[slots] = tokens
        self._epoch[slots] = epochs

    def read(self, slots: npt.NDArray[np.int64], tokens: Ints, epochs: tuple[int, ...]) -> Scores:
        """(n, n_banks, width) scores of positions 0 to n; NaN where a slot holds something else.

        tokens: (n,) what these positions must hold
        """
        found: Scores = self._scores[slots]
        same = (self._position[slots] == np.arange(len(slots))) & (self._token[slots] == tokens)
        stale = ~(same[:, None] & (self._epoch[slots] == epochs))
        found[stale] = np.nan
        return found
