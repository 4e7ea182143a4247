"""n > 1: a prompt is read once, and a fork of its stream goes on with each answer."""

import json
import socket

import pytest

from .fake_observer import STREAM, FakeObserver, Reply, proxying
from .fake_upstream import DONE, HANG, chat_chunk, chat_whole, head, json_answer
from .web import until, whole

TEXTS = ("aaaa", "bb*bb", "cc")
GO = [{"role": "user", "content": "go on"}]


def says(upstream):
    def answer(asked):
        if not asked.json.get("stream"):
            return json_answer(chat_whole(*TEXTS))
        chunks = [chat_chunk({"content": c}, i) for i, text in enumerate(TEXTS) for c in text]
        return [head(), *chunks, *(chat_chunk({}, i, "stop") for i in range(len(TEXTS))), DONE]

    upstream.answer = answer


@pytest.mark.parametrize(("has_room", "opened"), [(True, 1), (False, 3)])
@STREAM
def test_a_prompt_is_read_once_for_all_of_its_answers(upstream, stream, has_room, opened):
    """Without room for a fork, an answer's own stream reads it again, when it has something to read."""
    observer = FakeObserver()
    observer.has_room = has_room
    says(upstream)
    with proxying(upstream.url, observer=observer) as proxy:
        response = proxy.chat(stream=stream, n=3)
        reply = Reply(response)
        assert reply.texts == {0: "aaaa", 1: "bb", 2: "cc"}
        assert reply.finishes == {0: ["stop"], 1: ["content_filter"], 2: ["stop"]}
        assert observer.opened == opened and len(observer.streams) == 3
        records = proxy.records(response, 3)
        assert [r.released_tokens for r in records] == [4, 2, 2]
        assert all(r.coverage.prompt_scored == r.coverage.prompt_tokens for r in records)
        assert proxy.idle()


def test_each_prompt_of_a_list_has_its_own(upstream):
    observer = FakeObserver()
    texts = [{"index": i, "text": f"{i}", "logprobs": None, "finish_reason": "stop"} for i in range(4)]
    upstream.answer = lambda asked: json_answer({"id": "c", "object": "text_completion", "choices": texts})
    with proxying(upstream.url, observer=observer) as proxy:
        response = proxy.post("/completions", {"prompt": ["one", "other"], "n": 2})
        assert Reply(response).texts == {i: f"{i}" for i in range(4)}
        assert observer.opened == 2 and len(observer.streams) == 4 and proxy.idle()


def test_forks_of_a_prompt_that_is_blocked_are_closed(upstream):
    observer = FakeObserver()
    with proxying(upstream.url, observer=observer) as proxy:
        assert proxy.chat("g*", n=3).status_code == 400
        assert proxy.idle()


def test_forks_of_a_client_that_leaves_are_closed(upstream):
    """They have nothing to read yet."""
    observer, asked = FakeObserver(), len(upstream.asked)
    upstream.answer = lambda asked: [HANG]
    with proxying(upstream.url, observer=observer) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(whole(json.dumps({"model": "far", "messages": GO, "n": 3}).encode()))
            until(lambda: len(upstream.asked) > asked)
            assert len(observer.streams) == 3 and not any(stream.closed for stream in observer.streams)
        assert proxy.idle()
