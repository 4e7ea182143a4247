"""T1 with vLLM: one engine with a worker that breaks on demand; the fault that ends the engine comes last."""

import os
import signal
import threading
import time

import pytest
import torch

from monitor.engines.vllm.check import _decode
from monitor.engines.vllm.nobody import Nobody
from monitor.engines.vllm.selftest import check_decoding
from monitor.errors import ProbeMismatch
from monitor.probe import ProbeWeights

from ..conftest import LAYER, calibrated
from ..contract_policy import as_file
from ..faults import CLEAN, FAULTS, asking, check, check_counts, counts, fill_log
from .conftest import EAGER, Harness, Web, make_plan

# Of these the engine does not recover.
LAST = ("tap silent", "engine dies")


@pytest.fixture(scope="module")
def web(quiet, tmp_path_factory):
    torch.manual_seed(1)
    probe = ProbeWeights("random", {LAYER: torch.randn(quiet.d_model) / 8}, 0.25)
    published = [(probe, {"calibration": calibrated(1e6)})]
    modes = {"random": {"prompt": "block", "response": "block"}}
    plan = make_plan(quiet, tmp_path_factory.mktemp("store"), published, EAGER, modes=modes)
    running = Harness(plan, "tests.vllm.faulty.FaultyWorker")
    web = Web(running)
    yield web
    web.stop()
    running.stop()


@pytest.fixture
def server(web, quiet):
    from ..contract import Server

    return Server(web.url, quiet, web.harness.judge.banks.current.live, web.sink, web.idle)


def fails(web, tmp_path, fail_mode):
    bank = web.harness.judge.banks.current
    phases = {phase: {"mode": "block"} for phase in ("prompt", "response")}
    bank.live = bank.live.under(as_file(tmp_path, {"fail_mode": fail_mode, "probes": {"random": phases}}))


@pytest.fixture
def sampled_without(web):
    """The tap fails in decode steps alone, as a CUDA graph that was captured without it would have it."""
    web.harness.run(web.harness.engine.collective_rpc("break_scores", args=("NaN", 1)))
    yield
    web.harness.run(web.harness.engine.collective_rpc("break_scores", args=("", 0)))


def test_the_self_test_finds_a_tap_that_misses_decode_steps(web, sampled_without):
    plan, scorer = web.harness.plan, web.harness.started.scorer
    with pytest.raises(ProbeMismatch, match="when sampled than in a prompt: off by nan"):
        web.harness.run(check_decoding(scorer, plan, plan.live))


def test_check_times_no_decode_steps_without_scores(web, sampled_without):
    """The first of them ends the answer: 64 would seem to take next to no time."""
    with pytest.raises(ProbeMismatch, match="no score"):
        web.harness.run(_decode(web.harness.started, Nobody()))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_mode", ["closed", "open"])
@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in LAST] + ["tap silent"])
def test_a_fault_is_what_the_fail_mode_says(web, server, quiet, tmp_path, fault, fail_mode, stream):
    fails(web, tmp_path, fail_mode)
    assert server.idle()
    mend = None
    if fault == "log full":
        mend = fill_log(web.sink, tmp_path / "full.sqlite3")
    else:
        web.harness.run(web.harness.engine.collective_rpc("break_scores", args=(fault, CLEAN)))
    before = counts(web.sink.metrics)
    response = server.post("/v1/chat/completions", asking(quiet, stream))
    assert server.idle()  # and so its record is written
    (record,) = web.sink.of(response.headers["x-midstream-request-id"])
    if mend is not None:
        mend()
    web.harness.run(web.harness.engine.collective_rpc("break_scores", args=("", 0)))
    if fault == "tap silent" and (fail_mode, stream) != ("closed", False):
        assert record.coverage.unmonitored > 0, "it is deaf since the first of these: nothing is judged at all"
        assert response.status_code == (200 if fail_mode == "open" else 503)
        return
    check(response, record, fault, fail_mode, stream)
    check_counts(before, counts(web.sink.metrics), record, fault, fail_mode)


def test_when_the_engine_dies_nothing_more_is_said_and_the_server_is_not_ready(web, server, quiet, tmp_path):
    """Both kinds of answer are under way; with the tap gone they are served only because it fails open."""
    import httpx

    fails(web, tmp_path, "open")
    responses = {}

    def ask(stream):
        body = asking(quiet, stream) | {"max_tokens": 900}
        responses[stream] = server.post("/v1/chat/completions", body)

    asked = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in asked:
        thread.start()
    deadline = time.monotonic() + 60
    while web.harness.judge.active < 2:
        assert time.monotonic() < deadline, responses
    for process in web.harness.engine.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)
    for thread in asked:
        thread.join(60)
    assert responses[False].status_code == 503
    assert responses[True].status_code == 503 or '"error"' in responses[True].text
    assert "[DONE]" not in responses[True].text and '"length"' not in responses[True].text
    assert httpx.get(web.url + "/ready", timeout=60).status_code == 503
    assert [r.finish for r in web.sink.records[-2:]] == ["engine_error"] * 2
