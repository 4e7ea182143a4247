"""Logistic regression of all layers at once: scikit-learn's optimum, by preconditioned conjugate gradients in torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.fit import Array, Fitted, Scaler, balanced

_STEPS, _NEAR = 12, 0.01
"""Of a line search: at most, and what part of the slope at its start may be left."""
_ROWS_PER_FEATURE, _PART = 4, 512
_FACTOR_AT = (0, 2, 5)
"""Iterations. Labels that become certain flatten the loss fast at first: 12 iterations in place of 20."""
_TINY = torch.finfo(torch.float64).tiny


def fit_logistic_layers(
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.int64],
    weights: Array,
    c: float,
    tolerance: float = 1e-5,
    limit: int = 200,
    dtype: torch.dtype = torch.float32,
    block_bytes: int = 128 << 20,
) -> list[Fitted]:
    """One fit for each layer: what `fit_logistic` gives, on the same standardised features and class weights.

    x: (n, n_layers, d), any float dtype; y: (n,), 0 or 1; c: inverse strength of the penalty
    tolerance: on the largest entry of the gradient of the mean loss; limit: of iterations, `converged` says 0 beyond
    dtype: of the products with the features; sums over rows and parameters are float64
    block_bytes: of features that are held standardised at once, at least one layer
    returns: the same bytes for the same data, number of threads and machine
    raises: ValueError for other shapes, a feature that is not finite, or if one class is missing
    """
    n, n_layers, d = x.shape
    if y.shape != (n,) or weights.shape != (n,):
        raise ValueError(f"features {x.shape}, labels {y.shape} and weights {weights.shape} don't fit")
    rows = torch.from_numpy(balanced(y, weights))
    labels = torch.from_numpy(y.astype(np.float64))
    at_once = max(1, block_bytes // (n * d * dtype.itemsize))
    memory, fits = torch.empty(min(at_once, n_layers), n, d, dtype=dtype), []
    for start in range(0, n_layers, at_once):
        layers = range(start, min(start + at_once, n_layers))
        block = memory[: len(layers)]
        scalers = [_standardise(x[:, layer], block[i]) for i, layer in enumerate(layers)]
        theta, steps, found = _Solver(block, labels, rows, 1 / c).solve(tolerance, limit)
        for i, layer in enumerate(layers):
            weight, bias = scalers[i].fold(theta[i, :d].numpy(), float(theta[i, d]))
            details = {"C": c, "layer": layer, "iterations": int(steps[i]), "converged": int(found[i])}
            fits.append(Fitted("logistic_regression", weight, bias, details))
    return fits


def _standardise(x: npt.NDArray[np.floating], out: Tensor) -> Scaler:
    """As `Scaler.fit`, into `out`: (n, d)."""
    np.copyto(out.numpy(), x, casting="same_kind")
    mean = out.mean(0)
    out.sub_(mean)
    # Part by part, in the cache: the squares of the whole take longer than all else here.
    square = sum((out[i : i + _PART].square().sum(0) for i in range(0, len(out), _PART)), torch.zeros_like(mean))
    deviation = (square / len(out)).sqrt().double().numpy()
    if not np.isfinite(deviation).all():
        raise ValueError("a feature is not finite")
    middle = mean.double().numpy()
    size = np.abs(middle) + deviation
    # A constant feature may keep a deviation of rounding; of its own rounding, far below another's massive one.
    constant = deviation < np.maximum(1e-8 * max(1.0, float(size.max())), 4 * torch.finfo(out.dtype).eps * size)
    floor = 0.01 * float(np.median(deviation))
    scaler = Scaler(middle, np.where(constant, 1.0, np.sqrt(deviation**2 + floor**2)))
    out.div_(torch.from_numpy(scaler.scale).to(out))
    return scaler


class _Solver:
    """Minimise, for each of B layers, sum_i w_i log(1 + exp(-s_i z_i)) + penalty/2 |theta|^2, the bias unpenalised.

    x: (B, n, d); labels, weights: (n,) float64; theta: (B, d + 1), the bias last
    """

    def __init__(self, x: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> None:
        self.x, self.labels, self.weights = x, labels, weights
        self.n, self.d = x.shape[1:]
        self.penalty = torch.full((self.d + 1,), penalty, dtype=torch.float64)
        self.penalty[-1] = 0.0
        self.outer = self._products()

    def _products(self) -> Tensor:
        """(B, d + 1, d + 1): weighted sums of products of features, from every k-th row; only the gradient is exact."""
        stride = max(1, self.n // (_ROWS_PER_FEATURE * (self.d + 1)))
        some, weights = self.x[:, ::stride], self.weights[::stride]
        weights = weights * (self.weights.sum() / weights.sum())
        scaled = some * weights.to(some).sqrt()[:, None]
        outer = torch.zeros(len(some), self.d + 1, self.d + 1, dtype=some.dtype)
        outer[:, :-1, :-1] = scaled.mT @ scaled
        outer[:, -1, :-1] = outer[:, :-1, -1] = some.mT @ weights.to(some)
        outer[:, -1, -1] = weights.sum()
        return outer

    def _factor(self, z: Tensor) -> Tensor:
        """Cholesky factor of about the Hessian at these logits: p (1 - p) is replaced by its mean over rows."""
        p = torch.sigmoid(z)
        bend = (self.weights * p * (1 - p)).sum(1) / self.weights.sum()
        hessian = self.outer * bend.to(self.outer)[:, None, None]
        hessian.diagonal(dim1=1, dim2=2).add_((self.penalty + 1e-4 * self.n * bend[:, None]).to(hessian))
        factor: Tensor = torch.linalg.cholesky(hessian)
        return factor

    def _logits(self, theta: Tensor) -> Tensor:
        """(B, n) float64"""
        # One by one: a batched product with a vector is several times slower.
        product = torch.stack([torch.mv(x, t) for x, t in zip(self.x, theta[:, :-1].to(self.x), strict=True)])
        return product.double() + theta[:, -1:]

    def _gradient(self, z: Tensor, theta: Tensor) -> Tensor:
        """(B, d + 1) float64"""
        residual = self.weights * (torch.sigmoid(z) - self.labels)
        slope = (residual[:, None].to(self.x) @ self.x)[:, 0].double()
        return torch.cat([slope, residual.sum(1, keepdim=True)], 1) + self.penalty * theta

    def _length(self, z: Tensor, along: Tensor, theta: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
        """(B, 1): how far to go along a direction, by Newton on the one-dimensional loss, kept inside a bracket."""
        low, high = torch.zeros(len(z), 1, dtype=torch.float64), torch.full((len(z), 1), torch.inf, dtype=torch.float64)
        length = torch.ones_like(low)
        curve = (self.penalty * step * step).sum(1, keepdim=True)
        steep = (gradient * step).sum(1, keepdim=True)
        start = (self.penalty * step * theta).sum(1, keepdim=True)
        for _ in range(_STEPS):
            p = torch.sigmoid(z + length * along)
            slope = (self.weights * (p - self.labels) * along).sum(1, keepdim=True) + start + length * curve
            bend = (self.weights * p * (1 - p) * along**2).sum(1, keepdim=True) + curve
            low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
            if bool((slope.abs() <= _NEAR * steep.abs()).all()):
                break
            newton = length - slope / bend.clamp_min(_TINY)
            outside = torch.where(high.isinf(), 2 * low, (low + high) / 2)
            length = torch.where((newton > low) & (newton < high) & (newton < 10 * length), newton, outside)
        return length

    def solve(self, tolerance: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """theta, and for each layer the iterations it took and whether it converged."""
        theta, z = torch.zeros(len(self.x), self.d + 1).double(), torch.zeros(len(self.x), self.n).double()
        step, before, steepness = torch.zeros_like(theta), torch.zeros_like(theta), torch.ones_like(theta[:, :1])
        gradient, steps = self._gradient(z, theta), torch.zeros(len(self.x), dtype=torch.int64)
        for iteration in range(limit):
            left = gradient.abs().amax(1) > tolerance * self.n
            if not bool(left.any()):
                break
            if iteration in _FACTOR_AT:
                factor = self._factor(z)
                before = gradient  # directions of another factor are not conjugate: start again
            steps += left
            down = torch.cholesky_solve(gradient[..., None].to(self.x), factor)[..., 0].double()
            # Polak and Ribiere; a negative one starts again from the steepest descent.
            beta = ((gradient - before) * down).sum(1, keepdim=True).clamp_min(0) / steepness
            step = -down + beta * step
            before, steepness = gradient, (gradient * down).sum(1, keepdim=True).clamp_min(_TINY)
            step = torch.where((step * gradient).sum(1, keepdim=True) < 0, step, -down)
            step = step * left[:, None]  # a layer that has converged stays where it is
            along = self._logits(step)
            length = torch.where(left[:, None], self._length(z, along, theta, step, gradient), 0.0)
            theta, z = theta + length * step, z + length * along
            gradient = self._gradient(z, theta)
        return theta, steps, gradient.abs().amax(1) <= tolerance * self.n
