"""The feature log of a server: made of its settings and its model, and told to its metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

from monitor.config import Settings
from monitor.live import ServedModel
from monitor.metrics import Metrics
from monitor.template import POSITION_RULE
from monitor.traffic import TrafficLog, erase_each
from monitor.traffic.features import (
    Chances,
    Dropped,
    Events,
    FeatureLog,
    FeatureWriter,
    Origin,
    Reason,
    Retention,
    erase_features,
)

Eraser = Callable[[str | None, str | None], int]


def feature_log(settings: Settings, model: ServedModel, traffic: TrafficLog, metrics: Metrics) -> FeatureLog | None:
    """None unless `log_features` is on. raises: ConfigInvalid if pyarrow is missing or the folder can't be made"""
    if not settings.log_features:
        return None
    chances = Chances(settings.feature_rate, settings.feature_band, settings.feature_band_rate)
    origin = Origin(model.fingerprint, model.template.hash, POSITION_RULE)

    def dropped(cause: Dropped) -> None:
        metrics.features_dropped.labels(cause).inc()

    events = Events(
        traffic.mark_features, lambda reason: metrics.features_kept.labels(reason).inc(), dropped, metrics.shift.add
    )
    for reason in get_args(Reason):  # a rate sees a first event only in a series that was there before
        metrics.features_kept.labels(reason)
    for cause in get_args(Dropped):
        metrics.features_dropped.labels(cause)
    metrics.shift.watched = True
    writer = FeatureWriter(settings.features, origin, events, settings.feature_queue, settings.log_days)
    log = FeatureLog(writer, chances, settings.feature_queue, dropped)
    metrics.read("feature_queue_depth", lambda: log.depth)
    return log


def retention(settings: Settings) -> Retention | None:
    """What a feature log that is off by now has left grows old, too. None if there is nothing, or nothing too old."""
    if settings.log_features or settings.log_days is None or not settings.features.is_dir():
        return None
    return Retention(settings.features, settings.log_days)


def eraser(settings: Settings, traffic: TrafficLog, features: FeatureLog | None) -> Eraser:
    """Records, and then their features: also those of a log that is off by now. Returns the number of records."""
    of_features = features.erase if features is not None else functools.partial(erase_features, settings.features)

    def erase(key: str | None, request_id: str | None) -> int:
        acts = {"records": lambda: traffic.erase(key, request_id), "features": lambda: of_features(key, request_id)}
        return erase_each(acts)["records"]

    return erase
