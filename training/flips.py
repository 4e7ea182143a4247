"""Rows that only one of two probes flags: how sure is it that one catches more than the other, on the same rows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes_store.calibration import binomial_cdf
from training.metrics import MIN_GROUPS, Figure, need

Flags = npt.NDArray[np.bool_]
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows that only one of two probes flags; p: exact and two-sided (McNemar), of such a split by chance"""

    only_one: int
    only_other: int
    p: float


def mcnemar(one: Flags, other: Flags) -> Flips:
    """one, other: (n,) whether each probe flags the row"""
    a, b = int((one & ~other).sum()), int((other & ~one).sum())
    return Flips(a, b, min(1.0, 2 * binomial_cdf(min(a, b), a + b, 0.5)) if a + b else 1.0)


def share_difference(
    one: Flags, other: Flags, groups: Sequence[str] | None = None, rounds: int = 1000, seed: int = 0
) -> Figure:
    """Share of rows that one flags less the share that the other does, with Tango's interval; where rows share groups,
    the wider of it and the grouped bootstrap. raises: Unsupported without rows, or with too few groups"""
    need(len(one), 1, "rows", "a difference of two rates")
    by_row = one.astype(np.float64) - other
    low, high = tango(int((one & ~other).sum()), int((other & ~one).sum()), len(one))
    codes = np.arange(len(one)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n = int(codes.max()) + 1
    if n < len(one):
        need(n, MIN_GROUPS, "groups of rows", "a rate over rows that share groups")
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rounds).astype(np.float64)
        drawn = counts @ np.bincount(codes, by_row) / (counts @ np.bincount(codes))
        drawn_low, drawn_high = np.percentile(drawn, [2.5, 97.5]).tolist()
        low, high = min(low, drawn_low), max(high, drawn_high)
    return Figure(float(by_row.mean()), low, high, len(one))


def tango(only_one: float, only_other: float, n: float) -> tuple[float, float]:
    """The score interval of a paired difference (Tango 1998): it has a width although no row flips, unlike Wald's."""

    def score(delta: float) -> float:
        b = -only_one - only_other + (2 * n - only_one + only_other) * delta
        q = (math.sqrt(max(0.0, b * b + 8 * n * only_other * delta * (1 - delta))) - b) / (4 * n)
        spread = n * (2 * q + delta * (1 - delta))
        off = only_one - only_other - n * delta
        return off / math.sqrt(spread) if spread > 0 else math.copysign(math.inf, off)

    seen = (only_one - only_other) / n
    return _crossing(lambda d: score(d) > _Z, -1.0, seen), _crossing(lambda d: score(d) > -_Z, seen, 1.0)


def _crossing(above: Callable[[float], bool], low: float, high: float) -> float:
    """Where it ends to hold, between the two."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return high
