"""Token activations and labels -> a probe with k projections, fitted by AdamW on the value that is served.

Poolings: those of monitor.heads (PROBES 9.8); `mean`; `swim`, the sliding-window mean with a softmax-weighted loss that
is served as `ema` (9.5, 9.6). With any of them a soft partial AUC may stand beside the cross-entropy (9.7), for low
false-positive rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from monitor.aggregate import Aggregation, aggregate
from monitor.heads import HeadKind
from monitor.probe import ProbeWeights
from training.fit import Array, Scaler

Pooling = HeadKind | Literal["mean", "swim"]
Tokens = Sequence[npt.NDArray[np.floating]]
"""Of each text (n_i, n_features), n_i >= 1: the streams of the positions that count, of several layers side by side."""
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class HeadRecipe:
    """heads: of `multimax` and the two attentions; window: tokens, of `swim` and `rolling_attention`

    batch: texts a step, half of each label; decay: AdamW's, decoupled; lr: falls to 0 in a straight line
    low_fpr: weight of the soft partial AUC, over the `beta` highest harmless values of a batch
    """

    pooling: Pooling
    heads: int = 4
    window: int = 16
    steps: int = 600
    batch: int = 128
    lr: float = 3e-3
    decay: float = 0.1
    low_fpr: float = 0.0
    beta: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.window, self.steps) < 1 or self.batch < 2:
            raise ValueError("heads, window and steps must be at least 1, batch at least 2")
        if not (self.lr > 0 <= self.decay and self.low_fpr >= 0 and 0 < self.beta <= 1):
            raise ValueError("lr must be above 0, decay and low_fpr at least 0, beta above 0 and at most 1")

    @property
    def k(self) -> int:
        """Projections a token."""
        return {"mean": 1, "swim": 1, "mean_last": 2, "multimax": self.heads}.get(self.pooling, 2 * self.heads)

    @property
    def aggregation(self) -> Aggregation:
        """What is served."""
        if self.pooling == "swim":
            return Aggregation("ema", alpha=2 / (self.window + 1))
        return Aggregation(self.pooling, window=self.window)


@dataclass(frozen=True, slots=True)
class FittedHead:
    """weight: (k, n_features) and bias: (k,), on raw features; details: for the card"""

    aggregation: Aggregation
    weight: Array
    bias: Array
    details: dict[str, float | int | str]

    @property
    def method(self) -> str:
        return f"head_{self.details['pooling']}"

    def values(self, texts: Tokens) -> Array:
        """(n,): what is served for each text, if all its tokens are one turn; > 0 leans harmful"""
        weight, bias = self.weight.T.astype(np.float32), self.bias.astype(np.float32)
        return np.array(
            [aggregate(self.aggregation, self._scores(x.astype(np.float32) @ weight + bias)) for x in texts]
        )

    def _scores(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return rows[:, 0] if len(self.bias) == 1 else rows

    def probe(self, name: str, layers: Sequence[int]) -> ProbeWeights:
        """layers: whose streams lie side by side in the features, in that order"""
        parts = np.split(self.weight.astype(np.float32), len(layers), axis=1)
        whole = {layer: torch.from_numpy(part.copy()) for layer, part in zip(layers, parts, strict=True)}
        if len(self.bias) == 1:
            return ProbeWeights(name, {layer: w[0] for layer, w in whole.items()}, float(self.bias[0]))
        return ProbeWeights(name, whole, tuple(map(float, self.bias)))


def fit_head(
    texts: Tokens,
    labels: npt.NDArray[np.int64],
    weights: Array,
    recipe: HeadRecipe,
    ticks: Callable[[int], Iterable[int]] = range,
) -> FittedHead:
    """The same bytes for the same data, seed, number of threads and machine.

    labels: (n,), 0 or 1; weights: (n,), how often a text is drawn among those of its label
    ticks: gives the steps, so that a caller can show them
    raises: ValueError for other shapes, a text without tokens, a feature that is not finite, or if one label is missing
    """
    if not len(texts) == len(labels) == len(weights):
        raise ValueError(f"{len(texts)} texts, {len(labels)} labels and {len(weights)} weights don't fit")
    if min(map(len, texts), default=0) == 0:
        raise ValueError("a text has no token that counts")
    scaler = _scaler(texts)
    chance = torch.Generator().manual_seed(recipe.seed)
    drawn = [torch.from_numpy(np.where(labels == label, weights, 0.0)) for label in (0, 1)]
    if any(float(w.sum()) <= 0 for w in drawn):
        raise ValueError(f"no training text has label {int(float(drawn[1].sum()) <= 0)}")
    mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean, scaler.scale))
    theta = torch.randn(recipe.k, len(mean), generator=chance).mul_(len(mean) ** -0.5).requires_grad_()
    bias = torch.zeros(recipe.k, requires_grad=True)
    groups: list[dict[str, Any]] = [
        {"params": [theta], "weight_decay": recipe.decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.lr)
    half, loss = recipe.batch // 2, torch.tensor(0.0)
    target = torch.cat([torch.zeros(half), torch.ones(half)])
    for step in ticks(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 - step / recipe.steps)
        batch = torch.cat([torch.multinomial(w, half, replacement=True, generator=chance) for w in drawn])
        scores, n = _projected([texts[i] for i in batch.tolist()], theta / scale, mean, bias, recipe.window)
        value, loss = _loss(recipe, scores, n, target)
        if recipe.low_fpr:
            loss = loss + recipe.low_fpr * partial_auc(value[half:], value[:half], recipe.beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    folded = theta.detach().double().numpy() / scaler.scale
    own = bias.detach().double().numpy() - folded @ scaler.mean
    own[: recipe.aggregation.first_value(recipe.k)] = 0.0  # a softmax does not see them, and large ones cost precision
    details: dict[str, float | int | str] = {
        "pooling": recipe.pooling,
        "projections": recipe.k,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "lr": recipe.lr,
        "decay": recipe.decay,
        "low_fpr": recipe.low_fpr,
        "seed": recipe.seed,
        "final_loss": round(float(loss.detach()), 5),
    }
    return FittedHead(recipe.aggregation, folded, own, details)


def _scaler(texts: Tokens) -> Scaler:
    """As `Scaler.fit`, over tokens; raises: ValueError for a feature that is not finite"""
    n = sum(map(len, texts))
    total = sum(x.sum(axis=0, dtype=np.float64) for x in texts)
    mean = np.asarray(total / n)
    deviation = np.sqrt(np.asarray(sum(((x - mean) ** 2).sum(axis=0) for x in texts)) / n)
    if not np.isfinite(deviation).all():
        raise ValueError("a feature is not finite")
    floor = 0.01 * float(np.median(deviation))
    constant = deviation < 1e-8 * max(1.0, float((np.abs(mean) + deviation).max()))
    return Scaler(mean, np.where(constant, 1.0, np.sqrt(deviation**2 + floor**2)))


def _projected(texts: Tokens, weight: Tensor, mean: Tensor, bias: Tensor, shortest: int) -> tuple[Tensor, Tensor]:
    """(B, T, k) scores of a batch, T at least `shortest`, and (B,) how many of them are a text's own."""
    n = torch.tensor([len(x) for x in texts])
    rows = torch.from_numpy(np.concatenate(texts)).float() - mean
    scores = rows @ weight.T + bias
    starts = n.cumsum(0) - n
    at = torch.arange(max(shortest, int(n.max())))
    # Beyond its end a text repeats its last score, which `n` then takes out.
    return scores[starts[:, None] + torch.minimum(at, n[:, None] - 1)], n


def pooled(pooling: Pooling, window: int, scores: Tensor, n: Tensor) -> Tensor:
    """(B,): each text's value. scores: (B, T, k), T >= window, of which the first n count; `swim`: its highest mean"""
    mask = torch.arange(scores.shape[1]) < n[:, None]
    if pooling == "swim":
        means, valid = _sliding(scores[..., 0], n, window)
        return means.masked_fill(~valid, -torch.inf).amax(1)
    if pooling == "multimax":
        return scores.masked_fill(~mask[..., None], -torch.inf).amax(1).sum(1)
    if pooling in ("mean", "mean_last"):
        mean = (scores[..., 0] * mask).sum(1) / n
        return mean if pooling == "mean" else mean + scores[torch.arange(len(n)), n - 1, 1]
    query, value = scores.chunk(2, dim=2)
    weight = query.masked_fill(~mask[..., None], -torch.inf).softmax(1)
    whole = (weight * value).sum(1)
    if pooling == "attention":
        return whole.sum(1)
    means = (query.unfold(1, window, 1).softmax(-1) * value.unfold(1, window, 1)).sum(-1)
    full = torch.arange(means.shape[1]) <= (n - window)[:, None]
    highest = means.masked_fill(~full[..., None], -torch.inf).amax(1)
    return torch.where((n >= window)[:, None], highest, whole).sum(1)


def _sliding(scores: Tensor, n: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(B, S) means of full windows, last the mean of a text that is shorter than one; and which of them there are."""
    means = scores.unfold(1, window, 1).mean(2)
    full = torch.arange(means.shape[1]) <= (n - window)[:, None]
    short = (scores * (torch.arange(scores.shape[1]) < n[:, None])).sum(1) / n
    return torch.cat([means, short[:, None]], 1), torch.cat([full, (n < window)[:, None]], 1)


def _loss(recipe: HeadRecipe, scores: Tensor, n: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The value of each text, and the mean loss."""
    value = pooled(recipe.pooling, recipe.window, scores, n)
    if recipe.pooling != "swim":
        return value, functional.binary_cross_entropy_with_logits(value, target)
    means, valid = _sliding(scores[..., 0], n, recipe.window)
    # The highest means carry the loss: harmless stretches of a harmful text cost nothing.
    share = means.masked_fill(~valid, -torch.inf).softmax(1)
    each = functional.binary_cross_entropy_with_logits(means, target[:, None].expand_as(means), reduction="none")
    return value, (share * each).sum(1).mean()


def partial_auc(harmful: Tensor, harmless: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Soft share of pairs in the wrong order, of harmful values and the `beta` highest harmless ones."""
    highest = harmless.topk(max(1, -int(-beta * len(harmless) // 1))).values
    return functional.softplus((highest[None, :] - harmful[:, None]) / temperature).mean()
