"""A tap that falls silent is told, never taken for harmless. (Requests that are crossed: T8 in tests/siege.)"""

import httpx
import numpy as np
import pytest

from monitor.errors import ProbeMismatch

from ..conftest import calibrated
from .conftest import EAGER, Harness, Web, make_plan


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
