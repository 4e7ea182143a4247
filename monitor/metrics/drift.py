"""Drift: do the newest values still look like those that a threshold was calibrated on?

Three answers for each probe, phase and format, over a window of the newest sequences: the population stability index
(PSI) of their values against the tenths of the card's benign values, the share above the threshold with the exact
interval of Clopper and Pearson, and whether that makes the threshold stale. By habit a PSI above 0.1 is a shift, above
0.25 a large one. Drift tells; it acts on nothing.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monitor.types import Format, Phase, ProbeReading
from probes_store.calibration import clopper_pearson, is_stale

WINDOW = 2000
ENOUGH = 200
"""Values before anything is said: with fewer, PSI's own noise, about bins / n, reads like a shift."""


@dataclass(frozen=True, slots=True)
class Reference:
    """edges: the inner deciles of the benign values, in logits, empty where the card has none; threshold: in force

    target_fpr: the rate that it is certified for; None where it lies below what the card keeps
    """

    edges: tuple[float, ...]
    threshold: float
    target_fpr: float | None


@dataclass(slots=True)
class _Window:
    reference: Reference
    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))


@dataclass(frozen=True, slots=True)
class Standing:
    """How a threshold in force stands to the newest values.

    n: values; observed: their share above the threshold, within [low, high] at 95 %, and psi: None of fewer than ENOUGH
    (psi: also where the card has no reference); stale: None where there is nothing to hold it to
    """

    probe: str
    phase: Phase
    format: Format
    threshold: float
    target_fpr: float | None
    n: int
    observed: float | None = None
    low: float | None = None
    high: float | None = None
    psi: float | None = None
    stale: bool | None = None


class Drift:
    """`add` for every reading, from any thread; `standings` and `show` when somebody looks."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, Phase, Format], _Window] = {}
        self._lock = threading.Lock()

    def expect(self, references: Mapping[tuple[str, Phase, Format], Reference]) -> None:
        """Compare with these from now on. Values so far stay where probe, phase, format and its edges do."""
        with self._lock:
            old, self._windows = self._windows, {key: _Window(ref) for key, ref in references.items()}
            for key, window in self._windows.items():
                if key in old and old[key].reference.edges == window.reference.edges:
                    window.values = old[key].values

    def add(self, form: Format, reading: ProbeReading) -> None:
        window = self._windows.get((reading.probe, reading.phase, form))
        if window is not None and reading.value is not None:
            window.values.append(reading.value)

    def standings(self) -> list[Standing]:
        with self._lock:
            windows = [(key, w.reference, list(w.values)) for key, w in self._windows.items()]
        return [_standing(*key, reference, values) for key, reference, values in windows]

    def show(self, metrics: Any) -> None:
        """Set the gauges; nothing is said of fewer than ENOUGH values."""
        for s in self.standings():
            key = s.probe, s.phase, s.format
            for gauge, value in (
                (metrics.target_fpr_ratio, s.target_fpr),
                (metrics.drift_psi_ratio, s.psi),
                (metrics.observed_flag_ratio, s.observed),
                (metrics.observed_flag_ratio_low, s.low),
                (metrics.observed_flag_ratio_high, s.high),
            ):
                if value is not None:
                    gauge.labels(*key).set(value)


def _standing(probe: str, phase: Phase, form: Format, reference: Reference, values: Sequence[float]) -> Standing:
    target = reference.target_fpr
    bare = Standing(probe, phase, form, reference.threshold, target, len(values))
    if len(values) < ENOUGH:
        return bare
    above = sum(value > reference.threshold for value in values)
    low, high = clopper_pearson(above, len(values))
    return replace(
        bare,
        observed=above / len(values),
        low=low,
        high=high,
        psi=psi(reference.edges, values) if reference.edges else None,
        stale=None if target is None else is_stale(low, high, target),
    )


def psi(edges: Sequence[float], values: Sequence[float]) -> float:
    """Population stability index: the sum over bins of (p - q) ln(p / q); q is alike in every bin, the reference's.

    edges: inner quantiles of the reference, ascending; values: finite. Half a value is added to every bin, so that an
    empty one is not infinitely surprising.
    """
    counts = [0.5] * (len(edges) + 1)
    for value in values:
        counts[bisect_left(edges, value)] += 1
    q, total = 1 / len(counts), sum(counts)
    return math.fsum((n / total - q) * math.log(n / total / q) for n in counts)
