"""Gate: no answer before the verdict on its prompt, a block in the route's own words, and no way around it."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.api.vllm.gate import Gate
from monitor.api.vllm.wire import sse
from monitor.api.vllm.wires import WIRES
from monitor.config import load_settings
from monitor.engines.vllm.call import CALL
from monitor.metrics import Metrics
from monitor.types import Caller

from .gated import (
    ABORTED,
    CHAT,
    DONE,
    END,
    HARMFUL,
    ID,
    MESSAGES,
    RESPONSES,
    TEXT,
    UNSCORED,
    Answer,
    Inner,
    ask,
    block,
    chunk,
    fail,
    judge,
    nothing_yet,
    part,
    record_of,
    said,
    start,
    stream,
    user,
    whole,
)

# --- holding the start ------------------------------------------------------------------------------------------------


def test_a_stream_starts_when_every_prompt_has_its_verdict(tiny):
    def started(inner):
        assert len(inner.out) == 2, "the start, and all that was held in one piece"

    inner = Inner(
        *[stream(), part(chunk(0, "a")), nothing_yet, judge(), part(chunk(1, "b")), nothing_yet, judge()],
        *[part(chunk(2, "c")), nothing_yet, judge(), part(chunk(0, "d")), started, part(DONE), END],
    )
    answer = Answer(ask(tiny, inner, {"messages": [user()], "n": 3, "stream": True}))
    assert answer.status == 200 and answer.headers[ID] == inner.call.id.encode()
    assert answer.parts[0] == chunk(0, "a") + chunk(1, "b") + chunk(2, "c") + chunk(0, "d")
    assert answer.body == answer.parts[0] + DONE


@pytest.mark.parametrize(("code", "status"), [(400, 400), (503, 503), (None, 400), ("x", 400), (200, 400)])
def test_an_error_that_a_stream_begins_with_becomes_the_answers_status(tiny, code, status):
    """vLLM validates some fields only once it streams."""
    error = {"error": {"message": "no", "code": code}}
    sent = ask(tiny, Inner(stream(), part(sse(None, error)), nothing_yet, END), {"messages": [user()]})
    answer = Answer(sent)
    assert (answer.status, json.loads(answer.body)) == (status, error)


def test_a_stream_that_ends_unjudged_is_sent_at_its_end(tiny):
    said = sse(None, {"object": "nothing"})
    assert Answer(ask(tiny, Inner(stream(), part(said), nothing_yet, END), {"messages": [user()]})).body == said


def test_a_whole_answer_is_untouched_without_a_block(tiny):
    body = {"choices": [{"index": 0, "message": {"content": "x", "tool_calls": [1]}, "finish_reason": "tool_calls"}]}
    messages = whole(body)
    answer = Answer(ask(tiny, Inner(judge(), *messages), {"messages": [user()]}))
    assert answer.body == messages[1]["body"] and answer.status == 200


def test_a_whole_answer_in_pieces_is_sent_in_one(tiny):
    raw = json.dumps({"choices": []}).encode()
    inner = Inner(judge(), start(), part(raw[:5]), nothing_yet, part(raw[5:]), nothing_yet, END)
    assert Answer(ask(tiny, inner, {"messages": [user()]})).parts == [raw]


# --- prompts that are not answered ------------------------------------------------------------------------------------


def test_a_blocked_prompt_is_a_400_and_the_rest_is_swallowed(tiny):
    inner = Inner(stream(), part(chunk(0, "x")), judge(), fail(HARMFUL), part(chunk()), part(chunk()), part(DONE), END)
    answer = Answer(ask(tiny, inner, {"messages": [user()], "stream": True}))
    assert answer.status == 400 and answer.headers[b"content-type"] == b"application/json"
    error = answer.json["error"]
    assert (error["code"], error["param"]) == ("content_filter", "prompt") and "(p0)" in error["message"]
    assert error["innererror"]["content_filter_result"] == {"p0": {"filtered": True, "detected": True}}


def test_a_blocked_prompt_of_a_whole_answer_is_a_400_whatever_vllm_made_of_it(tiny):
    for status in (200, 500):
        inner = Inner(judge(), fail(HARMFUL), *whole({"choices": []}, status))
        assert Answer(ask(tiny, inner, {"messages": [user()]})).status == 400


@pytest.mark.parametrize(("record", "says"), [(UNSCORED, "could not score"), (ABORTED, "shutting down")])
def test_an_answer_that_cannot_be_given_is_a_503(tiny, record, says):
    answer = Answer(ask(tiny, Inner(fail(record), *whole({})), {"messages": [user()]}))
    assert answer.status == 503 and says in answer.json["error"]["message"] and answer.headers[b"retry-after"] == b"5"


def test_a_blocked_prompt_of_a_list_is_named(tiny):
    harmful = record_of([0, 9, 0], index=5)
    inner = Inner(judge(6), fail(harmful), *whole({}))
    error = Answer(ask(tiny, inner, {"prompt": ["a", "b", "c"], "n": 2}, TEXT)).json["error"]
    assert error["innererror"]["prompt_index"] == 2 and error["message"].startswith("Prompt 2 was blocked")


def test_on_anthropics_route_the_error_has_anthropics_shape(tiny):
    answer = Answer(ask(tiny, Inner(fail(HARMFUL), *whole({})), {"messages": [user()]}, MESSAGES))
    assert answer.status == 400 and answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", WIRES)
def test_after_the_start_a_failure_is_one_error_event_and_then_nothing(tiny, path):
    inner = Inner(stream(), judge(), part(chunk(0, "x")), fail(UNSCORED), part(chunk()), part(chunk()), part(DONE), END)
    answer = Answer(ask(tiny, inner, {"messages": [user()], "stream": True}, path))
    assert answer.status == 200 and len(answer.parts) == 2 and answer.parts[0] == chunk(0, "x")
    assert b"could not score" in answer.parts[1] and answer.parts[1].count(b"\n\n") == 1


def test_the_id_of_the_answer_is_the_calls(tiny):
    for inner in (Inner(*whole({})), Inner(fail(HARMFUL), *whole({})), Inner(*whole({"error": {}}, 404))):
        assert Answer(ask(tiny, inner, {"messages": [user()]})).headers[ID] == inner.call.id.encode()


@pytest.mark.parametrize(("asked", "judged"), [("m", "m"), ("alias", "m"), ("", "m"), (None, "m"), ("lora", "lora")])
def test_a_policy_sees_the_key_and_the_models_own_name(tiny, asked, judged):
    """Whatever alias a client asks for, or none."""
    seen = []

    async def inner(scope, receive, send):
        seen.append(CALL.get().caller)

    async def receive():
        return {"type": "http.request", "body": json.dumps({"messages": [user()], "model": asked}).encode()}

    gate = Gate(inner, CHAT, tiny.template, load_settings(), Metrics(), "m", {"m", "alias"})
    asyncio.run(gate({"type": "http", "state": {"midstream_key": "acme"}}, receive, None))
    assert seen == [Caller("acme", "chat", judged)]


def test_every_call_has_its_own_id_and_none_is_left_behind(tiny):
    inners = [Inner(*whole({})) for _ in range(3)]
    for inner in inners:
        ask(tiny, inner, {"messages": [user()]})
    assert len({inner.call.id for inner in inners}) == 3 and CALL.get() is None


def test_calls_at_the_same_time_do_not_see_each_other(tiny):
    seen = {}

    async def inner(scope, receive, send):
        call = CALL.get()
        body = json.loads((await receive())["body"])
        await asyncio.sleep(0)
        assert CALL.get() is call
        seen[body["n"]] = call.n

    async def one(n):
        body = json.dumps({"messages": [user(), said("x"), user()], "n": n}).encode()

        async def receive():
            await asyncio.sleep(0)
            return {"type": "http.request", "body": body}

        await Gate(inner, CHAT, tiny.template, load_settings(), Metrics())({"type": "http"}, receive, None)

    async def run():
        await asyncio.gather(*(one(n) for n in range(1, 9)))

    asyncio.run(run())
    assert seen == {n: n for n in range(1, 9)}


# --- answers that end in a block --------------------------------------------------------------------------------------


def test_a_whole_answer_with_a_block_is_rewritten_with_its_new_length(tiny):
    body = {"choices": [{"index": 0, "message": {"content": "é"}, "finish_reason": "abort", "stop_reason": None}]}
    answer = Answer(ask(tiny, Inner(judge(), block(0), *whole(body)), {"messages": [user()]}))
    assert answer.json["choices"][0] == body["choices"][0] | {"finish_reason": "content_filter"}
    assert int(answer.headers[b"content-length"]) == len(answer.body)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_errors_of_vllm_pass_unchanged_even_after_a_block(tiny, status):
    error = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": status}}
    for steps in ([], [block(0)]):
        answer = Answer(ask(tiny, Inner(*steps, *whole(error, status)), {"messages": [user()]}))
        assert answer.status == status and answer.json == error


def test_events_before_the_block_pass_as_they_are(tiny):
    before = b'data: {"choices": [ ], "odd spacing": 1}\n\n'
    inner = Inner(stream(), judge(), part(before), block(0), part(chunk(0, "a", "abort")), part(DONE), END)
    answer = Answer(ask(tiny, inner, {"messages": [user()]}))
    assert answer.parts[0] == before
    assert [c["finish_reason"] for e in answer.events[1:-1] for c in e["choices"]] == ["content_filter"]


def test_a_block_before_the_start_rewrites_what_was_held(tiny):
    inner = Inner(stream(), part(chunk(0, "")), judge(), block(0), part(chunk(0, "", "abort")), part(DONE), END)
    events = Answer(ask(tiny, inner, {"messages": [user()]})).events
    assert [e and e["choices"][0]["finish_reason"] for e in events] == [None, "content_filter", None]


def test_a_choice_without_a_token_gets_its_finish_before_done(tiny):
    inner = Inner(stream(), judge(2), part(chunk(0, "a")), part(chunk(0, "b", "stop")), block(1), part(DONE), END)
    events = Answer(ask(tiny, inner, {"messages": [user()], "n": 2})).events
    assert [(c["index"], c["finish_reason"]) for e in events[1:-1] for c in e["choices"]] == [
        (0, "stop"),
        (1, "content_filter"),
    ]
    assert events[2]["id"] == "c" and events[-1] is None


def test_a_stream_that_ends_without_a_blank_line_is_sent_whole(tiny):
    inner = Inner(stream(), judge(), part(chunk()), block(0), part(chunk(0, "a", "abort").rstrip()), END)
    assert (
        Answer(ask(tiny, inner, {"messages": [user()]})).events[-1]["choices"][0]["finish_reason"] == "content_filter"
    )


def named(kind, **data):
    return sse(kind, {"type": kind} | data)


STREAMS = {
    CHAT: [chunk(0, "é\n"), chunk(1, "b"), chunk(0, "", "stop"), chunk(1, "", "abort"), chunk(2, "", "stop"), DONE],
    TEXT: [chunk(0, "a"), chunk(2, "", "stop"), DONE],
    RESPONSES: [
        named("response.created", response={"id": "r"}),
        named("response.output_text.delta", delta="x"),
        named("response.function_call_arguments.delta", delta="{"),
        named("response.completed", response={"status": "completed", "output": []}),
    ],
    MESSAGES: [
        named("message_start", message={"id": "m"}),
        named("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}),
        named("message_delta", delta={"stop_reason": "tool_use"}),
        named("message_stop"),
    ],
}


def streamed(model, path, events, cuts, passed=1):
    """The body a client gets of these events: `passed` of them before the block, the rest cut at these bytes."""
    raw = b"".join(events[passed:])
    edges = [0, *sorted(c for c in cuts if c < len(raw)), len(raw)]
    pieces = [part(raw[a:b]) for a, b in itertools.pairwise(edges)]
    inner = Inner(stream(), judge(9), *map(part, events[:passed]), block(1), *pieces, END)
    return Answer(ask(model, inner, {"messages": [user()]}, path)).body


@pytest.mark.parametrize("path", STREAMS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, 800), max_size=12))
def test_events_after_a_block_may_be_split_anywhere(tiny, path, cuts):
    events = STREAMS[path]
    expected = streamed(tiny, path, events, ())
    assert expected != b"".join(events) and b"input_json_delta" not in expected and b"function_call" not in expected
    assert streamed(tiny, path, events, cuts) == expected


def test_an_event_may_be_split_by_the_block(tiny):
    first, last = chunk(0, "a"), chunk(0, "", "abort")
    inner = Inner(stream(), judge(), part(first + last[:20]), block(0), part(last[20:]), part(DONE), END)
    Answer(ask(tiny, inner, {"messages": [user()]}))


def test_the_first_event_may_come_in_pieces(tiny):
    first = chunk(0, "a")
    inner = Inner(stream(), judge(2), part(first[:9]), part(first[9:]), block(1), part(DONE), END)
    Answer(ask(tiny, inner, {"messages": [user()], "n": 2}))


def test_a_comment_after_a_block_does_not_end_the_stream(tiny):
    inner = Inner(stream(), judge(), part(chunk()), block(0), part(b": ping\n\n"), part(DONE), END)
    Answer(ask(tiny, inner, {"messages": [user()]}))


def test_events_may_end_in_crlf(tiny):
    crlf = [e.replace(b"\n", b"\r\n") for e in (chunk(), chunk(0, "", "abort"), DONE)]
    inner = Inner(stream(), judge(), part(crlf[0]), block(0), part(crlf[1]), part(crlf[2]), END)
    assert b"content_filter" in Answer(ask(tiny, inner, {"messages": [user()]})).body
