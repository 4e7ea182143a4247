"""Figures with intervals: AUROC by stratified bootstrap, rates by Clopper-Pearson, recall at a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def auroc(positive: Array, negative: Array) -> float:
    """P(a harmful row scores above a harmless one), ties count half."""
    both = np.concatenate([positive, negative])
    order = both.argsort(kind="stable")
    ranks = np.empty(len(both))
    ranks[order] = np.arange(1, len(both) + 1)
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    mean_rank = np.bincount(inverse, ranks) / counts
    total = mean_rank[inverse][: len(positive)].sum()
    n, m = len(positive), len(negative)
    return float((total - n * (n + 1) / 2) / (n * m))


def auroc_interval(positive: Array, negative: Array, rounds: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """AUROC and its 95 % bootstrap interval, resampled within each class."""
    random = np.random.default_rng(seed)
    draws = [
        auroc(random.choice(positive, len(positive)), random.choice(negative, len(negative))) for _ in range(rounds)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return auroc(positive, negative), float(low), float(high)


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate: hits of n."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


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
