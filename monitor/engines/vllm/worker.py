"""vLLM's worker with the tap: scores in the model's own forward pass, put in order of requests and positions.

The tap is a forward hook on each tapped decoder block that calls one opaque op (monitor.tap): torch.compile traces
it, CUDA graphs capture it. Weights and buffers belong to the block as module buffers, so they are inputs of the
compiled graph and never constants in it: probes are swapped by copying, and a graph from the compile cache serves the
weights of today.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from monitor.engines.vllm.slots import Ints, SlotScores, slots_of
from monitor.engines.vllm.support import KEY, TapConfig, whole_stream
from monitor.tap import decoder_blocks, tap_op
from monitor.types import ModelUnsupported, Scores

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class BankTap:
    """The tap in a worker: `n_banks` sets of `width` probe columns, read at `layers` in one product per layer.

    A bank without probes has NaN as its bias: its scores are missing, not 0.
    """

    def __init__(self, model: nn.Module, config: TapConfig, capacity: int, device: torch.device) -> None:
        self.config = config
        columns = config.n_banks * config.width
        blocks = decoder_blocks(model)
        self.d_model: int = model.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        self.blocks = [blocks[layer] for layer in config.layers]
        self.epochs = (-1,) * config.n_banks
        self._device = device
        self._bias = np.full((config.n_banks, config.width), np.nan, dtype=np.float32)
        self._reads = np.ones((len(config.layers), config.n_banks, config.width), dtype=bool)
        whole = whole_stream(config.architecture)
        for block in self.blocks:
            block.register_buffer("midstream_weight", torch.zeros(self.d_model, columns, device=device), False)
            block.register_buffer("midstream_out", torch.full((capacity, columns), torch.nan, device=device), False)
        self.handles = [block.register_forward_hook(_whole if whole else _summed) for block in self.blocks]

    def load(self, bank: int, epoch: int, layers: list[int], weight: Tensor, bias: list[float]) -> None:
        """Put a probe set into a bank. No request may be using it.

        layers: those the set reads, in the order of weight's first axis; weight: (n_layers, d_model, k) float32
        """
        k = weight.shape[2]
        columns = slice(bank * self.config.width, bank * self.config.width + k)
        for row, (layer, block) in enumerate(zip(self.config.layers, self.blocks, strict=True)):
            of_layer: Any = block.midstream_weight
            of_layer[:, columns.start : (bank + 1) * self.config.width] = 0.0
            if layer in layers:
                of_layer[:, columns] = weight[layers.index(layer)].to(of_layer)
            self._reads[row, bank] = layer in layers
        # New arrays: a step that is under way keeps those it began with.
        self._bias = self._bias.copy()
        self._bias[bank] = np.nan
        self._bias[bank, :k] = bias
        self._reads = self._reads.copy()
        self.epochs = tuple(epoch if b == bank else e for b, e in enumerate(self.epochs))

    def begin(self) -> None:
        """Before a forward pass: a tap that no longer writes leaves NaN, never the rows of the pass before."""
        for block in self.blocks:
            out: Any = block.midstream_out
            out.fill_(torch.nan)

    def rows(self, n: int) -> list[Tensor]:
        """The pass's products, on their way to the host: per layer (n, n_banks * width) float32."""
        return [_to_host(block.midstream_out[:n]) for block in self.blocks]  # type: ignore[index]

    def combine(self, bias: Scores, reads: Any, per_layer: list[Tensor]) -> Scores:
        """(n, n_banks, width) logits: the sum over the layers a set reads, plus its bias, once."""
        total = np.zeros((len(per_layer[0]), *bias.shape), dtype=np.float32)
        for row, product in enumerate(per_layer):
            total += np.where(reads[row], product.numpy().reshape(total.shape), np.float32(0))
        total += bias
        return total

    def seconds(self, n_tokens: int, dtype: torch.dtype, repeats: int = 200) -> float:
        """Median seconds of the tap's products over all layers for `n_tokens` rows, on the model's device."""
        hidden = torch.randn(n_tokens, self.d_model, dtype=dtype, device=self._device)
        out = torch.empty(n_tokens, self.config.n_banks * self.config.width, device=self._device)
        times = []
        for _ in range(repeats):
            _synchronize(self._device)
            began = time.perf_counter()
            for block in self.blocks:
                tap_op(hidden, hidden, block.midstream_weight, out)
            _synchronize(self._device)
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    @property
    def constants(self) -> tuple[Scores, Any, tuple[int, ...]]:
        return self._bias, self._reads, self.epochs


def _summed(block: nn.Module, _args: Any, output: Any) -> None:
    """vLLM's usual block returns (hidden, residual); the stream is their sum. One tensor: nothing is left to add."""
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    tap_op(hidden, residual, block.midstream_weight, block.midstream_out)


def _whole(block: nn.Module, _args: Any, output: Any) -> None:
    """A block that returns the whole stream, alone or first in a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    tap_op(hidden, None, block.midstream_weight, block.midstream_out)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _to_host(tensor: Tensor) -> Tensor:
    """On a GPU into pinned memory, in stream order and without waiting; the event of the step is waited for later."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


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

    def __init__(self, tap: BankTap, runner: Any, scheduled: Any) -> None:
        batch = runner.input_batch
        n = scheduled.total_num_scheduled_tokens
        self._tap = tap
        self._bias, self._reads, self._epochs = tap.constants
        self._spans = list(_spans(batch, scheduled))
        self._per_layer = tap.rows(n)
        self._tokens = _to_host(runner.input_ids.gpu[:n])
        self._arrived = None
        if self._tokens.is_pinned():
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

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


def _spans(batch: Any, scheduled: Any) -> Any:
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
        self._cache: SlotScores | None = None
        self._step: Step | None = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
        if kinds != ["FullAttentionSpec"]:
            # Slots are read from the one block table there is; a window would put null blocks into it.
            raise ModelUnsupported(f"KV cache groups {', '.join(kinds)}: only one of full attention is supported")
        super().initialize_from_config(kv_cache_config)

    def execute_model(self, scheduler_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens == 0:
            return super().execute_model(scheduler_output)
        self.tap.begin()
        output = super().execute_model(scheduler_output)
        self._step = Step(self.tap, self.model_runner, scheduler_output)
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
        if self._cache is None:
            table = self.model_runner.input_batch.block_table[0]
            per_block = self.vllm_config.cache_config.block_size
            n_slots = self.vllm_config.cache_config.num_gpu_blocks * max(per_block, table.block_size)
            self._cache = SlotScores(n_slots, self.tap.config.n_banks, self.tap.config.width)
        setattr(output, KEY, step.scores(self._cache))
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
