"""Packed attention: tokens of many sequences in one row, each attending to its own key-value cache.

transformers lets a model's attention function be chosen by name. Ours gets the packed tokens of a step (batch of
one), so every matrix product of the step serves all sequences, without padding, and a sequence joins or leaves by
being in the next step's list or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monitor.errors import ModelUnsupported

NAME = "midstream_packed"
_KNOWN = {
    "packed",
    "position_ids",
    "use_cache",
    "cache_position",
    "is_causal",
    "output_attentions",
    "cu_seq_lens_q",
}


class KVCache:
    """Keys and values of one sequence, (heads, reserved, head_dim) per layer; pages are touched as it grows."""

    def __init__(self, reserved: int) -> None:
        self.reserved = reserved
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value: (heads, n, head_dim) of positions length.. -> views of all positions so far"""
        n = key.shape[1]
        if layer not in self._layers:
            self._layers[layer] = (
                key.new_empty(key.shape[0], self.reserved, key.shape[2]),
                value.new_empty(value.shape[0], self.reserved, value.shape[2]),
            )
        keys, values = self._layers[layer]
        end = self.length + n
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]

    def fork(self, reserved: int | None = None) -> KVCache:
        """A copy that goes on by itself: the choices of one prompt share its prefill."""
        twin = KVCache(self.reserved if reserved is None else reserved)
        for layer, (keys, values) in self._layers.items():
            twin.write(layer, keys[:, : self.length], values[:, : self.length])
        twin.length = self.length
        return twin


@dataclass(slots=True)
class Packed:
    """One step: n_new[i] tokens of sequence i, in order, at positions caches[i].length.."""

    caches: Sequence[KVCache]
    n_new: Sequence[int]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return sum(self.n_new)

    def positions(self) -> list[int]:
        return [c.length + i for c, n in zip(self.caches, self.n_new, strict=True) for i in range(n)]

    def advance(self) -> None:
        """After the forward pass: the new tokens are part of the caches."""
        for cache, n in zip(self.caches, self.n_new, strict=True):
            cache.length += n

    def mask(self, n: int, total: int, window: int | None) -> Tensor:
        """(n, total) bool: query i stands at position total - n + i and sees the last `window` positions."""
        key = (n, total, window)
        if key not in self._masks:
            query = torch.arange(total - n, total)[:, None]
            seen = torch.arange(total)[None, :]
            mask = seen <= query
            if window is not None:
                mask &= seen > query - window
            self._masks[key] = mask
        return self._masks[key]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, n_tokens, head_dim), key and value alike -> (1, n_tokens, heads, head_dim)

    raises: ModelUnsupported for a model that passes something else of consequence (soft caps, sinks, biases)
    """
    strange = [k for k, v in extra.items() if k not in _KNOWN and v is not None]
    if strange:
        raise ModelUnsupported(
            f"{type(module).__name__} needs {', '.join(strange)}; the embedded engine has no such attention"
        )
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    start = 0
    for cache, n in zip(packed.caches, packed.n_new, strict=True):
        rows = slice(start, start + n)
        start += n
        keys, values = cache.write(module.layer_idx, key[0, :, rows], value[0, :, rows])
        total = keys.shape[1]
        windowed = sliding_window is not None and total > sliding_window
        causal = n > 1 and n == total and not windowed
        mask = packed.mask(n, total, sliding_window).to(query.device) if (n > 1 and not causal) or windowed else None
        heads = F.scaled_dot_product_attention(
            query[:, :, rows],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=keys.shape[0] != query.shape[1],
        )
        out[:, rows] = heads.transpose(1, 2)
    return out, None


def use_packed_attention(model: Any) -> None:
    """Switch a loaded transformers model to packed attention. No mask is made: this name has no mask function."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
