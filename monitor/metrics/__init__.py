"""What is counted of finished sequences, and shown to Prometheus."""

from monitor.metrics.observe import Metrics

__all__ = ["Metrics"]
