"""Connections to an upstream (T9, T15): what is tried again, and that who leaves ends its request."""

import contextlib
import json
import socket
import struct
import time

import pytest

from monitor.upstream.transport import Bounds

from .cuts import check_cut, proxy, wire  # noqa: F401
from .fake_observer import STREAM, Reply, proxying
from .fake_upstream import HANG, RESET, chat_stream, chat_whole, head, json_answer
from .web import percentile, until, whole


def test_a_request_without_any_answer_is_tried_again(upstream):
    fine = json_answer(chat_whole("fine"))
    upstream.answer = lambda asked: [RESET] if len(upstream.asked) % 3 else fine
    with proxying(upstream.url, bounds=Bounds(retries=2)) as proxy:
        upstream.asked.clear()
        response = proxy.chat()
        assert Reply(response).texts == {0: "fine"}
        assert len(upstream.asked) == 3 and len({a.body for a in upstream.asked}) == 1
        assert len(proxy.records(response)) == 1


@STREAM
def test_an_answer_that_has_begun_is_not(upstream, stream):
    with proxying(upstream.url, bounds=Bounds(retries=2)) as proxy:
        upstream.asked.clear()
        upstream.answer = lambda asked: [wire(stream, True)[:-60], RESET]
        check_cut(proxy.chat(stream=stream))
        assert len(upstream.asked) == 1


def test_an_upstream_that_is_not_there_is_unavailable():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with proxying(f"http://127.0.0.1:{port}/v1", bounds=Bounds(retries=1)) as proxy:
        response = proxy.chat()
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "upstream_unreachable"
        assert proxy.records(response)[0].finish == "engine_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("began", [False, True])
def test_a_client_that_leaves_ends_the_upstreams_request(upstream, proxy, stream, began):
    raw = wire(stream, True)
    upstream.answer = lambda asked: [raw[: len(raw) // 2] if began else b"", HANG]
    before, asked = len(proxy.sink.records), len(upstream.asked)
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port))) as client:
        body = json.dumps({"model": "far", "messages": [{"role": "user", "content": "go"}], "stream": stream}).encode()
        line = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(line + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(upstream.asked) > asked)
        if began and stream:
            client.recv(100)
    assert upstream.asked[-1].closed.wait(30), "sooner than any time-out of ours"
    (record,) = proxy.sink.wait(before + 1)[before:]
    assert record.finish == "aborted" and record.coverage.unmonitored == 0
    assert proxy.idle()


@pytest.mark.parametrize("n", [8, pytest.param(200, marks=pytest.mark.attack)])
def test_clients_that_leave_at_any_token_end_the_upstreams_request(upstream, proxy, n):
    """Half of them say goodbye, half are reset."""
    frames = chat_stream("words " * 40, size=6)[:-2]
    upstream.answer = lambda asked: [head(), *(x for frame in frames for x in (frame, 0.005)), HANG]
    body = {"model": "far", "messages": [{"role": "user", "content": "go"}], "stream": True}
    before, seconds = len(proxy.sink.records), []
    for i in range(n):
        asked = len(upstream.asked)
        client = socket.create_connection(("127.0.0.1", proxy.port))
        client.sendall(whole(body))
        seen = b""
        while seen.count(b"data: ") < 1 + 7 * i % 36:
            seen += client.recv(4096)
        if i % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        left = time.monotonic()
        assert upstream.asked[asked].closed.wait(10)
        seconds.append(upstream.asked[asked].left - left)
    records = proxy.sink.wait(before + n)[before:]
    assert {r.finish for r in records} == {"aborted"} and len(records) == n and proxy.idle()
    assert all(r.coverage.unmonitored == 0 for r in records)
    print(
        f"T9, in front of an upstream: {n} clients left, {n} requests to it ended after "
        f"p50 {percentile(seconds, 0.5) * 1e3:.1f} ms, p99 {percentile(seconds, 0.99) * 1e3:.1f} ms"
    )
