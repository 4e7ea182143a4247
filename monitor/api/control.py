"""What an operator may do with a running server: the admin routes' operations, filled in alike for both engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from monitor.api.admin import KeyTable, Operations
from monitor.api.features import Eraser
from monitor.api.tracing import Tracing
from monitor.audit import Audit
from monitor.config import Settings
from monitor.live import LiveProbes
from monitor.metrics import Metrics
from monitor.metrics.drift import Reference
from monitor.metrics.shift import Normal
from monitor.offenders import Offenders
from monitor.policy.keeper import PolicyKeeper
from monitor.template import ChatTemplate
from monitor.traffic import find_records
from monitor.types import Phase, Scorer
from probes_store.base import load_base


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
    serving: Serving,
    settings: Settings,
    keys: KeyTable,
    audit: Audit,
    offenders: Offenders,
    metrics: Metrics,
    erase: Eraser | None = None,
) -> Operations:
    for result in ("loaded", "refused"):
        metrics.policy_reloads.labels(result)  # rates start at 0

    def put(live: LiveProbes) -> None:
        serving.put(live)
        show_probes(metrics, live)

    keeper = PolicyKeeper(settings, serving.live, put, lambda result: metrics.policy_reloads.labels(result).inc())
    tracing = Tracing(serving.scorer, serving.template, serving.probes, serving.model)
    records = functools.partial(find_records, settings.log)
    return Operations(serving.describe, keeper, keys, records, audit, offenders, tracing, erase)


def show_probes(metrics: Metrics, live: LiveProbes) -> None:
    """Probes and thresholds in service, as metrics, and what their cards say of benign values."""
    cards = [p.card for p in live.probes]
    known = {c.name: c.calibration for c in cards}
    references = {}
    for form, rules in live.rules.items():
        for rule in rules:
            calibration = known[rule.probe].get(form, {}).get(rule.phase.value)
            if rule.threshold is not None and calibration is not None:
                target = calibration.rate(rule.threshold)
                references[rule.probe, rule.phase, form] = Reference(calibration.deciles, rule.threshold, target)
    shown = [(c.name, c.version, c.sha256, ",".join(map(str, c.layers))) for c in cards]
    metrics.probes(shown, live.rules, references, live.policies)
    if metrics.shift.watched:
        metrics.shift.expect(harmless(live))


def harmless(live: LiveProbes) -> dict[tuple[str, Phase], dict[int, Normal]]:
    """Where the harmless training rows of each probe lay that says so, by layer.

    raises: ProbeInvalid if what lies beside a probe is damaged
    """
    found: dict[tuple[str, Phase], dict[int, Normal]] = {}
    for probe in live.probes:
        base, calibrated = load_base(probe), probe.card.calibration.get("chat", {})
        of_layers = {} if base is None else {layer: Normal.of(base.cells[layer, 0]) for layer in base.layers}
        # Its rows are prompts, unless it is a probe of answers alone.
        phase = Phase.RESPONSE if calibrated.keys() == {Phase.RESPONSE.value} else Phase.PROMPT
        if of_layers and None not in of_layers.values():
            found[probe.card.name, phase] = {layer: normal for layer, normal in of_layers.items() if normal is not None}
    return found
