"""What of vLLM is supported: versions, environment, options and architectures, each refused in a sentence."""

import json
from types import SimpleNamespace

import pytest

from monitor.engines.vllm import support
from monitor.engines.vllm.support import ARCHITECTURES, TESTED_VERSIONS, TapConfig, check_config, check_environment
from monitor.errors import ConfigInvalid, ModelUnsupported

VARIABLES = sorted(support._REFUSED_VARIABLES)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def config():
    """As much of a VllmConfig as is looked at, with nothing wrong."""
    return SimpleNamespace(
        use_v2_model_runner=False,
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        weight_transfer_config=None,
        diffusion_config=None,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            tensor_parallel_size=2,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(
            architecture="LlamaForCausalLM",
            hf_text_config=SimpleNamespace(layer_types=["full_attention"] * 4, sliding_window=None),
            runner_type="generate",
            return_sampling_mask=False,
            enable_sleep_mode=False,
            enable_prompt_embeds=False,
        ),
    )


WRONG = [
    ("use_v2_model_runner", True, "Model Runner V2"),
    ("speculative_config", object(), "speculative decoding"),
    ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
    ("parallel_config.data_parallel_size", 2, "data parallelism"),
    ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
    ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
    ("parallel_config.enable_dbo", True, "dual batch overlap"),
    ("model_config.return_sampling_mask", True, "--return-sampling-mask"),
    ("lora_config", object(), "LoRA"),
    ("kv_transfer_config", object(), "KV transfer"),
    ("ec_transfer_config", object(), "encoder cache transfer"),
    ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
    ("model_config.enable_sleep_mode", True, "sleep mode"),
    ("model_config.enable_prompt_embeds", True, "prompt embeddings"),
    ("weight_transfer_config", object(), "weight transfer"),
    ("model_config.runner_type", "pooling", "a pooling model"),
    ("diffusion_config", object(), "diffusion"),
]


def test_a_plain_configuration_is_fine():
    check_config(config(), api_processes=1)


@pytest.mark.parametrize(("option", "value", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_one_wrong_option_is_refused_by_name(option, value, says):
    wrong = config()
    *parents, name = option.split(".")
    target = wrong
    for parent in parents:
        target = getattr(target, parent)
    assert hasattr(target, name)
    setattr(target, name, value)
    with pytest.raises(ConfigInvalid, match="does not support") as refused:
        check_config(wrong, api_processes=1)
    text = str(refused.value)
    assert says in text and "\n" not in text and "; " in text


def test_more_than_one_api_process_is_refused():
    with pytest.raises(ConfigInvalid, match="--api-server-count 1"):
        check_config(config(), api_processes=2)


def test_an_architecture_that_nobody_has_compared_is_refused():
    wrong = config()
    wrong.model_config.architecture = "MambaForCausalLM"
    with pytest.raises(ModelUnsupported, match=r"MambaForCausalLM.*LlamaForCausalLM.*--engine embedded"):
        check_config(wrong, api_processes=1)


@pytest.mark.parametrize(
    "text",
    [
        SimpleNamespace(sliding_window=4096),
        SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=None),
        SimpleNamespace(layer_types=["linear_attention"]),
    ],
)
def test_a_model_that_gives_up_kv_blocks_is_refused(text):
    wrong = config()
    wrong.model_config.hf_text_config = text
    with pytest.raises(ModelUnsupported, match="KV blocks"):
        check_config(wrong, api_processes=1)


def test_whole_stream_knows_every_architecture_and_no_other():
    assert {name: support.whole_stream(name) for name in ARCHITECTURES} == dict(ARCHITECTURES)
    for name in ("", "llamaforcausallm", "LlamaForCausalLM "):
        with pytest.raises(ModelUnsupported, match="can't be tapped"):
            support.whole_stream(name)


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_tested_versions_pass(version):
    check_environment(version, allow_untested=False)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0rc1", ""])
def test_an_untested_version_is_refused_unless_allowed(version):
    with pytest.raises(ConfigInvalid, match=r"has not been tested.*--allow-untested-vllm"):
        check_environment(version, allow_untested=False)
    check_environment(version, allow_untested=True)


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_refused_variable_is_named_with_its_value(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    for allow in (False, True):  # an untested version is a risk, these are holes
        with pytest.raises(ConfigInvalid, match=rf"^{variable}=1 .*; unset it$"):
            check_environment(TESTED_VERSIONS[0], allow_untested=allow)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["", "0"])
def test_a_variable_that_is_switched_off_is_fine(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    check_environment(TESTED_VERSIONS[0], allow_untested=False)


def test_the_taps_configuration_goes_through_json_and_back():
    tap = TapConfig((2, 5), 8, "LlamaForCausalLM")
    as_json = json.dumps(tap.as_dict())
    assert json.loads(as_json) == tap.as_dict(), "nothing in it changes its type"
    again = TapConfig(**json.loads(as_json))
    assert again.as_dict() == tap.as_dict() and (again.n_banks, again.revision) == (tap.n_banks, tap.revision)


@pytest.mark.parametrize(
    "other", [{"layers": (2,)}, {"width": 4}, {"architecture": "Qwen3ForCausalLM"}, {"n_banks": 3}, {"revision": 2}]
)
def test_every_field_of_it_is_in_the_key_of_the_compile_cache(other):
    same = {"layers": (2, 5), "width": 8, "architecture": "LlamaForCausalLM"}
    assert TapConfig(**same).as_dict() != TapConfig(**(same | other)).as_dict()
