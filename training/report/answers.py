"""Answers: what a probe's running value says of a given answer, and after how many of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from training import metrics
from training.data import Row
from training.evaluate import set_figures
from training.floor import tfidf_scores
from training.metrics import Array, Sample, Unsupported
from training.report.scores import ScoredAnswers
from training.report.sets import Exchange

SEEN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens of an answer."""
_FOLDS = 5


def answer_figures(
    exchanges: Sequence[Exchange], scored: ScoredAnswers, threshold: float, fit: Sequence[Row]
) -> dict[str, Any]:
    """The figures of one set of answers at the probe's threshold for answers. fit: rows of the text floor, may be empty

    `floors`: AUROC on the same rows of `words` (fitted to the probe's training rows), of `words_here` (fitted to the
    other answers of this very set: more than any probe gets), of `request` (the probe's value of the prompt: does it
    tell bad answers, or bad questions?) and of `length`, whichever way round; `beats`: AUROC less that floor's, drawn
    together
    """
    values, labels = scored.values(), [e.label for e in exchanges]
    groups = [e.group for e in exchanges]
    entry = set_figures(values.tolist(), labels, groups, threshold)
    kept = np.flatnonzero(np.isfinite(values) & np.isfinite(scored.prompts))
    rows = [exchanges[i] for i in kept]
    texts = [e.response for e in rows]
    floors = {"request": scored.prompts[kept], "length": lengths(texts, [e.label for e in rows])}
    if fit:
        floors["words"] = np.array(tfidf_scores(fit, texts))
    here = words_here(rows)
    if here is not None:
        floors["words_here"] = here
    entry |= compare_with_floors(values[kept], [e.label for e in rows], [e.group for e in rows], floors)
    entry["by_tokens"] = by_tokens(scored.running, labels, threshold)
    return entry


def compare_with_floors(
    values: Array, labels: Sequence[int], groups: Sequence[str], floors: dict[str, Array]
) -> dict[str, Any]:
    """`floors`: the AUROC of each; `beats`: the probe's less each floor's, with its interval; what the rows can't
    support is left out"""
    found: dict[str, dict[str, Any]] = {"floors": {}, "beats": {}}
    for name, floor in floors.items():
        try:
            one, other = Sample.of(values, labels, groups), Sample.of(floor, labels, groups)
            found["floors"][name] = asdict(metrics.interval(metrics.auroc, other))
            found["beats"][name] = asdict(metrics.paired(metrics.auroc, one, other))
        except Unsupported:
            continue
    return found


def lengths(texts: Sequence[str], labels: Sequence[int]) -> Array:
    """Characters, as a score: with the sign that separates these very rows better."""
    n, y = np.array([float(len(t)) for t in texts]), np.array(labels)
    if not 0 < y.sum() < len(y):
        return n
    return n if metrics.auroc(*Sample.of(n, labels).masses()) >= 0.5 else -n


def words_here(exchanges: Sequence[Exchange]) -> Array | None:
    """TF-IDF on the answers, fitted to the other four fifths of the groups; None where a fold lacks a label."""
    groups = sorted({e.group for e in exchanges})
    place = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % _FOLDS, strict=True))
    folds = np.array([int(place[e.group]) for e in exchanges])
    rows = [Row(e.response, e.label, "", e.group) for e in exchanges]
    values = np.zeros(len(rows))
    for fold in range(_FOLDS):
        inside = [r for r, f in zip(rows, folds, strict=True) if f != fold]
        outside = [r.text for r, f in zip(rows, folds, strict=True) if f == fold]
        if len({r.label for r in inside}) < 2 or not outside:
            return None
        scores = np.array(tfidf_scores(inside, outside))
        values[folds == fold] = scores
    return values


def by_tokens(running: Sequence[Array], labels: Sequence[int], threshold: float) -> dict[str, Any]:
    """Recall and false-positive rate after so many tokens, of all answers: one that has ended keeps what it had.

    `first`: tokens until the flag, over the harmful answers that are flagged at all: median and 90th percentile
    """
    out: dict[str, Any] = {"tokens": list(SEEN)}
    crossed = [next((i + 1 for i, v in enumerate(r) if v > threshold), None) for r in running]
    for label, word in ((1, "recall"), (0, "fpr")):
        mine = [c for c, wanted in zip(crossed, labels, strict=True) if wanted == label]
        out[word] = [sum(c is not None and c <= n for c in mine) / len(mine) for n in SEEN] if mine else []
    harmful = [c for c, label in zip(crossed, labels, strict=True) if label == 1 and c is not None]
    out["first"] = (
        dict(zip(("median", "p90"), np.percentile(harmful, [50, 90]).tolist(), strict=True)) if harmful else {}
    )
    return out
