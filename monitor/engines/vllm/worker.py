"""vLLM's worker with the tap: a step is noted when it is launched, and its scores go along with its output."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from monitor.engines.vllm.pools import Pools
from monitor.engines.vllm.slots import SlotScores
from monitor.engines.vllm.step import Step
from monitor.engines.vllm.support import KEY, POOLED, TapConfig
from monitor.engines.vllm.tap import BankTap
from monitor.errors import ModelUnsupported
from monitor.tap import decoder_blocks

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class _Scored(AsyncModelRunnerOutput):
    """A step's output that is still on its way from the GPU, with the step's scores."""

    def __init__(self, output: AsyncModelRunnerOutput, worker: MonitoredWorker, step: Step) -> None:
        self._output, self._worker, self._step = output, worker, step

    def get_output(self) -> ModelRunnerOutput:
        return self._worker.attach_scores(self._output.get_output(), self._step)


class MonitoredWorker(_Worker):
    """The platform's worker, plus the tap. Settings come as `additional_config["midstream"]`: vLLM hashes them into
    the key of its compile cache, so a graph without the tap is never served for one with it."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        config = TapConfig(**self.vllm_config.additional_config[KEY])
        scheduler = self.vllm_config.scheduler_config
        graphs = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        capacity = max(scheduler.max_num_batched_tokens, graphs)
        self.tap = BankTap(self.model_runner.get_model(), config, capacity, self.device)
        self._pools = Pools(self.tap, self.device) if config.streams else None
        self._step: Step | None = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
        if kinds != ["FullAttentionSpec"]:
            # Slots are read from the one block table there is; a window would put null blocks into it.
            raise ModelUnsupported(f"KV cache groups {', '.join(kinds)}: only one of full attention is supported")
        super().initialize_from_config(kv_cache_config)
        per_block = self.vllm_config.cache_config.block_size
        n_slots = kv_cache_config.num_blocks * max(per_block, self.model_runner.input_batch.block_table[0].block_size)
        self._cache = SlotScores(n_slots, self.tap.config.n_banks, self.tap.config.width)

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._pools is not None:
            self._pools.note(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return super().execute_model(scheduler_output)
        self.tap.begin()
        output = super().execute_model(scheduler_output)
        self._step = Step(self.tap, self.model_runner, scheduler_output, self._pools)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        step, self._step = self._step, None
        if step is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _Scored(output, self, step)
        return self.attach_scores(output, step)

    def attach_scores(self, output: Any, step: Step) -> Any:
        try:
            scores = step.scores(self._cache)
        except RuntimeError as error:  # no scores, and the fail mode decides; it must not end everybody's answer
            print(f"midstream: the tap failed, the tokens of a step have no score: {error}", file=sys.stderr)
            scores = {}
        setattr(output, KEY, scores)
        if pooled := step.pooled:
            setattr(output, POOLED, pooled)
        return output

    # --- called by name from the API process ----------------------------------------------------------------------

    def midstream_load(
        self, bank: int, epoch: int, layers: list[int], shape: list[int], weight: bytes, bias: list[float]
    ) -> None:
        array = np.frombuffer(weight, dtype=np.float32).reshape(shape)
        self.tap.load(bank, epoch, layers, torch.from_numpy(array.copy()), bias)

    def midstream_report(self) -> dict[str, Any]:
        """What `midstream check` prints of this worker."""
        compilation = self.vllm_config.compilation_config
        return {
            "worker": type(self).__mro__[1].__name__,
            "runner": type(self.model_runner).__module__,
            "device": str(self.device),
            "layers": list(self.tap.config.layers),
            "d_model": self.tap.d_model,
            "n_layers": len(decoder_blocks(self.model_runner.get_model())),
            "compiled": str(compilation.mode.name),
            "cuda_graphs": str(compilation.cudagraph_mode.name),
            "kv_cache_groups": len(self.model_runner.kv_cache_config.kv_cache_groups),
            "tap_seconds": self.tap.seconds(1, self.model_config.dtype),
        }

    def midstream_tap_seconds(self, n_tokens: int) -> float:
        return self.tap.seconds(n_tokens, self.model_config.dtype)
