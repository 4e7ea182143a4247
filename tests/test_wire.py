"""Wires: what a block looks like on each of vLLM's routes, whole and as server-sent events."""

import json

import pytest

from monitor.api.errors import ApiError, unavailable
from monitor.api.vllm.choices import ChatWire, CompletionWire
from monitor.api.vllm.items import MessagesWire, ResponsesWire
from monitor.api.vllm.wire import parse_event, sse
from monitor.api.vllm.wires import WIRES
from monitor.engines.vllm.call import Call

TOOL = {"index": 0, "id": "t1", "type": "function", "function": {"name": "rm", "arguments": '{"pa'}}


def blocked(wire, *indices, first=None):
    """A wire of that class whose call has these choices blocked. first: the first event that went out"""
    call = Call("chat", "chat", blocked=dict.fromkeys(indices, 0))
    made = wire(call)
    made.first = b"" if first is None else sse(None, first).split(b"\n\n")[0]
    return made


def sent(wire, *events):
    """What goes out for these events, parsed. An event is its data, or None for [DONE]."""
    raw = b"".join(part for data in events for part in wire.event(data and data.get("type"), data))
    assert raw.endswith(b"\n\n") or not raw
    return [parse_event(event) for event in raw.split(b"\n\n")[:-1]]


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


# --- Responses --------------------------------------------------------------------------------------------------------

MESSAGE = {"type": "message", "id": "m1", "status": "completed", "content": [{"type": "output_text", "text": "so far"}]}
CALL_ITEM = {"type": "function_call", "id": "f1", "name": "rm", "arguments": "{}", "status": "completed"}
REASONING = {"type": "reasoning", "id": "r1", "summary": []}


def test_a_whole_response_is_incomplete_and_has_no_calls():
    body = blocked(ResponsesWire, 0).whole(
        {"id": "resp_1", "status": "completed", "incomplete_details": None, "output": [REASONING, MESSAGE, CALL_ITEM]}
    )
    assert (body["id"], body["status"]) == ("resp_1", "incomplete")
    assert body["incomplete_details"] == {"reason": "content_filter"}
    assert [(i["type"], i["status"]) for i in body["output"]] == [
        ("reasoning", "incomplete"),
        ("message", "incomplete"),
    ]
    assert body["output"][1]["content"] == MESSAGE["content"]


@pytest.mark.parametrize("kind", ["response.completed", "response.failed"])
def test_the_end_of_a_streamed_response_is_incomplete(kind):
    response = {"id": "resp_1", "status": kind[9:], "incomplete_details": None, "output": [MESSAGE, CALL_ITEM]}
    ((name, data),) = sent(blocked(ResponsesWire, 0), {"type": kind, "sequence_number": 9, "response": response})
    assert name == data["type"] == "response.incomplete" and data["sequence_number"] == 9
    assert data["response"]["status"] == "incomplete"
    assert data["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert [i["type"] for i in data["response"]["output"]] == ["message"]


def test_items_of_a_streamed_response_end_incomplete():
    ((name, data),) = sent(blocked(ResponsesWire, 0), {"type": "response.output_item.done", "item": MESSAGE})
    assert name == "response.output_item.done" and data["item"] == MESSAGE | {"status": "incomplete"}


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.function_call_arguments.delta", "item_id": "f1", "delta": "{"},
        {"type": "response.function_call_arguments.done", "item_id": "f1", "arguments": "{}"},
        {"type": "response.output_item.added", "item": CALL_ITEM},
        {"type": "response.output_item.done", "item": CALL_ITEM},
    ],
    ids=lambda event: event["type"],
)
def test_calls_of_a_streamed_response_are_dropped(event):
    assert sent(blocked(ResponsesWire, 0), event) == []


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.custom_tool_call_input.delta", "item_id": "f1", "delta": "rm"},
        {"type": "response.custom_tool_call_input.done", "item_id": "f1", "input": "rm"},
        {"type": "response.output_item.added", "item": {"type": "custom_tool_call", "name": "sh", "input": ""}},
        {"type": "response.output_item.done", "item": {"type": "custom_tool_call", "name": "sh", "input": "rm"}},
    ],
    ids=lambda event: event["type"],
)
def test_custom_calls_of_a_streamed_response_are_dropped(event):
    assert sent(blocked(ResponsesWire, 0), event) == []


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.output_text.done", "text": "so far"},
        {"type": "response.created", "response": {"status": "in_progress"}},
        {"type": "response.output_item.added", "item": MESSAGE},
        {"type": "error", "message": "no"},
    ],
    ids=lambda event: event["type"],
)
def test_other_events_of_a_response_pass(event):
    assert sent(blocked(ResponsesWire, 0), event) == [(event["type"], event)]


# --- Anthropic --------------------------------------------------------------------------------------------------------


def test_a_whole_message_is_a_refusal_and_has_no_tool_use():
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}, {"type": "tool_use", "id": "t"}]
    body = {"type": "message", "stop_reason": "tool_use", "stop_sequence": "x", "content": content, "usage": {}}
    got = blocked(MessagesWire, 0).whole(body)
    assert (got["stop_reason"], got["stop_sequence"], got["usage"]) == ("refusal", None, {})
    assert got["stop_details"]["type"] == "refusal" and got["content"] == content[:2]


@pytest.mark.parametrize("reason", [None, "end_turn", "tool_use", "max_tokens"])
def test_the_end_of_a_streamed_message_is_a_refusal(reason):
    event = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": "x"}, "usage": {"o": 1}}
    ((name, data),) = sent(blocked(MessagesWire, 0), event)
    assert name == "message_delta" and data["usage"] == {"o": 1}
    assert (data["delta"]["stop_reason"], data["delta"]["stop_sequence"]) == ("refusal", None)


def test_arguments_of_a_tool_are_dropped_from_a_streamed_message():
    event = {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{"}}
    assert sent(blocked(MessagesWire, 0), event) == []


def test_a_tool_that_starts_after_the_block_does_not_start_for_the_client():
    start = {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "name": "rm"}}
    assert sent(blocked(MessagesWire, 0), start, {"type": "content_block_stop", "index": 1}) == []


@pytest.mark.parametrize(
    "event",
    [
        {"type": "message_start", "message": {"id": "m1"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_stop"},
        {"type": "ping"},
        {"type": "error", "error": {"type": "internal_error"}},
    ],
    ids=lambda event: event["type"],
)
def test_other_events_of_a_message_pass(event):
    assert sent(blocked(MessagesWire, 0), event) == [(event["type"], event)]


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
