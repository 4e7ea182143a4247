"""What is kept of an answer, whatever an upstream says: of every form its text, and nothing that breaks the answer."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.api.heard import Heard


def heard(content, streams=False, field=b"data: "):
    one, raw = Heard(), content if isinstance(content, bytes) else json.dumps(content).encode()
    one.take(field + raw + b"\n\n" if streams else raw, streams)
    return one.texts()


def call(arguments):
    return {"function": {"name": "f", "arguments": arguments}}


def chat(**message):
    return {"choices": [{"index": 0, "message": message}, {"index": 1, "message": {"content": "other"}}]}


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (chat(content="a", tool_calls=[call('{"x"'), call(": 1}")]), {0: 'a{"x": 1}', 1: "other"}),
        (chat(content="a", tool_calls=[call({"x": 1})]), {0: "a", 1: "other"}),
        (chat(content="a", tool_calls=call("b")), {0: "a", 1: "other"}),
        (chat(content="a", tool_calls=["b", None, {"function": "c"}]), {0: "a", 1: "other"}),
        (chat(content=[{"text": "b"}], reasoning_content=7), {1: "other"}),
        (chat(content="a", reasoning_content="b"), {0: "ab", 1: "other"}),
        (chat(content="a", reasoning="b"), {0: "ab", 1: "other"}),
        (chat(content="a", reasoning="b", reasoning_content="b"), {0: "ab", 1: "other"}),
        (chat(content="a", reasoning={"b": 1}, reasoning_content=None), {0: "a", 1: "other"}),
        ({"choices": {"0": "a"}}, {}),
        ({"choices": [None, {"text": "a"}, {"index": [], "text": "b"}, {"delta": "c"}]}, {0: "a"}),
        ({"type": "content_block_delta", "delta": {"text": {"a": 1}}}, {}),
        ({"type": "content_block_delta", "delta": {"partial_json": '{"a'}}, {0: '{"a'}),
        ({"type": "response.output_text.delta", "delta": "a"}, {0: "a"}),
        ({"type": "response.output_text.delta", "delta": {"a": 1}}, {}),
        ({"type": "response.reasoning_text.delta", "delta": "a"}, {0: "a"}),
        ({"type": "response.reasoning_summary_text.delta", "delta": "a"}, {0: "a"}),
        ({"type": "response.function_call_arguments.delta", "delta": '{"x"'}, {0: '{"x"'}),
        ({"type": "response.function_call_arguments.done", "arguments": "said before"}, {}),
        ({"type": ["response."], "delta": "a"}, {}),
        ({"type": "message", "content": "plain"}, {}),
        ({"type": "message", "content": [{"text": "a"}, {"text": 1}, 2]}, {0: "a"}),
        ({"object": "response", "output": {"content": 1}}, {}),
        ({"object": "response", "output": [{"content": [{"text": "a"}]}, {"content": "b"}, 3]}, {0: "a"}),
        (
            {"object": "response", "output": [{"summary": [{"text": "a"}], "content": [{"text": "b"}]}, call("c")]},
            {0: "ab"},
        ),
        ({"object": "response", "output": [{"arguments": "a"}, {"input": "b"}, {"arguments": {"c": 1}}]}, {0: "ab"}),
        (["a"], {}),
        (b"[" * 100_000, {}),
        (b"[DONE]", {}),
        (b"\xff\xfe", {}),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_of_every_form_its_text(content, texts, streams):
    assert heard(content, streams) == texts


@pytest.mark.parametrize("field", [b"data:", b"data: ", b"data:  ", b": a comment\ndata:", b"event: e\r\ndata:\t"])
def test_the_space_behind_a_fields_name_may_be_missing(field):
    assert heard(chat(content="a"), True, field) == {0: "a", 1: "other"}


def test_what_is_no_data_is_not_kept():
    for field in (b"event:", b"data", b" data:", b":data:"):
        assert heard(chat(content="a"), True, field) == {}


KNOWN = ["choices", "index", "delta", "message", "text", "content", "reasoning_content", "tool_calls", "function"]
KNOWN += ["arguments", "type", "partial_json", "object", "output", "reasoning", "summary", "input"]
VALUES = ["message", "response", "content_block_delta", "response.output_text.delta", "response.x.delta", "a"]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=1000, deadline=None)
@given(ANY)
def test_nothing_that_an_upstream_says_breaks_its_answer(content):
    assert all(isinstance(text, str) for text in heard(content).values())
