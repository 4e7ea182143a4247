"""Hundreds of requests at once and none crossed; and a tap that falls silent is told, never taken for harmless."""

import asyncio

import httpx
import numpy as np
import pytest

from monitor.aggregate import Aggregation, aggregate
from monitor.live import counted
from monitor.types import ProbeMismatch

from ..conftest import calibrated, reference_logits
from .conftest import EAGER, Harness, Web, make_plan

N = 500
IDS = [
    "a",
    "a-",
    "a-b",
    "0_a",
    "x" * 4096,
    "é".encode(),
    "../../etc",
    "'; DROP TABLE records",
    "%0d%0a",
]


@pytest.fixture(scope="module")
def web(tiny, random_probe, tmp_path_factory):
    """A probe that blocks nothing, on a worker that can go deaf."""
    modes = {"random": {"prompt": "block", "response": "block"}}
    folder = tmp_path_factory.mktemp("store")
    plan = make_plan(tiny, folder, [(random_probe, {"calibration": calibrated(1e6)})], EAGER, modes=modes)
    running = Harness(plan, "tests.vllm.deaf.DeafWorker")
    web = Web(running)
    yield web
    web.stop()
    running.stop()


def ask(web, tiny, text, **headers):
    body = {"model": tiny.name, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return httpx.post(web.url + "/v1/chat/completions", json=body, headers=headers, timeout=300)


def test_500_at_once_with_hostile_ids_and_none_is_crossed(web, tiny, random_probe):
    texts = [f"request {i} " + chr(33 + i % 90) * (i % 37) for i in range(N)]

    async def everything():
        limits = httpx.Limits(max_connections=N)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:

            async def one(i):
                body = {"model": tiny.name, "messages": [{"role": "user", "content": texts[i]}], "max_tokens": 2}
                headers = {"X-Request-Id": IDS[i % len(IDS)]}
                return await client.post(web.url + "/v1/chat/completions", json=body, headers=headers)

            return await asyncio.gather(*(one(i) for i in range(N)))

    answers = asyncio.run(everything())
    assert [a.status_code for a in answers] == [200] * N
    ids = [a.headers["x-midstream-request-id"] for a in answers]
    assert len(set(ids)) == N
    crossed, values = 0, set()
    for text, request_id in zip(texts, ids, strict=True):
        prompt = tiny.template.encode([{"role": "user", "content": text}])
        logits = reference_logits(tiny.module, list(prompt.token_ids), random_probe.weight, random_probe.bias)
        expected = aggregate(Aggregation("max"), [float(logits[p]) for p in counted(prompt)])
        (record,) = web.sink.of(request_id)
        values.add(round(expected, 3))
        crossed += abs(record.readings[0].value - expected) > 1e-3
    print(f"{N} requests, {len(values)} different scores, {crossed} crossed")
    assert crossed == 0 and len(values) > N / 5
    assert web.idle()


def test_a_silent_tap_fails_closed_and_is_counted(web, tiny):
    web.harness.run(web.harness.engine.collective_rpc("go_deaf"))
    answer = ask(web, tiny, "is anybody listening?")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "unavailable"
    (record,) = web.sink.of(answer.headers["x-midstream-request-id"])
    assert (record.verdict, record.finish, record.released_tokens) == ("unmonitored", "unmonitored", 0)
    assert record.coverage.causes == {"not_finite": record.coverage.prompt_tokens}
    assert np.isnan(record.token_scores["random"]).all()
    assert web.idle()


def test_a_deaf_worker_does_not_become_ready(tiny, random_probe, tmp_path):
    """The canaries find it before anything is served."""
    plan = make_plan(tiny, tmp_path, [(random_probe, {"calibration": calibrated(1e6)})], EAGER)
    with pytest.raises(ProbeMismatch, match="off by nan"):
        Harness(plan, "tests.vllm.deaf.BornDeafWorker")
