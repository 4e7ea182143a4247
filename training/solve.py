"""The fit that a recipe asks for: labelled rows of features -> one direction, by any of the families.

Difference of means, LDA and ridge are made of one-pass statistics; so a key (a data set) is left out by taking its
cells away, and ridge has its whole path of penalties from one eigendecomposition each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from training.families import PENALTIES, Weights, difference_of_means, lda, ridge_path
from training.fit import Array, Fitted, fit_torch
from training.left_out import Labels, Mask, Ranked, best, left_out, ranked
from training.logistic import fit_logistic_layers
from training.recipe import ClosedForm, Recipe
from training.statistics import Statistics

CLOSED: tuple[ClosedForm, ...] = ("difference_of_means", "lda", "ridge")
_ONLY = 0  # the one layer of statistics whose features are those of several layers side by side


@dataclass(frozen=True)
class Rows:
    """x: (n, d) float64; labels: (n,), 0 or 1; weights: (n,) of rows; keys: n data sets that they come from"""

    x: npt.NDArray[np.floating]
    labels: Labels
    weights: Array
    keys: Sequence[str]

    @cached_property
    def statistics(self) -> tuple[Statistics, Weights, dict[str, list[str]]]:
        """Moments by key and weight, the weight of each such source, and the sources of each key."""
        # Rows of a key weigh differently by label, and where two sources of a recipe share it.
        sources = [f"{key}\0{weight!r}" for key, weight in zip(self.keys, self.weights.tolist(), strict=True)]
        found = Statistics(self.x.shape[1], {})
        found.add(self.x[:, None], [_ONLY], self.labels, sources)
        of: dict[str, list[str]] = {}
        for key, source in sorted(set(zip(self.keys, sources, strict=True))):
            of.setdefault(key, []).append(source)
        return found, dict(zip(sources, self.weights.tolist(), strict=True)), of


def candidates(recipe: Recipe, rows: Rows, epochs: Callable[[int], Iterable[int]] = range) -> list[Fitted]:
    """One fit, or the two of `best`. epochs: gives those of LinearProbe, so that a caller can show them

    raises: ValueError if one label is missing; Unsupported if ridge's penalty can't be chosen
    """
    found = []
    if recipe.solver in ("best", "logistic"):
        x = rows.x[:, None]
        found += fit_logistic_layers(x, rows.labels, rows.weights, recipe.c, dtype=torch.float64)
    if recipe.solver in ("best", "adam"):
        n = recipe.epochs
        found.append(fit_torch(np.asarray(rows.x), rows.labels, rows.weights, n, epochs(n), recipe.seed))
    if recipe.solver in CLOSED:
        found.append(_closed(recipe, rows))
    return found


def _closed(recipe: Recipe, rows: Rows) -> Fitted:
    statistics, weights, _ = rows.statistics
    if recipe.solver == "ridge":
        if recipe.penalty is not None:
            return ridge_path(statistics, _ONLY, [recipe.penalty], weights).fitted(0)
        index, figures = choose_penalty(rows)
        fitted = ridge_path(statistics, _ONLY, PENALTIES, weights).fitted(index)
        told = {"left_out_recall": round(figures.recall, 4), "left_out_auroc": round(figures.auroc, 4)}
        return Fitted(fitted.method, fitted.weight, fitted.bias, fitted.details | told)
    if recipe.solver == "lda":
        return lda(statistics, _ONLY, recipe.shrinkage, weights)
    return difference_of_means(statistics, _ONLY, weights)


def left_out_closed(solver: ClosedForm, rows: Rows, shrinkage: float | None = None) -> Array:
    """(n, P): values of each row by fits without its key; P penalties of ridge, else one."""
    statistics, weights, sources = rows.statistics

    def fit(out: Mask) -> Array:
        gone = {source for key in set(np.asarray(rows.keys)[out].tolist()) for source in sources[key]}
        cells = {c: m for c, m in statistics.cells.items() if c.source not in gone}
        kept = Statistics(statistics.d, statistics.origin, cells)
        x = rows.x[out].astype(np.float64)
        if solver == "ridge":
            return ridge_path(kept, _ONLY, PENALTIES, weights).values(x)
        fitted = lda(kept, _ONLY, shrinkage, weights) if solver == "lda" else difference_of_means(kept, _ONLY, weights)
        return fitted.logits(x)[:, None]

    return left_out(rows.keys, rows.labels, fit)


def choose_penalty(rows: Rows) -> tuple[int, Ranked]:
    """Index into PENALTIES of the one that ranks first with data sets left out. raises: Unsupported"""
    values = left_out_closed("ridge", rows)
    found = [ranked(values[:, p], rows.labels, rows.keys) for p in range(values.shape[1])]
    index = best(found)
    return index, found[index]


def refitted(recipe: Recipe, fitted: Fitted, rows: Rows) -> Array:
    """(n, 1): values of each row by the fit that was chosen, made again without the row's data set. raises: Unsupported

    A penalty that was chosen stays: for the figure to mislead, one number would have had to learn a data set.
    """
    solver = {"logistic_regression": "logistic", "linear_probe_adam": "adam"}.get(fitted.method, fitted.method)
    same = recipe.model_copy(update={"solver": solver, "penalty": fitted.details.get("penalty")})

    def fit(out: Mask) -> Array:
        kept = [key for key, gone in zip(rows.keys, out.tolist(), strict=True) if not gone]
        (again,) = candidates(same, Rows(rows.x[~out], rows.labels[~out], rows.weights[~out], kept))
        return again.logits(rows.x[out].astype(np.float64))[:, None]

    return left_out(rows.keys, rows.labels, fit)
