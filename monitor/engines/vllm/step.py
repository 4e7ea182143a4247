"""One forward pass of vLLM: which rows belong to which request and position, and their scores once arrived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monitor.engines.vllm.pools import Pools
from monitor.engines.vllm.slots import Ints, SlotScores, slots_of
from monitor.engines.vllm.tap import BankTap, to_host


@dataclass(slots=True)
class _Span:
    """One request in a step: its positions [first, first + n) are rows [start, start + n).

    restored: the tokens of [0, first) that came out of the prefix cache, and the slots they came from
    """

    request_id: str
    start: int
    n: int
    first: int
    slots: Any
    restored: tuple[Any, Ints] | None


class Step:
    """One forward pass, noted when it was launched: the batch changes before its rows have arrived."""

    def __init__(self, tap: BankTap, runner: Any, scheduled: Any, pools: Pools | None = None) -> None:
        batch = runner.input_batch
        n = scheduled.total_num_scheduled_tokens
        self._tap = tap
        self._bias, self._reads, self._epochs = tap.constants
        self._spans = list(_spans(batch, scheduled))
        self._per_layer = tap.rows(n)
        self._tokens = to_host(runner.input_ids.gpu[:n])
        self._pooled = {} if pools is None else pools.take(self._spans)
        self._arrived = None
        if self._tokens.is_pinned():
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @property
    def pooled(self) -> dict[str, bytes]:
        """Averages of requests of ours that are complete, as float32 bytes; once `scores` has waited for the step."""
        return {request_id: means.numpy().tobytes() for request_id, means in self._pooled.items()}

    def scores(self, cache: SlotScores) -> dict[str, tuple[int, bytes]]:
        """Per request the first position and the rows from there on, cached prefix included, as float32 bytes."""
        if self._arrived is not None:
            self._arrived.synchronize()
        rows = self._tap.combine(self._bias, self._reads, self._per_layer)
        tokens = self._tokens.numpy().astype(np.int32, copy=False)
        for span in self._spans:  # all of them before the first read: they may share blocks
            own = slice(span.start, span.start + span.n)
            positions = np.arange(span.first, span.first + span.n, dtype=np.int32)
            cache.write(span.slots, positions, tokens[own], self._epochs, rows[own])
        found = {}
        for span in self._spans:
            own_rows, first = rows[span.start : span.start + span.n], span.first
            if span.restored is not None:
                slots, expected = span.restored
                own_rows = np.concatenate([cache.read(slots, expected, self._epochs), own_rows])
                first = 0
            found[span.request_id] = (first, own_rows.tobytes())
        return found


def _spans(batch: Any, scheduled: Any) -> Iterator[_Span]:
    new = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
    cached = scheduled.scheduled_cached_reqs
    known = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    table = batch.block_table[0]
    start = 0
    for row, request_id in enumerate(batch.req_ids[: batch.num_reqs]):
        n = scheduled.num_scheduled_tokens[request_id]
        first = new[request_id] if request_id in new else known[request_id]
        blocks = table.block_table.np[row]
        slots = slots_of(blocks, table.block_size, np.arange(first, first + n, dtype=np.int32))
        restored = None
        if first and (request_id in new or request_id in cached.resumed_req_ids):
            positions = np.arange(first, dtype=np.int32)
            expected = batch.token_ids_cpu[row, :first].astype(np.int32)
            restored = (slots_of(blocks, table.block_size, positions), expected)
        yield _Span(request_id, start, n, first, slots, restored)
        start += n
