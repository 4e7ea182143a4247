"""Calibration: benign statistics -> a threshold certified at a stated false-positive rate.

The threshold is an order statistic (PROBES 9.10): with n benign requests, the largest j with
P(Binomial(n, alpha) <= j) <= delta; the threshold is the (j + 1)-th highest benign value and a request is flagged
strictly above it, so at most j of the n were. With confidence 1 - delta the true rate is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

DELTA = 0.05


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


class Calibration(BaseModel):
    """The highest benign values of one phase, on the statistic that is served, per request.

    n: benign requests scored; tail: their highest values, descending; enough for any alpha up to `max_alpha`
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(ge=1, le=10**9)
    tail: tuple[float, ...] = Field(min_length=1)
    source: str
    """What the benign requests were, in words."""
    deciles: tuple[float, ...] = ()
    """The inner tenths of the benign values, ascending: what live ones are compared with. Older cards have none."""

    @model_validator(mode="after")
    def _ordered(self) -> Calibration:
        if any(not math.isfinite(v) for v in self.tail):
            raise ValueError("tail holds a value that is not finite")
        if list(self.tail) != sorted(self.tail, reverse=True):
            raise ValueError("tail is not in descending order")
        if len(self.tail) > self.n:
            raise ValueError("tail is longer than n")
        if self.deciles and (len(self.deciles) != 9 or list(self.deciles) != sorted(self.deciles)):
            raise ValueError("deciles must be nine values in ascending order")
        return self

    @classmethod
    def fit(cls, benign: Sequence[float], source: str, max_alpha: float = 0.1) -> Calibration:
        """benign: one finite value per benign request."""
        if not all(math.isfinite(v) for v in benign):
            raise ValueError("a benign value is not finite; leave requests without a value out, and say so")
        keep = max(1, math.ceil(max_alpha * len(benign)) + 1)
        deciles = np.quantile(benign, np.arange(1, 10) / 10).tolist() if benign else ()
        return cls(n=len(benign), tail=tuple(sorted(benign, reverse=True)[:keep]), source=source, deciles=deciles)

    def threshold(self, alpha: float, delta: float = DELTA) -> float:
        """Flag strictly above it: with confidence 1 - delta, at most `alpha` of requests like these are flagged.

        raises: ValueError, saying how many more benign rows are needed, or that alpha is beyond the tail
        """
        j = allowed_exceedances(self.n, alpha, delta, at_most=len(self.tail))
        if j is None:
            needed = rows_needed(alpha, delta)
            raise ValueError(
                f"{self.n} benign requests can't certify a false-positive rate of {alpha:.3%}: "
                f"{needed - self.n} more are needed ({needed} in all)"
            )
        if j >= len(self.tail):
            raise ValueError(f"the card keeps {len(self.tail)} values, too few for a rate of {alpha:.3%}")
        return self.tail[j]

    def rate(self, threshold: float, delta: float = DELTA) -> float | None:
        """The smallest rate that `threshold` is certified for, the upper end of Clopper and Pearson's interval; None if
        it lies below the values kept here."""
        above = sum(value > threshold for value in self.tail)
        if above == len(self.tail) and above < self.n:
            return None
        return _upper(above, self.n, delta)
