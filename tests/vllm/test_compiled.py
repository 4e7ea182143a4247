"""Under torch.compile: the tap is in the graph, and one compile cache serves whatever weights are loaded."""

import asyncio

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from monitor.engines.vllm.reread import averages
from monitor.probe import ProbeWeights
from monitor.types import Turn

from ..conftest import LAYER
from ..feature_log import hidden
from .conftest import COMMON, EVERYTHING, harness, make_plan
from .test_engine import CHUNKED, FLAG, check, prompt

# A GPU compiles and captures by itself; the CPU build compiles only if asked to.
COMPILED = [*COMMON, *CHUNKED]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compile cache of its own, that a plain vLLM without the tap has filled first."""
    folder = tmp_path_factory.mktemp("compile-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        patch.delenv("TORCH_COMPILE_DISABLE", raising=False)
        yield folder


def start_plain(plan):
    """vLLM as it is: no tap, no judge."""

    async def run():
        config = AsyncEngineArgs.from_cli_args(plan.arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
        engine = AsyncLLM.from_vllm_config(config)
        engine.shutdown(timeout=5)

    asyncio.run(run())


def test_parity_and_two_sets_of_weights_over_one_compile_cache(tiny, random_probe, cache, tmp_path):
    torch.manual_seed(7)
    other = ProbeWeights("random", {LAYER: torch.randn(tiny.d_model) / 8}, -0.5)
    for i, probe in enumerate((random_probe, other)):
        plan = make_plan(tiny, tmp_path / str(i), [(probe, EVERYTHING)], COMPILED, modes=FLAG)
        if i == 0:
            start_plain(plan)
        with harness(plan) as engine:
            report = engine.run(engine.engine.collective_rpc("midstream_report"))[0]
            assert report["compiled"] != "NONE"
            if report["device"] != "cpu":
                assert report["cuda_graphs"] != "NONE"
            texts = ["y" * n + f" number {n}" for n in (1, 40, 61, 64, 65, 130, 203, 300)]
            answers = engine.run(engine.ask_all([prompt(tiny, t) for t in texts], max_tokens=20, ignore_eos=True))
            again = engine.run(engine.ask_all([prompt(tiny, t) for t in texts], max_tokens=20, ignore_eos=True))
            off = max(check(engine, tiny, probe, a) for a in [*answers, *again])
            assert max(a.cached for a in again) >= 192
            print(f"compiled ({report['compiled']}), weights {i}: largest difference {off:.1e}")


def test_the_feature_log_is_in_the_graph_too(tiny, random_probe, cache, tmp_path):
    """Over the cache of graphs without it: its setting is part of their key."""
    plan = make_plan(tiny, tmp_path, [(random_probe, EVERYTHING)], COMPILED, modes=FLAG, log_features=True)
    with harness(plan) as engine:
        asked = prompt(tiny, "z" * 150 + " twice")
        answers = engine.run(engine.ask_all([asked, asked], max_tokens=20, ignore_eos=True))
        for answered in answers:
            check(engine, tiny, random_probe, answered)
            ids, turn = [*asked.token_ids, *answered.ids[0]][:-1], asked.turns[-1]
            spans = [turn, Turn(len(asked.token_ids), len(ids))]
            means = engine.run(averages(engine.engine, ids, spans, 1))
            for got, span in zip(means, spans, strict=True):
                expected = hidden(tiny.module, ids, span.start, span.end)
                off = float(np.abs(got[0] - expected).max())
                assert off <= 1e-4
            print(f"compiled, feature log: largest difference {off:.1e}")
