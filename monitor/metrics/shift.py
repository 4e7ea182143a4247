"""Shift: does the mean of live activations still lie where a probe's harmless training rows lay?

The squared Mahalanobis distance between the two means, times n, over what sampling alone makes of it: then 1 is what
harmless traffic like the training rows gives, whatever the width of the stream. It grows with n where the means differ:
it says that traffic is another one, not by how much. Only the uniform slice of the feature log is looked at, whose
sequences all had the same chance: so nothing needs a weight, and what was flagged is in it with its own share.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.types import Phase
from probes_store.moments import Moments

WINDOW = 1000
ENOUGH = 50
"""Sequences before anything is said."""
_RANK = 64
_LEAST = 100  # rows of a reference
_ROUNDS = 12

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Normal:
    """Mean and covariance of n rows: the directions that vary most as they are, every other one alike (Tipping and
    Bishop 1999), so that fewer rows than dimensions do.

    axes: (d, rank) orthonormal; variances: (rank,); rest: the variance of each other direction, 0 if there is none
    """

    n: float
    mean: Array
    axes: Array
    variances: Array
    rest: float

    @classmethod
    def of(cls, moments: Moments) -> Normal | None:
        """None of too few rows, or of rows that don't vary."""
        d, n = len(moments.mean), moments.n
        covariance = moments.scatter / max(n - 1, 1)
        if n < _LEAST or not np.trace(covariance) > 0:
            return None
        rank = min(_RANK, d, int(n // 10))
        axes, variances = _largest(covariance, rank)
        rest = float(np.trace(covariance) - variances.sum()) / (d - rank) if d > rank else 0.0
        if variances[-1] <= 0 or (d > rank and rest <= 0):
            return None
        return cls(n, moments.mean, axes, variances, rest)

    def distance(self, mean: Array, n: int) -> float:
        """Of the mean of n rows, over what it is on average for n rows of this distribution; about 1 for such."""
        apart = mean - self.mean
        along = self.axes.T @ apart
        squared = float((along**2 / self.variances).sum())
        if self.rest:
            squared += max(0.0, float(apart @ apart) - float(along @ along)) / self.rest
        # The reference's own mean is one of a sample too.
        return squared / (len(apart) * (1 / n + 1 / self.n))


def _largest(covariance: Array, rank: int) -> tuple[Array, Array]:
    """The directions that vary most, and their variances, ascending: by iterating a subspace, since all of them would
    take a minute at the width of a large model."""
    block = np.random.default_rng(0).normal(size=(len(covariance), min(len(covariance), rank + 8)))
    for _ in range(_ROUNDS):
        block, _r = np.linalg.qr(covariance @ block)
    values, turned = np.linalg.eigh(block.T @ covariance @ block)
    return (block @ turned)[:, -rank:], values[-rank:]


class _Window:
    """The newest vectors of a phase and layer, and their sum."""

    def __init__(self, width: int) -> None:
        self.rows: deque[Vectors] = deque()
        self.sum = np.zeros(width)

    def add(self, row: Vectors) -> None:
        self.rows.append(row)
        self.sum += row
        if len(self.rows) > WINDOW:
            self.sum -= self.rows.popleft()


class Shift:
    """`add` every vector of the uniform slice, `show` when somebody looks; from any thread. References per probe and
    phase, by layer; of several layers the mean of their distances is shown.

    watched: vectors will come, so references are worth their loading
    """

    def __init__(self) -> None:
        self.watched = False
        self._references: dict[tuple[str, Phase], dict[int, Normal]] = {}
        self._windows: dict[tuple[Phase, int], _Window] = {}
        self._lock = threading.Lock()

    def expect(self, references: Mapping[tuple[str, Phase], Mapping[int, Normal]]) -> None:
        """Compare with these from now on. What was seen so far stays: it is of the model, not of a probe."""
        with self._lock:
            self._references = {key: dict(of_layers) for key, of_layers in references.items()}

    def add(self, phase: Phase, layers: Sequence[int], vectors: Vectors) -> None:
        """vectors: (len(layers), d_model), finite"""
        with self._lock:
            for layer, row in zip(layers, vectors, strict=True):
                window = self._windows.get((phase, layer))
                if window is None or len(window.sum) != len(row):
                    window = self._windows[phase, layer] = _Window(len(row))
                window.add(row)

    def show(self, metrics: Any) -> None:
        """Set the gauge; nothing is said of fewer than ENOUGH sequences."""
        with self._lock:
            for (probe, phase), of_layers in self._references.items():
                found = [self._distance(phase, layer, normal) for layer, normal in of_layers.items()]
                known = [distance for distance in found if distance is not None]
                if known and len(known) == len(of_layers):
                    metrics.drift_mahalanobis_ratio.labels(probe, phase).set(sum(known) / len(known))

    def _distance(self, phase: Phase, layer: int, normal: Normal) -> float | None:
        window = self._windows.get((phase, layer))
        if window is None or len(window.rows) < ENOUGH or len(window.sum) != len(normal.mean):
            return None
        n = len(window.rows)
        return normal.distance(window.sum / n, n)
