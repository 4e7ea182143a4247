"""The tap in a worker: sets of probe columns, read at the tapped blocks by a forward hook in the model's own pass.

The hook calls one opaque op (monitor.tap): torch.compile traces it, CUDA graphs capture it. Weights and buffers belong
to the block as module buffers, so they are inputs of the compiled graph and never constants in it: probes are swapped
by copying, and a graph from the compile cache serves the weights of today.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monitor.engines.vllm.support import TapConfig, whole_stream
from monitor.tap import decoder_blocks, tap_op
from monitor.types import Scores


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
        if config.streams:
            for block in self.blocks:
                block.register_buffer("midstream_stream", torch.zeros(capacity, self.d_model, device=device), False)
            self.handles += [b.register_forward_hook(_whole_kept if whole else _summed_kept) for b in self.blocks]

    def load(self, bank: int, epoch: int, layers: list[int], weight: Tensor, bias: list[float]) -> None:
        """Put a probe set into a bank. No request may be using it.

        layers: those the set reads, in the order of weight's first axis; weight: (n_layers, d_model, k) float32
        """
        k = weight.shape[2]
        columns = slice(bank * self.config.width, bank * self.config.width + k)
        reads = self._reads.copy()  # a step that is under way keeps what it began with
        for row, (layer, block) in enumerate(zip(self.config.layers, self.blocks, strict=True)):
            of_layer: Any = block.midstream_weight
            of_layer[:, columns.start : (bank + 1) * self.config.width] = 0.0
            if layer in layers:
                of_layer[:, columns] = weight[layers.index(layer)].to(of_layer)
            reads[row, bank] = layer in layers
        bias_of_all = self._bias.copy()
        bias_of_all[bank] = np.nan
        bias_of_all[bank, :k] = bias
        self._bias, self._reads = bias_of_all, reads
        self.epochs = tuple(epoch if b == bank else e for b, e in enumerate(self.epochs))

    def begin(self) -> None:
        """Before a forward pass: a tap that no longer writes leaves NaN, never the rows of the pass before."""
        for block in self.blocks:
            out: Any = block.midstream_out
            out.fill_(torch.nan)

    def rows(self, n: int) -> list[Tensor]:
        """The pass's products, on their way to the host: per layer (n, n_banks * width) float32."""
        return [to_host(block.midstream_out[:n]) for block in self.blocks]  # type: ignore[index]

    def stream(self, rows: slice) -> Tensor:
        """(n_layers, d_model) float32: the newest pass's residual streams, summed over rows; still on the device."""
        return torch.stack([block.midstream_stream[rows].sum(0) for block in self.blocks])  # type: ignore[index]

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


@torch.library.custom_op("midstream::keep", mutates_args=("out",))
def keep_op(hidden: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """Write `hidden + residual` in float32 into the first rows of `out`, (capacity, d_model); opaque as `tap_op` is."""
    rows = out.narrow(0, 0, hidden.shape[0])
    rows.copy_(hidden)
    if residual is not None:
        rows.add_(residual)


@keep_op.register_fake
def _(hidden: Tensor, residual: Tensor | None, out: Tensor) -> None:
    return None


def _summed_kept(block: nn.Module, _args: Any, output: Any) -> None:
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    keep_op(hidden, residual, block.midstream_stream)


def _whole_kept(block: nn.Module, _args: Any, output: Any) -> None:
    keep_op(output[0] if isinstance(output, tuple) else output, None, block.midstream_stream)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_host(tensor: Tensor) -> Tensor:
    """On a GPU into pinned memory, in stream order and without waiting; the event of the step is waited for later."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
