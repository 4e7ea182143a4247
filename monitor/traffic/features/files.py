"""Features on disk: Parquet files, each whole and with mode 0600; written, read, and rewritten where rows must go."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitor.errors import ConfigInvalid
from monitor.types import Phase

Reason = Literal["flagged", "uniform", "near"]
FORMAT = b"midstream-features/2"
_LOCK = ".lock"
_PLAIN: tuple[str, ...] = ("request_id", "choice", "key", "created", "phase", "q", "reason", "fingerprint")
_PLAIN += ("template_hash", "position_rule", "n_tokens", "rate")
_REPEATED = ("key", "phase", "reason", "fingerprint", "template_hash", "position_rule")


@dataclass(frozen=True, slots=True)
class Feature:
    """One phase of one finished sequence. key: name of the API key; created: seconds since the epoch

    q: the probability that it was kept with; rate: of the slice that every sequence had the same chance of, whatever
    became of it; 0: it is not of that slice; fingerprint, template_hash, position_rule: as a card names them
    n_tokens: positions that were averaged; vectors: (len(layers), d_model) float16, their mean at each layer
    """

    request_id: str
    choice: int
    key: str
    created: float
    phase: Phase
    q: float
    reason: Reason
    fingerprint: str
    template_hash: str
    position_rule: str
    n_tokens: int
    layers: tuple[int, ...]
    vectors: npt.NDArray[np.float16]
    rate: float = 0.0


def new_path(folder: Path) -> Path:
    """A name that no file of the folder has; names sort by time."""
    return folder / f"features-{time.time_ns():019d}-{secrets.token_hex(4)}.parquet"


def write_features(folder: Path, features: Sequence[Feature], path: Path | None = None) -> Path:
    """Write one file, whole or not at all; the folder is made if it is not there.

    path: of `new_path`; features: at least one, of equal layers and width
    raises: ConfigInvalid for none, for different layers or widths, or if pyarrow is missing; OSError
    """
    kinds = {(f.layers, f.vectors.shape) for f in features}
    if len(kinds) != 1:
        what = "; ".join(f"layers {list(layers)}, {list(shape)}" for layers, shape in sorted(kinds)) or "none"
        raise ConfigInvalid(f"a file holds features of one kind, these are {what}; write one file for each kind")
    ((layers, shape),) = kinds
    if len(shape) != 2 or shape[0] != len(layers):
        raise ConfigInvalid(f"vectors {list(shape)} don't fit to {len(layers)} layers; give (n_layers, d_model)")
    _, pyarrow = _parquet()
    columns: dict[str, Any] = {name: [getattr(f, name) for f in features] for name in _PLAIN}
    columns["phase"] = [str(f.phase) for f in features]
    flat = np.concatenate([f.vectors.astype(np.float16, copy=False).ravel() for f in features])
    columns["layers"] = _lists(pyarrow.array(list(layers) * len(features), pyarrow.int32()), len(layers))
    columns["vectors"] = _lists(pyarrow.array(flat), shape[0] * shape[1])
    table = pyarrow.table(columns).replace_schema_metadata({b"format": FORMAT})
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = path or new_path(folder)
    _write(path, table)
    return path


def read_features(folder: Path, since: float | None = None, layers: Sequence[int] | None = None) -> list[Feature]:
    """Every feature of a folder, oldest file first. since: seconds since the epoch; layers: these alone, in this order;
    files that lack one are passed over, as are other models'

    raises: ConfigInvalid if there is no such folder, a file is damaged, or without `layers` if the features that are
    left differ in layers or width
    """
    if not folder.is_dir():
        raise ConfigInvalid(f"there are no features at {str(folder)!r}; set MIDSTREAM_FEATURES to the server's folder")
    found: list[Feature] = []
    for path in feature_files(folder):
        table = _read(path)
        if table is not None:
            found += [f for f in _features(table, layers) if since is None or f.created >= since]
    kinds = sorted({(f.layers, f.vectors.shape[1]) for f in found})
    if len(kinds) > 1 and layers is None:
        what = " and ".join(f"layers {', '.join(map(str, own))} of width {width}" for own, width in kinds)
        raise ConfigInvalid(
            f"{folder} holds features of {what}; name layers that all of them have, or a later time, or move files away"
        )
    return found


def feature_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.parquet"))


def erase_features(folder: Path, key: str | None = None, request_id: str | None = None) -> int:
    """Features of an API key's name or of a request go, as its records do; returns how many.

    raises: ConfigInvalid if neither or both are given, or at the end, naming every file that may still hold some
    because it can't be read or written; OSError
    """
    if (key is None) == (request_id is None):
        raise ConfigInvalid("say whose features: a key or an id")

    def goes(row: Mapping[str, Any]) -> bool:
        if key is not None:
            return bool(row["key"] == key)
        # A request that judges several texts names them ID, ID-1, ID-2, ...
        return bool(row["request_id"] == request_id) or str(row["request_id"]).startswith(f"{request_id}-")

    return _drop(folder, goes)


def drop_older(folder: Path, created: float) -> int:
    """Features of requests from before `created` go (seconds since the epoch); returns how many. raises: as erasing"""
    return _drop(folder, lambda row: bool(row["created"] < created))


def _drop(folder: Path, goes: Callable[[Mapping[str, Any]], bool]) -> int:
    """Files are written anew without the rows that go: nothing of them is left in the folder."""
    if not folder.is_dir():
        return 0
    gone, kept = 0, []
    with locked(folder):
        for part in folder.glob(".features-*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        for path in feature_files(folder):
            try:
                gone += _drop_from(path, goes)
            except (OSError, ConfigInvalid) as error:  # one file must not keep the others
                kept.append(f"{path.name}: {error}")
    if kept:
        raise ConfigInvalid(f"{gone} rows of features are gone; others may still be in {'; '.join(kept)}")
    return gone


def _drop_from(path: Path, goes: Callable[[Mapping[str, Any]], bool]) -> int:
    some = _read(path, ["key", "request_id", "created"])
    stays = [] if some is None else [not goes(row) for row in some.to_pylist()]
    if not any(stays):
        path.unlink(missing_ok=True)
    elif not all(stays):
        _write(path, _read(path).filter(stays).combine_chunks())
    return len(stays) - sum(stays)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time rewrites files: else one would bring back what another has just erased."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_parquet() -> None:
    """raises: ConfigInvalid if pyarrow is missing"""
    _parquet()


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigInvalid(
            "the feature log needs pyarrow; pip install 'midstream[parquet]', or leave log_features off"
        ) from error
    return parquet, pyarrow


def _lists(values: Any, size: int) -> Any:
    """values: a flat array -> lists of `size`, named as they are when they are read."""
    _, pyarrow = _parquet()
    kind = pyarrow.list_(pyarrow.field("element", values.type), size)
    return pyarrow.FixedSizeListArray.from_arrays(values, type=kind)


def _write(path: Path, table: Any) -> None:
    parquet, _ = _parquet()
    scratch = path.with_name(f".{path.name}.part")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            parquet.write_table(table, file, compression="zstd", use_dictionary=list(_REPEATED))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _read(path: Path, columns: list[str] | None = None) -> Any:
    """None: it has just been dropped. raises: ConfigInvalid if it is no file of features"""
    parquet, pyarrow = _parquet()
    try:
        table = parquet.read_table(pyarrow.BufferReader(path.read_bytes()), columns=columns)
    except FileNotFoundError:
        return None
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigInvalid(f"{path} can't be read ({reason}); move it away") from error
    if (table.schema.metadata or {}).get(b"format") != FORMAT:
        raise ConfigInvalid(f"{path} is not a file of features; move it away")
    # Reading numbers the fields; without that, a file that is written anew is as if what went had never been in it.
    fields = pyarrow.schema([pyarrow.field(f.name, f.type) for f in table.schema], {b"format": FORMAT})
    return pyarrow.Table.from_arrays(table.columns, schema=fields)


def _features(table: Any, wanted: Sequence[int] | None) -> Iterable[Feature]:
    rows = table.select([*_PLAIN, "layers"]).to_pylist()
    if not rows:
        return
    flat = table.column("vectors").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    have = tuple(rows[0]["layers"])
    vectors = flat.reshape(len(rows), len(have), -1)
    chosen = have if wanted is None else tuple(wanted)
    if set(chosen) - set(have):
        return
    columns = [have.index(layer) for layer in chosen]
    for row, vector in zip(rows, vectors, strict=True):
        plain = {name: row[name] for name in _PLAIN} | {"phase": Phase(row["phase"])}
        yield Feature(**plain, layers=chosen, vectors=vector[columns])
