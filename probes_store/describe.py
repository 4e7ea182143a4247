"""What a probe is, in figures: its certified thresholds, its metrics as a flat table, and how two versions differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from probes_store.calibration import rows_needed
from probes_store.card import Card, Format, Phase
from probes_store.store import StoredProbe

RATES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05)
_APART = {"calibration", "thresholds", "canaries", "data", "metrics"}
"""Fields of a card that are compared in a form of their own, or not number by number."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A threshold that at most `rate` of benign requests cross, with 95 % confidence.

    observed, low, high, test_rows: the rate on benign rows that neither fitted nor calibrated it, where the card has it
    """

    format: Format
    phase: Phase
    rate: float
    threshold: float
    n: int
    observed: float | None = None
    low: float | None = None
    high: float | None = None
    test_rows: int = 0


def certified(card: Card) -> list[Certified]:
    """Every threshold that the card's calibrations can certify, by rate."""
    seen = {(t.format, t.phase, t.target_fpr): t for t in card.thresholds if t.observed_fpr is not None}
    rows = []
    for form, phases in card.calibration.items():
        for phase, calibration in phases.items():
            for rate in RATES:
                if calibration.n < rows_needed(rate):
                    continue
                threshold, test = calibration.threshold(rate), seen.get((form, phase, rate))
                tested = () if test is None else (test.observed_fpr, test.fpr_low, test.fpr_high, test.test_rows)
                rows.append(Certified(form, phase, rate, threshold, calibration.n, *tested))
    return rows


def describe(probe: StoredProbe, live: bool) -> dict[str, Any]:
    """The whole card, and what can be computed from it."""
    return {
        "live": live,
        "shipped": probe.shipped,
        "weight_norm": {str(layer): float(vector.double().norm()) for layer, vector in probe.weight.items()},
        "bias": probe.bias,
        "certified": [asdict(row) for row in certified(probe.card)],
        "card": probe.card.model_dump(mode="json"),
    }


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, by dotted path; an empty one within is a leaf."""
    if not isinstance(value, Mapping | list) or not value:
        if path:
            yield path, value
        return
    for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from flat(child, f"{path}.{key}" if path else str(key))


def figures(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The metrics of a card for people: name and figure, an interval beside its figure."""
    for key, value in metrics.items():
        name = f"{path}.{key}" if path else str(key)
        main = next((k for k in ("rate", "auroc") if isinstance(value, Mapping) and k in value), None)
        if main is not None and {"low", "high"} <= value.keys():
            rows = value.get("n", f"{value.get('n_harmful', '?')} + {value.get('n_harmless', '?')}")
            yield name, f"{value[main]:.4g} [{value['low']:.4g}, {value['high']:.4g}] on {rows} rows"
        elif isinstance(value, Mapping):
            yield from figures(value, name)
        elif isinstance(value, int | float | str):
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def compare(a: StoredProbe, b: StoredProbe) -> dict[str, Any]:
    """How b differs from a: fields, data files, metrics, thresholds, and the angle between the weights."""
    return {
        "a": f"{a.card.name} {a.card.version}",
        "b": f"{b.card.name} {b.card.version}",
        "fields": _changed(_fields(a.card), _fields(b.card)),
        "data": _changed(_files(a.card), _files(b.card)),
        "metrics": _changed(dict(flat(a.card.metrics)), dict(flat(b.card.metrics))),
        "thresholds": _thresholds(a.card, b.card),
        "cosine": _cosines(a, b),
        "bias": {"a": a.bias, "b": b.bias},
    }


def _fields(card: Card) -> dict[str, Any]:
    fields = dict(flat({k: v for k, v in card.model_dump(mode="json").items() if k not in _APART}))
    for form, phases in card.calibration.items():
        for phase, calibration in phases.items():
            fields[f"calibration.{form}.{phase}.n"] = calibration.n
    return fields


def _files(card: Card) -> dict[str, Any]:
    return {d.file: f"{d.rows} rows, {d.positive} positive, sha256 {d.sha256[:12]}" for d in card.data}


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [*a, *(name for name in b if name not in a)]
    return [{"name": n, "a": a.get(n), "b": b.get(n)} for n in names if n not in a or n not in b or a[n] != b[n]]


def _thresholds(a: Card, b: Card) -> list[dict[str, Any]]:
    """One entry a format, phase and rate that either can certify; change: b's threshold less a's"""
    left, right = ({(r.format, r.phase, r.rate): r.threshold for r in certified(card)} for card in (a, b))
    rows = []
    for key in [*left, *(k for k in right if k not in left)]:
        one, other = left.get(key), right.get(key)
        change = None if one is None or other is None else other - one
        rows.append({"format": key[0], "phase": key[1], "rate": key[2], "a": one, "b": other, "change": change})
    return rows


def _cosines(a: StoredProbe, b: StoredProbe) -> dict[str, float | None]:
    """By layer that both read, and `all` over every layer side by side; None where shapes differ or one is zero."""
    if (a.card.d_model, a.card.projections) != (b.card.d_model, b.card.projections):
        return {"all": None}
    layers = sorted({*a.weight, *b.weight})
    zero = torch.zeros_like(next(iter(a.weight.values())))
    whole = [torch.cat([probe.weight.get(layer, zero) for layer in layers], dim=-1) for probe in (a, b)]
    both = [layer for layer in layers if layer in a.weight and layer in b.weight]
    return {str(layer): _cosine(a.weight[layer], b.weight[layer]) for layer in both} | {"all": _cosine(*whole)}


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float | None:
    # Norms of float32 weights as large as 1e30 overflow in float32.
    x, y = x.double().ravel(), y.double().ravel()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else None
