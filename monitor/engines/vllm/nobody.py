"""Nobody: an observer of records that are not kept."""

from __future__ import annotations

from monitor.types import Record


class Nobody:
    """seconds: that judging has taken"""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, record: Record) -> None:
        return None

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.seconds += seconds
