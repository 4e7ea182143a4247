"""What an operator may do with a running server: the admin routes' operations, filled in alike for both engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from monitor.api.admin import KeyTable, Operations
from monitor.api.tracing import Tracing
from monitor.audit import Audit
from monitor.config import Settings
from monitor.live import LiveProbes
from monitor.metrics import Metrics
from monitor.offenders import Offenders
from monitor.policy.keeper import PolicyKeeper
from monitor.template import ChatTemplate
from monitor.traffic import find_records
from monitor.types import Scorer


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine that serves. live, put: read and replace its probes; model: the name it serves"""

    describe: Callable[[], Mapping[str, Any]]
    live: Callable[[], LiveProbes]
    put: Callable[[LiveProbes], None]
    scorer: Scorer
    template: ChatTemplate
    model: str

    def probes(self) -> list[str]:
        return [p.card.name for p in self.live().probes]


def operations(
    serving: Serving, settings: Settings, keys: KeyTable, audit: Audit, offenders: Offenders, metrics: Metrics
) -> Operations:
    """Once for each registry."""
    reloads = Counter(
        "policy_reloads",
        "Policy files read again.",
        ["result"],
        registry=metrics.registry,
        namespace="midstream",
    )
    for result in ("loaded", "refused"):
        reloads.labels(result)  # rates start at 0

    def put(live: LiveProbes) -> None:
        serving.put(live)
        show_probes(metrics, live)

    keeper = PolicyKeeper(settings, serving.live, put, lambda result: reloads.labels(result).inc())
    tracing = Tracing(serving.scorer, serving.template, serving.probes, serving.model)
    records = functools.partial(find_records, settings.records)
    return Operations(serving.describe, keeper, keys, records, audit, offenders, tracing)


def show_probes(metrics: Metrics, live: LiveProbes) -> None:
    """Probes and thresholds in service, as metrics; a threshold that is no more goes."""
    cards = [p.card for p in live.probes]
    metrics.threshold.clear()
    metrics.probes([(c.name, c.version, c.sha256, ",".join(map(str, c.layers))) for c in cards], live.rules)
