"""What is exported: a causal model up to the last tapped block, the probes' products, and attention over given caches.

The new tokens of all streams of a step are packed into one row, so the matrix products of the blocks know no padding;
attention alone sees them as a padded batch. Keys and values that were computed before come in, new ones go out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monitor.errors import ModelUnsupported
from monitor.probe import ProbeBank
from monitor.tap import attach, decoder_blocks

NAME = "midstream_observer"
_KNOWN = {"layout", "position_ids", "use_cache", "is_causal", "output_attentions", "dropout"}
_HIDDEN = torch.finfo(torch.float32).min


@dataclass(slots=True)
class Layout:
    """How n packed tokens of B streams lie in a padded batch, at most S of each.

    rows: (B, S) index into the packed tokens; places of padding repeat any token
    back: (n,) index into the B * S places; past_length: (B,) tokens that `past` holds of each stream
    past: keys and values in turn, for each block: (B, kv_heads, P, head_dim); what lies after past_length is ignored
    """

    rows: Tensor
    back: Tensor
    past_length: Tensor
    past: list[Tensor]
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _masks: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What to add to the products with past and with new keys: (B, 1, 1, S or 1, P) and (S, S).

        Padding stands after the real tokens, so being causal hides it from them.
        """
        if window not in self._masks:
            query, old = torch.arange(self.rows.shape[1])[:, None], torch.arange(self.past[0].shape[2])
            length = self.past_length[:, None, None]
            seen, fresh = old < length, query >= query.T
            if window is not None:
                seen, fresh = seen & (old > length + query - window), fresh & (query - query.T < window)
            self._masks[window] = _bias(seen)[:, None, None], _bias(fresh)
        return self._masks[window]


def _bias(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, _HIDDEN)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, n, head_dim), key and value alike with kv_heads -> (1, n, heads, head_dim)

    raises: ModelUnsupported for a model that passes something else of consequence (soft caps, sinks, biases)
    """
    strange = [k for k, v in extra.items() if k not in _KNOWN and v is not None]
    if strange:
        raise ModelUnsupported(f"{type(module).__name__} needs {', '.join(strange)}; the observer has none of it")
    past_key, past_value = layout.past[2 * module.layer_idx], layout.past[2 * module.layer_idx + 1]
    kv_heads, size = past_key.shape[1], past_key.shape[3]
    batch, width = layout.rows.shape
    packed_key, packed_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    layout.new.append((packed_key, packed_value))
    places = layout.rows.reshape(-1)

    def padded(packed: Tensor) -> Tensor:
        """(n, h, head_dim) -> (B, kv_heads, h / kv_heads * S, head_dim): heads of the same keys in one product"""
        spread = packed.index_select(0, places).reshape(batch, width, kv_heads, -1, size)
        return spread.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)

    # Old and new are multiplied apart: joining them would copy every key and value at every step.
    q = padded(query[0].transpose(0, 1)) * scaling
    old, fresh = layout.masks(sliding_window)
    by_query = (batch, kv_heads, -1, width)
    to_old = (q @ past_key.transpose(-1, -2)).reshape(*by_query, past_key.shape[2]) + old
    to_new = (q @ padded(packed_key).transpose(-1, -2)).reshape(*by_query, width) + fresh
    share = torch.cat([to_old, to_new], dim=-1).softmax(-1)
    share_old = share[..., : past_key.shape[2]].reshape(batch, kv_heads, -1, past_key.shape[2])
    share_new = share[..., past_key.shape[2] :].reshape(batch, kv_heads, -1, width)
    heads = (share_old @ past_value + share_new @ padded(packed_value)).reshape(*by_query, size)
    spread = heads.permute(0, 3, 1, 2, 4).reshape(batch * width, -1, size)
    return spread.index_select(0, layout.back)[None], None


class Reader(nn.Module):
    """forward: packed tokens and caches -> scores (n, k), new keys and values (n_blocks, n, kv_heads, head_dim)."""

    def __init__(self, model: Any, bank: ProbeBank) -> None:
        super().__init__()
        self.model = _cut(model.base_model, bank.layers[-1] + 1)
        self.layers = bank.layers
        for row, layer in enumerate(bank.layers):
            self.register_buffer(f"probes_{layer}", bank.weight[row].clone())
        self.register_buffer("probes_bias", bank.bias.clone())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        back: Tensor,
        past_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = Layout(rows, back, past_length, past)
        streams: dict[int, Tensor] = {}

        def read(layer: int, hidden: Tensor) -> None:
            streams[layer] = hidden[0].float()

        handles = attach(self.model, self.layers, read)
        try:
            self.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, layout=layout)
        finally:
            for handle in handles:
                handle.remove()
        scores = self.get_buffer("probes_bias")
        for layer, stream in streams.items():
            scores = scores + stream @ self.get_buffer(f"probes_{layer}")
        return scores, torch.stack([k for k, _ in layout.new]), torch.stack([v for _, v in layout.new])


def _cut(model: Any, n_blocks: int) -> Any:
    """A twin that shares the first blocks, and ends after them. What it then computes is not asked for, nor exported.

    raises: ModelUnsupported if the blocks are not the model's own
    """
    blocks = decoder_blocks(model)
    name = next((k for k, child in model.named_children() if child is blocks), None)
    if name is None:
        raise ModelUnsupported(
            f"{type(model).__name__} holds its decoder blocks inside another module; it can't be cut"
        )
    twin = copy.copy(model)
    twin._modules = dict(model._modules) | {name: nn.ModuleList(blocks[:n_blocks])}
    twin.config = copy.copy(model.config)
    twin.config.num_hidden_layers = n_blocks
    return twin


@contextlib.contextmanager
def observed(model: Any) -> Iterator[None]:
    """A transformers model with the attention above, and its own again after."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
