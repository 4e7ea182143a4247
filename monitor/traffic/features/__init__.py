"""The feature log: one pooled vector per layer and phase of sampled requests, in Parquet; never any text."""

from monitor.traffic.features.files import Feature, Reason, erase_features, read_features, write_features
from monitor.traffic.features.log import FeatureLog
from monitor.traffic.features.retention import Retention
from monitor.traffic.features.sample import Chances, Kept
from monitor.traffic.features.writer import Dropped, Events, FeatureWriter, Origin

__all__ = [
    "Chances",
    "Dropped",
    "Events",
    "Feature",
    "FeatureLog",
    "FeatureWriter",
    "Kept",
    "Origin",
    "Reason",
    "Retention",
    "erase_features",
    "read_features",
    "write_features",
]
