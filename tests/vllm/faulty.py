"""A worker whose scores break on demand: what T1 injects where vLLM's engine runs."""

import time
from typing import Any

import numpy as np

from .deaf import DeafWorker


class FaultyWorker(DeafWorker):
    _fault, _clean = "", 0

    def break_scores(self, fault: str, clean: int) -> None:
        """From now on, after `clean` good passes. fault: of tests.faults.FAULTS; "" mends it"""
        self._fault, self._clean = fault, clean

    def attach_scores(self, output: Any, step: Any) -> Any:
        if self._fault and self._clean == 0:
            step = Broken(step, self._fault)
            if self._fault == "tap silent":
                self.go_deaf()
        self._clean = max(0, self._clean - 1)
        return super().attach_scores(output, step)


class Broken:
    def __init__(self, step: Any, fault: str) -> None:
        self._step, self._fault = step, fault

    @property
    def pooled(self) -> dict[str, bytes]:
        pooled: dict[str, bytes] = self._step.pooled
        return pooled

    def scores(self, cache: Any) -> Any:
        if self._fault == "score raises":
            raise RuntimeError("injected")
        if self._fault == "tap late":
            time.sleep(0.5)
        found = self._step.scores(cache)
        if self._fault == "probe removed":
            return {}
        value = {"NaN": np.nan, "inf": np.inf}.get(self._fault)
        if value is None:
            return found
        return {i: (first, np.full(len(raw) // 4, value, np.float32).tobytes()) for i, (first, raw) in found.items()}
