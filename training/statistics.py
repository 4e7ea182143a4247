"""One-pass statistics of features by layer, label and source: enough to fit again, to merge, and to take a source out.

No feature is kept, only counts, means and scatters; so a probe can be fitted again when the activations are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from monitor.errors import ConfigInvalid, ProbeMismatch
from probes_store.moments import Moments
from training.files import write_whole

SCHEMA = "midstream-statistics/1"


class Cell(NamedTuple):
    layer: int
    label: int
    source: str


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: str
    d: int
    origin: dict[str, str]
    cells: tuple[Cell, ...]
    sha256: str


class Statistics:
    """Moments by cell. Not thread safe.

    d: width of a feature; origin: what the features are (model, template, pooling): only equal ones are merged
    """

    def __init__(self, d: int, origin: Mapping[str, str], cells: Mapping[Cell, Moments] | None = None) -> None:
        self.d, self.origin, self.cells = d, dict(sorted(origin.items())), dict(cells or {})

    @property
    def layers(self) -> list[int]:
        return sorted({cell.layer for cell in self.cells})

    @property
    def sources(self) -> list[str]:
        return sorted({cell.source for cell in self.cells})

    def add(
        self,
        features: npt.NDArray[Any],
        layers: Sequence[int],
        labels: npt.NDArray[np.int64],
        sources: Sequence[str],
    ) -> None:
        """features: (n, len(layers), d), finite, any float dtype; labels: (n,), 0 or 1; sources: n keys

        raises: ValueError for other shapes or a row that is not finite; nothing is added then
        """
        n = len(labels)
        if features.shape != (n, len(layers), self.d) or len(sources) != n:
            raise ValueError(f"features {features.shape}, {n} labels and {len(sources)} sources don't fit")
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite")
        rows: dict[tuple[int, str], list[int]] = {}
        for row, (label, source) in enumerate(zip(labels.tolist(), sources, strict=True)):
            rows.setdefault((label, str(source)), []).append(row)
        for (label, source), which in rows.items():
            for column, layer in enumerate(layers):
                cell = Cell(layer, label, source)
                new = Moments.of(features[which, column])
                self.cells[cell] = self.cells[cell] + new if cell in self.cells else new

    def merge(self, other: Statistics) -> Statistics:
        """raises: ProbeMismatch if the other's features are not the same kind"""
        self._check(other)
        cells = dict(self.cells)
        for cell, moments in other.cells.items():
            cells[cell] = cells[cell] + moments if cell in cells else moments
        return Statistics(self.d, self.origin, cells)

    def subtract(self, other: Statistics) -> Statistics:
        """Without rows that were added before, to about 1e-12 of the whole; empty cells go.

        raises: ProbeMismatch if the features are not the same kind, ValueError if those rows are not in it
        """
        self._check(other)
        cells = dict(self.cells)
        for cell, moments in other.cells.items():
            if cell not in cells:
                raise ValueError(f"there are no rows of {cell}")
            cells[cell] = cells[cell] - moments
        return Statistics(self.d, self.origin, {cell: m for cell, m in cells.items() if m.n > 0})

    def without(self, source: str) -> Statistics:
        """All but one source, exactly: each has cells of its own."""
        return Statistics(self.d, self.origin, {c: m for c, m in self.cells.items() if c.source != source})

    def pooled(self, layer: int, label: int, weights: Mapping[str, float] | None = None) -> Moments:
        """All sources of a layer and label together. weights: of each row of a source; 1 if it is not named"""
        total = Moments.none(self.d)
        for cell in sorted(c for c in self.cells if c.layer == layer and c.label == label):
            total += self.cells[cell].times((weights or {}).get(cell.source, 1.0))
        return total

    def _check(self, other: Statistics) -> None:
        for key in sorted(self.origin.keys() | other.origin.keys()):
            mine, theirs = self.origin.get(key), other.origin.get(key)
            if mine != theirs:
                raise ProbeMismatch(f"statistics of other features: {key} is {mine!r} and {theirs!r}; harvest again")
        if self.d != other.d:
            raise ProbeMismatch(f"statistics of features {self.d} and {other.d} wide; harvest again")

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all; same statistics, same bytes. A scatter is kept as its triangle."""
        order, triangle = sorted(self.cells), np.triu_indices(self.d)
        tensors = {"n": np.array([self.cells[c].n for c in order], dtype=np.float64)}
        for i, cell in enumerate(order):
            tensors[f"mean.{i}"] = self.cells[cell].mean
            tensors[f"scatter.{i}"] = self.cells[cell].scatter[triangle]
        header = _Header(format=SCHEMA, d=self.d, origin=self.origin, cells=tuple(order), sha256="")
        header.sha256 = _digest(header, tensors)
        # One key: safetensors writes several in any order.
        write_whole(path, save_tensors(tensors, {"statistics": header.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """raises: ConfigInvalid if the file is missing, damaged or something else"""
        try:
            with safe_open(path, framework="numpy") as file:
                header = _Header.model_validate_json((file.metadata() or {}).get("statistics", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator
        except (OSError, SafetensorError, ValidationError) as error:
            raise ConfigInvalid(
                f"{path}: not a statistics file ({str(error).splitlines()[0]}); make it again"
            ) from error
        d, count = header.d, len(header.cells)
        wanted: dict[str, tuple[int, ...]] = {"n": (count,)}
        wanted |= {f"mean.{i}": (d,) for i in range(count)} | {
            f"scatter.{i}": (d * (d + 1) // 2,) for i in range(count)
        }
        sound = header.format == SCHEMA and {k: t.shape for k, t in tensors.items()} == wanted
        if (
            not sound
            or any(t.dtype != np.float64 for t in tensors.values())
            or _digest(header, tensors) != header.sha256
        ):
            raise ConfigInvalid(f"{path}: damaged, or of another version; make it again from its harvest")
        cells = {}
        for i, cell in enumerate(header.cells):
            scatter = np.zeros((d, d))
            scatter[np.triu_indices(d)] = tensors[f"scatter.{i}"]
            scatter += np.triu(scatter, 1).T
            cells[cell] = Moments(float(tensors["n"][i]), tensors[f"mean.{i}"], scatter)
        return cls(d, header.origin, cells)


def _digest(header: _Header, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """Of the numbers and of what the header says they are."""
    digest = hashlib.sha256(header.model_copy(update={"sha256": ""}).model_dump_json().encode())
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
