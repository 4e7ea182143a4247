"""int8 weights: every constant matrix of the graph in blocks of 32 with their own scale; the probes stay float32.

Activations are quantised row by row, block by block. One scale for all of a step's rows would let the sink at position
0, hundreds of times larger than other rows, and whatever stream shares the step, decide how fine a token's values are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from monitor.errors import ConfigInvalid

_CHATTY = "onnxruntime.quantization.matmul_nbits_quantizer"
_BITS, _BLOCK, _INT8_ACTIVATIONS = 8, 32, 4


def quantize(source: Path, path: Path) -> None:
    """Write the int8 form of a graph, its weights beside it. raises: ConfigInvalid if onnxruntime is not installed"""
    try:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    except ImportError as error:
        raise ConfigInvalid(f"int8 needs {error.name}: pip install midstream[observer]") from error
    logging.getLogger(_CHATTY).setLevel(logging.WARNING)  # or two thousand lines, one for each node
    model = onnx.load(source)
    _fold_transposes(model.graph)
    probes = [n.name for n in model.graph.node if n.op_type == "MatMul" and any("probes_" in i for i in n.input)]
    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK, bits=_BITS, is_symmetric=True, accuracy_level=_INT8_ACTIVATIONS
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=probes)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


def _fold_transposes(graph: Any) -> None:
    """Turn the weights that the graph turns at every step, so that the quantiser finds them."""
    from onnx import numpy_helper

    weights = {i.name: i for i in graph.initializer}
    turned = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    for node in turned:
        old = numpy_helper.to_array(weights[node.input[0]])
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        graph.initializer.append(numpy_helper.from_array(old.transpose(perm).copy(), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name in {n.input[0] for n in turned} - used:
        graph.initializer.remove(weights[name])
