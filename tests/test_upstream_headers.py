"""What of a client's headers goes on: nothing that a client sends fails a request, or counts against the upstream."""

import socket

import pytest

from monitor.upstream.transport import Bounds

from .fake_observer import HTTP, proxying
from .fake_upstream import HANG, chat_whole, json_answer
from .web import answer, status, until, whole

ASK = {"model": "far", "messages": [{"role": "user", "content": "go"}]}
ONE_IS_ENOUGH = Bounds(retries=2, failures=1, pause_s=60)


def send(proxy, line):
    """A request with this line in its head, as no client library would send it; returns its status."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        client.sendall(whole(ASK, b"Connection: close\r\n" + line + b"\r\n"))
        return status(answer(client))


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url, bounds=ONE_IS_ENOUGH) as server:
        yield server


@pytest.mark.parametrize(
    ("line", "name", "sent"),
    [
        (b"User-Agent: x y", "user-agent", "x y"),
        (b"User-Agent: x ", "user-agent", "x"),
        (b"User-Agent: x\t", "user-agent", "x"),
        (b"Accept: \t a/b \t ", "accept", "a/b"),
        (b"Traceparent: 00-aa-bb-01 ", "traceparent", "00-aa-bb-01"),
        (b"Tracestate: a=b ", "tracestate", "a=b"),
        (b"Tracestate: a=\xe9", "tracestate", None),
        (b"Tracestate: \xff\xfe", "tracestate", None),
        (b"Tracestate:", "tracestate", ""),
    ],
)
def test_a_value_goes_on_as_every_parser_takes_it_or_not_at_all(upstream, proxy, line, name, sent):
    upstream.answer = lambda asked: json_answer(chat_whole("fine"))
    assert send(proxy, line) == 200
    assert upstream.asked[-1].headers.get(name) == sent
    assert proxy.upstream.state == "closed"


def test_a_body_is_json_whatever_the_client_calls_it(upstream, proxy):
    """With `charset=utf-7` an upstream would read another text than was judged."""
    upstream.answer = lambda asked: json_answer(chat_whole("fine"))
    for kind in ("application/json; charset=utf-7", "application/json"):
        assert proxy.chat(headers={"Content-Type": kind}).status_code == 200
        assert upstream.asked[-1].headers["content-type"] == "application/json"
    upstream.answer = lambda asked: json_answer({"object": "list", "data": []})
    HTTP.get(proxy.url + "/v1/models", headers={"Content-Type": "text/plain"})
    assert upstream.asked[-1].method == "GET" and "content-type" not in upstream.asked[-1].headers


def test_a_request_that_is_no_http_is_not_the_upstreams_failure(upstream):
    """The operator's key with the line end of its file."""
    asked = len(upstream.asked)
    with proxying(upstream.url, key="operators-own-key\n", bounds=ONE_IS_ENOUGH) as proxy:
        for _ in range(2):
            response = proxy.chat()
            assert response.status_code == 502 and "own-key" not in response.text
        assert proxy.upstream.state == "closed" and len(upstream.asked) == asked
        assert proxy.records(response)[0].finish == "engine_error"


def test_a_full_pool_is_not_the_upstreams_failure(upstream):
    upstream.answer = lambda asked: [HANG]
    asked = len(upstream.asked)
    bounds = Bounds(retries=2, failures=1, pause_s=60, connections=1, connect_s=2)
    with proxying(upstream.url, bounds=bounds) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(whole(ASK))
            until(lambda: len(upstream.asked) > asked)
            response = proxy.chat()
            assert response.status_code == 503 and response.headers["retry-after"]
            assert "in use" in response.json()["error"]["message"]
        assert proxy.idle()
        upstream.answer = lambda asked: json_answer(chat_whole("fine"))
        assert proxy.chat().status_code == 200 and len(upstream.asked) == asked + 2
