"""Probes with several projections: k scores a token -> one value, of a `whole` turn, or `running` token by token.

A head's columns lie next to each other: `mean_last` has one to take the mean of and one to take the last of, `multimax`
H columns, `attention` and `rolling_attention` H queries and then H values. Sources: PROBES 9.8.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

HeadKind = Literal["mean_last", "multimax", "attention", "rolling_attention"]
HEAD_KINDS: tuple[HeadKind, ...] = ("mean_last", "multimax", "attention", "rolling_attention")
_QUERIED = ("attention", "rolling_attention")
Step = Callable[[Sequence[float]], float]
"""Takes the row of one more token, of all probes; returns the value of all tokens so far."""


def takes(kind: HeadKind, k: int) -> bool:
    """Whether k projections make heads of this kind."""
    if kind in _QUERIED:
        return k >= 2 and k % 2 == 0
    return k == 2 if kind == "mean_last" else k >= 1


def first_value(kind: HeadKind, k: int) -> int:
    """The first of k columns that is a value; those before it are queries, and only weigh tokens."""
    return k // 2 if kind in _QUERIED else 0


def whole(kind: HeadKind, window: int, rows: npt.NDArray[np.float64]) -> float:
    """rows: (n, k) finite logits, in order, n >= 1"""
    if kind == "mean_last":
        return float(rows[:, 0].mean() + rows[-1, 1])
    if kind == "multimax":
        return float(rows.max(axis=0).sum())
    query, value = np.hsplit(rows, 2)
    if kind == "attention" or len(rows) <= window:
        return float(_attended(query, value).sum())
    # Full windows only, as in `window_mean_max`: the first partial one would be a single token.
    queries, values = (sliding_window_view(part, window, axis=0).transpose(2, 0, 1) for part in (query, value))
    return float(_attended(queries, values).max(axis=0).sum())


def _attended(query: npt.NDArray[np.float64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of `value` over the first axis, weighted by the softmax of `query`."""
    weight = np.exp(query - query.max(axis=0))
    mean: npt.NDArray[np.float64] = (weight * value).sum(axis=0) / weight.sum(axis=0)
    return mean


def running(kind: HeadKind, window: int, first: int, k: int) -> Step:
    """For a fresh answer; after each token it says what `whole` says. first: the first of the probe's k columns"""
    if kind == "mean_last":
        return _MeanLast(first).add
    if kind == "multimax":
        return _MultiMax(first, k).add
    half = k // 2
    of = _Attended if kind == "attention" else lambda: _Rolling(window)
    return _Heads([(first + h, first + half + h, of()) for h in range(half)]).add


class _MeanLast:
    __slots__ = ("_first", "_mean", "_n")

    def __init__(self, first: int) -> None:
        self._first, self._n, self._mean = first, 0, 0.0

    def add(self, scores: Sequence[float]) -> float:
        self._n += 1
        self._mean += (scores[self._first] - self._mean) / self._n
        return self._mean + scores[self._first + 1]


class _MultiMax:
    __slots__ = ("_columns", "_highest")

    def __init__(self, first: int, k: int) -> None:
        self._columns, self._highest = slice(first, first + k), [-math.inf] * k

    def add(self, scores: Sequence[float]) -> float:
        self._highest = list(map(max, self._highest, scores[self._columns]))
        return sum(self._highest)


class _Head(Protocol):
    def add(self, query: float, value: float) -> float: ...


class _Heads:
    """The sum over heads, each with the columns of its query and its value."""

    __slots__ = ("_heads",)

    def __init__(self, heads: list[tuple[int, int, _Head]]) -> None:
        self._heads = heads

    def add(self, scores: Sequence[float]) -> float:
        total = 0.0
        for query, value, head in self._heads:
            total += head.add(scores[query], scores[value])
        return total


class _Attended:
    """The highest query so far; the sums of weights and of weighted values, in units of its weight."""

    __slots__ = ("_mass", "_top", "_weighted")

    def __init__(self) -> None:
        self._top, self._mass, self._weighted = -math.inf, 0.0, 0.0

    def add(self, query: float, value: float) -> float:
        if query > self._top:
            shrink, weight = math.exp(self._top - query), 1.0
            self._top = query
        else:
            shrink, weight = 1.0, math.exp(query - self._top)
        self._mass = self._mass * shrink + weight
        self._weighted = self._weighted * shrink + weight * value
        return self._weighted / self._mass


class _Rolling:
    """The newest tokens in a ring, and the highest mean of a full window."""

    __slots__ = ("_highest", "_ring", "_window")

    def __init__(self, window: int) -> None:
        self._window, self._highest = window, -math.inf
        self._ring = deque[tuple[float, float]](maxlen=window)

    def add(self, query: float, value: float) -> float:
        ring = self._ring
        ring.append((query, value))
        (top, _), mass, weighted = max(ring), 0.0, 0.0
        # Summed anew: a running sum would keep the rounding of one huge score for ever.
        for q, v in ring:
            weight = math.exp(q - top)
            mass += weight
            weighted += weight * v
        mean = weighted / mass
        if len(ring) < self._window:
            return mean
        if mean > self._highest:
            self._highest = mean
        return self._highest
