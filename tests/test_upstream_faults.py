"""T15: an upstream that breaks in every way. Nothing unjudged goes out, and no cut ever looks like a normal end."""

import asyncio
import contextlib
import json
import re
import socket
import struct
import threading
import time

import httpx
import pytest

from monitor.errors import MidstreamError, Overloaded
from monitor.observer.protocol import TooLong
from monitor.types import Action, Mode
from monitor.upstream.breaker import Breaker
from monitor.upstream.choice import Lag
from monitor.upstream.transport import Bounds

from .fake_observer import FakeObserver, Reply, proxying, rules
from .fake_upstream import (
    DONE,
    HANG,
    RESET,
    chat_chunk,
    chat_stream,
    chat_whole,
    chunked,
    event,
    head,
    json_answer,
)
from .web import percentile, until, whole

STREAM = pytest.mark.parametrize("stream", [False, True])
TEXT = "Once upon a time there was a café."
QUICK = Bounds(retries=0, first_s=5, read_s=1, connect_s=2, failures=1000)


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url, bounds=QUICK) as server:
        yield server


def bodies(response):
    """Every event's data; each is JSON or [DONE]."""
    events = [e for e in re.split(r"\n\n", response.text) if e]
    data = ["".join(line[5:].strip() for line in e.splitlines() if line.startswith("data:")) for e in events]
    return [d if d == "[DONE]" else json.loads(d) for d in data if d]


def check_cut(response):
    """An answer that is no whole one and says so. Returns its text."""
    if response.status_code != 200:
        assert response.status_code in (502, 503, 504) and response.json()["error"]["code"].startswith("upstream_")
        return ""
    *chunks, last = bodies(response)
    assert last["error"]["code"] in ("upstream_truncated", "upstream_unreadable", "upstream_timeout")
    assert "[DONE]" not in chunks and all("error" not in c for c in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(choice["finish_reason"] is None for choice in choices)
    return "".join(choice["delta"].get("content", "") for choice in choices)


def wire(stream, framed):
    """A whole answer as bytes on the wire, head included."""
    if stream:
        parts = chat_stream(TEXT, size=5)
        return b"".join(chunked(*parts) if framed else [head(), *parts])
    (raw,) = json_answer(chat_whole(TEXT))
    return raw if framed else re.sub(rb"Content-Length: \d+\r\n", b"", raw)


@pytest.mark.parametrize("fault", ["end", RESET])
@pytest.mark.parametrize("framed", [True, False])
@STREAM
def test_a_cut_at_any_of_54_points_is_told_as_one(upstream, proxy, stream, framed, fault):
    raw = wire(stream, framed)
    ends_at = raw.index(b'"finish_reason": "stop"') if stream else len(raw)
    for point in range(54):
        at = ends_at * point // 54
        upstream.answer = lambda asked, at=at: [raw[:at], *([fault] if fault == RESET else [])]
        response = proxy.chat(stream=stream)
        assert TEXT.startswith(check_cut(response))
        if "x-midstream-request-id" in response.headers:
            (record,) = proxy.records(response)
            assert record.finish == "engine_error" and record.coverage.unmonitored == 0
    upstream.answer = lambda asked: [raw]
    assert Reply(proxy.chat(stream=stream)).texts == {0: TEXT}
    assert proxy.idle()


def test_text_of_a_cut_answer_was_judged_too(upstream, proxy):
    upstream.answer = lambda asked: chunked(*chat_stream("aaa*bb")[:-2])[:-1]
    response = proxy.chat(stream=True)
    assert "*" not in response.text and Reply(response).finishes == {0: ["content_filter"]}


def test_an_answer_in_single_bytes_is_the_same(upstream, proxy):
    frames = chat_stream("Ünï ☃ 日本 🎈", size=1)
    raw = b"".join(frame.replace(b"\\u", b"\\u") for frame in frames)
    plain = b"".join(event(json.dumps(json.loads(f[6:]), ensure_ascii=False).encode()) for f in frames[:-1]) + DONE
    for body in (raw, plain, plain.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r") + b"\n"):
        upstream.answer = lambda asked, body=body: chunked(*(body[i : i + 1] for i in range(len(body))))
        response = proxy.chat(stream=True)
        assert response.content.startswith(body.rstrip(b"\r\n")), "byte for byte"
        assert proxy.records(response)[0].finish == "stop"


def test_pauses_within_the_bound_change_nothing(upstream, proxy):
    frames = chat_stream(TEXT, size=9)
    upstream.answer = lambda asked: [2, head(), *(x for frame in frames for x in (frame[:20], 0.2, frame[20:], 0.2))]
    response = proxy.chat(stream=True)
    assert response.content == b"".join(frames)


@STREAM
def test_silence_over_the_bound_is_a_timeout(upstream, proxy, stream):
    for raw in (b"", wire(stream, True)[:-40]):
        upstream.answer = lambda asked, raw=raw: [raw, HANG]
        with proxying(upstream.url, bounds=Bounds(retries=0, first_s=0.5, read_s=0.5)) as hasty:
            response = hasty.chat(stream=stream)
            assert "upstream_timeout" in response.text and "[DONE]" not in response.text
            assert upstream.asked[-1].closed.wait(10) and hasty.idle()


def test_half_an_event_at_the_end_is_none(upstream, proxy):
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "one"}), chat_chunk({}, finish="stop")[:-1]]
    assert check_cut(proxy.chat(stream=True)) == "one"
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "one"}), chat_chunk({}, finish="stop"), DONE[:-1]]
    reply = Reply(proxy.chat(stream=True))
    assert reply.done and reply.texts == {0: "one"}


def test_an_empty_delta_is_not_the_end(upstream, proxy):
    empty = [chat_chunk({}), chat_chunk({"content": ""}), chat_chunk({"content": None}), event({"choices": []})]
    frames = [*empty, chat_chunk({"content": "a b "}), *empty, chat_chunk({"content": "c"}), *empty]
    frames += [chat_chunk({}, finish="stop"), DONE]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.chat(stream=True)
    assert response.content == b"".join(frames)
    assert proxy.records(response)[0].released_tokens == len("a b c")


def test_a_second_done_and_what_follows_does_not_go_out(upstream, proxy):
    frames = chat_stream("fine")
    upstream.answer = lambda asked: [head(), *frames, DONE, chat_chunk({"content": "more"}), DONE]
    response = proxy.chat(stream=True)
    assert response.content == b"".join(frames)


def test_text_after_the_end_of_a_choice_does_not_go_out(upstream, proxy):
    late = [chat_chunk({"content": "la*te"}), chat_chunk({}, finish="stop"), chat_chunk({})]
    upstream.answer = lambda asked: [head(), *chat_stream("fine")[:-1], *late, DONE]
    reply = Reply(proxy.chat(stream=True))
    assert (reply.texts, reply.finishes, reply.done) == ({0: "fine"}, {0: ["stop"]}, True)
    assert "la" not in reply.raw


STRANGE = [
    event(b"{nope"),
    event(b"[1]"),
    event(b'"text"'),
    event(b"\xff\xfe"),
    event(b'{"choices": [], "choices": [{"index": 0, "delta": {"content": "b*d"}}]}'),
    event({"choices": {"0": {}}}),
    event({"choices": ["b*d"]}),
    event({"choices": [{"delta": {"content": "b*d"}}]}),
    event({"choices": [{"index": 1, "delta": {"content": "b*d"}}]}),
    event({"choices": [{"index": -1, "delta": {"content": "b*d"}}]}),
    event({"choices": [{"index": True, "delta": {"content": "b*d"}}]}),
    event({"choices": [{"index": 0, "delta": "b*d"}]}),
    event({"choices": [{"index": 0, "delta": ["b*d"]}]}),
    event({"choices": [{"index": 0, "delta": {"content": 7}}]}),
    event({"choices": [{"index": 0, "delta": {"content": True}}]}),
    event({"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": 7}}]}}]}),
    event({"choices": [{"index": 0, "delta": {}, "finish_reason": 7}]}),
]


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_a_wrong_type_ends_the_answer_and_nothing_of_it_goes_out(upstream, proxy, strange):
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "fine "}), strange, *chat_stream("more")]
    response = proxy.chat(stream=True)
    assert check_cut(response) == "fine " and "*" not in response.text
    assert bodies(response)[-1]["error"]["code"] == "upstream_unreadable"
    assert proxy.records(response)[0].finish == "engine_error"


WHOLES = [
    b"{nope",
    b"[]",
    b"",
    b"<html>b*d</html>",
    json.dumps({"object": "chat.completion"}).encode(),
    json.dumps(chat_whole()).encode(),
    json.dumps(chat_whole("a", "b")).encode(),
    json.dumps(chat_whole({"role": "assistant", "content": 7})).encode(),
    json.dumps(chat_whole("a") | {"choices": [{"index": 0, "message": "b*d", "finish_reason": "stop"}]}).encode(),
]


@pytest.mark.parametrize("raw", WHOLES, ids=repr)
def test_a_whole_answer_that_cant_be_judged_is_an_error(upstream, proxy, raw):
    upstream.answer = lambda asked: json_answer(raw)
    response = proxy.chat()
    assert response.status_code == 502 and response.json()["error"]["code"] == "upstream_unreadable"
    assert "*" not in response.text and proxy.records(response)[0].finish == "engine_error"


@STREAM
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_an_upstreams_error_passes_through(upstream, proxy, status, stream):
    content = {"error": {"message": "its own", "type": "t", "code": 7}, "more": [1]}
    raw = json.dumps(content, indent=2).encode()
    upstream.answer = lambda asked: json_answer(raw, status, Retry_After="17", X_RateLimit_Reset="1s", Server="x")
    response = proxy.chat(stream=stream)
    assert (response.status_code, response.content) == (status, raw)
    assert response.headers["retry-after"] == "17" and response.headers["x-ratelimit-reset"] == "1s"
    (record,) = proxy.records(response)
    assert (record.finish, record.coverage.response_tokens) == ("engine_error", 0)
    assert proxy.idle()


def test_an_error_event_in_the_middle_passes_in_order(upstream, proxy):
    error = event({"error": {"message": "its own", "code": 500}})
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "one two three"}), error]
    response = proxy.chat(stream=True)
    assert response.content == chat_chunk({"content": "one two three"}) + error
    assert proxy.records(response)[0].finish == "engine_error"


# --- connections ---


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


def test_the_breaker_opens_after_failures_and_lets_one_try():
    now = 0.0
    breaker = Breaker(2, 10.0, lambda: now)
    for _ in range(2):
        assert breaker.refuses() is None
        breaker.failed()
    assert (breaker.refuses(), breaker.state) == (10.0, "open")
    now = 10.0
    assert breaker.state == "half-open" and breaker.refuses() is None
    assert breaker.refuses() is not None, "one at a time"
    breaker.failed()
    assert breaker.refuses() == 10.0
    now = 20.0
    assert breaker.refuses() is None
    breaker.given_up()
    assert breaker.refuses() is None
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.refuses() is None
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.refuses() is None, "not in a row"


def test_an_upstream_that_keeps_failing_is_left_alone(upstream):
    upstream.answer = lambda asked: json_answer({"error": {"message": "down"}}, 503)
    with proxying(upstream.url, bounds=Bounds(retries=0, failures=2, pause_s=60)) as proxy:
        assert [proxy.chat().json()["error"]["message"] for _ in range(2)] == ["down"] * 2
        asked = len(upstream.asked)
        response = proxy.chat()
        assert response.status_code == 503 and 50 < int(response.headers["retry-after"]) <= 60
        assert len(upstream.asked) == asked
        assert httpx.get(proxy.url + "/ready").json()["upstream"] == "open"


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
    assert upstream.asked[-1].closed.wait(0.9), "sooner than any time-out of ours"
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


# --- an observer that fails ---

SAY = "one two three four five six seven"


def fails(kind):
    """An observer that fails from the third read on; the prompt's is the first."""
    observer, count = FakeObserver(), iter(range(10_000))

    def fault(ids):
        if next(count) < 2:
            return None
        if kind == "hangs":
            return asyncio.Event().wait()
        raise kind("no")

    observer.fault = fault
    return observer


@pytest.mark.parametrize("kind", ["hangs", MidstreamError, Overloaded, TooLong, RuntimeError], ids=str)
@pytest.mark.parametrize("fail_mode", ["open", "closed"])
@STREAM
def test_without_scores_the_fail_mode_decides(upstream, kind, fail_mode, stream):
    frames = chat_stream(SAY, size=4)
    slow = [head(), *(x for frame in frames for x in (frame, 0.02))]
    upstream.answer = lambda asked: slow if stream else json_answer(chat_whole(SAY))
    lag = Lag(tokens=8, seconds=0.3, pause_s=0.05)
    with proxying(upstream.url, observer=fails(kind), own_rules=rules(fail_mode=fail_mode), lag=lag) as proxy:
        response = proxy.chat(stream=stream)
        (record,) = proxy.records(response)
        assert record.verdict is Action.UNMONITORED and record.coverage.unmonitored > 0
        if fail_mode == "open":
            assert Reply(response).texts == {0: SAY} and record.finish == "stop"
            assert record.released_tokens == len(SAY)
            assert proxy.sink.metrics.registry.get_sample_value("midstream_fail_open_total") == 1
        else:
            assert record.finish == "unmonitored" and record.released_tokens < len(SAY)
            if stream:
                *chunks, last = bodies(response)
                assert last["error"]["code"] == "unavailable" and "[DONE]" not in chunks
                text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
                assert len(text) == record.released_tokens and SAY.startswith(text)
            else:
                assert response.status_code == 503 and response.headers["retry-after"] and "one" not in response.text
        assert proxy.idle()


@pytest.mark.parametrize("fail_mode", ["open", "closed"])
def test_more_text_than_the_lag_bound_while_it_reads_is_decided_by_the_fail_mode(upstream, fail_mode):
    """The first read waits until all of the answer has come."""
    observer, sent = FakeObserver(), threading.Event()
    count = iter(range(10_000))

    async def until_all_came():
        await asyncio.to_thread(sent.wait, 10)
        await asyncio.sleep(0.2)

    observer.fault = lambda ids: until_all_came() if next(count) == 1 else None
    frames = chat_stream("words " * 40, size=2)

    def answer(asked):
        yield head()
        yield from frames[:20]
        yield 0.3
        yield from frames[20:]
        sent.set()

    upstream.answer = answer
    lag = Lag(tokens=32, seconds=10, pause_s=0.05)
    with proxying(upstream.url, observer=observer, own_rules=rules(fail_mode=fail_mode), lag=lag) as proxy:
        response = proxy.chat(stream=True)
        (record,) = proxy.records(response)
        assert record.verdict is Action.UNMONITORED
        assert record.finish == ("stop" if fail_mode == "open" else "unmonitored")
        assert ("[DONE]" in response.text) is (fail_mode == "open")


def test_one_piece_larger_than_the_lag_bound_is_no_lag(upstream):
    upstream.answer = lambda asked: [head(), *chat_stream("words " * 40, size=1000)]
    with proxying(upstream.url, lag=Lag(tokens=16, pause_s=0.05)) as proxy:
        response = proxy.chat(stream=True)
        assert Reply(response).texts == {0: "words " * 40}
        assert proxy.records(response)[0].verdict is Action.ALLOW


@pytest.mark.parametrize(("fail_mode", "status"), [("open", 200), ("closed", 400)])
def test_a_prompt_that_is_too_long_for_the_observer(upstream, fail_mode, status):
    observer = FakeObserver()

    def fault(ids):
        raise TooLong("too long", "messages")

    observer.fault = fault
    upstream.answer = lambda asked: json_answer(chat_whole("fine"))
    with proxying(upstream.url, observer=observer, own_rules=rules(fail_mode=fail_mode)) as proxy:
        asked = len(upstream.asked)
        response = proxy.chat()
        assert response.status_code == status and len(upstream.asked) - asked == (status == 200)
        assert status == 200 or response.json()["error"]["code"] == "context_length_exceeded"
        assert proxy.records(response)[0].coverage.prompt_scored == 0


def test_a_policy_that_only_flags_waits_for_nothing(upstream):
    """The observer never answers, and still everything goes out."""
    observer = fails("hangs")
    upstream.answer = lambda asked: [head(), *chat_stream(SAY, size=4)]
    lag = Lag(tokens=8, seconds=0.5, pause_s=0.05)
    with proxying(upstream.url, observer=observer, own_rules=rules(Mode.FLAG, "open"), lag=lag) as proxy:
        response = proxy.chat(stream=True)
        assert response.content == b"".join(chat_stream(SAY, size=4))
        assert proxy.records(response)[0].coverage.unmonitored > 0
