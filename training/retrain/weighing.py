"""What a labelled row of traffic may weigh: by how it was sampled, once for near-copies, bounded for a tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.fit import Array, Scaler, balanced

CLIP = 20.0
"""Of 1/q, relative to the smallest: one rare row may not be worth more than so many others."""
COPY = 0.999
"""Cosine of two standardised features from which on one is a copy of the other."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """weights: (n,), 0 for what is left out; copies: rows that repeat an earlier one; torn: of those, rows left out
    because copies bear both labels; capped: tenants that were held to their share"""

    weights: Array
    copies: int
    torn: int
    capped: tuple[str, ...]


def weigh(
    x: Array,
    y: npt.NDArray[np.int64],
    q: Array,
    tenants: Sequence[str],
    scaler: Scaler,
    share: float,
    base_rows: float,
) -> Weighed:
    """x: (n, p) features; q: (n,) the probability that each was kept with; scaler: of the base or of other traffic

    Horvitz and Thompson's weights, clipped, with mean 1 over the rows that count, so that they are worth as much
    evidence as they are rows, and both labels alike. Then, last, no tenant weighs more than `share` of the labels; with
    fewer than twice the tenants that this takes (of two, one always has half), no more than `share` of base and labels
    together.
    """
    group, n_groups = _copies(scaler(x))
    weights, torn = np.zeros(len(y)), 0
    for g in range(n_groups):
        mine = np.flatnonzero(group == g)
        if len(set(y[mine].tolist())) > 1:
            torn += len(mine)
        else:
            weights[mine[0]] = 1 / q[mine[0]]
    counts = weights > 0
    if counts.any():
        weights[counts] = np.minimum(weights[counts], CLIP * weights[counts].min())
        weights[counts] = alike(y[counts], weights[counts])
    capped = _cap(weights, tenants, share, base_rows)
    return Weighed(weights, len(y) - n_groups, torn, capped)


def alike(y: npt.NDArray[np.int64], weights: Array) -> Array:
    """Weights with mean 1, each label's with the same sum where both are there."""
    if len(set(y.tolist())) > 1:
        return balanced(y, weights)
    return np.asarray(weights / weights.mean())


def _copies(x: Array) -> tuple[npt.NDArray[np.int64], int]:
    """The group of each row: that of the first row which it repeats."""
    unit = _unit(x)
    group = np.full(len(x), -1, dtype=np.int64)
    n = 0
    for i in range(len(x)):
        if group[i] < 0:
            later = np.flatnonzero(group < 0)
            group[later[unit[later] @ unit[i] > COPY]] = n
            group[i] = n
            n += 1
    return group, n


def _cap(weights: Array, tenants: Sequence[str], share: float, base_rows: float) -> tuple[str, ...]:
    """In place."""
    names = sorted({t for t, w in zip(tenants, weights, strict=True) if w > 0})
    which = {name: np.array([t == name for t in tenants]) for name in names}
    sums = {name: float(weights[which[name]].sum()) for name in names}
    whole = sum(sums.values())
    limit = share * (base_rows + whole) if len(names) * share < 2 else _level(list(sums.values()), share)
    over = [name for name in names if sums[name] > limit * (1 + 1e-9)]
    for name in over:
        weights[which[name]] *= limit / sums[name]
    return tuple(over)


def _level(sums: Sequence[float], share: float) -> float:
    """The largest c with c <= share x sum(min(s, c)): what each may weigh so that none has more than its share."""
    level, before = share * sum(sums), float("inf")
    while level < before * (1 - 1e-12):
        level, before = share * sum(min(s, level) for s in sums), level
    return level


def leaked(x: Array, frozen: Array, scaler: Scaler) -> npt.NDArray[np.bool_]:
    """(n,): rows that the frozen set has too; fitted on, they would flatter the candidate."""
    if not len(x) or not len(frozen):
        return np.zeros(len(x), dtype=bool)
    return np.asarray((_unit(scaler(x)) @ _unit(scaler(frozen)).T > COPY).any(axis=1))


def _unit(x: Array) -> Array:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
