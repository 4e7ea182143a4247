"""Token scores -> one running value per probe, turn by turn. Incremental, and keyed by position.

Kinds: `last`, `mean`, `max`, `ema` (the maximum of a bias-corrected moving average), `window_mean_max` (the maximum
of sliding means). Sources: PROBES 9.6 for ema (a = 2 / (M + 1) has the centre of mass of a window of M).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
"""Takes one more finite score, returns the value so far. A closure: this runs for every token of every probe."""


def fold(how: Aggregation) -> Fold:
    """A fresh running value, for one turn of one probe."""
    if how.kind == "last":
        return lambda score: score
    if how.kind == "mean":
        return _mean()
    if how.kind == "max":
        return _max()
    if how.kind == "ema":
        return _ema_max(how.alpha)
    return _window_mean_max(how.window)


def _mean() -> Fold:
    n, total = 0, 0.0

    def step(score: float) -> float:
        nonlocal n, total
        n += 1
        total += score
        return total / n

    return step


def _max() -> Fold:
    best = -math.inf

    def step(score: float) -> float:
        nonlocal best
        best = max(best, score)
        return best

    return step


def _ema_max(alpha: float) -> Fold:
    average, remaining, best = 0.0, 1.0, -math.inf

    def step(score: float) -> float:
        nonlocal average, remaining, best
        average += alpha * (score - average)
        remaining *= 1 - alpha  # weight still on the zero the average started from
        value = average / (1 - remaining)
        if value > best:
            best = value
        return best

    return step


def _window_mean_max(window: int) -> Fold:
    scores: deque[float] = deque(maxlen=window)
    best = -math.inf

    def step(score: float) -> float:
        nonlocal best
        full = len(scores) == window
        scores.append(score)
        mean = math.fsum(scores) / len(scores)  # a running sum would keep the rounding of one huge score for ever
        # Fewer tokens than the window: one mean of them all. A maximum over growing prefixes would be the
        # maximum of single tokens at the start.
        best = max(best, mean) if full else mean
        return best

    return step


class Running:
    """One probe over one turn: scores by position in, value out. A replayed position changes nothing.

    start: the first position of the turn; positions must then arrive in order, without gaps (`Watch` sees to it)
    peak: the highest value so far: the statistic a request is calibrated on
    """

    __slots__ = ("_fold", "next_position", "peak", "peak_position", "peak_score", "value")

    def __init__(self, how: Aggregation, start: int) -> None:
        self._fold = fold(how)
        self.next_position = start
        self.value: float | None = None
        self.peak: float | None = None
        self.peak_score = -math.inf
        self.peak_position = start

    def add(self, position: int, score: float) -> float | None:
        """The value with `score`, a finite logit, taken in."""
        if position < self.next_position:  # vLLM recomputes after a preemption: the same scores come again
            return self.value
        self.next_position = position + 1
        self.value = value = self._fold(score)
        if self.peak is None or value > self.peak:
            self.peak = value
        if score > self.peak_score:
            self.peak_score, self.peak_position = score, position
        return value


def aggregate(how: Aggregation, scores: list[float]) -> float:
    """The value of a whole turn. scores: at least one finite logit, in order."""
    step = fold(how)
    value = math.nan
    for score in scores:
        value = step(score)
    return value
