"""vLLM's scheduler, carrying each step's scores out of the engine: in `kv_transfer_params` of the request's output.
So do the averages of requests of ours.

Steps of a chunked prefill give no output: their rows wait for the first one that does.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from monitor.engines.vllm.support import KEY, POOLED


class _CarriesScores:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[str, list[tuple[int, bytes]]] = {}
        self._pooled: dict[str, bytes] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        for request_id, rows in getattr(model_runner_output, KEY, {}).items():
            self._waiting.setdefault(request_id, []).append(rows)
        self._pooled |= getattr(model_runner_output, POOLED, {})
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for of_client in outputs.values():
            for output in of_client.outputs:
                rows = self._waiting.pop(output.request_id, None)
                if rows is not None:
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: rows}
                if self._pooled and (pooled := self._pooled.pop(output.request_id, None)) is not None:
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), POOLED: pooled}
        for of_request in (self._waiting, self._pooled):
            for request_id in [i for i in of_request if i not in self.requests]:  # type: ignore[attr-defined]
                del of_request[request_id]
        return outputs


class MonitoredScheduler(_CarriesScores, Scheduler):
    pass


class MonitoredAsyncScheduler(_CarriesScores, AsyncScheduler):
    """For async scheduling, vLLM's default on GPUs: another base would lose most of the throughput."""
