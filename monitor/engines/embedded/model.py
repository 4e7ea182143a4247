"""Loading a causal model and telling exactly which one it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monitor.engines.identity import identify, locate
from monitor.errors import ConfigInvalid, ModelUnsupported
from monitor.live import ServedModel
from monitor.tap import decoder_blocks
from monitor.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """fingerprint: which weights, as a card names them; d_model: width of the residual stream"""

    name: str
    fingerprint: str
    quantization: str
    dtype: str
    module: Any
    tokenizer: Any
    template: ChatTemplate
    d_model: int
    n_layers: int
    max_model_len: int
    eos_ids: frozenset[int]

    def served(self) -> ServedModel:
        return ServedModel(self.name, self.fingerprint, self.dtype, self.d_model, self.n_layers, self.template)


def load_model(
    name: str, *, cache: Path, revision: str | None = None, dtype: str | None = None, device: str = "cpu"
) -> LoadedModel:
    """name: `smollm2-135m-instruct` (comes along), a local folder, or a hub id.

    raises: ConfigInvalid if there is no such model, ModelUnsupported if it can't be served
    """
    # Imported here: it takes seconds, and `midstream --help` should not.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = locate(name, cache)
    try:
        module: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=getattr(torch, dtype or "float32")
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigInvalid(f"--model {name!r} can't be loaded: {reason}") from error
    if not getattr(module, "_supports_attention_backend", False):
        raise ModelUnsupported(
            f"{type(module).__name__} does not take attention functions from outside, so the embedded engine "
            "can't batch it; serve it with vLLM or behind the proxy"
        )
    _check_batchable(module)
    module.to(device).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return loaded(module, tokenizer)


def _check_batchable(module: Any) -> None:
    """Packed tokens of many requests stand in one row: only attention tells them apart."""
    text: Any = module.config.get_text_config()
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = str((getattr(text, "rope_parameters", None) or {}).get("rope_type", "default"))
    if odd or getattr(module, "_is_stateful", False) or rope in ("dynamic", "longrope"):
        what = ", ".join(sorted(odd)) or ("a recurrent state" if rope == "default" else f"{rope} RoPE")
        raise ModelUnsupported(
            f"{type(module).__name__} has {what}, which would mix requests in the embedded engine; serve it with vLLM"
        )


def loaded(module: Any, tokenizer: Any) -> LoadedModel:
    """Describe a transformers model that is in memory already: which one it is, and its measures.

    raises: ModelUnsupported if neither a folder nor a hub commit says where it came from
    """
    text: Any = module.config.get_text_config()
    identity = identify(module.config)
    eos = module.generation_config.eos_token_id
    eos_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return LoadedModel(
        name=identity.name,
        fingerprint=identity.fingerprint,
        quantization=identity.quantization,
        dtype=str(module.dtype).removeprefix("torch."),
        module=module,
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer),
        d_model=text.hidden_size,
        n_layers=len(decoder_blocks(module)),
        max_model_len=getattr(text, "max_position_embeddings", 2048),
        eos_ids=eos_ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()),
    )
