"""Every architecture that `support` lists, as a tiny random model: vLLM's scores equal transformers'."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model
from monitor.engines.vllm.support import ARCHITECTURES
from monitor.probe import ProbeWeights

from ..conftest import LAYER, save_tiny, tiny_config
from .conftest import EAGER, EVERYTHING, harness, make_plan
from .test_engine import CHUNKED, FLAG, check, prompt

KINDS = {
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def test_the_list_has_no_architecture_without_a_test():
    assert set(ARCHITECTURES) == {"LlamaForCausalLM", *KINDS}  # Llama is what every other test runs


@pytest.mark.parametrize("name", KINDS)
def test_parity(name, tmp_path):
    config_class, model_class, more = KINDS[name]
    torch.manual_seed(3)
    config = tiny_config(config_class, hidden_size=128, **more)
    folder = save_tiny(tmp_path / "model", model_class(config))
    model = load_model(str(folder), cache=cache_dir())
    probe = ProbeWeights("random", {LAYER: torch.randn(model.d_model) / 8}, 0.25)
    plan = make_plan(model, tmp_path / "store", [(probe, EVERYTHING)], [*EAGER, *CHUNKED], modes=FLAG)
    with harness(plan) as engine:
        prompts = [prompt(model, "z" * n + " and more") for n in (1, 50, 64, 130)]
        answers = engine.run(engine.ask_all(prompts, max_tokens=12, ignore_eos=True))
        print(f"{name}: largest difference {max(check(engine, model, probe, a) for a in answers):.1e}")
