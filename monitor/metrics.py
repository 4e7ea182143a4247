"""Every metric, in one table. Labels are closed sets: probes, phases, modes, actions, causes; never a client's text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitor.policy.rule import Rule
from monitor.types import Action, Format, Mode, Phase, Record

_SECONDS = (1e-5, 2.5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0)
_PROBABILITY = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
_TOKENS = (0, 1, 2, 4, 8, 16, 64)


class Metrics:
    """The engine's observer: a finished sequence's Record in, counts out. Thread-safe, as prometheus_client is."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry, "namespace": "midstream"}
        self.requests = Counter("requests", "Finished sequences by verdict.", ["route", "action"], **of)
        self.finished = Counter("finished", "Finished sequences by how they ended.", ["finish"], **of)
        self.scored_tokens = Counter("tokens_scored", "Tokens with a judged score.", ["phase"], **of)
        self.final_unscored = Counter("final_unscored_tokens", "Last sampled tokens: never fed, so never scored.", **of)
        self.unmonitored = Counter(
            "unmonitored_tokens", "Tokens whose score was missing or not finite.", ["cause"], **of
        )
        self.fail_open = Counter("fail_open", "Sequences served over missing scores by a blocking probe.", **of)
        self.flags = Counter("flags", "Sequences that a probe flagged.", ["probe", "phase"], **of)
        self.blocks = Counter("blocks", "Sequences that a probe blocked.", ["probe", "phase"], **of)
        self.escalations = Counter(
            "escalations", "Questions to the second judge, by what came of them.", ["probe", "phase", "result"], **of
        )
        self.would_block = Counter(
            "would_block",
            "Sequences above the threshold of a probe that may not block.",
            ["probe", "phase"],
            **of,
        )
        self.request_score = Histogram(
            "request_score",
            "Value of a sequence, as a probability.",
            ["probe", "phase"],
            buckets=_PROBABILITY,
            **of,
        )
        self.score_seconds = Histogram(
            "score_seconds", "Judging one step of the engine, all its sequences.", buckets=_SECONDS, **of
        )
        self.held_tokens = Histogram(
            "held_tokens", "Most tokens of a sequence held back at once.", buckets=_TOKENS, **of
        )
        self.threshold = Gauge("threshold_logit", "Threshold in force.", ["probe", "phase", "format"], **of)
        self.probe_info = Gauge(
            "probe_info", "1 for each probe in service.", ["probe", "version", "sha256", "layers"], **of
        )
        self.records_dropped = Counter("records_dropped", "Records lost to a full or failing log.", **of)
        self.lines = Counter("notice_lines", "Flags and blocks written to stdout.", ["result"], **of)
        self.webhook = Counter("webhook", "Notices to the webhook.", ["result"], **of)
        self.rejected = Counter("rejected", "Requests refused before generation.", ["status"], **of)
        self.ready = Gauge("ready", "1 while the server is ready.", **of)

    def record(self, record: Record) -> None:
        self.requests.labels(record.route, record.verdict).inc()
        self.finished.labels(record.finish).inc()
        coverage = record.coverage
        self.scored_tokens.labels(Phase.PROMPT).inc(coverage.prompt_scored)
        self.scored_tokens.labels(Phase.RESPONSE).inc(coverage.response_scored)
        self.final_unscored.inc(coverage.final_unscored)
        for cause, n in coverage.causes.items():
            self.unmonitored.labels(cause).inc(n)
        self.held_tokens.observe(record.held_tokens)
        opened = False
        for reading in record.readings:
            labels = (reading.probe, reading.phase)
            if reading.value is not None:
                self.request_score.labels(*labels).observe(1 / (1 + math.exp(-max(-60.0, min(60.0, reading.value)))))
            if reading.action is Action.FLAG:
                self.flags.labels(*labels).inc()
            if reading.action is Action.BLOCK:
                self.blocks.labels(*labels).inc()
            if reading.would_block:
                self.would_block.labels(*labels).inc()
            opened |= (
                reading.action is Action.UNMONITORED
                and reading.mode is Mode.BLOCK
                and record.finish in ("stop", "length")
            )
        for asked in record.escalations:
            self.escalations.labels(asked.probe, asked.phase, asked.result).inc()
        self.fail_open.inc(opened)

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.score_seconds.observe(seconds)

    def probes(self, probes: Sequence[tuple[str, str, str, str]], rules: Mapping[Format, Sequence[Rule]]) -> None:
        """probes: (name, version, sha256, layers) in service; rules: per format"""
        for name, version, sha256, layers in probes:
            self.probe_info.labels(name, version, sha256[:16], layers).set(1)
            for phase in Phase:  # so that a counter exists before its first event, and rates start at 0
                for counter in (self.flags, self.blocks, self.would_block):
                    counter.labels(name, phase)
        for form, of_format in rules.items():
            for rule in of_format:
                if rule.threshold is not None:
                    self.threshold.labels(rule.probe, rule.phase, form).set(rule.threshold)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, help_text, registry=self.registry, namespace="midstream").set_function(read)
