"""Wires: server-sent events as bytes, a block of chat and completions whole and streamed, and every route's errors."""

import json

import pytest

from monitor.api.errors import ApiError, unavailable
from monitor.api.vllm.choices import ChatWire, CompletionWire
from monitor.api.vllm.items import MessagesWire, ResponsesWire
from monitor.api.vllm.wire import parse_event, sse
from monitor.api.vllm.wires import WIRES
from monitor.engines.vllm.call import Call

from .wires import blocked, sent

TOOL = {"index": 0, "id": "t1", "type": "function", "function": {"name": "rm", "arguments": '{"pa'}}


def chat_chunk(index=0, finish=None, **delta):
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    if finish:
        choice["stop_reason"] = "abc"
    return {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}


def text_chunk(index=0, text="", finish=None):
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return {"id": "c1", "object": "text_completion", "created": 7, "model": "m", "choices": [choice]}


def usage_chunk(kind="chat.completion.chunk"):
    return {"id": "c1", "object": kind, "created": 7, "model": "m", "choices": [], "usage": {"total_tokens": 9}}


def finishes(events):
    return [
        (choice["index"], choice["finish_reason"])
        for _, data in events
        if data
        for choice in data["choices"]
        if choice.get("finish_reason")
    ]


# --- events as bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "response.completed"])
def test_an_event_that_is_written_is_read_back(name):
    assert parse_event(sse(name, {"text": "two\n\nlines \u2028 \ud800"})) == (
        name,
        {"text": "two\n\nlines \u2028 \ud800"},
    )


def test_a_text_cannot_end_its_event_early():
    assert sse(None, {"text": "a\n\ndata: [DONE]\n\n"}).count(b"\n\n") == 1


@pytest.mark.parametrize(
    "raw", [b"data:[DONE]", b"data: [DONE]", b"data: [DONE]\r", b": a comment\ndata: [DONE]", b"id: 4\ndata: [DONE]"]
)
def test_done_is_none_however_it_is_written(raw):
    assert parse_event(raw) == (None, None)


def test_data_over_several_lines_is_one_value():
    assert parse_event(b'event: x\ndata: {"a":\ndata: 1}') == ("x", {"a": 1})


@pytest.mark.parametrize("raw", [b": ping", b"retry: 100", b"event: ping"])
def test_a_comment_or_an_event_without_data_is_no_error(raw):
    parse_event(raw)


# --- chat and completions ---------------------------------------------------------------------------------------------


def test_a_whole_chat_answer_says_content_filter_and_has_no_tool_calls():
    message = {"role": "assistant", "content": None, "tool_calls": [TOOL], "function_call": {"name": "rm"}}
    body = {"id": "c1", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls", "stop_reason": 5}]}
    (choice,) = blocked(ChatWire, 0).whole(body)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("content_filter", None)
    assert choice["message"] == {"role": "assistant", "content": ""}


def test_a_whole_chat_answer_keeps_the_text_that_was_released():
    message = {"role": "assistant", "content": "so far", "tool_calls": []}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "abort", "stop_reason": None}]}
    assert blocked(ChatWire, 0).whole(body)["choices"][0]["message"] == {"role": "assistant", "content": "so far"}


def test_of_three_whole_answers_only_the_blocked_one_changes():
    def choice(index):
        message = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
        return {"index": index, "message": message, "finish_reason": "tool_calls", "stop_reason": None}

    body = blocked(ChatWire, 1).whole({"choices": [choice(2), choice(1), choice(0)], "usage": {"total_tokens": 3}})
    assert [c["finish_reason"] for c in body["choices"]] == ["tool_calls", "content_filter", "tool_calls"]
    assert ["tool_calls" in c["message"] for c in body["choices"]] == [True, False, True]
    assert body["usage"] == {"total_tokens": 3}


def test_a_whole_completion_says_content_filter():
    body = {"choices": [{"index": i, "text": "x", "finish_reason": "stop", "stop_reason": "abc"} for i in (0, 1)]}
    choices = blocked(CompletionWire, 1).whole(body)["choices"]
    assert [(c["text"], c["finish_reason"], c["stop_reason"]) for c in choices] == [
        ("x", "stop", "abc"),
        ("x", "content_filter", None),
    ]


def test_of_three_streamed_answers_only_the_blocked_one_changes():
    events = sent(
        blocked(ChatWire, 1, first=chat_chunk()),
        chat_chunk(0, content="a"),
        chat_chunk(1, content="b", tool_calls=[TOOL]),
        chat_chunk(2, tool_calls=[TOOL]),
        chat_chunk(1, "tool_calls", tool_calls=[TOOL]),
        chat_chunk(0, "stop"),
        chat_chunk(2, "tool_calls"),
        usage_chunk(),
        None,
    )
    assert finishes(events) == [(1, "content_filter"), (0, "stop"), (2, "tool_calls")]
    deltas = [choice["delta"] for _, data in events[:4] for choice in data["choices"]]
    assert deltas == [{"content": "a"}, {"content": "b"}, {"tool_calls": [TOOL]}, {}]
    assert events[3][1]["choices"][0]["stop_reason"] is None and events[4][1]["choices"][0]["stop_reason"] == "abc"
    assert events[-2][1]["usage"] and events[-1] == (None, None)


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_choice_without_a_token_gets_exactly_one_finish_before_the_usage_and_done(with_usage):
    tail = [usage_chunk("text_completion"), None] if with_usage else [None]
    wire = blocked(CompletionWire, 0, 2, first=text_chunk(1, "a"))
    events = sent(wire, text_chunk(1, "a"), text_chunk(1, "b", "stop"), *tail)
    assert finishes(events) == [(1, "stop"), (0, "content_filter"), (2, "content_filter")]
    added = events[2][1]
    assert {k: added[k] for k in ("id", "object", "created", "model")} == {
        "id": "c1",
        "object": "text_completion",
        "created": 7,
        "model": "m",
    }
    ending = {"finish_reason": "content_filter", "stop_reason": None}
    assert added["choices"] == [{"index": 0, "text": "", "logprobs": None} | ending]
    assert [data is None or not data["choices"] for _, data in events[4:]] == [True] * len(tail)


def test_a_chat_choice_without_a_token_gets_its_finish_too():
    events = sent(blocked(ChatWire, 0, first=chat_chunk(role="assistant")), chat_chunk(role="assistant"), None)
    assert finishes(events) == [(0, "content_filter")] and events[1][1]["id"] == "c1"
    assert events[1][1]["choices"][0]["delta"] == {}


def test_a_choice_that_vllm_has_finished_gets_no_second_finish():
    events = sent(blocked(ChatWire, 0, first=chat_chunk()), chat_chunk(0, "stop"), usage_chunk(), None)
    assert finishes(events) == [(0, "content_filter")] and len(events) == 3


def test_an_error_of_vllm_in_the_stream_stays():
    events = sent(blocked(ChatWire, 0, first=chat_chunk()), {"error": {"message": "no"}}, None)
    assert {"error": {"message": "no"}} in [data for _, data in events] and events[-1] == (None, None)


def test_a_finish_of_ours_has_an_envelope_even_if_vllm_sent_no_chunk():
    """/v1/completions, n=1, blocked on its first token: vLLM sends [DONE] and nothing else."""
    wire = blocked(CompletionWire, 0)
    wire.first = b"data: [DONE]"
    assert set(sent(wire, None)[0][1]) >= {"id", "object", "created", "model", "choices"}


def test_a_finish_of_ours_is_possible_before_any_event():
    assert finishes(sent(blocked(ChatWire, 0), None)) == [(0, "content_filter")]


# --- errors -----------------------------------------------------------------------------------------------------------

OPENAI_ROUTES = [path for path in WIRES if path != "/v1/messages"]


@pytest.mark.parametrize("path", OPENAI_ROUTES)
def test_an_error_has_openais_shape(path):
    error = ApiError(400, "no", param="n", code="bad")
    expected = {"message": "no", "type": "invalid_request_error", "param": "n", "code": "bad"}
    assert WIRES[path](Call("r", "chat")).error(error) == {"error": expected}


@pytest.mark.parametrize("path", [p for p in OPENAI_ROUTES if p != "/v1/responses"])
def test_an_error_in_a_stream_is_an_event_that_openais_client_raises(path):
    raw = WIRES[path](Call("r", "chat")).error_event(unavailable("no"))
    name, data = parse_event(raw)
    assert raw.endswith(b"\n\n") and name is None and data["error"]["code"] == "unavailable"


def test_an_error_in_a_stream_of_a_response_is_its_error_event():
    name, data = parse_event(ResponsesWire(Call("r", "chat")).error_event(unavailable("no")))
    assert name == data["type"] == "error" and (data["message"], data["code"]) == ("no", "unavailable")
    assert isinstance(data["sequence_number"], int)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (503, "overloaded_error"),
        (500, "api_error"),
    ],
)
def test_an_error_has_anthropics_shape(status, kind):
    wire = MessagesWire(Call("messages", "chat"))
    expected = {"type": "error", "error": {"type": kind, "message": "no"}}
    assert wire.error(ApiError(status, "no")) == expected
    assert parse_event(wire.error_event(ApiError(status, "no"))) == ("error", expected)


def test_every_wire_writes_json_that_any_client_reads():
    """No NaN, no raw surrogate."""
    for path, wire in WIRES.items():
        raw = wire(Call("r", "chat")).error_event(ApiError(400, "a\ud800", param="\ud800"))
        assert json.loads(raw.split(b"data: ")[1]), path
        raw.decode("ascii")
