"""The logit lens: what each block would say next, token by token, and what the probes read there.

The residual stream of every block goes through the model's own last steps (final norm and unembedding), as if the
blocks after it did not exist. One forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from monitor.engines.embedded.attention import KVCache, Packed, use_packed_attention
from monitor.engines.embedded.harvest import score_streams
from monitor.engines.embedded.model import LoadedModel
from monitor.errors import ConfigInvalid, ModelUnsupported
from monitor.probe import ProbeBank
from monitor.tap import attach, decoder_blocks
from monitor.types import Prompt, Scores

_CHUNK_LOGITS = 2**23
"""Logits in memory at once, whatever the vocabulary: 32 MiB of float32, and as much again for their softmax."""


@dataclass(frozen=True, slots=True)
class ProbeTrace:
    """One probe. values: (n_layers, n_shown) float32, > 0 leans harmful

    A probe of one block: its direction and bias at every block; only the row of `reads` is what serving scores. One of
    several blocks: each block's share of the logit, without the bias, and NaN at blocks that it does not read.
    """

    name: str
    reads: tuple[int, ...]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Lens:
    """positions: those shown; tokens: their text; counts: which of them a probe's value is made of

    ids, probability: (n_layers, n_shown, k), the most probable first; words: each id's text
    scores: (n_tokens, n_probes) float32 logits of the WHOLE prompt, as serving scores it
    """

    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    counts: tuple[bool, ...]
    ids: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    words: dict[int, str]
    probes: tuple[ProbeTrace, ...]
    scores: Scores

    @property
    def n_layers(self) -> int:
        return len(self.ids)

    def top(self, layer: int, column: int) -> list[tuple[str, float]]:
        """(word, probability) of one cell, the most probable first."""
        cell = zip(self.ids[layer, column], self.probability[layer, column], strict=True)
        return [(self.words[int(i)], float(p)) for i, p in cell]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: layers x tokens; a probe's value is None where it says nothing."""
        cells = [
            [[[w, round(p, 5)] for w, p in self.top(layer, c)] for c in range(len(self.tokens))]
            for layer in range(self.n_layers)
        ]
        probes = {
            t.name: {"reads": list(t.reads), "values": [[_finite(v) for v in row] for row in t.values.tolist()]}
            for t in self.probes
        }
        return {
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "counts": list(self.counts),
            "top": cells,
            "probes": probes,
        }


def logit_lens(model: LoadedModel, prompt: Prompt, bank: ProbeBank | None = None, last: int = 24, k: int = 5) -> Lens:
    """Read every block's residual stream at the last `last` positions of a prompt.

    bank: the probes whose values are wanted, on this model's residual stream; k: words kept in each cell
    raises: ConfigInvalid if the prompt is longer than the model can read, ModelUnsupported if the last block, taken
    through the same steps, does not give the model's own logits
    """
    n = len(prompt.token_ids)
    if n > model.max_model_len:
        raise ConfigInvalid(f"the text has {n} tokens, this model reads {model.max_model_len}; shorten it")
    shown = min(last, n)
    read = frozenset(bank.layers) if bank is not None else frozenset()
    streams, tail, own = _forward(model, prompt, shown, read)
    unembed = _unembedding(model, tail)
    _check(unembed(streams[model.n_layers - 1][-1:])[0], own, model)

    rows = torch.stack([streams[layer][-shown:] for layer in range(model.n_layers)]).reshape(-1, model.d_model)
    ids, probability = _most_probable(unembed, rows, model.module.config.get_text_config().vocab_size, k)
    counts = {p for turn in prompt.turns for p in range(turn.start, turn.end)}
    positions = tuple(range(n - shown, n))
    decode: Callable[[list[int]], str] = model.tokenizer.decode
    scores = np.zeros((n, 0), np.float32) if bank is None else score_streams(bank, {i: streams[i] for i in bank.layers})
    return Lens(
        positions=positions,
        tokens=tuple(decode([prompt.token_ids[p]]) for p in positions),
        counts=tuple(p in counts for p in positions),
        ids=ids.reshape(model.n_layers, shown, -1).numpy(),
        probability=probability.reshape(model.n_layers, shown, -1).numpy(),
        words={i: decode([i]) for i in sorted(set(ids.flatten().tolist()))},
        probes=() if bank is None else _traces(bank, rows.reshape(model.n_layers, shown, -1)),
        scores=scores,
    )


def _forward(
    model: LoadedModel, prompt: Prompt, shown: int, whole: frozenset[int]
) -> tuple[dict[int, Tensor], list[nn.Module], Tensor]:
    """One pass: streams, float32, of the last `shown` positions (all, at `whole`), what ran after the last block in
    its order, and the model's own logits at the last position."""
    use_packed_attention(model.module)
    streams: dict[int, Tensor] = {}
    tail: list[nn.Module] = []

    def read(layer: int, hidden: Tensor) -> None:
        streams[layer] = (hidden[0] if layer in whole else hidden[0, -shown:]).float()

    def ran(module: nn.Module, _args: Any, _output: Any) -> None:
        if len(streams) == model.n_layers:
            tail.append(module)

    inside = {id(m) for m in decoder_blocks(model.module).modules()}
    leaves = [m for m in model.module.modules() if id(m) not in inside and next(m.children(), None) is None]
    handles = attach(model.module, range(model.n_layers), read)
    handles += [leaf.register_forward_hook(ran) for leaf in leaves]
    packed = Packed([KVCache(len(prompt.token_ids))], [len(prompt.token_ids)])
    try:
        with torch.inference_mode():
            output = model.module(
                input_ids=torch.tensor([prompt.token_ids]),
                position_ids=torch.tensor([packed.positions()]),
                use_cache=False,
                packed=packed,
                logits_to_keep=1,
            )
    finally:
        for handle in handles:
            handle.remove()
    return streams, tail, output.logits[0, -1].float()


def _unembedding(model: LoadedModel, tail: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """(n, d_model) rows of a residual stream -> (n, vocabulary) float32 logits."""
    config = model.module.config.get_text_config()
    # What some models do to their logits outside of any module: Gemma 2; Granite; Cohere.
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def unembed(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            hidden = rows[None].to(model.module.dtype)
            for module in tail:
                hidden = module(hidden)
            logits = hidden[0].float() * scale
            return logits if cap is None else torch.tanh(logits / cap) * cap

    return unembed


def _check(got: Tensor, own: Tensor, model: LoadedModel) -> None:
    """No lens is better than one that shows another model's words."""
    allowed = (1e-4 if model.dtype == "float32" else 2e-2) * max(1.0, float(own.abs().max()))
    off = float((got - own).abs().max()) if got.shape == own.shape else float("nan")
    if not off <= allowed:
        raise ModelUnsupported(
            f"{type(model.module).__name__}: final norm and unembedding give logits that are off by {off:.3g} from the "
            "model's own; it does something else after its last block, which the logit lens does not know"
        )


def _most_probable(unembed: Callable[[Tensor], Tensor], rows: Tensor, vocabulary: int, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) ids and probabilities, a chunk of rows at a time."""
    step = max(1, _CHUNK_LOGITS // vocabulary)
    found = [
        unembed(rows[start : start + step]).softmax(-1).topk(min(k, vocabulary), dim=-1)
        for start in range(0, len(rows), step)
    ]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _traces(bank: ProbeBank, streams: Tensor) -> tuple[ProbeTrace, ...]:
    """streams: (n_layers, n_shown, d_model) float32"""
    traces = []
    for column, name in enumerate(bank.names):
        rows = [row for row in range(len(bank.layers)) if bank.reads[row, column]]
        reads = tuple(bank.layers[row] for row in rows)
        if len(rows) == 1:
            values = streams @ bank.weight[rows[0], :, column] + bank.bias[column]
        else:
            values = torch.full(streams.shape[:2], torch.nan)
            for row, layer in zip(rows, reads, strict=True):
                values[layer] = streams[layer] @ bank.weight[row, :, column]
        traces.append(ProbeTrace(name, reads, values.numpy()))
    return tuple(traces)


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
