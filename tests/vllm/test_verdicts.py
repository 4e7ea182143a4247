"""The real model: 200 prompts get the verdict that the embedded engine gives; what bfloat16 changes is counted."""

import json
import random
from pathlib import Path

import pytest

from monitor.config import DEMO_MODEL, cache_dir, load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.vllm import launch
from monitor.live import load_live
from monitor.metrics import Metrics
from monitor.sequence import Watch
from probes_store.store import Store

from .conftest import EAGER, harness

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILES = ("jailbreakbench.jsonl", "xstest.jsonl", "benign_mix.jsonl", "catqa_en.jsonl")


@pytest.fixture(scope="module")
def prompts(demo):
    """200 of them, 50 a file: half harmful, half not. Nothing is fitted or chosen here."""
    rows = []
    for name in FILES:
        lines = (SHARED / name).read_text().strip().split("\n")
        rows += random.Random(0).sample([json.loads(line)["text"] for line in lines], 50)
    return [demo.template.encode([{"role": "user", "content": text[:1500]}]) for text in rows]


@pytest.fixture(scope="module")
def embedded(demo, prompts):
    """(verdict, value) of each prompt, by the embedded engine's tap."""
    settings = load_settings(model=DEMO_MODEL)
    live = load_live(demo.served(), Store(settings.store), settings)
    engine = EmbeddedEngine(demo, live, settings, Metrics())
    found = []
    for prompt in prompts:
        watch = Watch(prompt, live.rules["chat"])
        watch.advance(0, engine.prefill(prompt))
        found.append((watch.verdict, watch.readings()[0].value))
    return found


def by_vllm(prompts, dtype, **settings):
    chosen = load_settings(engine="vllm", model=DEMO_MODEL, dtype=dtype, cache=cache_dir(), **settings)
    # A CPU without bfloat16 emulates it: a step of 2,048 tokens would outlast vLLM's own patience with its engine.
    small = ["--max-num-batched-tokens", "256"] if dtype == "bfloat16" else []
    plan = launch.plan(chosen, [*EAGER, *small, "--gpu-memory-utilization", "0.3"])
    with harness(plan) as engine:
        answers = engine.run(engine.ask_all(prompts, max_tokens=1), 3600)
        records = [engine.sink.of(a.call.id)[0] for a in answers]
    return [(r.verdict, r.readings[0].value) for r in records]


def compare(embedded, other):
    flips = [i for i, (a, b) in enumerate(zip(embedded, other, strict=True)) if a[0] is not b[0]]
    off = max(abs(a[1] - b[1]) for a, b in zip(embedded, other, strict=True))
    return flips, off


def test_float32_gives_the_same_verdicts(embedded, prompts):
    flips, off = compare(embedded, by_vllm(prompts, "float32"))
    blocked = sum(v == "block" for v, _ in embedded)
    print(f"float32: {len(flips)} of {len(prompts)} verdicts differ, {blocked} blocked, values off by {off:.1e}")
    assert flips == [] and 20 < blocked < 180
    assert off <= 1e-3


@pytest.mark.attack
def test_the_flips_of_bfloat16_are_counted(embedded, prompts):
    flips, off = compare(embedded, by_vllm(prompts, "bfloat16", canary_tolerance=1.0))
    print(f"bfloat16: {len(flips)} of {len(prompts)} verdicts differ, values off by up to {off:.2f}")
    assert len(flips) <= 10
