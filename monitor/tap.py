"""The tap: where the residual stream is read in the forward pass that runs anyway, and multiplied by the probes.

`attach` hooks decoder blocks, `Tap` is the buffer the scores land in. A row is the score of the token that was fed,
so it exists one step after that token was sampled, and the last sampled token has none: 4 prompt tokens and 5
generated ones give 8 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monitor.errors import ModelUnsupported, ProbeMismatch
from monitor.probe import ProbeBank
from monitor.types import Scores


@torch.library.custom_op("midstream::tap", mutates_args=("out",))
def tap_op(hidden: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor) -> None:
    """Write `(hidden + residual).float() @ weight` into the first rows of `out`.

    hidden, residual: (n_tokens, d_model), any float dtype; residual None where a block returns the whole stream
    weight: (d_model, K) float32; out: (capacity, K) float32. Opaque to torch.compile and CUDA graphs: the three
    tensors keep their addresses, so probes are swapped by copying into `weight`.
    """
    stream = hidden.float() if residual is None else hidden.float() + residual.float()
    torch.mm(stream, weight, out=out.narrow(0, 0, stream.shape[0]))


@tap_op.register_fake
def _(hidden: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor) -> None:
    return None


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder blocks, in order.

    raises: ModelUnsupported if there is not exactly one list of `num_hidden_layers` modules
    """
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = text_config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(found) != 1:
        raise ModelUnsupported(
            f"{type(model).__name__}: expected one list of {n_layers} decoder blocks, found {len(found)}; "
            "this architecture can't be tapped yet"
        )
    return found[0]


def attach(model: nn.Module, layers: Iterable[int], read: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
    """Call `read(layer, hidden)` with the residual stream at each of `layers`, at every forward pass.

    layers: 0-based blocks; hidden: the OUTPUT of the block, as the model shaped it, (..., d_model)
    returns: handles; `handle.remove()` takes the tap out
    raises: ProbeMismatch for a layer the model does not have
    """
    blocks = decoder_blocks(model)
    handles = []
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ProbeMismatch(
                f"layer {layer} does not exist: the model has blocks 0 to {len(blocks) - 1}; choose one of them"
            )

        def hook(_module: nn.Module, _args: Any, output: Any, layer: int = layer) -> None:
            read(layer, output[0] if isinstance(output, tuple) else output)

        handles.append(blocks[layer].register_forward_hook(hook))
    return handles


class Tap:
    """Scores of the tokens of one forward pass: `begin`, run the model, `read`.

    The buffer is filled with NaN before each pass: a tap that has stopped writing leaves NaN, never old rows.
    """

    def __init__(self, model: nn.Module, bank: ProbeBank, capacity: int = 0) -> None:
        self.bank = bank
        self._row = {layer: row for row, layer in enumerate(bank.layers)}
        self._out = self._buffer(capacity)
        self._handles = attach(model, bank.layers, self._write)

    def _buffer(self, capacity: int) -> Tensor:
        shape = len(self.bank.layers), capacity, len(self.bank)
        with torch.inference_mode(False):  # one made under it could not be written outside of it
            return torch.full(shape, torch.nan, device=self.bank.weight.device)

    def _write(self, layer: int, hidden: Tensor) -> None:
        row = self._row[layer]
        tap_op(hidden.reshape(-1, hidden.shape[-1]), None, self.bank.weight[row], self._out[row])

    def begin(self, n_tokens: int) -> None:
        """Announce a forward pass over `n_tokens` rows (batch and sequence flattened)."""
        if n_tokens > self._out.shape[1]:
            self._out = self._buffer(n_tokens)
        else:
            self._out[:, :n_tokens] = torch.nan

    def read(self, n_tokens: int) -> Scores:
        """(n_tokens, K) float32 logits, > 0 leans harmful; NaN where a layer was not written."""
        scores: Scores = self.bank.combine(self._out[:, :n_tokens]).cpu().numpy().astype(np.float32, copy=False)
        return scores

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
