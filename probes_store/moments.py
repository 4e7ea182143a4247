"""Moments of rows of features: their number, mean and scatter, in one pass, exact to merge and to take apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """n: rows, or their weight; mean: (d,); scatter: (d, d), the sum of (x - mean)(x - mean)^T; float64"""

    n: float
    mean: Array
    scatter: Array

    @classmethod
    def none(cls, d: int) -> Moments:
        return cls(0.0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, x: npt.NDArray[Any]) -> Moments:
        """x: (n, d), any float dtype, n >= 1"""
        rows = np.asarray(x, dtype=np.float64)
        mean = rows.mean(axis=0)
        apart = rows - mean
        return cls(float(len(rows)), mean, apart.T @ apart)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows (Chan, Golub and LeVeque 1979)."""
        n = self.n + other.n
        if n == 0:
            return self
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), self.scatter + other.scatter + between)

    def __sub__(self, part: Moments) -> Moments:
        """Of the rows that are left without `part`; raises: ValueError if there are not so many rows."""
        n = self.n - part.n
        if n < 0:
            raise ValueError(f"{part.n:g} rows can't be taken out of {self.n:g}")
        if n == 0:
            return Moments.none(len(self.mean))
        apart = (part.mean - self.mean) * (self.n / n)  # to the mean of what is left
        between = np.outer(apart, apart) * (n * part.n / self.n)
        return Moments(n, part.mean - apart, self.scatter - part.scatter - between)

    def times(self, weight: float) -> Moments:
        """Every row weighs so much."""
        return Moments(self.n * weight, self.mean, self.scatter * weight)
