"""Wires of items: what a block looks like on /v1/responses and /v1/messages, whole and as server-sent events."""

import pytest

from monitor.api.vllm.items import MessagesWire, ResponsesWire

from .wires import blocked, sent

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
