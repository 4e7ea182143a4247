"""Fits that go on from a probe: logistic regression of new rows with a Gaussian prior around the weights in service.

The prior is Laplace's: its precision is about the curvature of the loss over the rows that the probe was made of, which
their moments give (`probes_store.base`). So a direction that many of them pinned down moves little, and one that they
left open is free. Same rows, same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from monitor.errors import ConfigInvalid
from probes_store.base import LABELS, Base
from probes_store.moments import Moments
from training.fit import Array, Fitted

_STEPS, _NEAR = 60, 1e-8
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)


def curvature(base: Base, layers: Sequence[int], weight: Array, bias: float, classes: Sequence[float]) -> Array:
    """(p + 1, p + 1): the Hessian of the logistic loss over the base's rows, p = layers x d, the bias last.

    weight: (p,) of the probe that was fitted to them; classes: how much each label's rows weigh together
    p (1 - p) is taken for independent of the features within a label, its mean for that of a Gaussian logit; layers are
    taken for independent within a label.
    """
    d = base.d_model
    hessian = np.zeros((len(layers) * d + 1,) * 2)
    for label in LABELS:
        own = [base.cells[layer, label] for layer in layers]
        if own[0].n <= 0:
            continue
        mean = np.concatenate([m.mean for m in own])
        second = np.outer(mean, mean)
        spread = 0.0
        for i, moments in enumerate(own):
            part, covariance = slice(i * d, (i + 1) * d), moments.scatter / moments.n
            second[part, part] += covariance
            spread += float(weight[part] @ covariance @ weight[part])
        bend = _mean_bend(float(weight @ mean) + bias, max(spread, 0.0) ** 0.5) * classes[label]
        hessian[:-1, :-1] += bend * second
        hessian[-1, :-1] += bend * mean
        hessian[:-1, -1] += bend * mean
        hessian[-1, -1] += bend
    return hessian


def _mean_bend(mean: float, deviation: float) -> float:
    """E[p (1 - p)] of a Gaussian logit."""
    p = 1 / (1 + np.exp(-np.clip(mean + deviation * _NODES, -60, 60)))
    return float((_WEIGHTS * p * (1 - p)).sum() / _WEIGHTS.sum())


def from_moments(layers: Sequence[int], rows: Sequence[Moments], n: float) -> Base:
    """A base of traffic in place of one that a card does not have. rows: by layer; n: how many they count for"""
    none = Moments.none(len(rows[0].mean))
    half = [m.times(n / 2 / m.n) for m in rows]
    cells = {(layer, label): m for label in LABELS for layer, m in zip(layers, half, strict=True)}
    return Base(len(none.mean), cells)


def discriminant(base: Base, layers: Sequence[int]) -> tuple[Array, float]:
    """(weight, bias) of a linear discriminant, layers side by side and taken for independent: a start where the weights
    in service are of another form. Both labels have rows."""
    weights, bias = [], 0.0
    for layer in layers:
        harmless, harmful = (base.cells[layer, label] for label in LABELS)
        within = (harmless.scatter + harmful.scatter) / (harmless.n + harmful.n)
        within += 0.1 * np.diag(within.diagonal() + 1e-12)
        weight = np.linalg.solve(within, harmful.mean - harmless.mean)
        weights.append(weight)
        bias -= float(weight @ (harmful.mean + harmless.mean)) / 2
    return np.concatenate(weights), bias


def fit_posterior(
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.int64],
    weights: Array,
    prior: tuple[Array, float],
    precision: Array,
) -> Fitted:
    """The mode, by Newton's method with halved steps. x: (n, p); prior: weight (p,) and bias; precision: (p + 1, p + 1)

    weights: of the rows. raises: ConfigInvalid if it does not converge, or the precision is singular
    """
    rows = np.concatenate([np.asarray(x, np.float64), np.ones((len(x), 1))], axis=1)
    centre = np.append(prior[0], prior[1])
    theta = centre.copy()
    # A little of each feature's own scale, so that a direction which the base has never seen stays put.
    precision = precision + np.diag(1e-6 * precision.diagonal() + 1e-12)
    loss = _loss(rows, y, weights, theta, centre, precision)
    for step in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(rows @ theta, -60, 60)))
        gradient = rows.T @ (weights * (p - y)) + precision @ (theta - centre)
        hessian = (rows * (weights * p * (1 - p))[:, None]).T @ rows + precision
        try:
            factor = np.linalg.cholesky(hessian)
        except np.linalg.LinAlgError as error:
            raise ConfigInvalid(
                "the base of the probe gives no precision to go on from; train it again with midstream train"
            ) from error
        move = np.linalg.solve(factor.T, np.linalg.solve(factor, gradient))
        if float(gradient @ move) < _NEAR * max(1.0, loss):
            details: dict[str, float | int] = {"iterations": step, "rows": len(x)}
            return Fitted("laplace_posterior", theta[:-1], float(theta[-1]), details)
        length = 1.0
        while (new := _loss(rows, y, weights, theta - length * move, centre, precision)) > loss and length > 1e-6:
            length /= 2
        theta, loss = theta - length * move, new
    raise ConfigInvalid(f"the fit did not converge in {_STEPS} steps: look at the labels, or train it anew")


def _loss(
    rows: Array, y: npt.NDArray[np.int64], weights: Array, theta: Array, centre: Array, precision: Array
) -> float:
    z = np.where(y == 1, -1.0, 1.0) * (rows @ theta)
    apart = theta - centre
    return float((weights * np.logaddexp(0, z)).sum() + apart @ precision @ apart / 2)
