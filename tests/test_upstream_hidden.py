"""What an upstream says beside the text that was blocked: ids, logprobs, usage, errors, and another status."""

import json

import pytest

from monitor.types import Action

from .fake_observer import Reply, proxying
from .fake_upstream import DONE, chat_chunk, chat_whole, event, head, json_answer

STREAM = pytest.mark.parametrize("stream", [False, True])
SPELLED = [{"token": c, "logprob": -1.0, "bytes": [ord(c)], "top_logprobs": []} for c in "aa*b"]


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url) as server:
        yield server


@STREAM
def test_token_ids_beside_a_text_go_with_it(upstream, proxy, stream):
    """vLLM's `return_token_ids`: numbers are no text, and spell it all the same."""
    whole = chat_whole("aa*b")
    whole["choices"][0] |= {"token_ids": [7, 7, 42, 9], "stop_reason": "b"}
    whole["choices"][0]["message"]["token_ids"] = [7, 7, 42, 9]
    chunk = {"index": 0, "delta": {"content": "aa*b", "ids": [7, 7, 42]}, "finish_reason": None}
    chunks = [event({"id": "c", "choices": [chunk | {"token_ids": [7, 7, 42, 9], "message": {"content": "aa*b"}}]})]
    chunks.append(chat_chunk({}, finish="stop"))
    upstream.answer = lambda asked: [head(), *chunks, DONE] if stream else json_answer(whole)
    response = proxy.chat(stream=stream, return_token_ids=True)
    assert Reply(response).texts == {0: "aa"}
    assert [word for word in ("42", "token_ids", '"ids"', "stop_reason", "*") if word in response.text] == []


@STREAM
def test_a_harmless_answer_keeps_them(upstream, proxy, stream):
    whole = chat_whole("aab")
    whole["choices"][0]["token_ids"] = [7, 7, 9]
    chunk = {"index": 0, "delta": {"content": "aab"}, "finish_reason": "stop", "token_ids": [7, 7, 9]}
    upstream.answer = lambda asked: [head(), event({"choices": [chunk]}), DONE] if stream else json_answer(whole)
    assert '"token_ids"' in proxy.chat(stream=stream, return_token_ids=True).text


def test_logprobs_of_a_whole_answer_spell_no_more_than_its_text(upstream, proxy):
    """A tool parser's raw text, what stood behind a stop string: judged by nobody."""
    body = chat_whole("aa")
    body["choices"][0]["logprobs"] = {"content": SPELLED}
    upstream.answer = lambda asked: json_answer(body)
    response = proxy.chat(logprobs=True)
    assert response.json()["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": "aa"}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    body["choices"][0]["logprobs"] = {"content": SPELLED[:2]}
    assert proxy.chat(logprobs=True).json() == body


def said(text, logprobs):
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}


def answered(text, logprobs):
    usage = {"input_tokens": 3, "output_tokens": 99, "total_tokens": 102}
    own = {"id": "resp", "object": "response", "created_at": 7, "model": "far", "status": "completed", "usage": usage}
    return own | {"output": [said(text, logprobs)], "output_text": text}


def responses_stream(text, logprobs):
    item, at = {"item_id": "m", "output_index": 0, "content_index": 0}, answered(text, logprobs)
    begun = answered("", []) | {"status": "in_progress", "usage": None, "output": [], "output_text": ""}
    steps = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": said("", []) | {"content": []}},
        {"type": "response.content_part.added", **item, "part": {"type": "output_text", "text": ""}},
        {"type": "response.output_text.delta", **item, "delta": text, "logprobs": logprobs},
        {"type": "response.output_text.done", **item, "text": text, "logprobs": logprobs},
        {"type": "response.output_item.done", "output_index": 0, "item": said(text, logprobs)},
        {"type": "response.completed", "response": at},
    ]
    numbered = [step | {"sequence_number": i} for i, step in enumerate(steps)]
    return [head(), b"".join(f"event: {s['type']}\ndata: {json.dumps(s)}\n\n".encode() for s in numbered)]


@STREAM
def test_a_blocked_responses_answer_tells_neither_logprobs_nor_its_length(upstream, proxy, stream):
    upstream.answer = lambda asked: (
        responses_stream("aa*b", SPELLED) if stream else json_answer(answered("aa*b", SPELLED))
    )
    body = {"input": "go", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "stream": stream}
    response = proxy.post("/responses", body)
    assert "*" not in response.text and "99" not in response.text and "102" not in response.text
    final = json.loads(response.text.strip().split("data: ")[-1])["response"] if stream else response.json()
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert final["output"][0]["content"][0]["text"] == "aa" and "output_text" not in final
    if not stream:
        assert final["usage"]["output_tokens"] == 2 and final["usage"]["total_tokens"] == 5
    (record,) = proxy.records(response)
    assert record.verdict is Action.BLOCK


@STREAM
def test_logprobs_of_responses_spell_no_more_than_the_text(upstream, proxy, stream):
    upstream.answer = lambda asked: responses_stream("aa", SPELLED) if stream else json_answer(answered("aa", SPELLED))
    response = proxy.post("/responses", {"input": "go", "stream": stream})
    assert "*" not in response.text and '"logprobs":[]' in response.text.replace(" ", "")
    assert proxy.records(response)[0].verdict is Action.ALLOW


@pytest.mark.parametrize("error", [{"message": "gone", "code": 1}, "gone"])
def test_behind_an_error_nothing_is_passed_on_unread(upstream, proxy, error):
    tainted = {"id": "c", "error": error, "choices": [{"index": 0, "delta": {"content": "*"}, "finish_reason": None}]}
    chunks = [
        chat_chunk({"content": "aa"}),
        event(tainted),
        chat_chunk({"content": "b*c"}),
        chat_chunk({}, finish="stop"),
    ]
    upstream.answer = lambda asked: [head(), *chunks, DONE]
    response = proxy.chat(stream=True)
    assert "*" not in response.text and "gone" in response.text and "b*c" not in response.text
    assert proxy.records(response)[0].finish == "engine_error"


@pytest.mark.parametrize("error", [None, {}, "", False])
def test_an_error_that_says_nothing_is_none(upstream, proxy, error):
    chunks = [chat_chunk({"content": c}, error=error) for c in "aa*b"] + [chat_chunk({}, finish="stop")]
    upstream.answer = lambda asked: [head(), *chunks, DONE]
    response = proxy.chat(stream=True)
    reply = Reply(response)
    assert (reply.texts, reply.finishes) == ({0: "aa"}, {0: ["content_filter"]}) and "*" not in response.text


@pytest.mark.parametrize("status", [201, 203, 206, 299])
@STREAM
def test_a_status_beside_200_is_no_answer(upstream, proxy, status, stream):
    """An SDK takes it for one."""
    body = json.dumps(chat_whole("aa*b")).encode()
    whole = [head(status, "application/json", Content_Length=str(len(body))) + body]
    upstream.answer = lambda asked: [head(status), chat_chunk({"content": "*"}), DONE] if stream else whole
    response = proxy.chat(stream=stream)
    assert response.status_code == 502 and "*" not in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}], "input": "b*d"}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}], "instructions": "b*d"}),
        ("/responses", {"input": "x", "messages": [{"role": "user", "content": "b*d"}]}),
    ],
)
def test_the_fields_of_another_route_are_words_like_any(upstream, proxy, path, body):
    before = len(upstream.asked)
    response = proxy.post(path, body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "content_filter", response.text
    assert len(upstream.asked) == before


def test_usage_of_several_choices_counts_what_went_out(upstream, proxy):
    """The upstream's own frame comes in the same piece as the block."""
    usage = {"prompt_tokens": 3, "completion_tokens": 99, "total_tokens": 102}
    frames = [chat_chunk({"content": "bb"}, 0), chat_chunk({"content": "a*cc"}, 1)]
    frames += [chat_chunk({}, i, "stop") for i in range(2)] + [event({"id": "c", "choices": [], "usage": usage}), DONE]
    upstream.answer = lambda asked: [head(), b"".join(frames)]
    response = proxy.chat(stream=True, n=2, stream_options={"include_usage": True})
    assert Reply(response).texts == {0: "bb", 1: "a"}
    assert '"completion_tokens":3' in response.text.replace(" ", "") and "99" not in response.text


@pytest.mark.parametrize("asks", [True, False])
def test_what_stands_beside_the_choices_of_a_cut_chunk_goes_with_the_text(upstream, proxy, asks):
    """Usage in every chunk, as some servers send it, and fields that we do not know: both tell what was cut."""
    usage = {"prompt_tokens": 3, "completion_tokens": 99, "total_tokens": 102}
    more = {"usage": usage, "raw": "aa*b", "system_fingerprint": "f"}
    frames = [chat_chunk({"content": "aa"}), chat_chunk({"content": "*b"}, finish="stop", **more), DONE]
    upstream.answer = lambda asked: [head(), *frames]
    options = {"stream_options": {"include_usage": True}} if asks else {}
    response = proxy.chat(stream=True, **options)
    assert Reply(response).texts == {0: "aa"}
    assert [word for word in ("99", "102", "raw", "*") if word in response.text] == []
    assert '"completion_tokens":2' in response.text.replace(" ", "") and '"system_fingerprint"' in response.text


def test_usage_of_a_chunk_that_is_dropped_is_told_by_us(upstream, proxy):
    usage = {"prompt_tokens": 3, "completion_tokens": 99, "total_tokens": 102}
    frames = [chat_chunk({"content": "aa*"}), chat_chunk({}, finish="stop", usage=usage), DONE]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.chat(stream=True, stream_options={"include_usage": True})
    assert '"completion_tokens":2' in response.text.replace(" ", "") and "99" not in response.text
