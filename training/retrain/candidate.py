"""A candidate: the probe in service, gone on from with labelled rows of traffic, and calibrated on everyday ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from monitor.aggregate import PLAIN_KINDS, Aggregation
from monitor.errors import ConfigInvalid
from monitor.probe import ProbeWeights
from probes_store.base import Base, load_base
from probes_store.calibration import Calibration, rows_needed
from probes_store.card import Platt, Threshold
from probes_store.moments import Moments
from probes_store.store import StoredProbe
from training.calibrate import MIN_ROWS, TARGETS
from training.evaluate import separation
from training.fit import Array, Fitted, Scaler, fit_platt
from training.retrain.posterior import curvature, discriminant, fit_posterior, from_moments

STRENGTH = 1.0
"""What a row of the base is worth against a labelled row of traffic."""
_NO_BASE_ROWS = 1000.0
_FOLDS, _EACH = 5, 10
_TIGHT = 15
"""Rows times rate from which the certified threshold of few rows is not much too high: it is at 0.6 of the rate."""
_EVERYDAY = "a uniform sample of traffic without what people called harmful, newest turns; if some was, it is too high"
_CALLED = "requests of a uniform sample of traffic that people called harmless, newest turns, by fits without them"


@dataclass(frozen=True, slots=True)
class Start:
    """What is gone on from. weight: (n_layers * d,) and bias over a turn's mean; base: moments of the rows so far;
    known: whether the probe has that base, or traffic stands in for it"""

    weight: Array
    bias: float
    base: Base
    known: bool

    @property
    def rows(self) -> float:
        return self.base.rows(0) + self.base.rows(1)

    @property
    def scaler(self) -> Scaler:
        """Of all rows of the base."""
        both = [self.base.cells[layer, 0] + self.base.cells[layer, 1] for layer in self.base.layers]
        mean = np.concatenate([m.mean for m in both])
        scale = np.sqrt(np.concatenate([m.scatter.diagonal() / m.n for m in both]))
        return Scaler(mean, np.where(scale > 0, scale, 1.0))


def start_of(live: StoredProbe, everyday: Array) -> Start:
    """everyday: features of traffic, for probes without a base

    raises: ConfigInvalid where neither the weights nor the base say where to start
    """
    card = live.card
    base, layers = load_base(live), card.layers
    known = base is not None and min(base.rows(0), base.rows(1)) > 0
    if base is None or not known:
        if len(everyday) < MIN_ROWS:
            raise ConfigInvalid(
                f"{card.name} {card.version} does not say which rows it was made of, and {len(everyday)} features of "
                f"everyday traffic can't stand in for them: {MIN_ROWS} are needed, or train it again with midstream "
                "train"
            )
        columns = everyday.reshape(len(everyday), len(layers), card.d_model)
        moments = [Moments.of(columns[:, i]) for i in range(len(layers))]
        base = from_moments(layers, moments, _NO_BASE_ROWS)
    if isinstance(live.bias, float) and card.aggregation["prompt"].kind == "mean":
        weight = np.concatenate([live.weight[layer].double().numpy() for layer in layers])
        return Start(weight, live.bias, base, known)
    if base.plane is not None:
        return Start(*base.plane, base, known)
    if not known:
        raise ConfigInvalid(
            f"{card.name} {card.version} does not average a turn, which is what features are, and has no base to start "
            "from instead; train it again with midstream train"
        )
    return Start(*discriminant(base, layers), base, known)


@dataclass(frozen=True, slots=True)
class Made:
    """held_out: figures of labelled rows by fits that had not seen them; needed: everyday rows that the target lacks"""

    probe: ProbeWeights
    fitted: Fitted
    base: Base
    aggregation: dict[str, Aggregation]
    calibration: dict[Any, dict[Any, Calibration]]
    thresholds: tuple[Threshold, ...]
    platt: Platt | None
    held_out: dict[str, Any]
    needed: int


def make(
    live: StoredProbe,
    start: Start,
    x: Array,
    y: npt.NDArray[np.int64],
    weights: Array,
    sampled: npt.NDArray[np.bool_],
    everyday: Array,
    target: float,
) -> Made:
    """x: (n, n_layers * d) labelled features; y, weights: (n,), weight 0 leaves a row out; sampled: (n,) whether a row
    is of the uniform slice; everyday: (m, n_layers * d) of the slice, without rows of x

    target: false-positive rate of prompts. raises: ConfigInvalid if a label is missing
    """
    kept = weights > 0
    copies = x[~kept & (y == 0) & sampled]
    x, y, weights, sampled = x[kept], y[kept], weights[kept], sampled[kept]
    for label, word in ((1, "harmful"), (0, "harmless")):
        if not (y == label).any():
            raise ConfigInvalid(f"no labelled request that counts is {word}; label some: midstream review")
    card, layers = live.card, live.card.layers
    fitted = _fit(start, layers, x, y, weights)
    by_layer = fitted.weight.reshape(len(layers), card.d_model)
    parts = {layer: torch.from_numpy(w.copy()).float() for layer, w in zip(layers, by_layer, strict=True)}
    unseen, held_out, platt, fits = _held_out(start, layers, x, y, weights)
    # What was fitted on is read by fits without it; a copy, which one of them has seen, by the one that says most. With
    # too few rows for that, none of them counts. What people called harmless is cleaner than what nobody looked at:
    # where there is enough of it, it is calibrated on alone.
    called = np.concatenate([unseen[(y == 0) & sampled], *([_most(fits, copies)] if fits else [])])
    called = called[~np.isnan(called)]
    values, source = np.concatenate([everyday @ fitted.weight + fitted.bias, called]), _EVERYDAY
    if len(called) * target >= _TIGHT:
        values, source = called, _CALLED
    calibration, thresholds = _calibrated(values.tolist(), source)
    own = Base.of(x.reshape(len(x), len(layers), card.d_model), layers, y)
    # An answer's value is not calibrated: until it is, there is only shadow for it. A moving average is what most have.
    how = card.aggregation["response"]
    response = how if how.kind in PLAIN_KINDS else Aggregation("ema")
    return Made(
        ProbeWeights(card.name, parts, fitted.bias),
        fitted,
        start.base + own,
        {"prompt": Aggregation("mean"), "response": response},
        calibration,
        thresholds,
        platt,
        held_out,
        max(0, rows_needed(target) - len(values)),
    )


def _fit(start: Start, layers: Sequence[int], x: Array, y: npt.NDArray[np.int64], weights: Array) -> Fitted:
    """Both labels weigh the same in the base; what a row of traffic weighs is decided (`weighing`): balanced once more,
    one tenant's rows would outgrow their share."""
    half = STRENGTH * start.rows / 2
    precision = curvature(start.base, layers, start.weight, start.bias, (half, half))
    return fit_posterior(x, y, weights, (start.weight, start.bias), precision)


def _calibrated(
    values: Sequence[float], source: str
) -> tuple[dict[Any, dict[Any, Calibration]], tuple[Threshold, ...]]:
    if len(values) < MIN_ROWS:
        return {}, ()
    calibration = Calibration.fit(values, source)
    table = [
        Threshold(format="chat", phase="prompt", target_fpr=rate, threshold=calibration.threshold(rate))
        for rate in TARGETS
        if calibration.n >= rows_needed(rate)
    ]
    return {"chat": {"prompt": calibration}}, tuple(table)


def _held_out(
    start: Start, layers: Sequence[int], x: Array, y: npt.NDArray[np.int64], weights: Array
) -> tuple[Array, dict[str, Any], Platt | None, list[Fitted]]:
    """The value of each row by one of five fits, each without a fifth of them; NaN, and none, with too few of a
    label. The fits come last."""
    if min((y == 0).sum(), (y == 1).sum()) < _EACH:
        return np.full(len(y), np.nan), {}, None, []
    random, fold = np.random.default_rng(0), np.zeros(len(y), dtype=np.int64)
    for label in (0, 1):
        mine = np.flatnonzero(y == label)
        fold[random.permutation(mine)] = np.arange(len(mine)) % _FOLDS
    values, fits = np.zeros(len(y)), list[Fitted]()
    for k in range(_FOLDS):
        inside = fold != k
        fits.append(_fit(start, layers, x[inside], y[inside], weights[inside]))
        values[~inside] = fits[-1].logits(x[~inside])
    before = x @ start.weight + start.bias
    figures = {
        name: separation(v[y == 1].tolist(), v[y == 0].tolist())
        for name, v in (("laplace_posterior", values), ("before", before))
    }
    slope, intercept = fit_platt(values, y)
    platt = Platt(slope=slope, intercept=intercept, n=len(y), positive=int(y.sum())) if slope > 0 else None
    return values, figures, platt, fits


def _most(fits: Sequence[Fitted], x: Array) -> Array:
    return np.asarray(np.max([fit.logits(x) for fit in fits], axis=0))
