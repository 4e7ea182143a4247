"""Rows -> activations -> the better of a recipe's fits, as a probe's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from monitor.errors import ConfigInvalid
from monitor.probe import ProbeWeights
from probes_store.base import Base, Plane
from training.data import Row
from training.evaluate import separation
from training.fit import Array, Fitted
from training.heads import FittedHead, HeadRecipe, fit_head
from training.left_out import told
from training.metrics import Unsupported
from training.peaks import Running, fit_peaks, running_means
from training.progress import progress, ticks
from training.recipe import Recipe
from training.solve import Rows, candidates, refitted
from training.texts import Reader

Labels = npt.NDArray[np.int64]
Made = list[tuple[Fitted | FittedHead, Array]]
"""Fits, each with its values of the held-out rows."""


class Fitting:
    """reader: of the model; layers: ascending. Prints progress to the console."""

    def __init__(self, recipe: Recipe, reader: Reader, layers: tuple[int, ...], console: Console) -> None:
        self._recipe, self._reader, self._layers, self._console = recipe, reader, layers, console

    def fit(self, rows: Sequence[Row], held_out: Sequence[Row]) -> tuple[Fitted | FittedHead, dict[str, Any], Base]:
        """The fit that does best on the held-out rows, the figures of all, and the moments of the rows that made it.

        raises: ValueError if the rows lack a label; ConfigInvalid if no data set can be left out, as the recipe asks
        """
        y, weights = np.array([r.label for r in rows]), np.array([r.weight for r in rows])
        together: Rows | None = None
        if self._recipe.head is not None:
            found, means = self._head(self._recipe.head, rows, y, weights, held_out)
        else:
            found, means, together = self._linear(rows, y, weights, held_out)
        means = means.reshape(len(rows), len(self._layers), -1)
        truth = np.array([r.label for r in held_out])
        best, metrics = found[0][0], dict[str, Any](held_out={})
        if len(set(truth.tolist())) == 2:
            scored = {c.method: separation(v[truth == 1].tolist(), v[truth == 0].tolist()) for c, v in found}
            best = max((c for c, _ in found), key=lambda c: scored[c.method]["auroc"])
            metrics = {"held_out": scored, "chosen": best.method}
        base = Base.of(means, self._layers, y, self._plane(best, means, y, weights, rows))
        if self._recipe.left_out and isinstance(best, Fitted) and together is not None:
            metrics["left_out"] = self._left_out(best, together, [r.group for r in rows])
        return best, metrics, base

    def weights(self, fitted: Fitted | FittedHead, name: str) -> ProbeWeights:
        """The bias is the first projection's: a value is the sum of what the projections give."""
        if isinstance(fitted, FittedHead):
            return fitted.probe(name, self._layers)
        k = self._recipe.projections
        by_layer = fitted.weight.reshape(k, len(self._layers), -1).transpose(1, 0, 2)
        if k == 1:
            by_layer = by_layer[:, 0]
        parts = {layer: torch.from_numpy(w.copy()).float() for layer, w in zip(self._layers, by_layer, strict=True)}
        return ProbeWeights(name, parts, fitted.bias if k == 1 else (fitted.bias, *[0.0] * (k - 1)))

    # --- the fits -------------------------------------------------------------------------------------------------

    def _head(
        self, head: HeadRecipe, rows: Sequence[Row], y: Labels, weights: Array, held_out: Sequence[Row]
    ) -> tuple[Made, Array]:
        texts = self._tokens(rows)
        with progress(self._console, f"{head.pooling} head, steps", head.steps) as tick:
            made = fit_head(texts, y, weights, head, lambda n: ticks(n, tick))
        means = np.stack([text.mean(0, dtype=np.float64) for text in texts])
        return [(made, made.values(self._tokens(held_out)))], means

    def _linear(
        self, rows: Sequence[Row], y: Labels, weights: Array, held_out: Sequence[Row]
    ) -> tuple[Made, Array, Rows]:
        recipe = self._recipe
        running: dict[int, Running] | None = {} if recipe.peaks else None
        pooled, x_test = self._features(rows, running), self._features(held_out).reshape(len(held_out), -1)
        x = pooled.reshape(len(rows), -1)
        together = Rows(x, y, weights, [r.key or r.source for r in rows])
        if running is not None:
            with progress(self._console, "fitting: logistic, rounds", recipe.peaks + 1) as tick:
                collected = [running[i] for i in range(len(rows))]
                fits = [fit_peaks(x, collected, y, weights, recipe.c, recipe.peaks, tick)]
        else:
            steps = recipe.epochs if recipe.solver in ("best", "adam") else 1
            with progress(self._console, f"fitting: {recipe.solver}", steps) as tick:
                fits = candidates(recipe, together, lambda n: ticks(n, tick))
        return [(c, c.logits(x_test)) for c in fits], pooled[:, 0], together

    def _plane(
        self, best: Fitted | FittedHead, means: Array, y: Labels, weights: Array, rows: Sequence[Row]
    ) -> Plane | None:
        """What the same method finds in the means alone, for a probe that is more than a plane over these."""
        if isinstance(best, FittedHead) or self._recipe.projections == 1:
            return None
        keys = [r.key or r.source for r in rows]
        with self._console.status("the same fit on the means alone, to retrain from …"):
            fits = candidates(self._recipe, Rows(means.reshape(len(rows), -1), y, weights, keys))
        (same,) = (fit for fit in fits if fit.method == best.method)
        return same.weight, same.bias

    def _left_out(self, fitted: Fitted, rows: Rows, groups: Sequence[str]) -> dict[str, Any]:
        try:
            with self._console.status("the same fit without each data set …"):
                values = refitted(self._recipe, fitted, rows)
            return told(values[:, 0], rows.labels, rows.keys, groups)
        except Unsupported as error:
            raise ConfigInvalid(f"`left_out: true`: {error}") from error

    # --- activations ----------------------------------------------------------------------------------------------

    def _tokens(self, rows: Sequence[Row]) -> list[npt.NDArray[np.float32]]:
        """Of each row (n_i, n_layers * d_model): the counted positions of the turn that its label is about."""
        out = [np.zeros((0, 0), dtype=np.float32)] * len(rows)
        for index, turn in self._turns(rows):
            out[index] = self._beside(turn).numpy()
        return out

    def _features(self, rows: Sequence[Row], running: dict[int, Running] | None = None) -> Array:
        """(n, projections, n_layers, d_model): the mean over the counted positions of the turn that a label is about,
        and for a second projection the last of them, 0 where it is not served. running: filled with what `fit_peaks`
        takes, by row"""
        d_model = self._reader.model.d_model
        out = np.zeros((len(rows), self._recipe.projections, len(self._layers), d_model))
        for index, turn in self._turns(rows):
            for column, layer in enumerate(self._layers):
                out[index, 0, column] = turn[layer].mean(0).double().numpy()
                if not rows[index].answer or self._recipe.response.kind == "mean_last":
                    out[index, 1:, column] = turn[layer][-1].double().numpy()
            if running is not None:
                stream = self._beside(turn)
                # Nothing comes after a last token, so a server never scores it.
                seen = stream[: max(1, len(stream) - 1)] if rows[index].answer else stream.mean(0, keepdim=True)
                running[index] = running_means(seen, self._recipe.response.decay)
        return out

    def _turns(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[int, Tensor]]]:
        with progress(self._console, f"activations at layers {listed(self._layers)}", len(rows)) as tick:
            yield from self._reader.streams(rows, self._layers, tick)

    def _beside(self, turn: dict[int, Tensor]) -> Tensor:
        """(n_counted, n_layers * d_model)"""
        return torch.cat([turn[layer] for layer in self._layers], 1)


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
