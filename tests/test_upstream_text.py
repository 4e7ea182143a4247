"""Whatever is text is judged, wherever a prompt or an answer has it; what can't be judged does not go on."""

import pytest

from monitor.types import Action

from .fake_observer import STREAM, Reply
from .fake_observer import proxy as proxy
from .fake_upstream import DONE, chat_chunk, chat_whole, event, head, json_answer

CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
HIDDEN = {
    "reasoning": [{"reasoning": "so "}, {"reasoning": "b*d"}, {"content": "never"}],
    "reasoning of another name": [{"reasoning_content": "so b*d"}, {"content": "never"}],
    "reasoning twice": [{"reasoning": "so b*d", "reasoning_details": [{"type": "x", "text": "so b*d"}]}],
    "a refusal": [{"refusal": "b*d"}],
    "arguments": [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"q": "'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'b*d"}'}}]},
    ],
    "a name of a function": [{"tool_calls": [CALL | {"function": {"name": "b*d", "arguments": "{}"}}]}],
    "an old call": [{"function_call": {"name": "f", "arguments": "{b*d"}}],
    "a field of next year": [{"thoughts": [{"transcript": {"words": "b*d"}}]}],
    "parts": [{"content": [{"type": "text", "text": "b*d"}]}],
}


@STREAM
@pytest.mark.parametrize("name", HIDDEN)
def test_whatever_is_text_is_judged(upstream, proxy, name, stream):
    deltas = HIDDEN[name]
    message = {"role": "assistant", "content": None} | {k: v for d in deltas for k, v in d.items()}
    whole = json_answer(chat_whole(message, finish="tool_calls"))
    chunks = [*(chat_chunk(d) for d in deltas), chat_chunk({}, finish="tool_calls"), DONE]
    upstream.answer = lambda asked: [head(), *chunks] if stream else whole
    response = proxy.chat(stream=stream)
    assert response.status_code == 200 and "*" not in response.text and "never" not in response.text
    assert '"finish_reason":"content_filter"' in response.text
    assert proxy.records(response)[0].verdict is Action.BLOCK
    if not stream:
        assert not {"tool_calls", "function_call"} & set(response.json()["choices"][0]["message"])


@STREAM
def test_a_call_that_is_harmless_passes_unchanged(upstream, proxy, stream):
    call = CALL | {"function": {"name": "look", "arguments": '{"q": "it"}'}}
    chunks = [chat_chunk({"tool_calls": [call]}), chat_chunk({}, finish="tool_calls"), DONE]
    whole = json_answer(chat_whole({"role": "assistant", "content": None, "tool_calls": [call]}, finish="tool_calls"))
    upstream.answer = lambda asked: [head(), *chunks] if stream else whole
    response = proxy.chat(stream=stream)
    assert response.content == b"".join(chunks) if stream else whole[0].endswith(response.content)
    (record,) = proxy.records(response)
    assert record.finish == "stop" and record.coverage.response_tokens == len('look\n{"q": "it"}')


@STREAM
def test_logprobs_do_not_spell_what_is_held_or_cut(upstream, proxy, stream):
    def spelled(text):
        return {"content": [{"token": c, "logprob": -1.0, "bytes": None, "top_logprobs": []} for c in text]}

    given = [({"content": "a"}, "a"), ({"content": "a"}, "aa"), ({"content": ""}, "*"), ({"content": "a*"}, "a*")]
    parts = [{"index": 0, "delta": d, "logprobs": spelled(s), "finish_reason": None} for d, s in given]
    parts.append({"index": 0, "delta": {}, "logprobs": spelled(["<|im_end|>"]), "finish_reason": "stop"})
    chunks = [event({"id": "c", "choices": [c]}) for c in parts]
    body = chat_whole("a*")
    body["choices"][0]["logprobs"] = spelled("a*")
    upstream.answer = lambda asked: [head(), *chunks, DONE] if stream else json_answer(body)
    response = proxy.chat(stream=stream, logprobs=True)
    reply = Reply(response)
    assert "*" not in reply.raw and reply.texts == {0: "aaa" if stream else "a"}
    assert reply.tokens == {0: ["a", "a"] if stream else ["a"]}


PROMPTS = {
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "*d"}]}]
    },
    "a tool's result": {
        "messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1", "content": "*"}]
    },
    "a name": {"messages": [{"role": "user", "content": "x", "name": "b*d"}]},
    "an unknown field of a message": {"messages": [{"role": "user", "content": "x", "hint": {"a": ["b*d"]}}]},
    "a long identifier": {"messages": [{"role": "tool", "tool_call_id": "b * d", "content": "x"}]},
    "a tool": {"tools": [{"type": "function", "function": {"name": "f", "description": "b*d", "parameters": {}}}]},
    "a schema's names": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"*": {}}}}}
    },
    "a prediction": {"prediction": {"type": "content", "content": "b*d"}},
    "a field that Go would take for messages": {"Messages": [{"role": "user", "content": "b*d"}]},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_whatever_the_model_may_read_is_judged(upstream, proxy, name):
    before = len(upstream.asked)
    response = proxy.chat("fine", **PROMPTS[name])
    assert response.status_code == 400 and response.json()["error"]["code"] == "content_filter", response.text
    assert len(upstream.asked) == before


UNREADABLE = [
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    {"messages": "hi"},
    {"messages": []},
    {"messages": [7]},
    {"messages": [{"role": 7, "content": "x"}]},
    {"modalities": ["text", "audio"]},
    {"prompt_embeds": "AAAA"},
    {"chat_template": "{{ x }}"},
    {"n": 0},
    {"n": 99},
    {"stream": "yes"},
    {"model": 7},
    {"model": None},
]


@pytest.mark.parametrize("body", UNREADABLE, ids=str)
def test_what_cant_be_judged_does_not_go_on(upstream, proxy, body):
    before, records = len(upstream.asked), len(proxy.sink.records)
    response = proxy.chat(**body)
    assert response.status_code == 400 and response.json()["error"]["message"], response.text
    assert (len(upstream.asked), len(proxy.sink.records)) == (before, records)


def test_a_field_that_stands_twice_is_refused(upstream, proxy):
    before = len(upstream.asked)
    for raw in (
        b'{"model":"far","messages":[{"role":"user","content":"b*d"}],"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"far","messages":[{"role":"user","content":"b*d","content":"x"}]}',
    ):
        assert proxy.post("/chat/completions", raw).status_code == 400
    assert len(upstream.asked) == before
