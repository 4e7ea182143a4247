"""LinearProbe, one linear probe as a torch module, and ProbeBank, any number of them as one matrix per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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


Bias = float | tuple[float, ...]
"""Of one projection, or one of each of several."""


@dataclass(frozen=True, slots=True)
class ProbeWeights:
    """One probe's numbers. weight: float32 for each tapped layer, (d_model,), or (k, d_model), a row a projection"""

    name: str
    weight: Mapping[int, Tensor]
    bias: Bias

    @property
    def biases(self) -> tuple[float, ...]:
        return self.bias if isinstance(self.bias, tuple) else (self.bias,)

    @property
    def k(self) -> int:
        """Projections a token."""
        return len(self.biases)


class ProbeBank:
    """Probes stacked, K columns: for each tapped layer one matrix (d_model, K) float32, and one bias (K,).

    A column's logit is the sum over its probe's layers plus its bias, once. `reads[i]` says which columns read
    `layers[i]`; the others are zero there. `columns[p]` are the p-th probe's, next to each other; `names[c]` says whose
    column c is: the probe's name, with a number where it has several.
    raises: ProbeMismatch if the widths differ, ProbeInvalid if a weight is not finite
    """

    def __init__(self, probes: Sequence[ProbeWeights], d_model: int, device: torch.device | str = "cpu") -> None:
        ends = list(accumulate(p.k for p in probes))
        self.columns = tuple(slice(end - p.k, end) for p, end in zip(probes, ends, strict=True))
        self.names = tuple(name for p in probes for name in _names(p))
        self.d_model = d_model
        self.layers = tuple(sorted({layer for p in probes for layer in p.weight}))
        self.bias = torch.tensor([b for p in probes for b in p.biases], dtype=torch.float32, device=device)
        self.weight = torch.zeros(len(self.layers), d_model, len(self), dtype=torch.float32, device=device)
        self.reads = torch.zeros(len(self.layers), len(self), dtype=torch.bool, device=device)
        for columns, probe in zip(self.columns, probes, strict=True):
            for layer, weight in probe.weight.items():
                rows = weight.reshape(-1, weight.shape[-1])
                if rows.shape != (probe.k, d_model):
                    raise ProbeMismatch(
                        f"probe {probe.name!r} has a weight of shape {tuple(weight.shape)} at layer {layer} for "
                        f"{probe.k} projections, the model's residual stream is {d_model} wide; train the probe on "
                        "this model"
                    )
                if not bool(torch.isfinite(rows).all()):
                    raise ProbeInvalid(f"probe {probe.name!r} has a weight that is not finite; publish it again")
                row = self.layers.index(layer)
                self.weight[row, :, columns] = rows.T.to(self.weight)
                self.reads[row, columns] = True

    def __len__(self) -> int:
        """K, the columns."""
        return len(self.names)

    def same(self, other: ProbeBank) -> bool:
        """Whether its columns are the other's, number by number."""
        if (self.names, self.layers) != (other.names, other.layers):
            return False
        pairs = ((self.weight, other.weight), (self.bias, other.bias), (self.reads, other.reads))
        return self is other or all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def combine(self, per_layer: Tensor) -> Tensor:
        """(n_layers, n_tokens, K) float32 of one product per layer -> (n_tokens, K) logits.

        A layer that a probe reads and that holds NaN makes that probe's logits NaN; other probes don't notice.
        """
        zero = torch.zeros((), dtype=torch.float32, device=per_layer.device)
        return torch.where(self.reads[:, None, :], per_layer, zero).sum(0) + self.bias


def _names(probe: ProbeWeights) -> list[str]:
    return [probe.name] if probe.k == 1 else [f"{probe.name}.{i}" for i in range(probe.k)]
