"""The same edge in front of vLLM as an operator starts it: slow peers, bodies, overload, SIGHUP, the admin port."""

import contextlib
import json
import re
import select
import signal
import socket
import sqlite3
import time
from types import SimpleNamespace

import httpx
import pytest

from ..conftest import calibrated
from ..test_connection import t11
from ..test_limits import SHAPES, fuzzed, overloaded, send_shape
from ..web import until, whole
from .conftest import EAGER, VllmServer

ADMIN = "the-admin-key-of-this-test"
LIMIT = 8
POLICY = "name: first\nprobes:\n  random:\n    prompt: {mode: block}\n    response: {mode: block}\n"


class Sink:
    """The server's log, read as the engine's observer would have been told."""

    def __init__(self, path):
        self._path = path

    @property
    def records(self):
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT body FROM records ORDER BY id").fetchall()
        return [json.loads(body, object_hook=lambda d: SimpleNamespace(**d)) for (body,) in rows]

    def wait(self, n):
        until(lambda: len(self.records) >= n)
        return self.records


class Limited(VllmServer):
    """A VllmServer with what the tests of the edge ask of a server."""

    def wait(self, timeout_s=400):
        super().wait(timeout_s)
        self.port = int(self.url.rpartition(":")[2])
        self.sink = Sink(self.records)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def post(self, path, body=None, **kwargs):
        if body is None:  # as tests/web.py's: any body, any route
            path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        return super().post(path, body, **kwargs)

    def metric(self, name, **labels):
        lines = httpx.get(self.url + "/metrics", timeout=60).text.splitlines()
        wanted = {f'{k}="{v}"' for k, v in labels.items()}
        found = [line for line in lines if re.match(rf"{name}[{{ ]", line) and all(w in line for w in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def limited(self, limit):
        return self.metric("midstream_limited_total", limit=limit)

    def measured(self):
        return {"calls": self.metric("midstream_requests_total")}

    def idle(self):
        until(lambda: self.metric("midstream_active_sequences") == 0)
        return True


@pytest.fixture(scope="module")
def server(tiny, random_probe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limited")
    (folder / "policy.yaml").write_text(POLICY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    settings = {
        "max_concurrent": str(LIMIT),
        "receive_deadline_s": "2",
        "write_deadline_s": "2",
        "policy": str(folder / "policy.yaml"),
        "admin_key": ADMIN,
        "admin_port": port,
    }
    running = Limited(folder, tiny, [(random_probe, {"calibration": calibrated(1e6)})], EAGER, **settings)
    running.admin, running.folder = f"http://127.0.0.1:{port}/admin/", folder
    running.wait()
    yield running
    running.stop()


def test_t10_slow_readers_are_closed_and_their_answers_end(server):
    """Thirty alternatives a token fill the buffers of a client that never reads."""
    before, n_before, slow = server.limited("write"), len(server.sink.records), 2
    body = {
        "model": server.model.name, "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 8,
        "max_tokens": 900, "ignore_eos": True, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip
    poll, opened = select.poll(), {}
    for _ in range(slow):
        raw = server.connect()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(whole(body))
        poll.register(raw, 0)  # only its end: a reset
        opened[raw.fileno()] = raw
    closed = 0
    deadline = time.monotonic() + 120
    while closed < slow and time.monotonic() < deadline:
        assert server.post(None).status_code == 200  # the others go on
        for descriptor, _ in poll.poll(200):
            poll.unregister(descriptor)
            closed += 1
    assert closed == slow and server.limited("write") == before + slow
    assert server.idle()
    cut = [r for r in server.sink.records[n_before:] if r.finish == "aborted"]
    assert len(cut) == 8 * slow
    for raw in opened.values():
        raw.close()


def test_t11_slow_senders_are_closed_and_normal_requests_pass(server):
    t11(server, 2.0, each=10, normal=20, every_s=0.5)


def test_t12_each_shape_is_refused_and_nothing_is_generated(server):
    before = len(server.sink.records)
    for name, (data, wanted, limit) in SHAPES.items():
        counted = server.limited(limit)
        got, _ = send_shape(server.connect, data)
        assert (got, server.limited(limit)) == (wanted, counted + 1), name
    with httpx.Client(base_url=server.url) as client:
        for body in fuzzed(100):
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400 and response.json()["error"]["message"]
    assert server.idle() and len(server.sink.records) == before


def test_t13_overload_is_refused_and_nothing_goes_unjudged(server):
    server.idle()
    overloaded(server, LIMIT, 3 * LIMIT, 5)


def test_sighup_and_the_admin_port_change_the_policy(server):
    def policy():
        answer = server.post(None)
        return answer.headers["x-midstream-policy"]

    file = server.folder / "policy.yaml"
    assert policy() == "first"
    file.write_text(POLICY.replace("first", "second"))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: policy() == "second")
    file.write_text(POLICY.replace("first", "third"))
    bearer = {"Authorization": f"Bearer {ADMIN}"}
    assert httpx.post(server.admin + "policy/reload", headers=bearer).status_code == 200
    assert policy() == "third"
    file.write_text("probes: 7\n")
    assert httpx.post(server.admin + "policy/reload", headers=bearer).status_code == 422
    assert policy() == "third"
    assert httpx.get(server.admin + "status").status_code == 401
    rows = httpx.get(server.admin + "audit?limit=10", headers=bearer).json()
    assert len(json.dumps(rows)) > 100 and "policy/reload" in json.dumps(rows)
