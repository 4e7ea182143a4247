"""A probe as an ONNX graph: one MatMul and one Add, checked against torch before the file is there.

Aggregation stays with the server: of a probe with k projections the graph gives k logits a token.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from monitor.errors import ConfigInvalid, ProbeInvalid
from probes_store.card import Card
from probes_store.store import StoredProbe

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET, IR_VERSION = 17, 8
"""What any onnxruntime since 1.13 (2022) reads; MatMul and Add have not changed since."""
TOLERANCE = 1e-5
_ROWS = 64


def build(probe: StoredProbe) -> ModelProto:
    """The graph: `hidden` (tokens, n_layers * d_model) float32 -> `logits` (tokens,) float32, > 0 leans harmful.

    The layers' streams lie side by side, in ascending order of layer: metadata `layers`. With k projections, metadata
    `projections`, `logits` is (tokens, k).
    raises: ConfigInvalid if onnx is not installed
    """
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError as error:
        raise ConfigInvalid("onnx is not installed; pip install midstream[onnx]") from error
    card = probe.card
    layers = sorted(probe.weight)
    weight = np.ascontiguousarray(torch.cat([probe.weight[layer] for layer in layers], dim=-1).numpy().T)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["hidden", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["logits"]),
        ],
        f"{card.name}-{card.version}",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["tokens", len(weight)])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", *weight.shape[1:]])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array(probe.bias, dtype=np.float32).reshape(-1), "bias"),
        ],
        doc_string=card.description,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="midstream"
    )
    helper.set_model_props(model, _metadata(card, layers))
    checker.check_model(model, full_check=True)
    return model


def _metadata(card: Card, layers: list[int]) -> dict[str, str]:
    """What a server needs to use the graph as it was calibrated."""
    return {
        "name": card.name,
        "version": card.version,
        "model": card.model.name,
        "fingerprint": card.model.fingerprint,
        "layers": ",".join(map(str, layers)),
        "d_model": str(card.d_model),
        "projections": str(card.projections),
        "template_hash": card.template_hash,
        "position_rule": card.position_rule,
        "aggregation": json.dumps(card.model_dump(mode="json")["aggregation"]),
        "raw_prompt": json.dumps(card.model_dump(mode="json")["raw_prompt"]),
        "license": card.license,
        "sha256": card.sha256,
    }


def export(probe: StoredProbe, path: Path) -> float:
    """Write the graph, whole or not at all; returns its largest difference from torch.

    raises: ConfigInvalid if onnx or onnxruntime is missing or `path` can't be written, ProbeInvalid if they disagree
    """
    data = build(probe).SerializeToString()
    off = difference(probe, data)
    if not off <= TOLERANCE:
        raise ProbeInvalid(f"onnxruntime and torch differ by {off:.3g}, {TOLERANCE:g} is allowed; nothing was written")
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".onnx-")
    except OSError as error:
        raise ConfigInvalid(f"{str(path)!r} can't be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        os.unlink(scratch)
        raise ConfigInvalid(f"{str(path)!r} can't be written: {error.strerror}") from error
    return off


def difference(probe: StoredProbe, data: bytes) -> float:
    """Largest |onnxruntime - torch| / max(1, |torch|) over random rows.

    The rows are scaled so that products are about 1, or float32's own rounding would be measured.
    raises: ConfigInvalid if onnxruntime is not installed
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigInvalid("onnxruntime is not installed; pip install midstream[onnx]") from error
    layers = sorted(probe.weight)
    weight = torch.stack([probe.weight[layer].reshape(-1, probe.card.d_model) for layer in layers])
    size = float(weight.double().norm(dim=(0, 2)).max())
    hidden = torch.randn(len(layers), _ROWS, probe.card.d_model, generator=torch.Generator().manual_seed(0))
    hidden /= size if size > 0 else 1.0
    expected = (torch.einsum("lnd,lkd->nk", hidden, weight) + torch.tensor(probe.bias)).numpy()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (got,) = session.run(["logits"], {"hidden": torch.cat(list(hidden), dim=-1).numpy()})
    return float((np.abs(got.reshape(expected.shape) - expected) / np.maximum(1, np.abs(expected))).max())
