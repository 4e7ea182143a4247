"""LinearProbe, one linear probe as a torch module, and ProbeBank, any number of them as one matrix per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monitor.errors import ProbeInvalid, ProbeMismatch


class LinearProbe(nn.Module):
    """`sigmoid(w . h + b)`: the probability that a position of the residual stream leans harmful.

    hidden: (..., d_model), any float dtype; computed in float32
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,) float32, > 0 leans harmful."""
        return self.linear(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Tensor:
        """(...,) float32 in [0, 1]."""
        return torch.sigmoid(self.logits(hidden))


@dataclass(frozen=True, slots=True)
class ProbeWeights:
    """One probe's numbers: a weight (d_model,) float32 for each tapped layer, and one bias."""

    name: str
    weight: Mapping[int, Tensor]
    bias: float


class ProbeBank:
    """K probes stacked: for each tapped layer one matrix (d_model, K) float32, and one bias (K,).

    A probe's logit is the sum over its layers plus its bias, once. `reads[i]` says which probes read `layers[i]`;
    the others have zero columns there.
    raises: ProbeMismatch if the widths differ, ProbeInvalid if a weight is not finite
    """

    def __init__(self, probes: Sequence[ProbeWeights], d_model: int, device: torch.device | str = "cpu") -> None:
        self.names = tuple(p.name for p in probes)
        self.d_model = d_model
        self.layers = tuple(sorted({layer for p in probes for layer in p.weight}))
        self.bias = torch.tensor([p.bias for p in probes], dtype=torch.float32, device=device)
        self.weight = torch.zeros(len(self.layers), d_model, len(probes), dtype=torch.float32, device=device)
        self.reads = torch.zeros(len(self.layers), len(probes), dtype=torch.bool, device=device)
        for column, probe in enumerate(probes):
            for layer, vector in probe.weight.items():
                if vector.shape != (d_model,):
                    raise ProbeMismatch(
                        f"probe {probe.name!r} has a weight of shape {tuple(vector.shape)} at layer {layer}, "
                        f"the model's residual stream is {d_model} wide; train the probe on this model"
                    )
                if not bool(torch.isfinite(vector).all()):
                    raise ProbeInvalid(f"probe {probe.name!r} has a weight that is not finite; publish it again")
                row = self.layers.index(layer)
                self.weight[row, :, column] = vector.to(self.weight)
                self.reads[row, column] = True

    def __len__(self) -> int:
        return len(self.names)

    def combine(self, per_layer: Tensor) -> Tensor:
        """(n_layers, n_tokens, K) float32 of one product per layer -> (n_tokens, K) logits.

        A layer that a probe reads and that holds NaN makes that probe's logit NaN; other probes don't notice.
        """
        zero = torch.zeros((), dtype=torch.float32, device=per_layer.device)
        return torch.where(self.reads[:, None, :], per_layer, zero).sum(0) + self.bias
