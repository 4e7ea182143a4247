"""The residual stream of packed sequences, by a forward pass that stops after the last block that is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monitor.engines.embedded.attention import KVCache, Packed
from monitor.tap import attach


class _StopForward(Exception):
    """Raised by the hook on the last block that is needed; what comes after it is not computed."""


class Streams:
    """Hooks on a model with packed attention, until `close`. Between two passes of `run` nobody else may use it.

    raises: ProbeMismatch for a layer the model does not have
    """

    def __init__(self, module: Any, layers: Sequence[int]) -> None:
        self._module, self._last = module, max(layers)
        self._device = next(module.parameters()).device
        self._streams: dict[int, Tensor] = {}
        self._handles = attach(module, sorted(layers), self._read)

    def _read(self, layer: int, hidden: Tensor) -> None:
        self._streams[layer] = hidden[0].float()
        if layer == self._last:
            raise _StopForward

    def run(self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> dict[int, Tensor]:
        """{layer: (n_tokens, d_model) float32} of the new tokens of every sequence, one after the other."""
        packed = Packed(caches, [len(t) for t in tokens])
        ids = torch.tensor([[t for part in tokens for t in part]], device=self._device)
        positions = torch.tensor([packed.positions()], device=self._device)
        with torch.inference_mode(), contextlib.suppress(_StopForward):
            self._module(input_ids=ids, position_ids=positions, use_cache=False, packed=packed)
        packed.advance()
        streams, self._streams = self._streams, {}
        return streams

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
