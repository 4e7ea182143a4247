"""T15: an upstream that breaks in every way. Nothing unjudged goes out, and no cut ever looks like a normal end."""

import dataclasses
import json

import pytest

from monitor.policy.file import Body, PolicyFile, SecondPolicy
from monitor.upstream.transport import Bounds

from .cuts import TEXT, bodies, check_cut, proxy, wire  # noqa: F401
from .fake_observer import STREAM, Reply, proxying, rules
from .fake_upstream import DONE, HANG, RESET, chat_chunk, chat_stream, chat_whole, chunked, event, head, json_answer
from .second_judge import SecondJudge
from .test_upstream_choice import Unsure


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


def test_pauses_within_the_bound_change_nothing(upstream):
    """Together they are longer than the bound: it is one of each read."""
    frames = chat_stream(TEXT, size=9)
    pauses = [x for frame in frames for x in (frame[:20], 0.3, frame[20:], 0.3)]
    assert sum(x for x in pauses if isinstance(x, float)) > 3
    upstream.answer = lambda asked: [2, head(), *pauses]
    with proxying(upstream.url, bounds=Bounds(retries=0, first_s=20, read_s=3)) as proxy:
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


def test_an_error_behind_text_that_is_held_is_told_all_the_same(upstream):
    """The second judge is still asked about the text; with it goes the upstream's own error, and none would be told."""
    error = event({"error": {"message": "its own", "code": 500}})
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "one * two three"}), error]
    judge = SecondJudge()
    judge.hold()
    try:
        with proxying(upstream.url, observer=Unsure(), own_rules=rules(escalate=-1.0)) as proxy:
            asks = Body(second=SecondPolicy(**judge.policy))
            proxy.engine.live = dataclasses.replace(proxy.engine.live, file=PolicyFile("default", asks, (), ""))
            response = proxy.chat(stream=True)
            judge.let_go()
            assert [body["error"]["code"] for body in bodies(response)] == ["upstream_truncated"]
            assert proxy.records(response)[0].finish == "engine_error" and proxy.idle()
    finally:
        judge.close()
