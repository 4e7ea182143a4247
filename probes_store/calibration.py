"""Calibration: benign statistics -> a threshold certified at a stated false-positive rate.

The threshold is an order statistic (PROBES 9.10): with n benign requests, the largest j with
P(Binomial(n, alpha) <= j) <= delta; the threshold is the (j + 1)-th highest benign value and a request is flagged
strictly above it, so at most j of the n were. With confidence 1 - delta the true rate is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

DELTA = 0.05
STALE_LOW, STALE_HIGH = 0.5, 2.0
"""A threshold is stale where traffic is certainly flagged at less or more than these times its certified rate."""


def binomial_cdf(j: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= j), 0 < p < 1."""
    steps = np.arange(j)
    # Each term out of the one before it, in logarithms: C(n, i + 1) / C(n, i) = (n - i) / (i + 1).
    ratios = np.log((n - steps) / (steps + 1)) + (math.log(p) - math.log1p(-p))
    terms = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(1.0, math.fsum(np.exp(terms)))


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate: hits of n, n > 0."""
    tail = (1 - confidence) / 2
    return 1 - _upper(n - hits, n, tail), _upper(hits, n, tail)


def is_stale(low: float, high: float, target: float) -> bool:
    """low, high: the interval of the rate that was seen; target: the certified one"""
    return low > STALE_HIGH * target or high < STALE_LOW * target


def _upper(hits: int, n: int, tail: float) -> float:
    """The rate at which so few hits are as unlikely as `tail`."""
    if hits == n:
        return 1.0
    low, high = hits / n, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(hits, n, middle) > tail else (low, middle)
    return high


def allowed_exceedances(n: int, alpha: float, delta: float = DELTA, at_most: int | None = None) -> int | None:
    """The largest j with P(Bin(n, alpha) <= j) <= delta; None if even j = 0 is too many (n is too small).

    at_most: stop there; a caller that can't use a larger j need not wait for it
    """
    total = math.exp(n * math.log1p(-alpha))  # P(X = 0), then term by term
    j, term = 0, n * math.log1p(-alpha)
    if total > delta:
        return None
    while j + 1 < n and (at_most is None or j < at_most):
        term += math.log((n - j) / (j + 1)) + math.log(alpha) - math.log1p(-alpha)
        total += math.exp(term)
        if total > delta:
            break
        j += 1
    return j


def rows_needed(alpha: float, delta: float = DELTA) -> int:
    """The smallest n that can certify alpha: 299 for 1 %, 598 for 0.5 %, 2,995 for 0.1 % (at 95 %)."""
    return math.ceil(math.log(delta) / math.log1p(-alpha))


class _Tail(BaseModel):
    """n: benign requests scored; tail: their highest values, descending"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(ge=1, le=10**9)
    tail: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if any(not math.isfinite(v) for v in self.tail):
            raise ValueError("tail holds a value that is not finite")
        if list(self.tail) != sorted(self.tail, reverse=True):
            raise ValueError("tail is not in descending order")
        if len(self.tail) > self.n:
            raise ValueError("tail is longer than n")
        return self

    def threshold(self, alpha: float, delta: float = DELTA) -> float:
        """Flag strictly above it: with confidence 1 - delta, at most `alpha` of requests like these are flagged.

        raises: ValueError, saying how many more benign rows are needed, or that alpha is beyond the tail
        """
        j = allowed_exceedances(self.n, alpha, delta, at_most=len(self.tail))
        if j is None:
            needed = rows_needed(alpha, delta)
            raise ValueError(
                f"{self.n} benign requests can't certify a false-positive rate of {alpha:.3%}: "
                f"{needed - self.n} more are needed ({needed} in all); calibrate it with more, or raise target_fpr"
            )
        if j >= len(self.tail):
            raise ValueError(f"the card keeps {len(self.tail)} values, too few for a rate of {alpha:.3%}; lower it")
        return self.tail[j]

    def rate(self, threshold: float, delta: float = DELTA) -> float | None:
        """The smallest rate that `threshold` is certified for, the upper end of Clopper and Pearson's interval; None if
        it lies below the values kept here."""
        above = sum(value > threshold for value in self.tail)
        if above == len(self.tail) and above < self.n:
            return None
        return _upper(above, self.n, delta)


class Bucket(_Tail):
    """Benign prompts of some lengths. up_to: tokens of the longest that belongs here, template and all"""

    up_to: int = Field(ge=1)

    def __add__(self, longer: Bucket) -> Bucket:
        """Both; of the values those that no value left out by either lies between."""
        floor = max((b.tail[-1] for b in (self, longer) if len(b.tail) < b.n), default=-math.inf)
        tail = sorted((v for v in (*self.tail, *longer.tail) if v >= floor), reverse=True)
        return Bucket(n=self.n + longer.n, tail=tuple(tail), up_to=longer.up_to)


class Calibration(_Tail):
    """The highest benign values of one phase, on the statistic that is served, per request: enough for any alpha up to
    `max_alpha`."""

    source: str
    """What the benign requests were, in words."""
    deciles: tuple[float, ...] = ()
    """The inner tenths of the benign values, ascending: what live ones are compared with. Older cards have none."""
    buckets: tuple[Bucket, ...] = ()
    """The same prompts by length, shortest first, in powers of two. Older cards and answers have none."""

    @model_validator(mode="after")
    def _ordered(self) -> Calibration:
        if self.deciles and (len(self.deciles) != 9 or list(self.deciles) != sorted(self.deciles)):
            raise ValueError("deciles must be nine values in ascending order")
        ends = [b.up_to for b in self.buckets]
        if self.buckets and (ends != sorted(set(ends)) or sum(b.n for b in self.buckets) != self.n):
            raise ValueError("buckets must ascend, and hold the n requests together")
        return self

    @classmethod
    def fit(
        cls, benign: Sequence[float], source: str, max_alpha: float = 0.1, lengths: Sequence[int] = ()
    ) -> Calibration:
        """benign: one finite value per benign request; lengths: its tokens, for thresholds by length"""
        if not all(math.isfinite(v) for v in benign):
            raise ValueError("a benign value is not finite; leave requests without a value out, and say so")
        if lengths and len(lengths) != len(benign):
            raise ValueError(f"{len(benign)} values and {len(lengths)} lengths don't belong together")
        deciles = np.quantile(benign, np.arange(1, 10) / 10).tolist() if benign else ()
        powers = [max(0, math.ceil(math.log2(n))) for n in lengths]
        buckets = []
        for power in sorted(set(powers)):
            values = [v for v, p in zip(benign, powers, strict=True) if p == power]
            buckets.append(Bucket(n=len(values), tail=_highest(values, max_alpha), up_to=2**power))
        tail = _highest(benign, max_alpha)
        return cls(n=len(benign), tail=tail, source=source, deciles=deciles, buckets=tuple(buckets))

    def between(self, shorter: int, up_to: int) -> Bucket:
        """The prompts of more than `shorter` and at most `up_to` tokens. raises: ValueError if there are none"""
        found = [b for b in self.buckets if shorter < b.up_to <= up_to]
        if not found:
            raise ValueError(f"no benign request has more than {shorter} and at most {up_to} tokens")
        return reduce(add, found)

    def by_length(self, alpha: float, delta: float = DELTA) -> tuple[tuple[int, float], ...]:
        """(tokens up to which it holds, threshold) by length, shortest first: each certified by prompts of its lengths
        alone (Mondrian). Buckets with too few rows for that are joined with the next longer ones, the last ones with
        what comes before. Longer prompts than any here are nothing that a row says something about.

        raises: ValueError as `threshold`, or if the card does not know the lengths
        """
        if not self.buckets:
            raise ValueError("the card knows no lengths of its benign requests; train it again for `by_length`")
        joined: list[Bucket] = []
        whole = True  # the last of them has rows enough
        for bucket in self.buckets:
            if whole:
                joined.append(bucket)
            else:
                joined[-1] += bucket
            whole = joined[-1].n >= rows_needed(alpha, delta)
        if not whole and len(joined) > 1:
            last = joined.pop()
            joined[-1] += last
        return tuple((b.up_to, b.threshold(alpha, delta)) for b in joined)


def _highest(values: Sequence[float], max_alpha: float) -> tuple[float, ...]:
    """For the thresholds of rates up to `max_alpha`."""
    keep = max(1, math.ceil(max_alpha * len(values)) + 1)
    return tuple(sorted(values, reverse=True)[:keep])
