"""`midstream select`: which blocks, family and strength, by data sets left out of the fit; training rows alone.

Only the rows that the recipe fits on are read: not those that it calibrates or tests on, and none of a set that is
there to evaluate on. Each candidate is fitted as often as there are data sets, each time without one of them, and
ranked by what it says of the rows it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.families import PENALTIES
from training.fit import Array
from training.left_out import Mask, Ranked, best, folds, left_out, ranked
from training.logistic import fit_logistic_layers
from training.metrics import Sample, auroc, interval
from training.recipe import ClosedForm
from training.solve import CLOSED, Rows, left_out_closed

Features = npt.NDArray[np.float32]
Blocks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """blocks: whose features are read side by side; strength: C of logistic, the penalty of ridge, else None"""

    blocks: Blocks
    solver: str
    strength: float | None

    def recipe(self) -> dict[str, Any]:
        """The lines of a recipe that ask for it."""
        named = {"logistic": "c", "ridge": "penalty"}.get(self.solver)
        lines = {"layers": list(self.blocks), "solver": self.solver}
        return lines | ({named: self.strength} if named else {})


@dataclass(frozen=True, slots=True)
class Selection:
    """found: best first; values: (n,) of the first one, by fits without each row's data set

    auroc: of those, with its interval; skipped: data sets that can't be left out, as a label would be missing
    """

    found: tuple[tuple[Candidate, Ranked], ...]
    auroc: dict[str, float]
    rows: int
    data_sets: tuple[str, ...]
    skipped: tuple[str, ...]


def select(
    features: Features,
    blocks: Sequence[int],
    rows: Rows,
    groups: Sequence[str],
    sets: Sequence[Blocks],
    solvers: Sequence[str],
    strengths: Sequence[float],
    tick: Callable[[int], None] = lambda n: None,
) -> Selection:
    """features: (n, len(blocks), d); rows: their labels, weights and data sets (`x` is not looked at)

    sets: of blocks, each side by side; strengths: C's of logistic; tick: called with fits that are done, of `fits`
    raises: Unsupported if no data set can be left out, or too few harmless rows are
    """
    found: list[tuple[Candidate, Array]] = []
    at = {block: i for i, block in enumerate(blocks)}
    single = [s for s in sets if len(s) == 1]
    for c in strengths if "logistic" in solvers else ():
        if single:  # all blocks at once
            x = features[:, [at[s[0]] for s in single]]
            values = _logistic(x, rows, c, tick)
            found += [(Candidate(s, "logistic", c), values[:, i]) for i, s in enumerate(single)]
        for s in (s for s in sets if len(s) > 1):
            values = _logistic(_beside(features, at, s)[:, None], rows, c, tick)
            found.append((Candidate(s, "logistic", c), values[:, 0]))
    for solver in (s for s in CLOSED if s in solvers):
        for s in sets:
            found += _closed(solver, s, Rows(_beside(features, at, s), rows.labels, rows.weights, rows.keys))
            tick(1)
    scored = [ranked(values, rows.labels, rows.keys) for _, values in found]
    first = best(scored)
    known = np.isfinite(found[first][1])
    figure = interval(
        auroc,
        Sample.of(found[first][1][known], rows.labels[known], [g for g, k in zip(groups, known, strict=True) if k]),
    )
    rest = sorted((i for i in range(len(found)) if i != first), key=lambda i: -scored[i].recall)
    done = [key for key, _ in folds(rows.keys, rows.labels)]
    return Selection(
        tuple((found[i][0], scored[i]) for i in (first, *rest)),
        {"value": figure.value, "low": figure.low, "high": figure.high, "n": figure.n},
        len(rows.labels),
        tuple(done),
        tuple(sorted(set(rows.keys) - set(done))),
    )


def fits(sets: Sequence[Blocks], solvers: Sequence[str], strengths: Sequence[float]) -> int:
    """How often `tick` is called in all."""
    several = sum(len(s) > 1 for s in sets)
    logistic = len(strengths) * (several + (several < len(sets))) if "logistic" in solvers else 0
    return logistic + len(sets) * sum(s in solvers for s in CLOSED)


def _beside(features: Features, at: dict[int, int], blocks: Blocks) -> Features:
    return np.ascontiguousarray(features[:, [at[b] for b in blocks]]).reshape(len(features), -1)


def _logistic(x: Features, rows: Rows, c: float, tick: Callable[[int], None]) -> Array:
    """(n, L)"""

    def fit(out: Mask) -> Array:
        fitted = fit_logistic_layers(x[~out], rows.labels[~out], rows.weights[~out], c)
        held = x[out].astype(np.float64)
        return np.stack([f.logits(held[:, i]) for i, f in enumerate(fitted)], axis=1)

    values = left_out(rows.keys, rows.labels, fit)
    tick(1)
    return values


def _closed(solver: ClosedForm, blocks: Blocks, rows: Rows) -> Iterator[tuple[Candidate, Array]]:
    """Of ridge's path the penalty that ranks first."""
    values = left_out_closed(solver, rows)
    if solver != "ridge":
        yield Candidate(blocks, solver, None), values[:, 0]
        return
    chosen = best([ranked(values[:, p], rows.labels, rows.keys) for p in range(values.shape[1])])
    yield Candidate(blocks, solver, PENALTIES[chosen]), values[:, chosen]
