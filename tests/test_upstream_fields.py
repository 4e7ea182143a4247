"""Fields of an upstream's answer that nobody knows: their texts are judged, and beside a cut none of them is left."""

import json

import pytest

from monitor.errors import MidstreamError
from monitor.types import Action
from monitor.upstream.choice import Lag

from .fake_observer import STREAM, FakeObserver, Reply, proxying
from .fake_observer import proxy as proxy
from .fake_upstream import DONE, HANG, chat_chunk, chat_whole, event, head, json_answer, text_chunk

KNOWN = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 99, "total_tokens": 102}
SPELLED = {"raw": "aa*b", "raw_ids": [7, 7, 42], "service_tier": "default", "provider": "Far"}


def chunk(choice, **more):
    own = {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "far"}
    return event(own | {"choices": [{"index": 0, "finish_reason": None} | choice]} | more)


# --- beside a cut ---


def test_beside_a_whole_answer_that_is_cut_only_what_is_known_stands(upstream, proxy):
    """vLLM's `enable_response_messages` and its like spell the whole answer once more."""
    upstream.answer = lambda asked: json_answer(chat_whole("aa*b", usage=USAGE, **SPELLED))
    response = proxy.chat()
    body = response.json()
    assert Reply(response).texts == {0: "aa"} and set(body) == KNOWN - {"system_fingerprint"}
    assert body["usage"]["completion_tokens"] == 2 and "*" not in response.text


def test_the_other_choice_of_an_answer_that_is_cut_stays_whole(upstream, proxy):
    upstream.answer = lambda asked: json_answer(chat_whole("a*", "bb", prompt_token_ids=[42]))
    response = proxy.chat(n=2)
    assert Reply(response).texts == {0: "a", 1: "bb"} and "42" not in response.text


def test_beside_the_usage_of_a_cut_answer_nothing_stands(upstream, proxy):
    last = event({"id": "c", "choices": [], "usage": USAGE, "raw_ids": [7, 7, 42]})
    frames = [chat_chunk({"content": "aa*"}), chat_chunk({}, finish="stop"), last, DONE]
    upstream.answer = lambda asked: [head(), b"".join(frames)]
    response = proxy.chat(stream=True, stream_options={"include_usage": True})
    (usage,) = Reply(response).usages
    assert usage["completion_tokens"] == 2 and "42" not in response.text


def test_nor_beside_a_usage_of_ours(upstream, proxy):
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "aa*"}, raw_ids=[7, 7, 42]), HANG]
    response = proxy.chat(stream=True, stream_options={"include_usage": True})
    assert Reply(response).usages[0]["completion_tokens"] == 2 and "42" not in response.text


def test_nor_beside_another_choice_that_goes_on(upstream, proxy):
    frames = [chat_chunk({"content": "a*"}), 0.3, chat_chunk({"content": "bb"}, 1, raw_ids=[42], usage=USAGE)]
    upstream.answer = lambda asked: [head(), *frames, chat_chunk({}, 1, "stop"), chat_chunk({}, 0, "stop"), DONE]
    response = proxy.chat(stream=True, n=2)
    reply = Reply(response)
    assert (reply.texts, reply.finishes) == ({0: "a", 1: "bb"}, {0: ["content_filter"], 1: ["stop"]})
    assert "42" not in response.text and "99" not in response.text


def test_nor_where_the_scores_have_ended(upstream):
    """A cut is not always a block."""
    observer, count = FakeObserver(), iter(range(100))

    def fault(ids):
        if next(count) > 1:  # the prompt is read, and the first eight tokens
            raise MidstreamError("no")

    observer.fault = fault
    upstream.answer = lambda asked: [head(), chat_chunk({"content": "one two three four"}, raw_ids=[42]), HANG]
    with proxying(upstream.url, observer=observer, lag=Lag(tokens=8, pause_s=0.05)) as proxy:
        response = proxy.chat(stream=True)
        assert '"one two' in response.text and "unavailable" in response.text and "42" not in response.text
        assert proxy.records(response)[0].finish == "unmonitored"


# --- texts ---

ENDS = [chat_chunk({}, finish="stop"), DONE]
AA = {"delta": {"content": "aa"}}
HIDDEN = {
    "beside the choices": [chunk(AA, citations=["b*d"])],
    "deep beside the choices": [chunk(AA, search={"results": [{"title": "b*d", "input": 7}]})],
    "beside a delta": [chunk(AA | {"message": {"role": "assistant", "content": "b*d"}})],
    "instead of a delta": [chunk(AA), chunk({"text": "b*d"})],
    "beside no choices": [chunk(AA), event({"id": "c", "choices": [], "note": "b*d"})],
    "beside usage": [chunk(AA), event({"id": "c", "choices": [], "usage": USAGE, "note": "b*d"})],
    "without choices": [chunk(AA), event({"object": "note", "note": "b*d"})],
    "twice": [chunk(AA, note="b*d"), chunk(AA, note="b*d")],
}


@pytest.mark.parametrize("ends", [ENDS, [HANG]], ids=["ends", "hangs"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_text_that_stands_beside_is_judged_and_ends_the_answer(upstream, proxy, name, ends):
    upstream.answer = lambda asked: [head(), *HIDDEN[name], *ends]
    response = proxy.chat(stream=True)
    reply = Reply(response)
    assert (reply.texts, reply.finishes, reply.done) == ({0: "aa"}, {0: ["content_filter"]}, True)
    assert "*" not in response.text and "note" not in response.text
    assert proxy.records(response)[0].verdict is Action.BLOCK and proxy.idle()


@pytest.mark.parametrize("where", ["answer", "choice"])
def test_it_is_in_a_whole_answer_too(upstream, proxy, where):
    body = chat_whole("aa", citations=["b*d"] if where == "answer" else ["b"])
    body["choices"][0]["note"] = "b*d" if where == "choice" else "b"
    upstream.answer = lambda asked: json_answer(body)
    response = proxy.chat()
    assert (Reply(response).texts, Reply(response).finishes) == ({0: "aa"}, {0: ["content_filter"]})
    assert "*" not in response.text and "citations" not in response.text


def test_it_is_in_completions_too(upstream, proxy):
    noted = event(json.loads(text_chunk("bb")[6:]) | {"note": "b*d"})
    upstream.answer = lambda asked: [head(), text_chunk("aa"), noted, text_chunk("", finish="stop"), DONE]
    reply = Reply(proxy.post("/completions", {"prompt": "once", "stream": True}))
    assert "*" not in reply.raw and reply.finishes == {0: ["content_filter"]}


def test_one_choice_may_end_by_what_came_with_another(upstream, proxy):
    """Nothing of the first one's own follows: its end is told all the same."""
    frames = [chat_chunk({"content": "aa"}), chat_chunk({"content": "bb"}, 1, note="b*d")]
    upstream.answer = lambda asked: [head(), *frames, 0.3, chat_chunk({}, 1, "stop"), DONE]
    reply = Reply(proxy.chat(stream=True, n=2))
    assert "*" not in reply.raw and reply.done
    assert (reply.texts, reply.finishes) == ({0: "aa", 1: "bb"}, {0: ["content_filter"], 1: ["stop"]})


# --- harmless ones ---


@STREAM
def test_harmless_ones_pass_as_they_came_and_are_read_once(upstream, proxy, stream):
    more = {"citations": ["http://a"], "service_tier": "default", "provider": "Far", "cost": {"input": 0.1}}
    frames = [
        event({"type": "ping"}),
        chunk({"delta": {"content": "one"}}, **more, obfuscation="xY"),
        chunk({"delta": {"content": " two"}, "native_finish_reason": None}, **more, obfuscation="zzz"),
        chunk({"delta": {}, "finish_reason": "stop", "native_finish_reason": "end", "stop_reason": "."}, **more),
        event({"id": "c", "choices": [], "usage": USAGE} | more),
        DONE,
    ]
    whole = json.dumps(chat_whole("one two", **more)).encode()
    upstream.answer = lambda asked: [head(), *frames] if stream else json_answer(whole)
    response = proxy.chat(stream=stream)
    assert response.content == (b"".join(frames) if stream else whole)
    read = "one\nhttp://a\n two" if stream else "one two\nhttp://a"
    assert proxy.records(response)[0].coverage.response_tokens == len(read)


def test_what_repeats_the_text_so_far_is_not_read_again(upstream, proxy):
    """Some upstreams send the whole message beside each piece of it."""
    text = "one two three"
    parts = [{"delta": {"content": text[i]}, "message": {"content": text[: i + 1]}} for i in range(len(text))]
    frames = [*(chunk(part) for part in parts), chunk({"delta": {}, "finish_reason": "stop"}, raw=text), DONE]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.chat(stream=True)
    assert response.content == b"".join(frames)
    assert proxy.records(response)[0].coverage.response_tokens == len(text)


def test_a_text_that_comes_after_the_end_goes(upstream, proxy):
    late = event({"id": "c", "choices": [], "usage": USAGE, "note": "b*d"})
    upstream.answer = lambda asked: [head(), chunk(AA), ENDS[0], 0.3, late, late, event({"note": "b*d"}), DONE]
    response = proxy.chat(stream=True)
    bare = event({"id": "c", "choices": [], "usage": USAGE}).replace(b": ", b":").replace(b", ", b",")
    got = response.content.replace(b": ", b":").replace(b", ", b",")
    assert got.endswith(b'"finish_reason":"stop"}]}\n\n' + bare + bare + DONE.replace(b": ", b":"))
