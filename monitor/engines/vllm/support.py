"""What of vLLM is supported: versions, architectures, options. The rest is refused at start, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from monitor.errors import ConfigInvalid, ModelUnsupported

KEY = "midstream"  # names our data on vLLM's objects and in its settings
POOLED = "midstream_pooled"  # names the positions to average on a request of ours, and the averages on its output
TESTED_VERSIONS = ("0.32.0",)
N_BANKS = 2

# Blocks that return (hidden, residual), the stream being their sum, or one tensor. True: the block returns the whole
# stream, and whatever else it returns is stale. An architecture gets in after the parity test has run with it.
ARCHITECTURES: Mapping[str, bool] = {
    "LlamaForCausalLM": False,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": False,
    "Qwen3ForCausalLM": False,
}


_REFUSED_VARIABLES: Mapping[str, str] = {
    "VLLM_USE_V2_MODEL_RUNNER": "chooses Model Runner V2, which is not supported yet",
    "VLLM_USE_RUST_FRONTEND": "skips the judge in the Python frontend",
    "VLLM_SERVER_DEV_MODE": "opens routes that change the model under the probes",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "lets a client's X-Request-Id name another client's request",
}


@dataclass(frozen=True, slots=True)
class TapConfig:
    """Goes to every worker, and into the key of vLLM's compile cache.

    layers: tapped blocks, ascending; width: probes that fit into a bank; streams: the blocks' residual streams stay on
    the device until the next step, for requests of ours to be averaged
    """

    layers: tuple[int, ...]
    width: int
    architecture: str
    streams: bool = False
    n_banks: int = N_BANKS
    revision: int = 1
    """Of the tap's own code: raised when the graph changes."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


def whole_stream(architecture: str) -> bool:
    """raises: ModelUnsupported for an architecture that nobody has compared with transformers"""
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{architecture} can't be tapped in vLLM yet (known: {', '.join(sorted(ARCHITECTURES))}); serve it with "
            "--engine embedded or behind the proxy"
        )
    return ARCHITECTURES[architecture]


def check_environment(version: str, allow_untested: bool) -> None:
    """Before vLLM's settings are made. raises: ConfigInvalid"""
    if version not in TESTED_VERSIONS and not allow_untested:
        raise ConfigInvalid(
            f"vLLM {version} has not been tested with midstream (tested: {', '.join(TESTED_VERSIONS)}); install a "
            "tested one, or try --allow-untested-vllm"
        )
    for variable, why in _REFUSED_VARIABLES.items():
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ConfigInvalid(f"{variable}={os.environ[variable]} {why}; unset it")


def check_config(config: Any, api_processes: int) -> None:
    """Refuse what would run past the tap or has not been tested with it. config: vLLM's VllmConfig

    raises: ConfigInvalid, ModelUnsupported
    """
    parallel = config.parallel_config
    refused = (
        (config.use_v2_model_runner, "Model Runner V2", "set VLLM_USE_V2_MODEL_RUNNER=0"),
        (config.speculative_config, "speculative decoding", "start without --speculative-config"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism", "use --tensor-parallel-size instead"),
        (parallel.data_parallel_size > 1, "data parallelism", "run one server per replica"),
        (api_processes > 1, "more than one API process", "start with --api-server-count 1"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "leave it out"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "leave it out"),
        (parallel.enable_dbo, "dual batch overlap", "start without --enable-dbo"),
        (config.model_config.return_sampling_mask, "--return-sampling-mask", "leave it out"),
        (config.lora_config, "LoRA, whose adapters shift what the probes read", "start without --enable-lora"),
        (config.kv_transfer_config, "KV transfer, whose tokens have no forward pass here", "leave it out"),
        (config.ec_transfer_config, "encoder cache transfer", "leave it out"),
        (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", "leave it out"),
        (config.model_config.enable_sleep_mode, "sleep mode", "start without --enable-sleep-mode"),
        (config.model_config.enable_prompt_embeds, "prompt embeddings", "start without --enable-prompt-embeds"),
        (config.weight_transfer_config, "weight transfer, which changes the model under the probes", "leave it out"),
        (config.model_config.runner_type != "generate", "a pooling model", "serve a generating model"),
        (config.diffusion_config, "diffusion models", "serve an autoregressive model"),
    )
    for found, what, remedy in refused:
        if found:
            raise ConfigInvalid(f"midstream does not support {what} in vLLM yet; {remedy}")
    text = config.model_config.hf_text_config
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if odd or getattr(text, "sliding_window", None):
        what = ", ".join(sorted(odd)) or f"a sliding window of {text.sliding_window} tokens"
        raise ModelUnsupported(
            f"{config.model_config.architecture} has {what}; its KV blocks are given up early, and cached tokens would "
            "lose their scores. Serve it with --engine embedded or behind the proxy"
        )
    whole_stream(config.model_config.architecture)
