"""Drift: do the newest values still look like those that a threshold was calibrated on?

Two answers for each probe, phase and format, over a window of the newest sequences: the population stability index
(PSI) of their values against the tenths of the card's benign values, and the share above the threshold with the exact
interval of Clopper and Pearson. By habit a PSI above 0.1 is a shift, above 0.25 a large one. Drift tells; it acts on
nothing.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monitor.types import Format, Phase, ProbeReading
from probes_store.calibration import clopper_pearson

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


class Drift:
    """`add` for every reading, from any thread; `show` when somebody looks."""

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

    def show(self, metrics: Any) -> None:
        """Set the gauges; nothing is said of fewer than ENOUGH values."""
        with self._lock:
            windows = [(key, w.reference, list(w.values)) for key, w in self._windows.items()]
        for key, reference, values in windows:
            if reference.target_fpr is not None:
                metrics.target_fpr_ratio.labels(*key).set(reference.target_fpr)
            if len(values) < ENOUGH:
                continue
            if reference.edges:
                metrics.drift_psi_ratio.labels(*key).set(psi(reference.edges, values))
            above = sum(value > reference.threshold for value in values)
            low, high = clopper_pearson(above, len(values))
            metrics.observed_flag_ratio.labels(*key).set(above / len(values))
            metrics.observed_flag_ratio_low.labels(*key).set(low)
            metrics.observed_flag_ratio_high.labels(*key).set(high)


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
