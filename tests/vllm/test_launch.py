"""Without an engine: what of vLLM's arguments is refused, workers that disagree, a vLLM that takes no more requests."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineGenerateError

from monitor.config import DEMO_MODEL, cache_dir, load_settings
from monitor.engines.identity import locate
from monitor.engines.vllm import launch
from monitor.engines.vllm.check import agreed
from monitor.engines.vllm.reread import VllmRereading
from monitor.engines.vllm.scorer import VllmScorer
from monitor.errors import ConfigInvalid, Overloaded, ProbeMismatch
from monitor.types import Caller, Prompt, Turn

FULL = [QueueOverflowError(), EngineGenerateError()]


@pytest.mark.parametrize("extra", [["--ssl-keyfile", "k"], ["--ssl_certfile=c"], ["--ssl-ca-certs", "a"]])
def test_tls_is_refused_and_not_ignored(demo, extra):
    settings = load_settings(engine="vllm", model=DEMO_MODEL, cache=cache_dir())
    with pytest.raises(ConfigInvalid, match="plain HTTP"):
        launch.plan(settings, extra)


RENDERING = [
    ["--chat-template", "{{ messages }}"],
    ["--chat_template={{ messages }}"],
    ["--default-chat-template-kwargs", '{"enable_thinking": false}'],
    ["--tokenizer", "another/model"],
    ["--tokenizer-mode", "mistral"],
    ["--tokenizer_revision", "main"],
]


def parse(extra):
    settings = load_settings(engine="vllm", model=DEMO_MODEL, cache=cache_dir())
    return launch.parse(settings, extra, "name", "float32")


@pytest.mark.parametrize("extra", RENDERING, ids=lambda extra: extra[0])
def test_what_would_render_other_prompts_is_refused(extra):
    """The thresholds would be those of another rendering."""
    with pytest.raises(ConfigInvalid, match="chat template and tokenizer"):
        parse(extra)


def test_the_models_own_tokenizer_may_be_named():
    own = str(locate(DEMO_MODEL, cache_dir()))
    for extra in (["--tokenizer-mode", "hf"], ["--tokenizer", own], ["--tokenizer", DEMO_MODEL]):
        parse(extra)


def test_keys_are_midstreams_however_vllm_is_told_of_others(tmp_path):
    (tmp_path / "vllm.yaml").write_text("api-key: mine\n")
    for extra in (["--api_key", "mine"], ["--api_key=mine"], ["--config", str(tmp_path / "vllm.yaml")]):
        with pytest.raises(ConfigInvalid, match="MIDSTREAM_API_KEY"):
            parse(extra)


def test_each_worker_of_tensor_parallelism_reports_and_they_agree():
    report = {"d_model": 64, "n_layers": 4, "layers": [2], "tap_seconds": 0.1}
    assert agreed([report]) == report
    assert agreed([report, report | {"tap_seconds": 0.2}]) == report
    with pytest.raises(ProbeMismatch, match=r"layers \[2\] and \[3\]"):
        agreed([report, report | {"layers": [3]}])


class Busy:
    """An engine that refuses every request."""

    model_config = SimpleNamespace(max_model_len=100)

    def __init__(self, error):
        self.error = error

    async def generate(self, *args, **kwargs):
        raise self.error
        yield


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_rereading_that_is_refused_is_told_and_not_the_last(error):
    """Else nothing would ever be read again."""

    async def run():
        rereading, told = VllmRereading(Busy(error), (1,), lambda: 0), []
        for n in (1, 2):
            rereading.reread([1, 2, 3], [Turn(0, 3)], (1,), told.append)
            while len(told) < n:
                await asyncio.sleep(0.01)
        assert told == [None, None]

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_text_to_judge_that_is_refused_is_overload(error):
    scorer = VllmScorer(Busy(error))
    prompt = Prompt((1, 2, 3), (Turn(0, 3),), 0, "chat")
    with pytest.raises(Overloaded):
        asyncio.run(scorer.judge("r", prompt, (), Caller(route="moderations")))
