"""Averages of the residual stream over positions of requests of ours, in the worker, over the steps that feed them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from monitor.engines.vllm.support import POOLED
from monitor.engines.vllm.tap import BankTap, to_host


class Span(Protocol):
    """One request in a step: its positions [first, first + n) are rows [start, start + n)."""

    request_id: str
    start: int
    n: int
    first: int


@dataclass(slots=True)
class _Pool:
    """spans: positions [start, end); sums: (n_spans, n_layers, d_model); done: positions below it are in the sums"""

    spans: list[list[int]]
    sums: Tensor
    done: int = 0

    @property
    def whole(self) -> bool:
        return self.done >= max(end for _, end in self.spans)

    @property
    def means(self) -> Tensor:
        lengths = torch.tensor([end - start for start, end in self.spans], device=self.sums.device)
        return self.sums / lengths[:, None, None]


class Pools:
    """`note` which requests of a step are new, `take` its rows before the next one overwrites them."""

    def __init__(self, tap: BankTap, device: torch.device) -> None:
        self._tap, self._device = tap, device
        self._pools: dict[str, _Pool] = {}

    def note(self, scheduled: Any) -> None:
        for request_id in scheduled.finished_req_ids:
            self._pools.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            spans = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(POOLED)
            if spans:
                shape = len(spans), len(self._tap.blocks), self._tap.d_model
                self._pools[request.req_id] = _Pool(spans, torch.zeros(shape, device=self._device))

    def take(self, spans: Iterable[Span]) -> dict[str, Tensor]:
        """{request: (n_spans, n_layers, d_model) float32, on its way to the host} of those that are complete now."""
        if not self._pools:
            return {}
        found = {}
        for span in spans:
            pool = self._pools.get(span.request_id)
            if pool is None:
                continue
            self._add(pool, span)
            if pool.whole:
                found[span.request_id] = to_host(pool.means)
                del self._pools[span.request_id]
        return found

    def _add(self, pool: _Pool, span: Span) -> None:
        """A preempted request comes again, from its beginning or from what the cache has: nothing counts twice."""
        if span.first > pool.done:
            return  # a gap: it never gets whole, and nobody takes it for an average
        for i, (start, end) in enumerate(pool.spans):
            low, high = max(start, pool.done), min(end, span.first + span.n)
            if low < high:
                rows = slice(span.start + low - span.first, span.start + high - span.first)
                pool.sums[i] += self._tap.stream(rows)
        pool.done = max(pool.done, span.first + span.n)
