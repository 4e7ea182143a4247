"""Refusals that vLLM makes only once it streams, played: a client is told as if it had not begun."""

import pytest

from monitor.api.vllm.admit import is_true
from monitor.api.vllm.wire import sse

from .gated import CHAT, END, MESSAGES, RESPONSES, Answer, Inner, ask, chunk, judge, part, stream

USER = [{"role": "user", "content": "go"}]


def refuse(status, why):
    """What the judge notes of vLLM's refusal."""

    def step(inner):
        inner.call.refused = (status, why)

    return step


def breaks(inner):
    raise RuntimeError("Caught handled exception, but response already started.")


def test_a_route_that_breaks_off_over_it_is_a_bad_request(tiny):
    created = part(sse("response.created", {"type": "response.created"}))
    inner = Inner(stream(), created, refuse(400, "no such token"), breaks)
    answer = Answer(ask(tiny, inner, {"input": "go", "stream": True}, RESPONSES))
    assert (answer.status, answer.json["error"]["message"]) == (400, "no such token")
    assert answer.headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (503, "overloaded_error")])
def test_a_route_that_tells_it_in_words_of_its_own_insides_tells_vllms(tiny, status, kind):
    other = sse("error", {"type": "error", "error": {"type": "internal_error", "message": "3 validation errors"}})
    inner = Inner(stream(), refuse(status, "why"), part(other), END)
    answer = Answer(ask(tiny, inner, {"messages": USER, "stream": True}, MESSAGES))
    assert (answer.status, answer.json["error"]) == (status, {"type": kind, "message": "why"})
    assert (b"retry-after" in answer.headers) is (status == 503)


def test_it_is_told_once(tiny):
    told = part(sse(None, {"error": {"message": "why", "code": 400}}))
    answer = Answer(ask(tiny, Inner(stream(), refuse(400, "why"), told, END, breaks), {"messages": USER}))
    assert answer.status == 400


def test_once_something_has_gone_out_the_route_breaks_off(tiny):
    inner = Inner(stream(), judge(), part(chunk(0, "a")), refuse(400, "why"), breaks)
    with pytest.raises(RuntimeError):
        ask(tiny, inner, {"messages": USER, "stream": True}, CHAT)


def test_a_failure_that_is_nobodys_refusal_is_the_routes_own(tiny):
    with pytest.raises(RuntimeError):
        ask(tiny, Inner(stream(), breaks), {"messages": USER, "stream": True}, CHAT)


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true", "TRUE", "on", "yes", "t", "y"])
def test_a_stream_is_asked_for_in_every_way_that_vllm_reads_so(value):
    assert is_true(value)


@pytest.mark.parametrize("value", [False, None, 0, 2, "", "no", "stream", [], {}, [True], float("nan")])
def test_and_in_no_other(value):
    assert not is_true(value)
