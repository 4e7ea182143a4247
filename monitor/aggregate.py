"""Token scores -> one value per probe: of a whole turn (`aggregate`), or token by token (`fold`).

Kinds: `last`, `mean`, `max`, `ema` (the maximum of a bias-corrected moving average), `window_mean_max` (the maximum
of sliding means). Sources: PROBES 9.6 for ema (a = 2 / (M + 1) has the centre of mass of a window of M).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

Kind = Literal["last", "mean", "max", "ema", "window_mean_max"]
KINDS: tuple[Kind, ...] = ("last", "mean", "max", "ema", "window_mean_max")


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How a probe's token scores become one value; written in its card.

    alpha: weight of the newest score in `ema`; window: tokens in `window_mean_max`
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


Fold = Callable[[float], float]
"""Takes one more finite score, returns the running value there. A closure: this runs for every token of every probe."""


def fold(how: Aggregation) -> Fold:
    """A fresh running value, for one answer and one probe. Its maximum so far is the value of the answer: what a
    response is calibrated on."""
    if how.kind == "mean":
        return _mean()
    if how.kind == "ema":
        return _ema(how.alpha)
    if how.kind == "window_mean_max":
        return _window_mean(how.window)
    return lambda score: score  # last, and max, whose maximum is taken outside


def _mean() -> Fold:
    n, total = 0, 0.0

    def step(score: float) -> float:
        nonlocal n, total
        n += 1
        total += score
        return total / n

    return step


def _ema(alpha: float) -> Fold:
    average, remaining = 0.0, 1.0

    def step(score: float) -> float:
        nonlocal average, remaining
        average += alpha * (score - average)
        remaining *= 1 - alpha  # weight still on the zero the average started from
        return average / (1 - remaining)

    return step


def _window_mean(window: int) -> Fold:
    scores: deque[float] = deque(maxlen=window)

    def step(score: float) -> float:
        scores.append(score)
        return math.fsum(scores) / len(scores)  # a running sum would keep the rounding of one huge score for ever

    return step


def aggregate(how: Aggregation, scores: npt.ArrayLike) -> float:
    """The value of a whole turn. scores: (n,) finite logits, in order; none gives NaN"""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return math.nan
    if how.kind == "last":
        return float(values[-1])
    if how.kind == "mean":
        return float(values.mean())
    if how.kind == "max":
        return float(values.max())
    if how.kind == "ema":
        return max(map(_ema(how.alpha), values.tolist()))
    if len(values) < how.window:
        # One mean of them all: a maximum over growing prefixes would be the maximum of single tokens at the start.
        return float(values.mean())
    return float(sliding_window_view(values, how.window).mean(axis=1).max())
