"""Scores from inside vLLM equal transformers', whatever the scheduler does with the tokens."""

import asyncio

import numpy as np
import pytest
import torch

from monitor.probe import ProbeWeights

from ..conftest import LAYER, reference_logits
from .conftest import EAGER, EVERYTHING, harness, make_plan

FLAG = {"random": {"prompt": "flag", "response": "flag"}}
CHUNKED = ["--max-num-batched-tokens", "64", "--block-size", "32", "--enable-prompt-tokens-details"]


@pytest.fixture(scope="module")
def engine(tiny, random_probe, tmp_path_factory):
    plan = make_plan(
        tiny, tmp_path_factory.mktemp("store"), [(random_probe, EVERYTHING)], [*EAGER, *CHUNKED], modes=FLAG
    )
    with harness(plan) as running:
        yield running


def prompt(tiny, text):
    return tiny.template.encode([{"role": "user", "content": text}])


def check(engine, tiny, probe, answered, index=0):
    """Every position's score equals transformers' at that position; all are there but the last token's."""
    records = engine.sink.of(answered.call.id)
    record = next(r for r in records if r.index == index)
    ids = [*answered.prompt_ids, *answered.ids[index]]
    expected = reference_logits(tiny.module, ids, probe.weight, probe.bias)
    scores = np.array(record.token_scores[probe.name])
    assert record.coverage.unmonitored == 0
    assert len(scores) == len(ids) - 1
    off = float(np.abs(scores - expected[:-1]).max())
    assert off <= 1e-3
    return off


def test_parity_over_chunked_prefill_and_a_batch_of_eight(engine, tiny, random_probe):
    texts = ["x" * n + f" number {n}" for n in (1, 30, 61, 64, 65, 120, 203, 400)]
    answers = engine.run(engine.ask_all([prompt(tiny, t) for t in texts], max_tokens=20, ignore_eos=True))
    assert max(check(engine, tiny, random_probe, a) for a in answers) <= 1e-3
    assert engine.idle()


def test_parity_over_prefix_cache_hits(engine, tiny, random_probe):
    text = "the same beginning " * 15
    first = engine.run(engine.ask(prompt(tiny, text + "one"), max_tokens=8, ignore_eos=True))
    again = engine.run(engine.ask(prompt(tiny, text + "two"), max_tokens=8, ignore_eos=True))
    assert first.cached == 0 and again.cached >= 192
    check(engine, tiny, random_probe, first)
    check(engine, tiny, random_probe, again)


def test_an_answer_that_is_sent_back_as_history_hits_the_cache_too(engine, tiny, random_probe):
    asked = prompt(tiny, "tell me " * 10)
    first = engine.run(engine.ask(asked, max_tokens=40, ignore_eos=True))
    longer = tiny.template.raw([*asked.token_ids, *first.ids[0], *asked.token_ids[:20]])
    second = engine.run(engine.ask(longer, form="raw", ignore_eos=True))
    assert second.cached > len(asked.token_ids)
    check(engine, tiny, random_probe, second)


def test_equal_prompts_in_one_step_while_a_stream_runs(engine, tiny, random_probe):
    async def everything():
        running = asyncio.create_task(engine.ask(prompt(tiny, "a stream"), max_tokens=200, ignore_eos=True))
        await asyncio.sleep(0.2)
        same = prompt(tiny, "equal prompts, sent at once, " * 6)
        answers = await asyncio.gather(*(engine.ask(same, n=3, temperature=1.0) for _ in range(4)))
        return [await running], answers

    running, answers = engine.run(everything())
    check(engine, tiny, random_probe, running[0])
    for answered in answers:
        for index in range(3):
            check(engine, tiny, random_probe, answered, index)
    assert max(a.cached for a in answers) > 0


@pytest.mark.parametrize("stream", [True, False])
def test_streaming_or_not_gives_the_same_tokens_and_one_record(engine, tiny, stream):
    answered = engine.run(engine.ask(prompt(tiny, "hello"), stream=stream, max_tokens=9, ignore_eos=True, logprobs=2))
    (record,) = engine.sink.of(answered.call.id)
    assert (record.finish, record.released_tokens, len(answered.ids[0])) == ("length", 9, 9)
    assert record.coverage.final_unscored == 1


def test_a_stop_string_ends_the_record_with_what_was_released(engine, tiny):
    free = engine.run(engine.ask(prompt(tiny, "stop here"), max_tokens=12, ignore_eos=True))
    stop = free.texts[0][4]
    cut = engine.run(engine.ask(prompt(tiny, "stop here"), max_tokens=12, ignore_eos=True, stop=[stop]))
    (record,) = engine.sink.of(cut.call.id)
    assert cut.texts[0] == free.texts[0].split(stop)[0]
    assert record.finish == "stop" and record.coverage.unmonitored == 0
    assert engine.idle()


def test_an_abandoned_stream_is_aborted_and_recorded(engine, tiny):
    async def leave():
        task = asyncio.create_task(engine.ask(prompt(tiny, "leaving"), max_tokens=800, ignore_eos=True))
        while not engine.judge.active:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = len(engine.sink.records)
    engine.run(leave())
    record = engine.sink.wait(before + 1)[-1]
    assert record.finish == "aborted" and record.coverage.unmonitored == 0
    assert record.released_tokens < 800
    assert engine.idle()


def test_hot_swap_under_sixteen_streams_fifty_times(engine, tiny, random_probe):
    """Every record names one version and holds that version's scores; no stream is interrupted."""
    live = engine.plan.live
    stored = live.probes[0]
    settings = engine.plan.settings.model_copy(update={"modes": {"random": FLAG["random"]}})
    sets = {}
    for i in range(50):
        torch.manual_seed(100 + i)
        weight = {LAYER: torch.randn(tiny.d_model) / 8}
        sets[f"v{i + 2}"] = (weight, float(i))
    weights = {"v1": (random_probe.weight, random_probe.bias)} | sets

    def as_live(version):
        from dataclasses import replace

        from monitor.live import assemble

        weight, bias = weights[version]
        card = stored.card.model_copy(update={"version": version})
        return assemble([replace(stored, card=card, weight=weight, bias=bias)], tiny.d_model, settings)

    async def swap_while_streaming():
        done = asyncio.Event()
        answers = []

        async def client(i):
            turn = 0
            while not done.is_set():
                text = "shared beginning of many requests " * 3 + f"{i % 4}"
                answers.append(await engine.ask(prompt(tiny, text), max_tokens=6, ignore_eos=True))
                turn += 1

        clients = [asyncio.create_task(client(i)) for i in range(16)]
        for version in sets:
            await engine.judge.banks.load(as_live(version))
            await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*clients)
        await engine.judge.banks.load(as_live("v1"))
        return answers

    answers = engine.run(swap_while_streaming())
    seen = set()
    for answered in answers:
        (record,) = engine.sink.of(answered.call.id)
        versions = {r.version for r in record.readings}
        assert len(versions) == 1 and record.finish == "length"
        (version,) = versions
        seen.add(version)
        weight, bias = weights[version]
        check(engine, tiny, ProbeWeights("random", weight, bias), answered)
    print(f"swaps: {len(answers)} requests, {len(seen)} versions, {sum(a.cached > 0 for a in answers)} with cache hits")
    assert len(seen) >= 25


def test_preemption_replays_change_nothing(tiny, random_probe, tmp_path):
    """A KV cache for a few sequences only: vLLM preempts and computes again."""
    small = [*EAGER, *CHUNKED, "--num-gpu-blocks-override", "40"]
    plan = make_plan(tiny, tmp_path, [(random_probe, EVERYTHING)], small, modes=FLAG)
    with harness(plan) as engine:
        prompts = [prompt(tiny, f"{i} " * 40) for i in range(12)]
        answers = engine.run(engine.ask_all(prompts, max_tokens=150, ignore_eos=True))
        for answered in answers:
            check(engine, tiny, random_probe, answered)
        from prometheus_client import REGISTRY

        preempted = sum(
            s.value for m in REGISTRY.collect() for s in m.samples if s.name == "vllm:num_preemptions_total"
        )
        assert preempted > 0
        assert engine.idle()
