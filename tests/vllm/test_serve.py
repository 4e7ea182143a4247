"""`midstream serve --engine vllm` as a process: ready, asked, shown, drained, and what it says when its engine dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from monitor.traffic.features import read_features

from ..conftest import calibrated
from .conftest import EAGER, VllmServer

MODES = json.dumps({"random": {"prompt": "block", "response": "block"}})


@pytest.fixture
def server(tiny, random_probe, tmp_path):
    features = {"log_features": "true", "feature_rate": "1", "features": str(tmp_path / "features")}
    probes = [(random_probe, {"calibration": calibrated(1e6)})]
    running = VllmServer(tmp_path, tiny, probes, EAGER, modes=MODES, **features)
    yield running
    running.stop()


def children(pid):
    """Process ids below `pid`, by name."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    below, todo = {}, [str(pid)]
    while todo:
        parent = todo.pop()
        for child, of, name in rows:
            if of == parent:
                below[int(child)] = name
                todo.append(child)
    return below


def test_ready_asked_shown_drained(server, tiny, tmp_path):
    server.wait()
    assert httpx.get(server.url + "/ready", timeout=60).json() == {"status": "ready", "engine": "vllm"}
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200
    request_id = answer.headers["x-midstream-request-id"]
    (record,) = server.record(request_id)
    assert record["verdict"] == "allow" and record["coverage"]["prompt_scored"] > 10
    command = [sys.executable, "-m", "monitor.cli", "show", request_id]
    shown = subprocess.run(
        command, env=os.environ | {"MIDSTREAM_RECORDS": str(server.records)}, capture_output=True, text=True
    )
    assert "verdict allow" in shown.stdout, shown.stderr
    assert server.metric("midstream_requests_total") == 1
    assert server.metric("vllm:request_success_total") >= 1
    # A request under way at the signal is answered to its end.
    late = []
    long = body | {"max_tokens": 800, "ignore_eos": True}
    asking = threading.Thread(target=lambda: late.append(server.post("/v1/chat/completions", long)))
    asking.start()
    while server.metric("midstream_active_sequences") < 1:
        assert asking.is_alive()
        time.sleep(0.05)
    assert server.stop() == 0
    asking.join(60)
    assert late[0].status_code == 200 and late[0].json()["usage"]["completion_tokens"] == 800
    assert server.record(late[0].headers["x-midstream-request-id"])[0]["finish"] == "length"
    # The first was read again, which left no record of its own; the last came too late for that.
    kept = [f for f in read_features(tmp_path / "features") if f.request_id == request_id]
    assert [(f.phase, f.n_tokens, f.q, f.fingerprint) for f in kept] == [
        ("prompt", record["coverage"]["prompt_tokens"] - record["counted"][-1][0], 1.0, tiny.fingerprint),
        ("response", 4, 1.0, tiny.fingerprint),
    ]


def test_a_dead_engine_ends_the_server_with_its_own_exit_code(server):
    server.wait()
    answer = []
    long = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 900, "ignore_eos": True, "stream": True}

    def ask():
        with httpx.stream(
            "POST", server.url + "/v1/chat/completions", json=long | {"model": server.model.name}, timeout=60
        ) as response:
            answer.append(response.headers["x-midstream-request-id"])
            answer.append(response.read().decode())

    workers = children(server.process.pid)
    assert len(workers) >= 2
    asking = threading.Thread(target=ask)
    asking.start()
    while not answer:
        assert asking.is_alive()
        time.sleep(0.05)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):  # it ended with the one before
            os.kill(pid, signal.SIGKILL)
    asking.join(60)
    assert server.process.wait(60) == 3
    (record,) = server.record(answer[0])
    assert record["finish"] == "engine_error"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--worker-cls", "x.Y"], "--worker-cls"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "speculative"),
        (["--no-such-argument"], "no-such-argument"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(tiny, random_probe, tmp_path, arguments, says):
    server = VllmServer(tmp_path, tiny, [(random_probe, {})], [*EAGER, *arguments])
    try:
        assert server.process.wait(600) == 2
        last = server.log().strip().splitlines()[-1]
    finally:
        server.stop()
    assert says in last and "Traceback" not in server_log(tmp_path)


def server_log(folder):
    return (folder / "log").read_text(errors="replace")
