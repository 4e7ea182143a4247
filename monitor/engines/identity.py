"""Which model a name means, and exactly which weights: what a probe's card is bound to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.config import DEMO_MODEL
from monitor.engines.cached import file_sha256
from monitor.engines.demo import MANIFEST, demo_model
from monitor.errors import ConfigInvalid, ModelUnsupported

_EDGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """fingerprint: which weights, as a card names them"""

    name: str
    fingerprint: str
    quantization: str


def locate(name: str, cache: Path) -> Path | str:
    """`smollm2-135m-instruct` (comes along) or a local folder -> its folder; a hub id stays as it is.

    raises: ConfigInvalid if there is no such folder
    """
    if name == DEMO_MODEL:
        return demo_model(cache)
    local = Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or local.exists():
        local = local.expanduser()
        if not (local / "config.json").exists():
            raise ConfigInvalid(
                f"--model {name!r}: no folder with a config.json there; name a model folder or a hub id"
            )
        return local
    return name


def identify(config: Any) -> Identity:
    """config: a transformers configuration that was read from a folder or a hub commit

    raises: ModelUnsupported if it says neither
    """
    origin = Path(str(config.name_or_path))
    if (origin / "config.json").exists():
        return _identity(origin)
    if commit := getattr(config, "_commit_hash", None):
        return Identity(str(origin), f"hub-commit:{commit}", "none")
    raise ModelUnsupported(f"model {str(origin)!r} is neither a local folder nor a hub commit; load it from one")


def _identity(folder: Path) -> Identity:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return Identity(folder.resolve().name, f"files-sha256:{files_fingerprint(folder)}", "none")
    data = json.loads(manifest.read_text())
    for file, digest in data["files"].items():
        if not (folder / file).exists() or file_sha256(folder / file) != digest:
            raise ModelUnsupported(f"{folder / file} is damaged; remove the folder, it is made again")
    return Identity(data["name"], data["fingerprint"], data["quantization"])


def files_fingerprint(folder: Path) -> str:
    """Hash of a local model: config, tokenizer, and of each weight file its size, first and last MiB.

    The whole of a 16 GB file takes most of a minute; an edit that keeps size, header and both ends is what the
    canaries in a probe's card are for.
    """
    digest = hashlib.sha256()
    weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    if not weights:
        raise ConfigInvalid(f"{folder} holds no weights (*.safetensors); name the folder that does")
    for path in [folder / "config.json", folder / "tokenizer.json", *weights]:
        if not path.exists():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            if size > _EDGE_BYTES:
                file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
                digest.update(file.read())
    return digest.hexdigest()
