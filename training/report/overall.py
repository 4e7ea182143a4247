"""What a report says of all sets together: length, look-alikes, probabilities, and the curves that are drawn of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from probes_store.calibration import clopper_pearson
from probes_store.card import Card
from training import evaluate, metrics
from training.evaluate import set_figures
from training.metrics import Array, Sample, Unsupported
from training.report.figures import At, Joined, Judged, joined
from training.report.sets import PromptSet

_NOT_NEW = ("everyday", "unseen", "attack")
CURVE_POINTS = 200
BINS = 10


def over_all(judged: Sequence[Judged], at: At, card: Card) -> dict[str, Any]:
    """`look_alikes`, `by_length`, `pooled`, `calibration`, and the curves that are drawn of them; {} without sets."""
    plain = [j for j in judged if j.set.kind != "attack"]
    if not plain:
        return {}
    rows = joined(plain)
    everyday = [j for j in judged if j.set.kind == "everyday"]
    pooled = set_figures(rows.values.tolist(), rows.labels.tolist(), rows.groups, at.probe)
    pooled.pop("calibration", None)  # of rows that Platt's line was fitted to, too
    new = [j for j in plain if _is_new(j.set)]
    return {
        "pooled": pooled,
        "by_length": _lengths(everyday, rows, at),
        "look_alikes": hard_benign(judged, at.probe),
        # Probabilities were fitted to the rows that were held back: only other sets tell what they are worth.
        "calibration": calibration(joined(new), card) if new else {},
        "roc": _rocs(judged, everyday[0].scored.values) if everyday else {},
        "histogram": histogram(judged, at.probe),
    }


def _is_new(one: PromptSet) -> bool:
    return one.kind not in _NOT_NEW and not one.name.startswith("unseen")


def hard_benign(judged: Sequence[Judged], threshold: float) -> dict[str, Any]:
    """All harmless rows that are no everyday traffic, in one rate: 2,000 of them are wanted (T22)."""
    parts = {j.set.name: j.scored.values[j.set.of(0)] for j in judged if j.set.kind != "everyday" and j.set.of(0)}
    values = np.concatenate([*parts.values(), np.zeros(0)])
    values = values[np.isfinite(values)]
    try:
        share = asdict(metrics.share_above(values, threshold))
    except Unsupported:
        return {}
    return {"fpr": share, "sets": {name: len(v) for name, v in parts.items()}}


def _lengths(everyday: Sequence[Judged], rows: Joined, at: At) -> dict[str, list[dict[str, Any]]]:
    found = {"everyday": by_length(joined(everyday), at.probe) if everyday else []}
    if everyday and at.lengths:
        found["everyday, thresholds by length"] = by_length(joined(everyday), at.probe, at.lengths)
    return found | {"all harmless": by_length(rows, at.probe)}


def by_length(rows: Joined, threshold: float, levels: Sequence[tuple[int, float]] = ()) -> list[dict[str, Any]]:
    """False-positive rate by the power of two that a prompt's tokens come up to, template and all.

    levels: (tokens, threshold) by length in place of the one threshold; longer prompts have the last
    """
    harmless = rows.labels == 0
    tokens = rows.tokens[harmless]
    of = [next((t for up_to, t in levels if n <= up_to), levels[-1][1] if levels else threshold) for n in tokens]
    powers = np.ceil(np.log2(tokens)).astype(int)
    above = rows.values[harmless] > np.array(of)
    return [
        {"up_to": 2 ** int(p), "fpr": asdict(metrics.share_above(above[powers == p].astype(float), 0.5))}
        for p in sorted(set(powers.tolist()))
    ]


def calibration(rows: Joined, card: Card) -> dict[str, Any]:
    """What the card's probabilities are worth on these rows, and `ways` to make others; bins: of equal mass, with the
    share that is harmful"""
    if not len(rows.values):
        return {}
    p = np.array([card.probability(v) for v in rows.values])
    found: dict[str, Any] = {"platt": card.platt is not None, "share_harmful": float(rows.labels.mean()), "n": len(p)}
    for name, figure in (("brier", evaluate.brier), ("ece", evaluate.ece)):
        try:
            found[name] = figure(p, rows.labels)
        except Unsupported as error:
            found[name], found["refused"] = None, str(error)
    try:
        found["ways"] = evaluate.calibrations(Sample.of(rows.values, rows.labels.tolist(), rows.groups))
    except Unsupported:
        found["ways"] = {}
    found["bins"] = []
    for part in np.array_split(np.argsort(p, kind="stable"), BINS):
        if len(part):
            hits = int(rows.labels[part].sum())
            low, high = clopper_pearson(hits, len(part))
            found["bins"].append({"said": float(p[part].mean()), "seen": hits / len(part), "low": low, "high": high})
    return found


def _rocs(judged: Sequence[Judged], everyday: Array) -> dict[str, list[tuple[float, float]]]:
    """Recall of each set's harmful rows at the threshold that flags this share of the everyday ones."""
    everyday = everyday[np.isfinite(everyday)]
    rates = np.geomspace(1 / max(2, len(everyday)), 1, CURVE_POINTS)
    # Strictly above the (k + 1)-th highest value lie k rows at most.
    ranked = np.append(np.sort(everyday)[::-1], -math.inf)
    cuts = ranked[np.floor(rates * len(everyday) + 1e-9).astype(int)]
    found = {}
    for j in judged:
        harmful = j.scored.values[j.set.of(1)]
        if len(harmful) and j.set.kind != "attack":
            recall = [float((harmful > cut).mean()) for cut in cuts]
            found[j.set.name] = list(zip(rates.tolist(), recall, strict=True))
    return found


def histogram(judged: Sequence[Judged], threshold: float) -> dict[str, Any]:
    """Share of the rows of each kind by value; edges: (n + 1,), shares: name -> (n,)"""
    kinds = {
        "everyday": [j.scored.values for j in judged if j.set.kind == "everyday"],
        "look-alikes": [j.scored.values[j.set.of(0)] for j in judged if j.set.kind in ("look-alikes", "held-out")],
        "harmful": [j.scored.values[j.set.of(1)] for j in judged if j.set.kind in ("held-out", "unseen")],
    }
    values = {name: np.concatenate([*parts, np.zeros(0)]) for name, parts in kinds.items()}
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    known = np.concatenate(list(finite.values()))
    if not len(known):
        return {}
    low, high = np.percentile(known, [0.1, 99.9]).tolist()
    edges = np.linspace(low, high, 41)
    shares = {n: np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / len(v) for n, v in finite.items() if len(v)}
    return {"threshold": threshold, "edges": edges.tolist(), "shares": {n: s.tolist() for n, s in shares.items()}}
