"""The feature log: one pooled vector per layer and phase of sampled requests, in Parquet; never any text."""

from monitor.traffic.features.files import Feature, Reason, read_features, write_features

__all__ = ["Feature", "Reason", "read_features", "write_features"]
