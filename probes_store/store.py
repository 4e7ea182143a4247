"""The store: read, verify and publish probes. `<model>/<probe>/<version>/{probe.safetensors, card.json}`.

A version never changes once published. The shipped store lies read-only in the wheel; MIDSTREAM_STORE, a folder of
the operator's with the same layout, lies over it, and its live.json (model/probe -> version) is the one mutable file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from monitor.errors import ConfigInvalid, ProbeInvalid
from monitor.types import CANDIDATE_MARK
from probes_store.card import Card
from probes_store.durable import renamed, sync, write

SHIPPED = Path(__file__).parent
PREVIOUS, CANDIDATE = "@previous", "@candidate"
"""Behind `model/probe` in live.json: the version to go back to, and the one on trial in shadow."""
BASE = "base.safetensors"
"""Beside the weights, of probes that have it: see probes_store.base."""
MAX_FILE_BYTES = 256 * 2**20
_SAFE = re.compile(r"^[a-z0-9][a-z0-9._-]{0,127}$")
_VERSION = re.compile(r"^v[0-9]{1,6}$")


@dataclass(frozen=True, slots=True)
class StoredProbe:
    """A verified probe. weight: per layer (d_model,) float32, finite, or (k, d_model) of k projections, and k biases

    shipped: it lies in the wheel's store; candidate: it is served on trial, beside the live version
    heir: it went on from a version of a shipped probe, so it stands where that stood
    """

    card: Card
    weight: Mapping[int, Tensor]
    bias: float | tuple[float, ...]
    shipped: bool
    path: Path
    candidate: bool = False
    heir: bool = False

    @property
    def name(self) -> str:
        """What it is called in service: a candidate by its version too."""
        return self.card.name + (f"{CANDIDATE_MARK}{self.card.version}" if self.candidate else "")


def model_slug(name: str) -> str:
    """The folder of a model: the last part of its name, lower case."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", Path(name.rstrip("/")).name.lower()).strip("-._")[:128]
    return slug or "model"


def _is_idle(folder: Path) -> bool:
    """Whether its card says that it starts idle. What is wrong with a card is for `read_folder` to say."""
    try:
        card = json.loads((folder / "card.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("starts") == "idle"


class Store:
    """overlay: the operator's folder, or None. raises: ConfigInvalid if it is not a directory"""

    def __init__(self, overlay: Path | None = None, shipped: Path = SHIPPED) -> None:
        if overlay is not None and overlay.exists() and not overlay.is_dir():
            raise ConfigInvalid(f"store {str(overlay)!r} is not a directory; name a folder or unset MIDSTREAM_STORE")
        self.overlay = overlay
        self.shipped = shipped

    def versions(self, model: str, probe: str) -> dict[str, Path]:
        """Every version of a probe -> its folder; the overlay's stands where both have one."""
        found: dict[str, Path] = {}
        for root in (self.shipped, self.overlay):
            folder = root / model / probe if root is not None else None
            if folder is not None and folder.is_dir():
                found |= {p.name: p for p in folder.iterdir() if p.is_dir() and _VERSION.match(p.name)}
        return dict(sorted(found.items(), key=lambda item: int(item[0][1:])))

    def newest(self, model: str, probe: str) -> str | None:
        return next(reversed(self.versions(model, probe)), None)

    def unchosen(self, model: str, probe: str) -> str | None:
        """The version to serve where live.json names none: the newest; None if there is none, or it starts idle."""
        versions = self.versions(model, probe)
        newest = next(reversed(versions), None)
        return None if newest is None or _is_idle(versions[newest]) else newest

    def probes(self, model: str) -> list[str]:
        names: set[str] = set()
        for root in (self.shipped, self.overlay):
            folder = root / model if root is not None else None
            if folder is not None and folder.is_dir():
                names |= {p.name for p in folder.iterdir() if p.is_dir() and self.versions(model, p.name)}
        return sorted(names)

    def live(self, model: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
        """Probe -> the version to serve: what live.json says, else the newest, unless that starts idle.

        chosen: in place of live.json; raises: ConfigInvalid for a version that is not there
        """
        result = self.named(model, chosen)
        for probe, version in result.items():
            if version not in (versions := self.versions(model, probe)):
                raise ConfigInvalid(
                    f"live.json names {model}/{probe} {version!r}, which is not in the store; "
                    f"choose one of {', '.join(versions)}"
                )
        return result

    def named(self, model: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
        """As `live`, but a version that live.json names may be missing from the store."""
        chosen = self.choices() if chosen is None else chosen
        found = {}
        for probe in self.probes(model):
            key = f"{model}/{probe}"
            version = chosen[key] if key in chosen else self.unchosen(model, probe)
            if version is not None:
                found[probe] = version
        return found

    def candidates(self, model: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
        """Probe -> the version that is on trial beside the live one, one at most; it may be missing from the store."""
        chosen = self.choices() if chosen is None else chosen
        live = self.named(model, chosen)
        found = [(probe, chosen.get(f"{model}/{probe}{CANDIDATE}", live[probe])) for probe in live]
        return {probe: version for probe, version in found if version != live[probe]}

    def choices(self) -> dict[str, str]:
        """What live.json says, empty without one. raises: ConfigInvalid if it is damaged"""
        path = self.overlay / "live.json" if self.overlay is not None else None
        if path is None or not path.exists():
            return {}
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigInvalid(f"{path} can't be read ({error}); write it again or remove it") from error
        if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
            raise ConfigInvalid(f'{path} must be a JSON object like {{"model/probe": "v1"}}')
        return data

    def load(self, model: str, probe: str, version: str) -> StoredProbe:
        """Read and verify one version.

        raises: ConfigInvalid if there is no such version, ProbeInvalid if it is damaged
        """
        folder = self.versions(model, probe).get(version) if _SAFE.match(model) and _SAFE.match(probe) else None
        if folder is None:
            raise ConfigInvalid(f"there is no probe {model}/{probe} {version} in the store; see `midstream probes`")
        stored = read_folder(folder, shipped=folder.is_relative_to(self.shipped))
        if (stored.card.name, stored.card.version) != (probe, version):
            raise ProbeInvalid(f"{folder}: the card says {stored.card.name} {stored.card.version}; publish it again")
        if not stored.shipped and stored.card.retrained and (self.shipped / model / probe).is_dir():
            return replace(stored, heir=True)
        return stored

    def publish(
        self, card: Card, weight: Mapping[int, Tensor], bias: float | tuple[float, ...], base: bytes | None = None
    ) -> Path:
        """Write a probe under the next free version of the overlay, whole or not at all, after a power failure too;
        returns its folder.

        card.version and the hashes are set here; base: `Base.dump()` of the training rows
        raises: ConfigInvalid without an overlay
        """
        if self.overlay is None:
            raise ConfigInvalid("the shipped store is read-only; set MIDSTREAM_STORE to a folder of yours")
        model = model_slug(card.model.name)
        tensors = {f"weight.{layer}": w.float().reshape(-1, w.shape[-1]).contiguous() for layer, w in weight.items()}
        data = save_tensors(
            tensors | {"bias": torch.tensor(bias, dtype=torch.float32).reshape(-1)}, {"schema": "midstream-probe/1"}
        )
        hashes = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "base_sha256": None if base is None else hashlib.sha256(base).hexdigest(),
        }
        folder = self.overlay / model / card.name
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
        try:
            write(scratch / "probe.safetensors", data)
            if base is not None:
                # Moments of few labelled rows may tell of one of them: as private as the log that they come from.
                write(scratch / BASE, base, 0o600 if card.retrained else 0o644)
            scratch.chmod(0o755)
            for number in itertools.count(1 + max((int(v[1:]) for v in self.versions(model, card.name)), default=0)):
                card = card.model_copy(update={"version": f"v{number}"} | hashes)
                write(scratch / "card.json", card.model_dump_json(indent=1).encode() + b"\n")
                read_folder(scratch, shipped=False)
                sync(scratch)
                if renamed(scratch, folder / card.version):
                    break  # else somebody else was a moment ahead, and has that one
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for parent in (folder, folder.parent, self.overlay):
            sync(parent)
        return folder / card.version


def read_folder(folder: Path, shipped: bool) -> StoredProbe:
    """raises: ProbeInvalid, naming the file, what is wrong and what to do"""
    card_bytes, data = read_file(folder / "card.json"), read_file(folder / "probe.safetensors")
    try:
        card = Card.model_validate_json(card_bytes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ProbeInvalid(f"{folder / 'card.json'}: {where}: {first['msg']}; publish the probe again") from error
    # The hash comes first: nothing is parsed that the card does not vouch for.
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.sha256:
        raise ProbeInvalid(
            f"{folder / 'probe.safetensors'} has sha256 {digest[:12]}…, its card says {card.sha256[:12]}…; "
            "the file was changed or damaged: restore it or publish the probe again"
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]  # torch appends a trace of its own
        raise ProbeInvalid(f"{folder / 'probe.safetensors'} is not a safetensors file: {reason}") from error
    k = card.projections
    wanted = {f"weight.{layer}": (k, card.d_model) for layer in card.layers} | {"bias": (k,)}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != wanted:
        raise ProbeInvalid(f"{folder / 'probe.safetensors'} holds {shapes}, its card wants {wanted}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise ProbeInvalid(f"{folder / 'probe.safetensors'}: {name} is not finite float32; train it again")
    weight, bias = {layer: tensors[f"weight.{layer}"] for layer in card.layers}, tuple(tensors["bias"].tolist())
    if k == 1:
        return StoredProbe(card, {layer: w[0] for layer, w in weight.items()}, bias[0], shipped, folder)
    return StoredProbe(card, weight, bias, shipped, folder)


def read_file(path: Path) -> bytes:
    """A file of a probe. raises: ProbeInvalid"""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
            raise ProbeInvalid(f"{path} is a link or larger than {MAX_FILE_BYTES >> 20} MiB; publish the probe again")
        return path.read_bytes()
    except OSError as error:
        raise ProbeInvalid(f"{path} can't be read ({error.strerror}); publish the probe again") from error
