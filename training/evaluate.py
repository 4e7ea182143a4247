"""The figures of one data set: for a card (plain lists in, four digits out), and for a report, all that it supports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from probes_store.calibration import clopper_pearson
from training import metrics
from training.fit import fit_platt
from training.metrics import Array, Figure, Sample, Unsupported, need

BINS = 15
ROWS_A_BIN = 10
ISOTONIC_ROWS = 1000
"""Below it a step function follows single rows."""
_FOLDS = 5
Labels = npt.NDArray[np.int64]


def auroc(positive: Array, negative: Array) -> float:
    """P(a harmful row scores above a harmless one), ties count half."""
    labels = [1] * len(positive) + [0] * len(negative)
    return float(metrics.auroc(*Sample.of(np.concatenate([positive, negative]), labels).masses()))


def auroc_interval(positive: Array, negative: Array, rounds: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """AUROC and its 95 % bootstrap interval, resampled within each class."""
    random = np.random.default_rng(seed)
    draws = [
        auroc(random.choice(positive, len(positive)), random.choice(negative, len(negative))) for _ in range(rounds)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return auroc(positive, negative), float(low), float(high)


def rate(values: Sequence[float], threshold: float) -> dict[str, float | int]:
    """Share of values strictly above a threshold, with its interval."""
    finite = [v for v in values if math.isfinite(v)]
    hits = sum(v > threshold for v in finite)
    low, high = clopper_pearson(hits, len(finite))
    return {
        "n": len(finite),
        "hits": hits,
        "rate": round(hits / len(finite), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def separation(positive: Sequence[float], negative: Sequence[float]) -> dict[str, float | int]:
    value, low, high = auroc_interval(np.asarray(positive), np.asarray(negative))
    return {
        "n_harmful": len(positive),
        "n_harmless": len(negative),
        "auroc": round(value, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def brier(probability: Array, labels: Labels) -> float:
    """Mean squared error of probabilities; raises: Unsupported without rows"""
    need(len(labels), 1, "rows", "a Brier score")
    return float(((probability - labels) ** 2).mean())


def ece(probability: Array, labels: Labels) -> float:
    """Expected calibration error over 15 bins of equal mass. raises: Unsupported below 150 rows"""
    need(len(labels), BINS * ROWS_A_BIN, "rows", f"a calibration error over {BINS} bins")
    order = np.argsort(probability, kind="stable")
    _, ties = np.unique(probability, return_inverse=True)
    # Equal probabilities share their labels: which of them falls into which bin must not depend on the rows' order.
    shared = (np.bincount(ties, labels) / np.bincount(ties))[ties]
    gaps = [len(b) * abs(float((probability[b] - shared[b]).mean())) for b in np.array_split(order, BINS)]
    return sum(gaps) / len(labels)


def calibrations(sample: Sample, seed: int = 0) -> dict[str, dict[str, float]]:
    """Brier score and calibration error of probabilities made three ways: the logit as it is, Platt's line, a step
    function (isotonic). The last two are fitted on the other four fifths of the groups.

    raises: Unsupported below 1,000 rows
    """
    from sklearn.isotonic import IsotonicRegression

    values, labels = sample.values, sample.labels
    need(len(labels), ISOTONIC_ROWS, "rows", "a comparison of calibrations")
    n_groups = int(sample.groups.max()) + 1
    folds = np.random.default_rng(seed).permutation(np.arange(n_groups) % _FOLDS)[sample.groups]
    platt, isotonic = np.empty(len(labels)), np.empty(len(labels))
    for fold in range(_FOLDS):
        inside, outside = folds != fold, folds == fold
        slope, intercept = fit_platt(values[inside], labels[inside])
        platt[outside] = _sigmoid(slope * values[outside] + intercept)
        steps = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(values[inside], labels[inside])
        isotonic[outside] = steps.predict(values[outside])
    ways = {"logit": _sigmoid(values), "platt": platt, "isotonic": isotonic}
    return {name: {"brier": brier(p, labels), "ece": ece(p, labels)} for name, p in ways.items()}


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(z, -60, 60)))


def set_figures(
    values: Sequence[float],
    labels: Sequence[int],
    groups: Sequence[str],
    threshold: float,
    requests_a_day: float | None = None,
) -> dict[str, Any]:
    """Everything that the rows of one set support, as JSON: each figure has `value`, `low`, `high`, `n`.

    values: one a row, NaN where there is none (left out, and counted as `unmonitored`); groups: rows that belong
    together; `refused` says of each other figure why there is none
    """
    kept = [i for i, v in enumerate(values) if math.isfinite(v)]
    v, y, g = np.array([values[i] for i in kept]), np.array([labels[i] for i in kept]), [groups[i] for i in kept]

    def share(label: int) -> Figure:
        rows = np.flatnonzero(y == label)
        return metrics.share_above(v[rows], threshold, [g[i] for i in rows])

    def compare(metric: metrics.Metric) -> Callable[[], Figure]:
        return lambda: metrics.interval(metric, Sample.of(v, y, g))

    wanted: dict[str, Callable[[], Any]] = {
        "recall": lambda: share(1),
        "fpr": lambda: share(0),
        "auroc": compare(metrics.auroc),
        "auprc": compare(metrics.auprc),
        "log_auroc": compare(metrics.log_auroc),
        "calibration": lambda: calibrations(Sample.of(v, y, g)),
    }
    if requests_a_day is not None:
        wanted["false_alarms_a_day"] = lambda: metrics.false_alarms_a_day(share(0), requests_a_day)
    harmful = int((y == 1).sum())
    out: dict[str, Any] = {"harmful": harmful, "harmless": len(y) - harmful, "unmonitored": len(values) - len(kept)}
    refused = {}
    for name, figure in wanted.items():
        try:
            found = figure()
        except Unsupported as error:
            refused[name] = str(error)
        else:
            out[name] = asdict(found) if isinstance(found, Figure) else found
    return out | {"threshold": threshold, "refused": refused}
