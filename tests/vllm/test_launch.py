"""Without an engine: what of vLLM's arguments is refused, and a vLLM that takes no more requests."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineGenerateError

from monitor.config import DEMO_MODEL, cache_dir, load_settings
from monitor.engines.vllm import launch
from monitor.engines.vllm.reread import VllmRereading
from monitor.engines.vllm.scorer import VllmScorer
from monitor.errors import ConfigInvalid, Overloaded
from monitor.types import Caller, Prompt, Turn

FULL = [QueueOverflowError(), EngineGenerateError()]


@pytest.mark.parametrize("extra", [["--ssl-keyfile", "k"], ["--ssl_certfile=c"], ["--ssl-ca-certs", "a"]])
def test_tls_is_refused_and_not_ignored(demo, extra):
    settings = load_settings(engine="vllm", model=DEMO_MODEL, cache=cache_dir())
    with pytest.raises(ConfigInvalid, match="plain HTTP"):
        launch.plan(settings, extra)


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
