"""Paired, interleaved measurements: medians of ratios with 95 % bootstrap intervals, until they are narrow enough."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ratio:
    median: float
    low: float
    high: float
    pairs: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.pairs} pairs"


def ratio(pairs: list[tuple[float, float]]) -> Ratio:
    """Of first to second in each pair."""
    ratios = np.array([a / b for a, b in pairs])
    random = np.random.default_rng(0)
    low, high = np.percentile([np.median(random.choice(ratios, len(ratios))) for _ in range(2000)], [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def measure(
    ours: Callable[[], float], plain: Callable[[], float], cap_s: float, wanted: float = 0.01, least: int = 6
) -> tuple[Ratio, list[tuple[float, float]]]:
    """Blocks in alternation, the order turning, until the 95 % half-width is `wanted` or the time is up."""
    pairs: list[tuple[float, float]] = []
    deadline = time.monotonic() + cap_s
    while True:
        if len(pairs) % 2:
            second, first = plain(), ours()
        else:
            first, second = ours(), plain()
        pairs.append((first, second))
        found = ratio(pairs)
        if len(pairs) >= least and (found.half_width <= wanted or time.monotonic() > deadline):
            return found, pairs


def verdict(found: Ratio, good: bool, bad: bool) -> str:
    """good: the whole interval meets the target; bad: none of it does"""
    return "met" if good else "MISSED" if bad else "INCONCLUSIVE"


def say(line: str) -> None:
    print(line, flush=True)  # minutes lie between two lines
