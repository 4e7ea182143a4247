"""Leave-one-data-set-out: what fits say of the rows of data sets that they have not seen, and how that ranks fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from training import metrics
from training.metrics import Array, Sample, Unsupported

TARGET_FPR = 0.01
TIE = 0.01
"""Of recall. Less than that apart, log-AUROC decides: it looks at two orders of magnitude of the rate, not at one."""
Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def folds(keys: Sequence[str], labels: Labels) -> Iterator[tuple[str, Mask]]:
    """Each key with the mask of its rows, in order; without those that hold all rows of a label, which nothing could be
    fitted without."""
    of = np.asarray(keys)
    for key in sorted(set(keys)):
        out = of == key
        if 0 < labels[~out].sum() < (~out).sum():
            yield key, out


def left_out(keys: Sequence[str], labels: Labels, fit: Callable[[Mask], Array]) -> Array:
    """(n, P): each row's values by P fits that have not seen its key; NaN where its key can't be left out.

    fit: mask of the rows that are left out -> (rows of the mask, P) values of those by fits to all others
    """
    values: Array | None = None
    for _, out in folds(keys, labels):
        found = fit(out)
        if values is None:
            values = np.full((len(labels), found.shape[1]), np.nan)
        values[out] = found
    if values is None:
        raise Unsupported("leaving a data set out needs two of a label at least; add a file, or `by_source: true`")
    return values


@dataclass(frozen=True, slots=True)
class Ranked:
    """Of one fit, over rows of left-out sources.

    recall: mean over harmful sources, at the value that TARGET_FPR of the pooled harmless rows lie above; worst: the
    lowest of them; log_auroc: None with fewer than 1,000 harmless rows; recalls, rates: by source, at that value
    """

    recall: float
    worst: str
    auroc: float
    log_auroc: float | None
    threshold: float
    recalls: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


def ranked(values: Array, labels: Labels, keys: Sequence[str], target_fpr: float = TARGET_FPR) -> Ranked:
    """values: (n,), NaN rows count nowhere. raises: Unsupported with too few harmless rows for the rate"""
    known = np.isfinite(values)
    v, y, k = values[known], labels[known], np.asarray(keys)[known]
    sample = Sample.of(v, y)
    harmless = np.sort(v[y == 0])[::-1]
    metrics.need(len(harmless), round(1 / target_fpr), "left-out harmless rows", f"recall at {target_fpr:.1%}")
    threshold = float(harmless[int(target_fpr * len(harmless) + 1e-9)])
    shares: dict[int, dict[str, float]] = {0: {}, 1: {}}
    for label, of in shares.items():
        for key in sorted(set(k[y == label])):
            of[str(key)] = float((v[(k == key) & (y == label)] > threshold).mean())
    recalls, rates = shares[1], shares[0]
    try:
        log_auroc: float | None = float(metrics.log_auroc(*sample.masses()))
    except Unsupported:
        log_auroc = None
    return Ranked(
        float(np.mean(list(recalls.values()))),
        min(recalls, key=lambda name: recalls[name]),
        float(metrics.auroc(*sample.masses())),
        log_auroc,
        threshold,
        recalls,
        rates,
    )


def best(found: Sequence[Ranked]) -> int:
    """Recall first; of those within TIE of the highest the one with the highest log-AUROC, or AUROC without it."""
    highest = max(f.recall for f in found)
    tied = [i for i, f in enumerate(found) if f.recall > highest - TIE]
    return max(tied, key=lambda i: (found[i].auroc if found[i].log_auroc is None else found[i].log_auroc, -i))


def told(values: Array, labels: Labels, keys: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """For a card: AUROC with its interval, recall and the lowest, the shares of each data set. raises: Unsupported"""
    known = np.isfinite(values)
    found = ranked(values, labels, keys)
    sample = Sample.of(values[known], labels[known], np.asarray(groups)[known].tolist())
    figure = metrics.interval(metrics.auroc, sample)
    shares = {name: {k: round(v, 4) for k, v in of.items()} for name, of in
              (("recalls", found.recalls), ("rates", found.rates))}  # fmt: skip
    return {
        "pooled": {
            "n_harmful": int(sample.labels.sum()),
            "n_harmless": int((sample.labels == 0).sum()),
            "auroc": round(figure.value, 4),
            "low": round(figure.low, 4),
            "high": round(figure.high, 4),
        },
        "log_auroc": None if found.log_auroc is None else round(found.log_auroc, 4),
        "recall": round(found.recall, 4),
        "lowest": found.worst,
        "at_fpr": TARGET_FPR,
        "data_sets": len(shares["recalls"].keys() | shares["rates"].keys()),
        **shares,
    }
