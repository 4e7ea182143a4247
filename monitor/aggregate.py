"""Token scores -> one value per probe: of a whole turn (`aggregate`), or token by token (`Running`).

Kinds for one score a token: `last`, `mean`, `max`, `ema` (the maximum of a bias-corrected moving average),
`window_mean_max` (the maximum of sliding means). For several, side by side: those of monitor.heads. Beside `mean_last`,
which has a projection for the last token, in the other phase, these read the first projection alone: an answer that is
not over has no last token. Sources: PROBES 9.6 for ema (a = 2 / (M + 1) has the centre of mass of a window of M).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from monitor.heads import HEAD_KINDS, HeadKind, Step, first_value, running, takes, whole

PlainKind = Literal["last", "mean", "max", "ema", "window_mean_max"]
Kind = PlainKind | HeadKind
PLAIN_KINDS: tuple[PlainKind, ...] = ("last", "mean", "max", "ema", "window_mean_max")
KINDS: tuple[Kind, ...] = (*PLAIN_KINDS, *HEAD_KINDS)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How a probe's token scores become one value; written in its card.

    alpha: weight of the newest score in `ema`; window: tokens in `window_mean_max` and `rolling_attention`
    """

    kind: Kind
    alpha: float = 2 / 17
    window: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"aggregation {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must be above 0 and at most 1")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1")

    @property
    def decay(self) -> float:
        """What a score's weight is multiplied by with each later token, in the kinds whose running value is their
        weighted mean. `last`, and `max`, whose maximum is taken outside, forget at once."""
        if self.kind == "mean":
            return 1.0
        return 1 - self.alpha if self.kind == "ema" else 0.0

    def check(self, k: int) -> None:
        """raises: ValueError if it can't make one value of k scores a token"""
        if not (takes(self.kind, k) if self.kind in HEAD_KINDS else k in (1, 2)):
            raise ValueError(f"aggregation {self.kind!r} can't be had from {k} projections")

    def first_value(self, k: int) -> int:
        """Of k columns: those before it only weigh tokens, and are no part of `token_scores`."""
        return first_value(self.kind, k) if self.kind in HEAD_KINDS else 0


Read = tuple[Aggregation, int, int]
"""How a probe's scores become a value, the first of their columns, and how many they are."""
_Groups = tuple[tuple[float, tuple[tuple[int, int], ...]], ...]
"""Weighted means by their decay, each with the (index, column) of its probes: at a token they share the weights."""
_MEANS = ("last", "mean", "max", "ema")


@lru_cache(maxsize=64)
def _grouped(probes: tuple[Read, ...]) -> _Groups:
    """One object for all answers under a set of rules: it stays in the processor's cache."""
    groups: dict[float, list[tuple[int, int]]] = {}
    for index, (how, column, _) in enumerate(probes):
        if how.kind in _MEANS:
            groups.setdefault(how.decay, []).append((index, column))
    return tuple((decay, tuple(members)) for decay, members in groups.items())


def _step(how: Aggregation, column: int, k: int) -> Step:
    """One of those that are no weighted mean, for a fresh answer."""
    if how.kind in HEAD_KINDS:
        return running(how.kind, how.window, column, k)
    return _WindowMean(column, how.window).add


class _WindowMean:
    __slots__ = ("_column", "_window")

    def __init__(self, column: int, window: int) -> None:
        self._column, self._window = column, deque[float](maxlen=window)

    def add(self, scores: Sequence[float]) -> float:
        window = self._window
        window.append(scores[self._column])
        # A running sum would keep the rounding of one huge score for ever.
        return math.fsum(window) / len(window)


class Running:
    """The running values of some probes over one answer, token by token.

    values: one a probe; highest: their maxima so far, the values of the answer: what a response is calibrated on
    limits: what `add` compares each value with, infinite until it is set; n: rows so far
    """

    # Lists of floats: for a row of 8 scores numpy's calls cost three times what the loop does, for 64 about half.
    __slots__ = ("_groups", "_masses", "_steps", "highest", "limits", "n", "values")

    def __init__(self, probes: Sequence[Read]) -> None:
        k = len(probes)
        self.n = 0
        self.values, self.highest, self.limits = [0.0] * k, [-math.inf] * k, [math.inf] * k
        self._groups = _grouped(tuple(probes))
        self._masses = [0.0] * len(self._groups)  # the sum of all weights so far, the newest score's being 1
        self._steps = [(index, _step(*read)) for index, read in enumerate(probes) if read[0].kind not in _MEANS]

    def add(self, scores: Sequence[float]) -> list[int]:
        """Take one more row, of finite scores. Returns the probes whose value is above its limit now."""
        self.n += 1
        values, highest, limits, masses = self.values, self.highest, self.limits, self._masses
        above = []
        for group, (decay, members) in enumerate(self._groups):
            masses[group] = mass = 1 + decay * masses[group]
            rest = 1 - 1 / mass
            for i, column in members:
                # Written so that equal scores keep their value, and that with `rest` 0 nothing of the old one is left.
                score = scores[column]
                values[i] = value = score - rest * (score - values[i])
                if value > highest[i]:
                    highest[i] = value
                if value > limits[i]:
                    above.append(i)
        for i, step in self._steps:
            values[i] = value = step(scores)
            highest[i] = max(highest[i], value)
            if value > limits[i]:
                above.append(i)
        return above

    def drop(self, index: int) -> None:
        """Follow this probe no more: a score of it is missing or not finite."""
        self._steps = [step for step in self._steps if step[0] != index]
        self._groups = tuple((decay, tuple(m for m in members if m[0] != index)) for decay, members in self._groups)


def aggregate(how: Aggregation, scores: npt.ArrayLike) -> float:
    """The value of a whole turn. scores: (n,), or (n, k) of k projections: finite logits, in order; none gives NaN"""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return math.nan
    if how.kind in HEAD_KINDS:
        return whole(how.kind, how.window, values.reshape(len(values), -1))
    if values.ndim == 2:
        values = values[:, 0]
    if how.kind == "last":
        return float(values[-1])
    if how.kind == "mean":
        return float(values.mean())
    if how.kind == "max":
        return float(values.max())
    if how.kind == "ema":
        return _highest_average(how.decay, values.tolist())
    if len(values) < how.window:
        # One mean of them all: a maximum over growing prefixes would be the maximum of single tokens at the start.
        return float(values.mean())
    return float(sliding_window_view(values, how.window).mean(axis=1).max())


def _highest_average(decay: float, scores: list[float]) -> float:
    highest, average, mass = -math.inf, 0.0, 0.0
    for score in scores:
        mass = 1 + decay * mass
        average = score - (1 - 1 / mass) * (score - average)
        highest = max(highest, average)
    return highest


def token_scores(how: Aggregation, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n,): what is shown of each token, the value of a turn of that token alone. One score a token is it; of several
    it is the sum of those that are values. Of `mean_last` it is what is averaged: what a token would be as the last one
    says nothing of it. scores: (n,) or (n, k) logits, NaN where one is missing"""
    if scores.ndim == 1:
        return scores
    alone = how.kind == "mean_last" or how.kind in PLAIN_KINDS
    columns = slice(0, 1) if alone else slice(how.first_value(scores.shape[1]), None)
    shown: npt.NDArray[np.float32] = scores[:, columns].sum(axis=1)
    return shown
