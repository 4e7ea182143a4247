"""What a probe must beat, on the same rows: length, shuffled labels, block 0, random directions; and every block.

All of them are one ridge regression on averaged features, fitted to a sample of the probe's own training rows, so that
they differ in one thing each. Nothing here looks at an evaluation set before the weights are fixed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data import Row, sample
from training.fit import Scaler, balanced
from training.metrics import Array

FIT_ROWS = 1000
PENALTY = 0.3
"""Beside a loss that is the mean over rows, on standardised features; fixed beforehand, about what the shipped C is."""
SHUFFLES = 100
DIRECTIONS = 1000
INSIDE = (0.45, 0.55)
"""Where the mean AUROC of probes that were fitted to shuffled labels must lie, or the evaluation leaks."""
_FOLDS = 5
Features = Mapping[int, npt.NDArray[np.float32]]


def fit_sample(rows: Sequence[Row]) -> list[Row]:
    """Whole groups, at most FIT_ROWS."""
    return sample(rows, FIT_ROWS, seed=0)


def ridge(x: Array, targets: Array, weights: Array, penalty: float = PENALTY) -> Array:
    """(d, k) weights of k targets on standardised features; there is no intercept, which no ranking needs.

    x: (n, d); targets: (n, k), about -1 and 1; weights: (n,) of rows, positive
    """
    share = weights / weights.sum()
    scaled = x * np.sqrt(share)[:, None]
    wanted = targets * np.sqrt(share)[:, None]
    if len(x) < x.shape[1]:  # several blocks side by side: the smaller of the two systems
        dual: Array = scaled.T @ np.linalg.solve(scaled @ scaled.T + penalty * np.eye(len(x)), wanted)
        return dual
    primal: Array = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(x.shape[1]), scaled.T @ wanted)
    return primal


def aurocs(values: Array, labels: npt.NDArray[np.int64]) -> Array:
    """(k,): AUROC of each column of values (n, k); ties count half"""
    from scipy.stats import rankdata

    harmful = int(labels.sum())
    ranks = rankdata(values, axis=0)[labels == 1].sum(0)
    area: Array = (ranks - harmful * (harmful + 1) / 2) / (harmful * (len(labels) - harmful))
    return area


class Controls:
    """Fitted once, asked about every set. fit: features of the sample at block 0 and at the probe's blocks"""

    def __init__(self, rows: Sequence[Row], fit: Features, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        labels = np.array([r.label for r in rows])
        weights = balanced(labels, np.array([r.weight for r in rows]))
        targets = 2.0 * labels[:, None] - 1
        x, first = beside(fit, self.layers), beside(fit, [0])
        self._scaler, self._first = Scaler.fit(x), Scaler.fit(first)
        x, first = self._scaler(x), self._first(first)
        self._same, self._block_0 = ridge(x, targets, weights), ridge(first, targets, weights)
        random = np.random.default_rng(0)
        shuffled = np.stack([random.permutation(labels) for _ in range(SHUFFLES)], axis=1)
        # Rows weigh the same here: weights that are balanced by label would have to be shuffled with the labels.
        self._shuffled = ridge(x, 2.0 * shuffled - 1 - (2.0 * shuffled - 1).mean(0), np.ones(len(labels)))
        self._directions = random.standard_normal((x.shape[1], DIRECTIONS))
        found = aurocs(x @ self._directions, labels)
        self._directions *= np.where(found < 0.5, -1.0, 1.0)  # the sign, and the best one, by the training rows
        self._best = int(np.maximum(found, 1 - found).argmax())

    def figures(self, features: Features, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
        """AUROCs on the rows of one set, of both labels."""
        x, first = self._scaler(beside(features, self.layers)), self._first(beside(features, [0]))
        shuffled, random = aurocs(x @ self._shuffled, labels), aurocs(x @ self._directions, labels)
        low, high = np.percentile(shuffled, [2.5, 97.5]).tolist()
        return {
            "same_blocks": float(aurocs(x @ self._same, labels)[0]),
            "block_0": float(aurocs(first @ self._block_0, labels)[0]),
            "shuffled": {"value": float(shuffled.mean()), "low": low, "high": high, "n": SHUFFLES},
            "random": float(random.mean()),
            "best_random": float(random[self._best]),
        }


def beside(features: Features, layers: Sequence[int]) -> Array:
    """(n, d * layers) float64"""
    return np.concatenate([features[layer] for layer in layers], axis=1).astype(np.float64)


def sweep(rows: Sequence[Row], features: Features) -> dict[str, list[float | None]]:
    """AUROC of the same ridge at each block, on training rows only: for sources and for rows that it was not fitted to.

    sources: mean over folds of whole keys (data sets) of each label; None if there are too few of them
    """
    labels = np.array([r.label for r in rows])
    weights = balanced(labels, np.array([r.weight for r in rows]))
    splits = {"sources": _by_key(rows), "rows": _by_group(rows)}
    found: dict[str, list[float | None]] = {name: [] for name in splits}
    for layer in sorted(features):
        x = Scaler.fit(raw := features[layer].astype(np.float64))(raw)
        for name, folds in splits.items():
            areas = [_held_out(x, labels, weights, folds == fold) for fold in range(_FOLDS)]
            known = [area for area in areas if area is not None]
            found[name].append(float(np.mean(known)) if known else None)
    return found


def _held_out(x: Array, labels: npt.NDArray[np.int64], weights: Array, out: npt.NDArray[np.bool_]) -> float | None:
    if not 0 < labels[out].sum() < out.sum() or not 0 < labels[~out].sum() < (~out).sum():
        return None
    targets = (2 * labels[~out, None] - 1).astype(np.float64)
    direction = ridge(x[~out], targets, weights[~out])
    return float(aurocs(x[out] @ direction, labels[out])[0])


def _by_key(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Whole sources; those of one kind are dealt out in turn, the largest first, so that a fold has both labels."""
    keys, labels = [r.key or r.source for r in rows], defaultdict[str, set[int]](set)
    for key, row in zip(keys, rows, strict=True):
        labels[key].add(row.label)
    counts, place = Counter(keys), dict[str, int]()
    for kind in ({0}, {1}, {0, 1}):
        ranked = sorted((k for k in counts if labels[k] == kind), key=lambda k: (-counts[k], k))
        place |= {k: i % _FOLDS for i, k in enumerate(ranked)}
    return np.array([place[k] for k in keys])


def _by_group(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    groups = sorted({r.group for r in rows})
    place = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % _FOLDS, strict=True))
    return np.array([int(place[r.group]) for r in rows])
