"""The base of a probe: moments of its training rows by layer and label, in one optional file beside its weights.

Enough to fit it again with new rows when the old ones are gone, and to say how far live features lie from them. A row
is what training pools: the mean of the residual stream over the counted positions of the turn that its label is about.
Weights of rows are not in it: every row counts once. Of a probe that also reads a turn's last token it has the
plane, too, that the same fit finds in the means alone: that is what retraining goes on from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from monitor.errors import ProbeInvalid
from probes_store.moments import Moments
from probes_store.store import BASE, StoredProbe, read_file

LABELS = (0, 1)
Cell = tuple[int, int]
"""Layer and label."""
Plane = tuple[npt.NDArray[np.float64], float]
"""(n_layers * d_model,) weight, layers side by side in ascending order, and bias."""


@dataclass(frozen=True, slots=True)
class Base:
    """cells: moments, float64 in memory, float32 in the file, for each layer and both labels
    plane: (n_layers * d_model,) weight and bias over the means, of a probe that reads more than those; None of others

    Layers are kept apart: how features of two layers vary together is not in it.
    """

    d_model: int
    cells: Mapping[Cell, Moments]
    plane: Plane | None = None

    @classmethod
    def of(
        cls,
        features: npt.NDArray[Any],
        layers: Sequence[int],
        labels: npt.NDArray[np.int64],
        plane: Plane | None = None,
    ) -> Base:
        """features: (n, len(layers), d_model), finite, any float dtype; labels: (n,), 0 or 1; a label may be missing

        raises: ValueError for other shapes or a row that is not finite
        """
        n, n_layers, d = features.shape
        if n_layers != len(layers) or labels.shape != (n,):
            raise ValueError(f"features {features.shape}, {len(layers)} layers and labels {labels.shape} don't fit")
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite")
        cells = {}
        for label in LABELS:
            rows = features[labels == label]
            for column, layer in enumerate(layers):
                cells[layer, label] = Moments.of(rows[:, column]) if len(rows) else Moments.none(d)
        return cls(d, cells, plane)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.cells}))

    def rows(self, label: int) -> float:
        return self.cells[self.layers[0], label].n

    def __add__(self, other: Base) -> Base:
        """Of the rows of both; neither's plane is theirs. raises: ValueError for other layers or another width"""
        if (self.layers, self.d_model) != (other.layers, other.d_model):
            raise ValueError(f"bases of layers {self.layers} and {other.layers} can't be merged")
        return Base(self.d_model, {cell: m + other.cells[cell] for cell, m in self.cells.items()})

    def dump(self) -> bytes:
        """safetensors; the same moments give the same bytes. A scatter is kept as its upper triangle."""
        triangle = np.triu_indices(self.d_model)
        tensors = {}
        for (layer, label), moments in sorted(self.cells.items()):
            tensors[f"n.{layer}.{label}"] = np.array([moments.n], np.float32)
            tensors[f"mean.{layer}.{label}"] = moments.mean.astype(np.float32)
            tensors[f"scatter.{layer}.{label}"] = moments.scatter[triangle].astype(np.float32)
        if self.plane is not None:
            weight, bias = self.plane
            tensors["plane.weight"], tensors["plane.bias"] = weight.astype(np.float32), np.array([bias], np.float32)
        data: bytes = save_tensors(tensors, {"schema": "midstream-base/1"})
        return data


def load_base(probe: StoredProbe) -> Base | None:
    """None for a probe without one. raises: ProbeInvalid if it is not what the card vouches for"""
    wanted = probe.card.base_sha256
    if wanted is None:
        return None
    path, card = probe.path / BASE, probe.card
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != wanted:
        raise ProbeInvalid(f"{path} is not the file that its card names; restore it or publish the probe again")
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProbeInvalid(f"{path} is not a safetensors file: {str(error).splitlines()[0]}") from error
    d = card.d_model
    shapes = {"n": (1,), "mean": (d,), "scatter": (d * (d + 1) // 2,)}
    cells = [(layer, label) for layer in card.layers for label in LABELS]
    expected = {f"{name}.{layer}.{label}": shape for layer, label in cells for name, shape in shapes.items()}
    if "plane.weight" in tensors:
        expected |= {"plane.weight": (len(card.layers) * d,), "plane.bias": (1,)}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise ProbeInvalid(f"{path} does not hold what its card's layers and width need; publish the probe again")
    if not all(t.dtype == np.float32 and bool(np.isfinite(t).all()) for t in tensors.values()):
        raise ProbeInvalid(f"{path} holds a number that is not finite float32; publish the probe again")
    plane = None
    if "plane.weight" in tensors:
        plane = tensors["plane.weight"].astype(np.float64), float(tensors["plane.bias"][0])
    return Base(d, {(layer, label): _moments(tensors, f"{layer}.{label}", d) for layer, label in cells}, plane)


def _moments(tensors: Mapping[str, npt.NDArray[Any]], cell: str, d: int) -> Moments:
    scatter = np.zeros((d, d))
    scatter[np.triu_indices(d)] = tensors[f"scatter.{cell}"]
    scatter += np.triu(scatter, 1).T
    return Moments(float(tensors[f"n.{cell}"][0]), tensors[f"mean.{cell}"].astype(np.float64), scatter)
