"""Fits in closed form, from statistics alone: difference of means, LDA, and ridge over a path of penalties.

Both classes weigh the same in all of them, as in `training.fit`. Same statistics, same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from monitor.errors import ConfigInvalid
from probes_store.moments import Moments
from training.fit import Array, Fitted, Scaler
from training.statistics import Statistics

PENALTIES = tuple(float(p) for p in np.logspace(-4, 3, 50))
Weights = Mapping[str, float]
"""Of each row of a source; 1 for a source that is not named."""


def difference_of_means(statistics: Statistics, layer: int, weights: Weights | None = None) -> Fitted:
    """From the harmless mean to the harmful one; the boundary half-way.

    raises: ConfigInvalid if the layer or one class is missing, here and below
    """
    harmless, harmful = _classes(statistics, layer, weights)
    weight = harmful.mean - harmless.mean
    bias = -float(weight @ (harmful.mean + harmless.mean)) / 2
    return Fitted("difference_of_means", weight, bias, {"layer": layer})


def lda(statistics: Statistics, layer: int, shrinkage: float | None = None, weights: Weights | None = None) -> Fitted:
    """Linear discriminant on standardised features, with the covariance within classes shrunk to its mean variance.

    shrinkage: 0 (none) to 1 (a multiple of the identity); None: oracle approximating shrinkage (Chen 2010), which like
    Ledoit and Wolf's is estimated, but needs no fourth moments
    raises: ConfigInvalid also if the shrunk covariance is singular
    """
    harmless, harmful = _classes(statistics, layer, weights)
    scaler = _scaler(harmless + harmful)
    within = (harmless.scatter + harmful.scatter) / (harmless.n + harmful.n) / np.outer(scaler.scale, scaler.scale)
    if shrinkage is None:
        rows = sum(m.n for cell, m in statistics.cells.items() if cell.layer == layer)
        shrinkage = oracle_shrinkage(within, rows)
    d = len(within)
    shrunk = (1 - shrinkage) * within + shrinkage * (within.trace() / d) * np.eye(d)
    apart = (harmful.mean - harmless.mean) / scaler.scale
    try:
        factor = np.linalg.cholesky(shrunk)
    except np.linalg.LinAlgError as error:
        raise ConfigInvalid(f"layer {layer}: singular covariance; take a shrinkage above {shrinkage:g}") from error
    weight = np.linalg.solve(factor.T, np.linalg.solve(factor, apart))
    middle = (harmful.mean + harmless.mean) / 2
    folded, bias = Scaler(middle, scaler.scale).fold(weight, 0.0)
    return Fitted("lda", folded, bias, {"layer": layer, "shrinkage": round(shrinkage, 6)})


def oracle_shrinkage(covariance: Array, n: float) -> float:
    """In [0, 1], for the covariance of n rows that are about Gaussian."""
    d = len(covariance)
    mean_square, square_mean = float((covariance**2).mean()), float(covariance.trace() / d) ** 2
    below = (n + 1) * (mean_square - square_mean / d)
    return 1.0 if below <= 0 else min(1.0, (mean_square + square_mean) / below)


@dataclass(frozen=True, slots=True)
class RidgePath:
    """penalties: (P,); weight: (P, d) and bias: (P,) on raw features, for targets -1 (harmless) and 1 (harmful)"""

    layer: int
    penalties: Array
    weight: Array
    bias: Array

    def values(self, x: Array) -> Array:
        """(n, d) -> (n, P), > 0 leans harmful"""
        return x @ self.weight.T + self.bias

    def fitted(self, index: int) -> Fitted:
        details = {"layer": self.layer, "penalty": float(self.penalties[index])}
        return Fitted("ridge", self.weight[index], float(self.bias[index]), details)


def ridge_path(
    statistics: Statistics, layer: int, penalties: Sequence[float] = PENALTIES, weights: Weights | None = None
) -> RidgePath:
    """Least squares on standardised features, all penalties from one eigendecomposition.

    penalties: above 0, each beside a loss that is the mean over rows; the intercept has none
    raises: ValueError for another penalty
    """
    strength = np.asarray(penalties, dtype=np.float64)
    if not (strength > 0).all():
        raise ValueError("a penalty must be above 0")
    harmless, harmful = _classes(statistics, layer, weights)
    whole = harmless + harmful
    scaler = _scaler(whole)
    values, vectors = np.linalg.eigh(whole.scatter / whole.n / np.outer(scaler.scale, scaler.scale))
    # With classes that weigh the same, the covariance of features and targets is half the distance of the means.
    along = vectors.T @ ((harmful.mean - harmless.mean) / 2 / scaler.scale)
    weight = (along / (np.maximum(values, 0.0) + strength[:, None])) @ vectors.T / scaler.scale
    return RidgePath(layer, strength, weight, -weight @ whole.mean)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A path fitted without one source, and what it says of that source's rows.

    rows, mean, deviation: by label, of those rows' values; the last two (P,)
    """

    path: RidgePath
    rows: dict[int, float]
    mean: dict[int, Array]
    deviation: dict[int, Array]

    def squared_error(self) -> Array:
        """(P,): the mean over the source's rows, from their targets -1 and 1."""
        error = sum(n * ((self.mean[k] - (2 * k - 1)) ** 2 + self.deviation[k] ** 2) for k, n in self.rows.items())
        return np.asarray(error / sum(self.rows.values()))


def ridge_left_out(
    statistics: Statistics, layer: int, penalties: Sequence[float] = PENALTIES, weights: Weights | None = None
) -> dict[str, LeftOut]:
    """Exact leave-one-source-out: for each source the path without it, by taking its cells out of the sums.

    raises: ConfigInvalid if without a source a class is missing
    """
    out = {}
    for source in statistics.sources:
        try:
            path = ridge_path(statistics.without(source), layer, penalties, weights)
        except ConfigInvalid as error:
            raise ConfigInvalid(f"source {source!r} can't be left out: {error}") from error
        found = {c.label: m for c, m in statistics.cells.items() if c.layer == layer and c.source == source}
        variance = {k: np.einsum("pd,de,pe->p", path.weight, m.scatter, path.weight) / m.n for k, m in found.items()}
        out[source] = LeftOut(
            path,
            {label: m.n for label, m in found.items()},
            {label: path.values(m.mean[None])[0] for label, m in found.items()},
            {label: np.sqrt(np.maximum(v, 0.0)) for label, v in variance.items()},
        )
    return out


def _classes(statistics: Statistics, layer: int, weights: Weights | None) -> tuple[Moments, Moments]:
    """Harmless and harmful, each weighing 1."""
    both = statistics.pooled(layer, 0, weights), statistics.pooled(layer, 1, weights)
    for label, moments in enumerate(both):
        if moments.n <= 0:
            raise ConfigInvalid(f"the statistics have no row of label {label} at layer {layer}; add a source that has")
    return both[0].times(1 / both[0].n), both[1].times(1 / both[1].n)


def _scaler(whole: Moments) -> Scaler:
    """As `Scaler.fit` on the rows: constant features keep scale 1."""
    deviation = np.sqrt(np.maximum(whole.scatter.diagonal(), 0.0) / whole.n)
    floor = 0.01 * float(np.median(deviation))
    constant = deviation < 1e-8 * max(1.0, float(np.abs(whole.mean).max()))
    return Scaler(whole.mean, np.where(constant, 1.0, np.sqrt(deviation**2 + floor**2)))
