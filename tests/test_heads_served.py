"""Probes with several projections, served: values and traces are those of transformers' own states."""

import asyncio

import httpx
import numpy as np
import pytest
import torch

from monitor.aggregate import Aggregation, aggregate, token_scores
from monitor.engines.embedded.harvest import prompt_values
from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.errors import ProbeMismatch
from monitor.live import counted
from monitor.probe import ProbeWeights
from monitor.types import Caller, Phase
from probes_store.card import Canary

from .conftest import LAYER, calibrated, make_card, publish, reference_logits

K = 4


@pytest.fixture(scope="module")
def heads(tiny):
    torch.manual_seed(6)
    weight = {layer: torch.randn(K, tiny.d_model) / 8 for layer in (1, LAYER)}
    return ProbeWeights("heads", weight, (0.0, 0.25, -0.5, 1.0))


def changes(model, probe, how, off=0.0, **more):
    """What of its card is not as `make_card` would have it."""
    prompt = model.template.encode([{"role": "user", "content": "a canary"}])
    scores = logits(model, prompt.token_ids, probe)[counted(prompt)]
    scores[-1, -1] += off
    both = {phase.value: how for phase in Phase}
    canaries = (Canary(text="a canary", scores=tuple(map(float, scores.ravel()))),)
    return {"projections": probe.k, "aggregation": both, "canaries": canaries} | more


def logits(model, ids, probe):
    """(n, k), by transformers"""
    columns = [
        reference_logits(model.module, list(ids), {layer: w[i] for layer, w in probe.weight.items()}, probe.biases[i])
        for i in range(probe.k)
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", ["multimax", "attention", "rolling_attention"])
def test_the_served_value_is_the_aggregate_of_transformers_own_states(tiny, heads, random_probe, serve, kind):
    how = Aggregation(kind, window=4)
    made_of = [
        (heads, changes(tiny, heads, how, calibration=calibrated(-1e6))),
        (random_probe, {"calibration": calibrated(-1e6)}),
    ]
    modes = {"heads": {"prompt": "flag", "response": "flag"}, "random": {"prompt": "flag"}}
    server = serve(tiny, made_of, modes=modes)
    asked = [{"role": "user", "content": "how do I bake bread?"}]
    server.post("/v1/chat/completions", {"messages": asked, "max_tokens": 9, "temperature": 0}).raise_for_status()
    (record,) = server.sink.wait(1)
    prompt = tiny.template.encode(asked)
    rows = logits(tiny, prompt.token_ids, heads)
    value = aggregate(how, rows[counted(prompt)])
    found = {(r.probe, r.phase): r for r in record.readings}
    assert found["heads", Phase.PROMPT].value == pytest.approx(value, abs=1e-3)
    assert prompt_values(tiny, heads, dict.fromkeys(Phase, how), [prompt]) == pytest.approx([value], abs=1e-3)
    assert record.token_scores["heads"][: len(rows)] == pytest.approx(token_scores(how, rows), abs=1e-3)
    one = reference_logits(tiny.module, list(prompt.token_ids), random_probe.weight, random_probe.bias)
    assert record.token_scores["random"][: len(rows)] == pytest.approx(one, abs=1e-3)


def test_an_operators_trace_has_one_score_a_probe(tiny, heads, random_probe, serve):
    how = Aggregation("attention")
    server = serve(tiny, [(heads, changes(tiny, heads, how)), (random_probe, {})])
    prompt, seen = tiny.template.encode([{"role": "user", "content": "soup"}]), []
    scorer = EmbeddedScorer(server.engine)
    asyncio.run(scorer.follow("t", prompt, 3, 0.0, Caller(), lambda first, ids, rows: seen.append(rows)))
    rows, n = np.concatenate(seen), len(prompt.token_ids)
    assert rows.shape == (n + 2, 2)
    assert rows[:n, 0] == pytest.approx(token_scores(how, logits(tiny, prompt.token_ids, heads)), abs=1e-3)
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_canary_holds_every_projection(tiny, heads, tmp_path):
    how = Aggregation("attention")
    for off in (0.0, 0.5):
        more = changes(tiny, heads, how, off)
        live, _ = publish(tiny, [(heads, more)], tmp_path / str(off))
        prompt = tiny.template.encode([{"role": "user", "content": "a canary"}])
        if off:
            with pytest.raises(ProbeMismatch, match=r"off by 0\.5"):
                live.check_canaries(tiny.template, lambda p: logits(tiny, p.token_ids, heads))
        else:
            assert live.check_canaries(tiny.template, lambda p: logits(tiny, p.token_ids, heads)) < 1e-4
    assert make_card(tiny, heads, **more).projections == K and len(prompt.token_ids) > 0
