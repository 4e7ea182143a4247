"""One reading of a server's /metrics: every series of ours by name and labels, and what grew between two readings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "midstream_"
_START = "process_start_time_seconds"
TIMEOUT_S = 5.0

Series = tuple[Mapping[str, str], float]


class Unreachable(Exception):
    """The server does not answer, or not with Midstream's metrics. The message is one line."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """at: seconds since the epoch, by our clock; started: by the server's, None if it does not say

    series: name without `midstream_` -> (labels, value) of each; a value that is not finite is left out
    counters: names of the counters, those included that have no series yet
    """

    at: float
    started: float | None
    series: Mapping[str, list[Series]]
    counters: frozenset[str]

    def of(self, name: str, **labels: str) -> Iterator[Series]:
        """The series that have these labels, and maybe more."""
        for own, value in self.series.get(name, ()):
            if all(own.get(k) == v for k, v in labels.items()):
                yield own, value

    def total(self, name: str, **labels: str) -> float | None:
        """Their sum. Without one a counter is 0, and everything else None: not known is not 0."""
        values = [value for _, value in self.of(name, **labels)]
        return sum(values) if values or name in self.counters else None

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Their sums by the values of one label."""
        sums: dict[str, float] = {}
        for own, value in self.of(name, **labels):
            sums[own.get(label, "")] = sums.get(own.get(label, ""), 0.0) + value
        return sums

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Of a histogram: upper bound -> observations at or below it."""
        return {float(bound): n for bound, n in self.by("le", f"{name}_bucket", **labels).items()}


def parse(text: str, at: float) -> Scrape:
    """raises: Unreachable if it is not Prometheus' text, or has nothing of Midstream's"""
    series: dict[str, list[Series]] = {}
    counters: set[str] = set()
    born: list[float] = []
    started: float | None = None
    try:
        for family in text_string_to_metric_families(text):
            if family.name.startswith(PREFIX) and family.type == "counter":
                counters.add(family.name.removeprefix(PREFIX) + "_total")
            for sample in family.samples:
                if sample.name == _START:
                    started = sample.value
                elif sample.name.startswith(PREFIX) and math.isfinite(sample.value):
                    name = sample.name.removeprefix(PREFIX)
                    if name.endswith("_created"):
                        born.append(sample.value)
                    else:
                        series.setdefault(name, []).append((sample.labels, sample.value))
    except (ValueError, KeyError, IndexError) as error:  # what the parser raises on any other text
        raise Unreachable("what it answers is not Prometheus' text format") from error
    if not series and not counters:
        raise Unreachable("it answers, but has no metrics of Midstream's")
    # The embedded engine's registry has no process metrics; its first counter is as old as itself.
    return Scrape(at, min(born, default=None) if started is None else started, series, frozenset(counters))


def fetch(client: httpx.Client, url: str, at: float) -> Scrape:
    """url: of the metrics. raises: Unreachable"""
    try:
        answer = client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error
    if answer.status_code != 200:
        raise Unreachable(f"it answers {answer.status_code}")
    return parse(answer.text, at)


def grown(new: float | None, old: float | None) -> float | None:
    """How much a counter grew. One that fell began again at 0, as Prometheus reads it; one that is new began there."""
    if new is None:
        return None
    return new if old is None or new < old else new - old


def grown_buckets(new: Mapping[float, float], old: Mapping[float, float]) -> dict[float, float]:
    """The same of a histogram: if one bucket fell, all began again."""
    again = any(n < old.get(bound, 0.0) for bound, n in new.items())
    return {bound: n - (0.0 if again else old.get(bound, 0.0)) for bound, n in new.items()}


def quantile(q: float, buckets: Mapping[float, float]) -> float | None:
    """By straight lines within a bucket, as histogram_quantile; None without observations.

    Above the last finite bound there is no line: that bound is the answer, a lower limit.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = q * buckets[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        n = buckets[bound]
        if n >= rank and n > below:
            return low if bound == math.inf else low + (bound - low) * (rank - below) / (n - below)
        low, below = bound, n
    return low
