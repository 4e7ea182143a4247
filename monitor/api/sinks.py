"""Where a finished sequence goes: metrics, traffic log, live view, offenders, stdout, webhook, spans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from monitor.api.admin.control import harmless, show_probes
from monitor.api.admin.feed import Feed
from monitor.api.features import feature_log, retention
from monitor.api.spans import Spans
from monitor.config import Settings
from monitor.errors import MidstreamError
from monitor.live import LiveProbes, ServedModel
from monitor.metrics import Metrics
from monitor.notice import Outbox, Webhook, notice, print_line
from monitor.offenders import Offenders
from monitor.traffic import Cipher, TrafficLog
from monitor.traffic.features import FeatureLog
from monitor.types import Record


class Sinks:
    """The engine's observer: one Record to metrics, traffic log, live view, offenders, stdout, webhook, spans."""

    def __init__(self, settings: Settings, metrics: Metrics, spans: Spans | None = None) -> None:
        self.metrics, self.spans = metrics, spans
        self.traffic = TrafficLog(
            settings.log,
            settings.max_records,
            settings.record_queue,
            metrics.records_dropped.inc,
            days=settings.log_days,
            required=settings.log_required,
            wait_s=settings.log_wait_s,
            cipher=Cipher(settings.log_key) if settings.log_text else None,
            texts_dropped=metrics.texts_dropped.inc,
        )
        self.feed = Feed()
        self.features: FeatureLog | None = None
        self.retention = retention(settings)
        self.lines = Outbox(
            settings.webhook_queue, print_line, lambda result: metrics.notice_lines.labels(result).inc()
        )
        self.webhook: Webhook | None = None
        if settings.webhook_url is not None:
            self.webhook = Webhook(
                settings.webhook_url,
                settings.webhook_queue,
                settings.webhook_attempts,
                lambda result: metrics.webhook.labels(result).inc(),
            )
        self.offenders = Offenders(
            metrics.key_events,
            self._tell,
            window_s=settings.offender_window_s,
            limit=settings.offender_limit,
            block_s=settings.offender_block_s,
            metric_keys=settings.offender_metric_keys,
        )

    def record(self, record: Record) -> None:
        self.metrics.record(record)
        self.traffic.put(record)
        self.feed.put(record)
        event = notice(record)
        if event is not None:
            self._tell(event)
        self.offenders.note(record)
        if self.spans is not None:
            self.spans.record(record)

    def _tell(self, event: Mapping[str, Any]) -> None:
        self.lines.put(event)
        if self.webhook is not None:
            self.webhook.put(event)

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.metrics.scored(seconds, n_tokens)

    def beat(self) -> None:
        """Every few seconds: what is too slow for a scrape."""
        try:
            backlog: float = self.traffic.backlog()
        except MidstreamError:  # a log that can't be read: its losses are counted, its backlog is not known
            backlog = math.nan
        self.metrics.review_backlog.set(backlog)

    def keep_features(self, settings: Settings, model: ServedModel) -> FeatureLog | None:
        """Before an engine is made that offers its sequences; None unless the setting is on. raises: ConfigInvalid"""
        self.features = feature_log(settings, model, self.traffic, self.metrics)
        return self.features

    def close(self) -> None:
        if self.features is not None:
            self.features.close()
        if self.retention is not None:
            self.retention.close()
        self.traffic.close()
        self.lines.close()
        if self.webhook is not None:
            self.webhook.close()
        if self.spans is not None:
            self.spans.close()


def announce(model: str, live: LiveProbes, active: Callable[[], float], sinks: Sinks) -> None:
    """Metrics of what serves. active: sequences in the engine. raises: ProbeInvalid, see `harmless`"""
    metrics = sinks.metrics
    metrics.model = model
    show_probes(metrics, live)
    if metrics.shift.watched:
        metrics.shift.expect(harmless(live))
    metrics.read("active_sequences", active)
    metrics.read("record_queue_depth", lambda: sinks.traffic.depth)
