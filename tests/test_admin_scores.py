"""Per-token scores at the admin port: as they are judged, a few at once, and which bodies are refused."""

import asyncio

import pytest

from monitor.api.admin.app import MAX_TRACES
from monitor.api.admin.guard import MAX_BODY_BYTES
from monitor.errors import Overloaded, RequestInvalid

from .admin_port import HELLO, events
from .admin_port import port as port


def test_scores_come_as_they_are_judged(port):
    port.tracer.let = asyncio.Semaphore(0)
    ask = {"messages": [{"role": "system", "content": "Be kind."}, *HELLO["messages"]], "max_tokens": 3}
    got = []
    with port.open("POST", "/admin/scores", body=ask) as answer:
        assert (answer.status, answer.headers.get_content_type()) == (200, "text/event-stream")
        assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-store", "no")
        assert len(answer.headers["x-midstream-request-id"]) == 32
        for event in events(answer):
            got.append(event)
            port.let()  # the next one exists only now
    assert got == [port.tracer.events[0], port.tracer.events[1] | {"scores": {"demo": None}}, port.tracer.events[2]]
    assert port.calls == [("trace", ask["messages"], 3, 0.0)]


def test_a_reader_that_leaves_stops_the_work(port):
    port.tracer.let = asyncio.Semaphore(0)
    answer = port.open("POST", "/admin/scores", body=HELLO)
    assert next(events(answer))["position"] == 0
    answer.close()
    assert port.tracer.closed.wait(20)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RequestInvalid("too long", "messages"), 400), (Overloaded("the queue is full"), 429)],
)
def test_what_can_not_be_scored_is_a_status_at_first_and_an_event_later(port, error, status):
    port.tracer.error = error
    got, body, _ = port.ask("POST", "/admin/scores", body=HELLO)
    assert (got, body["error"]["message"]) == (status, str(error))
    port.tracer.error, port.tracer.late = None, error
    with port.open("POST", "/admin/scores", body=HELLO) as answer:
        got = list(events(answer))
    assert [set(e) for e in got] == [{"position", "token", "phase", "scores"}, {"error"}]
    assert port.tracer.closed.wait(20)


def test_only_a_few_are_scored_at_once(port):
    port.tracer.let = asyncio.Semaphore(0)
    answers = [port.open("POST", "/admin/scores", body=HELLO) for _ in range(MAX_TRACES)]
    assert port.status("POST", "/admin/scores", body=HELLO) == 429
    port.let(100)
    for answer in answers:
        assert len(list(events(answer))) == 3
        answer.close()
    assert port.status("POST", "/admin/scores", body=HELLO) == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        HELLO | {"max_tokens": 0},
        HELLO | {"max_tokens": 10**9},
        HELLO | {"max_tokens": True},
        HELLO | {"temperature": -1},
        HELLO | {"stream": True},
        "{",
        "[" * 100_000,
    ],
)
def test_a_wrong_body_is_refused(port, body):
    status, answer, _ = port.ask("POST", "/admin/scores", body=body)
    assert (status, port.calls) == (400, [])
    assert answer["error"]["message"]


def test_a_large_body_is_refused(port):
    large = {"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]}
    assert port.status("POST", "/admin/scores", body=large) == 413
    assert port.calls == []
