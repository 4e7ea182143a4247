"""Harvested features on disk: a JSON manifest and shards in safetensors, each whole, checked before it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from monitor.errors import ConfigInvalid
from training.files import write_whole

MANIFEST = "manifest.json"
FORMAT: Literal["midstream-harvest/1"] = "midstream-harvest/1"
Pooling = Literal["mean", "last"]
Features = npt.NDArray[np.floating[Any]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Plan(_Part):
    """What is harvested, from what, and how; a folder holds one plan's shards. rows_sha256: of all rows in order

    reader: which engine read them, with its arguments: kernels and quantisation change a feature. An older manifest
    does not say, so nothing goes on from it.
    """

    format: Literal["midstream-harvest/1"] = FORMAT
    model: str
    fingerprint: str
    reader: str = "not known"
    model_dtype: str
    template_hash: str
    position_rule: str
    d_model: int
    layers: tuple[int, ...] = Field(min_length=1)
    poolings: tuple[Pooling, ...] = Field(min_length=1)
    dtype: Literal["float16", "float32"]
    max_text_tokens: int
    shard_rows: int = Field(ge=1)
    sources: tuple[str, ...]
    rows: int
    rows_sha256: str

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def origin(self, pooling: Pooling) -> dict[str, str]:
        """What must be equal for two harvests' features to be of one kind."""
        keys = ("model", "fingerprint", "reader", "model_dtype", "template_hash", "position_rule", "max_text_tokens")
        return {key: str(getattr(self, key)) for key in keys} | {"pooling": pooling}


class Manifest(_Part):
    """shards: sha256 of each finished one, by number"""

    plan: Plan
    shards: dict[int, str] = {}


@dataclass(frozen=True, slots=True)
class Shard:
    """features: by pooling, (n, n_layers, d_model); labels: (n,); counted: (n,) positions that were averaged;
    hashes: n rows' sha256 in hex; sources: n keys"""

    features: dict[Pooling, Features]
    labels: npt.NDArray[np.int64]
    counted: npt.NDArray[np.int64]
    hashes: list[str]
    sources: list[str]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest | None:
    """None if there is none; raises: ConfigInvalid if it is damaged"""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigInvalid(f"{path} can't be used ({reason}); remove the folder and harvest again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")


def write_shard(folder: Path, number: int, shard: Shard, plan: Plan) -> str:
    """Returns its sha256, for the manifest."""
    tensors: dict[str, npt.NDArray[Any]] = {name: values.astype(plan.dtype) for name, values in shard.features.items()}
    tensors["labels"], tensors["counted"] = shard.labels, shard.counted
    tensors["hashes"] = np.frombuffer(bytes.fromhex("".join(shard.hashes)), dtype=np.uint8).reshape(-1, 32)
    index = {source: i for i, source in enumerate(plan.sources)}
    tensors["sources"] = np.array([index[s] for s in shard.sources], dtype=np.int64)
    data = save_tensors(tensors, {"format": FORMAT})
    write_whole(shard_path(folder, number), data)
    return hashlib.sha256(data).hexdigest()


def is_sound(folder: Path, number: int, manifest: Manifest) -> bool:
    """Whether a shard is there as its manifest has it."""
    path, wanted = shard_path(folder, number), manifest.shards.get(number)
    if wanted is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted


def read_shard(folder: Path, number: int, manifest: Manifest) -> Shard:
    """raises: ConfigInvalid if it is missing, damaged or not this plan's; nothing is parsed before its checksum"""
    path, plan = shard_path(folder, number), manifest.plan
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"{path} can't be read ({error.strerror}); harvest again, it is made anew") from error
    if hashlib.sha256(data).hexdigest() != manifest.shards.get(number):
        raise ConfigInvalid(f"{path} does not have the checksum of the manifest; harvest again, it is made anew")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ConfigInvalid(f"{path} is not a safetensors file: {error}") from error
    n = len(plan.rows_of(number))
    wide = (n, len(plan.layers), plan.d_model)
    wanted: dict[str, tuple[int, ...]] = {"labels": (n,), "counted": (n,), "sources": (n,), "hashes": (n, 32)}
    wanted |= dict.fromkeys(plan.poolings, wide)
    if {name: t.shape for name, t in tensors.items()} != wanted:
        raise ConfigInvalid(f"{path} does not hold what its manifest says; remove the folder and harvest again")
    return Shard(
        {pooling: tensors[pooling] for pooling in plan.poolings},
        tensors["labels"],
        tensors["counted"],
        [row.tobytes().hex() for row in tensors["hashes"]],
        [plan.sources[i] for i in tensors["sources"].tolist()],
    )


class Harvest:
    """A finished harvest. Shards are read and checked one by one; `load` holds one pooling of all rows."""

    def __init__(self, folder: Path) -> None:
        """raises: ConfigInvalid if the folder has no manifest, or shards are missing"""
        manifest = read_manifest(folder)
        if manifest is None:
            raise ConfigInvalid(f"{folder} holds no harvest ({MANIFEST} is missing); run `midstream harvest`")
        missing = set(range(manifest.plan.n_shards)) - manifest.shards.keys()
        if missing:
            raise ConfigInvalid(
                f"{folder}: {len(missing)} of {manifest.plan.n_shards} shards are missing; harvest again"
            )
        self.folder, self.manifest, self.plan = folder, manifest, manifest.plan

    def shards(self) -> Iterator[Shard]:
        """In order of the rows; raises: ConfigInvalid at a shard that is damaged"""
        for number in range(self.plan.n_shards):
            yield read_shard(self.folder, number, self.manifest)

    def load(self, pooling: Pooling, layers: Sequence[int] | None = None) -> tuple[Features, npt.NDArray[np.int64]]:
        """(n, n_layers, d_model) in the harvest's dtype, and labels (n,); rows in their order.

        layers: some of the harvest's, all if None
        raises: ConfigInvalid for a pooling or layer that was not harvested
        """
        plan = self.plan
        wanted = plan.layers if layers is None else tuple(layers)
        if pooling not in plan.poolings or not set(wanted) <= set(plan.layers):
            raise ConfigInvalid(
                f"{self.folder} holds {', '.join(plan.poolings)} of layers {', '.join(map(str, plan.layers))}; "
                "harvest what else you need into another folder"
            )
        columns = [plan.layers.index(layer) for layer in wanted]
        features = np.empty((plan.rows, len(wanted), plan.d_model), dtype=plan.dtype)
        labels = np.empty(plan.rows, dtype=np.int64)
        for number, shard in enumerate(self.shards()):
            rows = plan.rows_of(number)
            features[rows.start : rows.stop] = shard.features[pooling][:, columns]
            labels[rows.start : rows.stop] = shard.labels
        return features, labels
