"""Metrics: the engine's observer. A finished sequence's Record in, counts out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric as Family

from monitor.metrics.drift import Drift, Reference
from monitor.metrics.processes import forget, forget_probe
from monitor.metrics.shift import Shift
from monitor.metrics.table import PREFIX, TABLE, Metric
from monitor.policy.rule import Rule
from monitor.types import Action, Cause, Format, Mode, Phase, ProbeReading, Record, is_candidate

_OF_PROBES = (
    "probe_info",
    "threshold_logit",
    "threshold_ratio",
    "target_fpr_ratio",
    "observed_flag_ratio",
    "observed_flag_ratio_low",
    "observed_flag_ratio_high",
    "drift_psi_ratio",
    "drift_mahalanobis_ratio",
)


class Metrics:
    """An attribute for each row of the table. Thread-safe, as prometheus_client is.

    model: the name served, a label of what is counted by model
    """

    def __init__(self, registry: CollectorRegistry | None = None, model: str = "") -> None:
        self.registry = registry or CollectorRegistry()
        self.model = model
        self.drift, self.shift = Drift(), Shift()
        self._candidates: set[str] = set()
        self._reads: dict[str, Callable[[], float]] = {}
        self.registry.register(self)  # before the gauges: they are scraped after they were read
        for metric in TABLE:
            setattr(self, metric.name, _made(metric, self.registry))
        for cause in get_args(Cause):  # a rate sees a first event only in a series that was there before
            self.unmonitored_tokens.labels(cause)

    def __getattr__(self, name: str) -> Any:
        """Of the table. raises: AttributeError"""
        raise AttributeError(f"there is no metric {name!r}; see monitor/metrics/table.py")

    def record(self, record: Record) -> None:
        self.requests.labels(self.model, record.policy, record.verdict).inc()
        self.finished.labels(record.route, record.finish).inc()
        coverage = record.coverage
        self.tokens_scored.labels(Phase.PROMPT).inc(coverage.prompt_scored)
        self.tokens_scored.labels(Phase.RESPONSE).inc(coverage.response_scored)
        self.final_unscored_tokens.inc(coverage.final_unscored)
        for cause, n in coverage.causes.items():
            self.unmonitored_tokens.labels(cause).inc(n)
        self.held_tokens.observe(record.held_tokens)
        self.holdback_seconds.observe(record.held_seconds)
        for reading in record.readings:
            self._reading(reading)
            self.drift.add(record.format, reading)
        for asked in record.escalations:
            self.escalations.labels(asked.probe, asked.phase, asked.result).inc()
        self.fail_open.inc(_opened(record))
        self.leaked_tokens.inc(_leaked(record))

    def _reading(self, reading: ProbeReading) -> None:
        labels = (reading.probe, reading.phase)
        if reading.value is not None:
            self.request_score.labels(*labels).observe(_probability(reading.value))
        if reading.sample is not None:
            self.token_score.labels(*labels).observe(_probability(reading.sample))
        if reading.action is Action.FLAG:
            self.flags.labels(self.model, *labels).inc()
        if reading.action is Action.BLOCK:
            self.blocks.labels(self.model, *labels).inc()
        if reading.would_block:
            self.would_block.labels(self.model, *labels).inc()

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.score_seconds.observe(seconds)

    def probes(
        self,
        probes: Sequence[tuple[str, str, str, str, str]],
        rules: Mapping[Format, Sequence[Rule]],
        references: Mapping[tuple[str, Phase, Format], Reference] | None = None,
        policies: Iterable[str] = (),
    ) -> None:
        """What serves from now on. What served before and is no more is shown no longer.

        probes: (name, version, sha256, layers, kind); rules: per format
        references: what the cards say of benign values; policies: their names
        """
        for name in _OF_PROBES:
            forget(getattr(self, name))
        gone, self._candidates = self._candidates, {name for name, *_ in probes if is_candidate(name)}
        for candidate in sorted(gone - self._candidates):  # or there would be one more of each with every trial
            for metric in TABLE:
                if "probe" in metric.labels:
                    forget_probe(getattr(self, metric.name), candidate)
        for name, version, sha256, layers, kind in probes:
            self.probe_info.labels(name, version, sha256[:16], layers, kind).set(1)
            for phase in Phase:
                for counter in (self.flags, self.blocks, self.would_block):
                    counter.labels(self.model, name, phase)
        for policy in policies:
            for action in Action:
                self.requests.labels(self.model, policy, action)
        for form, of_format in rules.items():
            for rule in of_format:
                if rule.threshold is not None:
                    where = (rule.probe, rule.phase, form)
                    self.threshold_logit.labels(*where).set(rule.threshold)
                    self.threshold_ratio.labels(*where).set(_probability(rule.threshold))
        self.drift.expect(references or {})

    def read(self, name: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self._reads[name] = value

    def refresh(self) -> None:
        """Set the gauges that are read, and those of drift."""
        for name, value in list(self._reads.items()):
            getattr(self, name).set(value())
        self.drift.show(self)
        self.shift.show(self)

    def collect(self) -> Iterator[Family]:
        """As a collector of the registry: nothing of its own, the gauges are fresh after it."""
        self.refresh()
        return iter(())

    def describe(self) -> list[Family]:
        return []


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    of: dict[str, Any] = {"labelnames": metric.labels, "namespace": PREFIX, "registry": registry}
    if metric.kind == "counter":
        return Counter(metric.name, metric.help, **of)
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, multiprocess_mode=metric.merge, **of)
    return Histogram(metric.name, metric.help, buckets=metric.buckets, **of)


def _probability(logit: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, logit))))


def _opened(record: Record) -> bool:
    """Whether it was answered although a probe that blocks had no score, or no answer of the second judge."""
    blind = any(r.action is Action.UNMONITORED and r.mode is Mode.BLOCK for r in record.readings)
    unheard = any(e.result in ("failed", "overflow") for e in record.escalations)
    return (blind or unheard) and record.finish in ("stop", "length")


def _leaked(record: Record) -> int:
    """Tokens that went out at or after the position where a probe blocked: the Watch's word against the policy's."""
    start = record.coverage.prompt_tokens
    blocked = [r.crossed_at for r in record.readings if r.action is Action.BLOCK and r.crossed_at is not None]
    return max([0, *(record.released_tokens - max(0, at - start) for at in blocked)])
