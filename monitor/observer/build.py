"""Building an observer: export the graph, write it with a manifest of hashes, whole or not at all; read it back."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from monitor.engines.cached import appearing, file_sha256
from monitor.engines.embedded.model import LoadedModel
from monitor.errors import ConfigInvalid, ModelUnsupported, ProbeInvalid
from monitor.live import LiveProbes, ServedModel
from monitor.observer.graph import Reader, observed
from monitor.probe import ProbeBank
from probes_store.store import model_slug

GRAPH, MANIFEST = "observer.onnx", "observer.json"
INPUTS = ("token_ids", "positions", "rows", "back", "past_length")
OUTPUTS = ("scores", "keys", "values")
_OPSET = 20
_MAKERS = ("torch", "transformers", "onnxscript", "onnxruntime")
_CHATTY = "torch.onnx._internal.exporter._registration"
_EXTRA = "the observer needs an extra: pip install midstream[observer]"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a session must know: caches of n_blocks x (kv_heads, tokens, head_dim), n_probes columns of scores."""

    n_blocks: int
    kv_heads: int
    head_dim: int
    n_probes: int
    vocabulary: int
    max_tokens: int
    """Positions that the model knows."""


@dataclass(frozen=True, slots=True)
class Built:
    """A verified observer in the cache."""

    folder: Path
    shape: Shape
    int8: bool

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH


def parts(model: ServedModel, live: LiveProbes, int8: bool) -> dict[str, Any]:
    """Everything that a built observer depends on: model, probes, and the packages that made it.

    raises: ConfigInvalid if one of them is not installed
    """
    try:
        makers = {name: version(name) for name in _MAKERS}
    except PackageNotFoundError as error:
        raise ConfigInvalid(f"{_EXTRA} ({error.name} is missing)") from error
    return {
        "schema": 1,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "probes": [list(version) for version in live.versions],
        "int8": int8,
        "makers": makers,
    }


def folder_of(cache: Path, made_of: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache / "observers" / f"{model_slug(made_of['model'])}-{digest[:16]}"


def build(model: LoadedModel, live: LiveProbes, cache: Path, int8: bool = False) -> Built:
    """Export and put it into the cache; one that is there already is verified and returned.

    int8: made from the float32 one, which is built and kept too
    raises: ConfigInvalid if a package is missing, ModelUnsupported if it can't be exported
    """
    made_of = parts(model.served(), live, int8)
    folder = folder_of(cache, made_of)
    if (folder / MANIFEST).exists():
        return read(folder, made_of)
    shape = _shape(model, live.bank)
    with appearing(folder, MANIFEST, {"made_of": made_of, "shape": asdict(shape)}) as scratch:
        if int8:
            from monitor.observer.quantize import quantize

            quantize(build(model, live, cache).graph, scratch / GRAPH)
        else:
            export(model, live.bank, shape, scratch / GRAPH)
    return read(folder, made_of)


def find(model: ServedModel, live: LiveProbes, cache: Path, int8: bool = False) -> Built | None:
    """The built observer of this model and these probes, verified; None if there is none. raises: as `read`"""
    made_of = parts(model, live, int8)
    folder = folder_of(cache, made_of)
    return read(folder, made_of) if (folder / MANIFEST).exists() else None


def read(folder: Path, made_of: Mapping[str, Any]) -> Built:
    """Verify every file by its hash. raises: ProbeInvalid if one is damaged or missing, or it is of something else"""
    remedy = f"remove {folder}, it is built again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, shape = dict(manifest["files"]), Shape(**manifest["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProbeInvalid(f"{folder / MANIFEST} can't be read ({type(error).__name__}); {remedy}") from error
    if manifest.get("made_of") != made_of:
        raise ProbeInvalid(f"{folder} was made of something else than its name says; {remedy}")
    if GRAPH not in files:
        raise ProbeInvalid(f"{folder / MANIFEST} names no {GRAPH}; {remedy}")
    for name, digest in files.items():
        path = folder / Path(name).name
        if not path.is_file() or file_sha256(path) != digest:
            raise ProbeInvalid(f"{path} is damaged or missing; {remedy}")
    return Built(folder, shape, bool(made_of["int8"]))


def _shape(model: LoadedModel, bank: ProbeBank) -> Shape:
    text: Any = model.module.config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        n_blocks=bank.layers[-1] + 1,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        n_probes=len(bank),
        vocabulary=text.vocab_size,
        max_tokens=model.max_model_len,
    )


def export(model: LoadedModel, bank: ProbeBank, shape: Shape, path: Path) -> None:
    """Write the graph to `path`, its weights beside it. raises: ConfigInvalid, ModelUnsupported"""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigInvalid(f"{_EXTRA} ({error.name} is missing)") from error
    logging.getLogger(_CHATTY).setLevel(logging.ERROR)  # it misses torchvision, which nothing here uses
    n, batch, width, past = 7, 3, 4, 5  # all different, and none of them 0 or 1: those would become constants
    names = {k: torch.export.Dim(k) for k in ("n", "batch", "width", "past")}
    tensors = (
        torch.arange(n),
        torch.arange(n),
        torch.zeros(batch, width, dtype=torch.int64),
        torch.arange(n),
        torch.tensor([0, 2, past]),
        [torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2 * shape.n_blocks)],
    )
    shapes = (
        {0: names["n"]},
        {0: names["n"]},
        {0: names["batch"], 1: names["width"]},
        {0: names["n"]},
        {0: names["batch"]},
        [{0: names["batch"], 2: names["past"]} for _ in range(2 * shape.n_blocks)],
    )
    past_names = [f"past_{kind}_{i}" for i in range(shape.n_blocks) for kind in ("key", "value")]
    with observed(model.module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch, and of names it does not need
        try:
            program: Any = torch.onnx.export(
                Reader(model.module, bank).eval(),
                tensors,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[*INPUTS, *past_names],
                output_names=list(OUTPUTS),
                opset_version=_OPSET,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            root: BaseException = error
            while root.__cause__ is not None:  # ours, say, wrapped by the exporter in a page of advice
                root = root.__cause__
            reason = " ".join(str(root).split())[:300]
            raise ModelUnsupported(f"{model.name} can't be exported to ONNX: {reason}") from error
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of whoever built it
    program.save(path, external_data=True)
