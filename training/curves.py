"""One probe looked at while it is trained: loss and accuracy after every epoch, on both sides of the split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from monitor.engines.embedded.harvest import residual_streams
from monitor.engines.embedded.model import LoadedModel
from monitor.probe import LinearProbe
from training.fit import Array, Fitted, Scaler

EPOCHS = 200
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trained:
    """curves: training and validation loss and accuracy after each epoch, each of length `epochs`"""

    fitted: Fitted
    curves: dict[str, list[float]]


def train(x: Array, y: Labels, x_val: Array, y_val: Labels, epochs: int = EPOCHS, seed: int = 0) -> Trained:
    """LinearProbe by Adam, as `training.fit.fit_torch` does it with equal weights, looked at after every epoch.

    x, x_val: (n, d_model) raw features; the validation rows change nothing, they are only looked at
    """
    torch.manual_seed(seed)
    scaler = Scaler.fit(x)
    sides = {
        name: (torch.from_numpy(scaler(features)).float(), torch.from_numpy(labels).float())
        for name, features, labels in (("training", x, y), ("validation", x_val, y_val))
    }
    probe = LinearProbe(x.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-2)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    curves: dict[str, list[float]] = {f"{name}_{what}": [] for name in sides for what in ("loss", "accuracy")}
    for _ in range(epochs):
        optimizer.zero_grad()
        features, labels = sides["training"]
        bce(probe.logits(features), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name, (features, labels) in sides.items():
                logits = probe.logits(features)
                curves[f"{name}_loss"].append(round(float(bce(logits, labels)), 6))
                curves[f"{name}_accuracy"].append(round(float(((logits > 0) == (labels > 0)).double().mean()), 6))
    weight, bias = probe.linear.weight.detach()[0].double().numpy(), float(probe.linear.bias.detach())
    return Trained(Fitted("linear_probe_adam", *scaler.fold(weight, bias), {"epochs": epochs}), curves)


def features(
    model: LoadedModel, texts: Sequence[str], layers: Sequence[int], tick: Callable[[int], None]
) -> npt.NDArray[np.float32]:
    """(n_layers, n, d_model): each text as a user's message, averaged over its counted positions."""
    prompts = [model.template.encode([{"role": "user", "content": text}]) for text in texts]
    out = np.zeros((len(layers), len(texts), model.d_model), np.float32)
    for index, streams in residual_streams(model, prompts, layers, tick):
        turn = prompts[index].turns[-1]
        for row, layer in enumerate(layers):
            out[row, index] = streams[layer][turn.start : turn.end].mean(0).numpy()
    return out
