"""The same edge in front of vLLM as an operator starts it: slow peers, bodies, overload, SIGHUP, the admin port."""

import contextlib
import dataclasses
import json
import re
import signal
import socket
import sqlite3
import time
from types import SimpleNamespace

import httpx
import pytest

from ..conftest import calibrated
from ..overload import overloaded
from ..shapes import SHAPES, fuzzed, send_shape
from ..test_connection import t11
from ..web import percentile, until, whole
from .conftest import EAGER, VllmServer

ADMIN = "the-admin-key-of-this-test"


@dataclasses.dataclass(frozen=True)
class Size:
    """limit: requests at once; receive_s, write_s: deadlines; slow: readers that never read, of so many choices each;
    senders: slow ones of each kind; normal: requests meanwhile; fuzzed: bodies; overload_s: for so long"""

    limit: int
    receive_s: float
    write_s: float
    slow: int
    choices: int
    senders: int
    normal: int
    fuzzed: int
    overload_s: float


SAMPLE = Size(8, 2.0, 2.0, 2, 8, 10, 20, 100, 5.0)
FULL = Size(128, 10.0, 30.0, 50, 1, 75, 200, 500, 60.0)  # RELIABILITY.md's; more choices would queue for the engine
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

    def wait(self):
        super().wait()
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

    def memory(self):
        """MiB of the process that clients talk to."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024

    def idle(self):
        until(lambda: self.metric("midstream_active_sequences") == 0)
        return True


@pytest.fixture(scope="module")
def size(request):
    return FULL if request.config.getoption("--attack") else SAMPLE


@pytest.fixture(scope="module")
def server(tiny, random_probe, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limited")
    (folder / "policy.yaml").write_text(POLICY)
    settings = {
        "max_concurrent": str(size.limit),
        "receive_deadline_s": str(size.receive_s),
        "write_deadline_s": str(size.write_s),
        "policy": str(folder / "policy.yaml"),
        "admin_key": ADMIN,
        "admin_port": "0",
        "log_wait_s": "60",
    }
    running = Limited(folder, tiny, [(random_probe, {"calibration": calibrated(1e6)})], EAGER, **settings)
    try:
        running.wait()
        running.admin = re.search(r"admin port on (http://127\.0\.0\.1:\d+/admin/)", running.log())[1]
        running.folder = folder
        yield running
    finally:
        running.stop()


def test_t10_slow_readers_are_closed_and_their_answers_end(server, size):
    """Alternatives fill the buffers of a client that never reads; more of them would only keep the server busy."""
    before, n_before = server.limited("write"), len(server.sink.records)
    body = {
        "model": server.model.name, "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": size.choices,
        "max_tokens": 900, "ignore_eos": True, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    opened, memory = [], server.memory()
    closed, normal, began = [], [], time.monotonic()
    for _ in range(size.slow):
        raw = server.connect()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(whole(body))
        opened.append(raw)
    while len(closed) < size.slow and time.monotonic() < began + 120 + 10 * size.slow:
        start = time.monotonic()
        assert server.post(None).status_code == 200  # the others go on
        normal.append(time.monotonic() - start)
        # By the server's own count: a reset that lies behind a full window reaches its peer only with the next probe.
        closed += [time.monotonic() - began] * int(server.limited("write") - before - len(closed))
        time.sleep(0.2)
    assert len(closed) == size.slow
    assert min(closed) >= size.write_s, "nobody is closed before the deadline"
    grown = server.memory() - memory
    assert server.idle()
    server.sink.wait(n_before + len(normal) + size.choices * size.slow)
    slow = [r for r in server.sink.records[n_before:] if r.index or r.coverage.response_tokens > 1]
    assert len(slow) == size.choices * size.slow and {r.finish for r in slow} <= {"aborted", "length"}
    # The engine does not wait for readers: whoever had said everything by then had ended.
    aborted = sum(r.finish == "aborted" for r in slow)
    for raw in opened:
        raw.close()
    print(
        f"\nT10, vLLM: {size.slow} slow readers closed after {min(closed):.1f} to {max(closed):.1f} s, filling their "
        f"buffers included; {aborted} of {len(slow)} answers aborted; memory +{grown:.1f} MiB; {len(normal)} normal "
        f"requests meanwhile, p99 {percentile(normal, 0.99) * 1e3:.0f} ms"
    )


def test_t11_slow_senders_are_closed_and_normal_requests_pass(server, size):
    body = {"model": server.model.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    t11(server, size.receive_s, each=size.senders, normal=size.normal, every_s=size.receive_s / 4, body=body)


def test_t12_each_shape_is_refused_and_nothing_is_generated(server, size):
    before, memory, times = len(server.sink.records), server.memory(), {}
    for name, (data, wanted, limit) in SHAPES.items():
        counted = server.limited(limit)
        got, times[name] = send_shape(server.connect, data)
        assert (got, server.limited(limit)) == (wanted, counted + 1), name
    with httpx.Client(base_url=server.url) as client:
        for body in fuzzed(size.fuzzed):
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400 and response.json()["error"]["message"]
    assert server.idle() and len(server.sink.records) == before
    print(
        f"\nT12, vLLM: {len(SHAPES)} shapes refused, the slowest in {max(times.values()) * 1e3:.0f} ms; {size.fuzzed} "
        f"fuzzed bodies: all 400; memory +{server.memory() - memory:.1f} MiB"
    )


def test_t13_overload_is_refused_and_nothing_goes_unjudged(server, size):
    server.idle()
    overloaded(server, size.limit, 3 * size.limit, size.overload_s)


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
    assert httpx.post(server.admin + "policy/reload", headers=bearer, timeout=60).status_code == 200
    assert policy() == "third"
    file.write_text("probes: 7\n")
    assert httpx.post(server.admin + "policy/reload", headers=bearer, timeout=60).status_code == 422
    assert policy() == "third"
    assert httpx.get(server.admin + "status", timeout=60).status_code == 401
    rows = httpx.get(server.admin + "audit?limit=10", headers=bearer, timeout=60).json()
    assert len(json.dumps(rows)) > 100 and "policy/reload" in json.dumps(rows)
