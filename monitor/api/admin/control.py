"""What an operator may do with a running server: the admin routes' operations, filled in alike for both engines."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from monitor.api.admin.app import KeyTable, Operations
from monitor.api.admin.aside import Aside
from monitor.api.admin.desk import Desk
from monitor.api.admin.feed import Feed
from monitor.api.admin.probes import ProbeOperations
from monitor.api.admin.retraining import Retraining, environment
from monitor.api.admin.shelf import Shelf, everyday
from monitor.api.admin.swap import Slots, Swap
from monitor.api.admin.tracing import Tracing
from monitor.api.features import Eraser
from monitor.audit import Audit
from monitor.config import Settings
from monitor.live import LiveProbes, ServedModel
from monitor.metrics import Metrics
from monitor.metrics.drift import Reference
from monitor.metrics.shift import Normal
from monitor.offenders import Offenders
from monitor.policy.keeper import PolicyKeeper
from monitor.traffic import find_records
from monitor.traffic.features import FeatureLog
from monitor.types import Phase, Scorer
from probes_store.base import load_base

Versions = tuple[tuple[str, str, str], ...]
Normals = dict[tuple[str, Phase], dict[int, Normal]]


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine that serves. live, put: read and replace its probes, or their policy; stage: see `Slots`"""

    describe: Callable[[], Mapping[str, Any]]
    live: Callable[[], LiveProbes]
    put: Callable[[LiveProbes], None]
    stage: Callable[[LiveProbes], Awaitable[None]]
    scorer: Scorer
    model: ServedModel

    def probes(self) -> list[str]:
        return [p.name for p in self.live().probes]


def operations(
    serving: Serving,
    settings: Settings,
    keys: KeyTable,
    audit: Audit,
    offenders: Offenders,
    metrics: Metrics,
    erase: Eraser | None = None,
    say: Callable[[str], None] = print,
    feed: Feed | None = None,
    features: FeatureLog | None = None,
) -> Operations:
    """feed: of the records, for the console; None: there is none; features: likewise, for retraining"""
    for result in ("loaded", "refused"):  # rates start at 0
        metrics.policy_reloads.labels(result)
        metrics.probe_reload.labels(result)

    aside = Aside()
    normals: dict[Versions, Normals] = {}  # of the set that was staged last

    async def stage(live: LiveProbes) -> None:
        # Before anything serves: what was refused must not be in service. And once for each set, off the event loop.
        found = await aside(harmless, live) if metrics.shift.watched else {}
        await serving.stage(live)
        normals.clear()
        normals[live.versions] = found

    def put(live: LiveProbes) -> None:
        serving.put(live)
        show_probes(metrics, live)
        if live.versions in normals:  # else the same probes serve under another policy
            metrics.shift.expect(normals[live.versions])

    keeper = PolicyKeeper(settings, serving.live, put, lambda result: metrics.policy_reloads.labels(result).inc())
    tracing = Tracing(serving.scorer, serving.model.template, serving.probes, serving.model.name, aside)
    slots = Slots(serving.live, stage, put)

    def reloaded(result: Literal["loaded", "refused"]) -> None:
        metrics.probe_reload.labels(result).inc()

    swap = Swap(slots, serving.model, settings, audit, reloaded, say, aside)
    shelf = Shelf(
        swap.store,
        swap.slug,
        settings.log,
        settings.target_fpr / 2,
        lambda: everyday(settings),
        lambda: serving.live().probes,
        metrics.drift.standings,
    )
    flush = (lambda: None) if features is None else features.flush
    retraining = Retraining(lambda name: swap.store.newest(swap.slug, name), environment(settings), aside, flush)

    def tell() -> None:
        for name, needed in shelf.needs().items():
            metrics.calibration_rows_needed.labels(name).set(needed)

    probes = ProbeOperations(swap, shelf.describe, retraining, tell, aside)
    records = functools.partial(find_records, settings.log)
    desk = None if feed is None else Desk.of(settings, feed, serving.model.template, aside)
    return Operations(
        serving.describe,
        keeper,
        keys,
        records,
        audit,
        offenders,
        tracing,
        erase=erase,
        probes=probes,
        desk=desk,
        aside=aside,
    )


def show_probes(metrics: Metrics, live: LiveProbes) -> None:
    """Probes and thresholds in service, as metrics, and what their cards say of benign values."""
    known = {p.name: p.card.calibration for p in live.probes}
    references = {}
    for form, rules in live.rules.items():
        for rule in rules:
            calibration = known[rule.probe].get(form, {}).get(rule.phase.value)
            if rule.threshold is not None and calibration is not None:
                target = calibration.rate(rule.threshold)
                references[rule.probe, rule.phase, form] = Reference(calibration.deciles, rule.threshold, target)
    cards = [(p.name, p.card) for p in live.probes]
    shown = [(name, c.version, c.sha256, ",".join(map(str, c.layers)), c.kind) for name, c in cards]
    metrics.probes(shown, live.rules, references, live.policies)


def harmless(live: LiveProbes) -> Normals:
    """Where the harmless training rows of each probe lay that says so, by layer.

    raises: ProbeInvalid if what lies beside a probe is damaged
    """
    found: Normals = {}
    for probe in live.probes:
        base = load_base(probe)
        of_layers = {} if base is None else {layer: Normal.of(base.cells[layer, 0]) for layer in base.layers}
        # Its rows are prompts, unless it is a probe of answers alone.
        phase = Phase.RESPONSE if probe.card.of_answers else Phase.PROMPT
        if of_layers and None not in of_layers.values():
            found[probe.name, phase] = {layer: normal for layer, normal in of_layers.items() if normal is not None}
    return found
