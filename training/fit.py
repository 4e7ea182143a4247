"""Features and labels -> weights: LinearProbe by Adam, or logistic regression; the scaler folded into the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from monitor.probe import LinearProbe

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scaler:
    """Per-feature mean and scale of the training rows (PROBES 9.1)."""

    mean: Array
    scale: Array

    @classmethod
    def fit(cls, x: Array) -> Scaler:
        """Constant features keep scale 1: clamping them to a tiny one would amplify noise a million times."""
        deviation = x.std(axis=0)
        floor = 0.01 * float(np.median(deviation))
        constant = deviation < 1e-8 * max(1.0, float(np.abs(x).max()))
        return cls(x.mean(axis=0), np.where(constant, 1.0, np.sqrt(deviation**2 + floor**2)))

    def __call__(self, x: Array) -> Array:
        return (x - self.mean) / self.scale

    def fold(self, weight: Array, bias: float) -> tuple[Array, float]:
        """w'_i = w_i / s_i, b' = b - sum_i w_i m_i / s_i: the same logits on raw features."""
        folded = weight / self.scale
        return folded, float(bias - folded @ self.mean)


@dataclass(frozen=True, slots=True)
class Fitted:
    """weight: (d,) and bias on raw features; method and what it was fitted with, for the card"""

    method: str
    weight: Array
    bias: float
    details: dict[str, float | int]

    def logits(self, x: Array) -> Array:
        """(n,), > 0 leans harmful"""
        return x @ self.weight + self.bias


def balanced(labels: npt.NDArray[np.int64], weights: Array) -> Array:
    """Row weights with both classes summing to the same; raises: ValueError if one class is missing."""
    out = weights.astype(np.float64).copy()
    for label in (0, 1):
        total = out[labels == label].sum()
        if total <= 0:
            raise ValueError(f"no training row has label {label}")
        out[labels == label] *= 0.5 * len(labels) / total
    return out


def fit_logistic(x: Array, y: npt.NDArray[np.int64], weights: Array, c: float) -> Fitted:
    """scikit-learn's L2 logistic regression on standardised features. c: inverse strength of the penalty."""
    from sklearn.linear_model import LogisticRegression

    scaler = Scaler.fit(x)
    model = LogisticRegression(C=c, max_iter=2000)
    model.fit(scaler(x), y, sample_weight=balanced(y, weights))
    weight, bias = scaler.fold(model.coef_[0], float(model.intercept_[0]))
    return Fitted("logistic_regression", weight, bias, {"C": c, "iterations": int(model.n_iter_[0])})


def fit_platt(values: Array, labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """(slope, intercept) of the probability of label 1. Platt 1999, with his targets, which no outlier can drive to 0
    or 1: each row counts as both labels, in the shares of its target."""
    from sklearn.linear_model import LogisticRegression

    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
    target = np.where(labels == 1, high, low)
    x = np.concatenate([values, values])[:, None]
    y = np.repeat([1, 0], len(values))
    model = LogisticRegression(C=np.inf, tol=1e-8).fit(x, y, sample_weight=np.concatenate([target, 1 - target]))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def fit_torch(
    x: Array,
    y: npt.NDArray[np.int64],
    weights: Array,
    epochs: int,
    ticks: Iterable[int],
    seed: int = 0,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
) -> Fitted:
    """LinearProbe by Adam, full batch, on standardised features.

    ticks: iterated once per epoch, so that a caller can wrap it in a progress bar; at least `epochs` long
    """
    torch.manual_seed(seed)
    scaler = Scaler.fit(x)
    features = torch.from_numpy(scaler(x)).float()
    labels = torch.from_numpy(y).float()
    row_weights = torch.from_numpy(balanced(y, weights)).float()
    probe = LinearProbe(x.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    loss = torch.tensor(0.0)
    for _ in ticks:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(probe.logits(features), labels, row_weights)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    raw = probe.linear.weight.detach()[0].double().numpy(), float(probe.linear.bias.detach())
    weight, bias = scaler.fold(*raw)
    details = {
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "final_loss": round(float(loss.detach()), 5),
    }
    return Fitted("linear_probe_adam", weight, bias, details)
