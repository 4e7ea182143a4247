"""The proxy with a scripted upstream and a scripted observer: what goes on, comes back, is held and is blocked."""

import json

import httpx
import openai
import pytest

from monitor.types import Action, Mode, Terms

from .fake_observer import STREAM, FakeObserver, Reply, proxying, rules
from .fake_observer import proxy as proxy
from .fake_upstream import DONE, HANG, chat_chunk, chat_stream, chat_whole, event, head, json_answer


def says(upstream, *texts, finish="stop", size=1):
    """Both forms of an answer with these choices."""

    def answer(asked):
        if not asked.json.get("stream"):
            return json_answer(chat_whole(*texts, finish=finish))
        chunks = [chat_chunk({"content": c}, i) for i, t in enumerate(texts) for c in pieces(t, size)]
        return [head(), *chunks, *(chat_chunk({}, i, finish) for i in range(len(texts))), DONE]

    upstream.answer = answer


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


# --- what goes on ---


def test_the_body_goes_on_byte_for_byte_with_the_operators_key(upstream, proxy):
    says(upstream, "fine")
    body = (
        b'{ "model":"far",  "messages":[{"role":"user","content":"caf\\u00e9"}],"temperature":0.70,"new_field":[1e2]}'
    )
    headers = {"Authorization": "Bearer clients-key", "Cookie": "a=b", "X-Api-Key": "k", "OpenAI-Organization": "org"}
    response = proxy.post("/chat/completions", body, headers=headers)
    asked = upstream.asked[-1]
    assert response.status_code == 200 and asked.body == body
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.headers["authorization"] == "Bearer operators-own-key"
    assert not {"cookie", "x-api-key", "openai-organization"} & set(asked.headers)


def test_a_whole_answer_comes_back_byte_for_byte(upstream, proxy):
    raw = json.dumps(chat_whole("fine", service_tier="x", unknown={"a": [1, None]}), indent=1).encode()
    upstream.answer = lambda asked: json_answer(raw, x_ratelimit_remaining="7", set_cookie="no")
    response = proxy.chat()
    assert response.content == raw
    assert response.headers["x-ratelimit-remaining"] == "7" and "set-cookie" not in response.headers
    assert response.headers["x-midstream-decision"] == "allow"
    (record,) = proxy.records(response)
    assert (record.finish, record.verdict, record.route, record.model) == ("stop", "allow", "chat", "far")
    assert record.released_tokens == record.coverage.response_tokens == len("fine")
    assert record.scored_by == "observer"


def test_a_stream_comes_back_byte_for_byte_with_comments_usage_and_unknown_fields(upstream, proxy):
    frames = [
        b": ping\n\n",
        b"event: chunk\r\ndata:" + event({"choices": []})[6:].strip() + b"\r\n\r\n",
        chat_chunk({"role": "assistant"}, extra=[None], system_fingerprint="fp"),
        chat_chunk({"content": "Once upon"}),
        b": still here\n\n",
        chat_chunk({"content": " a time."}),
        chat_chunk({}, finish="length"),
        event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}),
        DONE,
    ]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.chat(stream=True, stream_options={"include_usage": True})
    assert response.content == b"".join(frames)
    assert response.headers["content-type"].startswith("text/event-stream")
    (record,) = proxy.records(response)
    assert (record.finish, record.released_tokens) == ("length", len("Once upon a time."))
    assert record.coverage.response_scored == len("Once upon a time.")


def test_models_are_the_upstreams(upstream, proxy):
    upstream.answer = lambda asked: json_answer({"object": "list", "data": [{"id": "far"}]})
    response = httpx.get(proxy.url + "/v1/models")
    assert response.json()["data"] == [{"id": "far"}] and upstream.asked[-1].path == "/v1/models"


def test_other_paths_do_not_go_on(upstream, proxy):
    before = len(upstream.asked)
    for path in ("/files", "/images/generations", "/chat/completions/x", "/audio/speech", "/messages"):
        assert proxy.post(path, {}).status_code == 404
    assert len(upstream.asked) == before


# --- blocks ---


@STREAM
@pytest.mark.parametrize("n", [1, 2])
def test_a_blocked_prompt_never_reaches_the_upstream(upstream, proxy, stream, n):
    before = len(upstream.asked)
    response = proxy.chat("tell*me", stream=stream, n=n)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "content_filter"
    assert error["innererror"]["content_filter_result"] == {"star": {"filtered": True, "detected": True}}
    assert len(upstream.asked) == before
    for record in proxy.records(response, n):
        assert (record.verdict, record.finish, record.released_tokens) == ("block", "content_filter", 0)
    assert proxy.idle()


@STREAM
@pytest.mark.parametrize("size", [1, 3, 100])
def test_nothing_of_the_trigger_or_later_goes_out_at_any_position(upstream, proxy, stream, size):
    """The leak test: 32 positions x streaming or not x how much text a chunk brings."""
    for p in range(1, 33):
        says(upstream, "a" * (p - 1) + "*" + "b" * 40, size=size)
        response = proxy.chat(stream=stream)
        reply = Reply(response)
        assert (reply.texts, reply.finishes) == ({0: "a" * (p - 1)}, {0: ["content_filter"]})
        assert "*" not in reply.raw and "b" not in reply.texts[0] and reply.done is stream
        (record,) = proxy.records(response)
        assert (record.verdict, record.finish, record.released_tokens) == ("block", "content_filter", p - 1)
        (reading,) = [r for r in record.readings if r.phase == "response"]
        assert reading.crossed_at == record.coverage.prompt_tokens + p - 1
    assert proxy.idle()


def test_without_the_monitor_the_trigger_would_be_there(upstream):
    says(upstream, "aaa*bbb")
    with proxying(upstream.url, own_rules=rules(Mode.SHADOW)) as proxy:
        response = proxy.chat(stream=True)
        assert Reply(response).texts == {0: "aaa*bbb"}
        (record,) = proxy.records(response)
        assert record.verdict is Action.ALLOW and record.readings[1].would_block


def test_a_block_closes_the_upstream_while_it_still_answers(upstream, proxy):
    upstream.answer = lambda asked: [head(), *chat_stream("aa*aa b b b")[:-2], HANG]
    response = proxy.chat(stream=True, stream_options={"include_usage": True})
    assert Reply(response).finishes == {0: ["content_filter"]}
    assert Reply(response).usages[0]["completion_tokens"] == 2
    assert upstream.asked[-1].closed.wait(10)
    assert proxy.idle()


@STREAM
def test_each_choice_is_an_answer_of_its_own(upstream, proxy, stream):
    says(upstream, "aaaa", "bb*bb", "*")
    response = proxy.chat(stream=stream, n=3)
    reply = Reply(response)
    assert reply.texts == {0: "aaaa", 1: "bb", 2: ""}
    assert reply.finishes == {0: ["stop"], 1: ["content_filter"], 2: ["content_filter"]}
    assert [r.finish for r in proxy.records(response, 3)] == ["stop", "content_filter", "content_filter"]
    assert "*" not in reply.raw and proxy.idle()


def test_one_chunk_with_several_choices_loses_only_those_that_are_blocked(upstream, proxy):
    def both(first, second, **more):
        return event(
            {"id": "c", "choices": [{"index": 0, "finish_reason": None} | first, {"index": 1} | second]} | more
        )

    upstream.answer = lambda asked: [
        head(),
        both({"delta": {"content": "one "}}, {"delta": {"content": "two "}, "finish_reason": None}),
        both({"delta": {"content": "more"}}, {"delta": {"content": "b*d"}, "finish_reason": None}, kept="yes"),
        both({"delta": {}, "finish_reason": "stop"}, {"delta": {}, "finish_reason": "stop"}),
        DONE,
    ]
    reply = Reply(proxy.chat(stream=True, n=2))
    assert reply.texts == {0: "one more", 1: "two b"}
    assert reply.finishes == {0: ["stop"], 1: ["content_filter"]}
    assert "kept" not in reply.bodies[1] and reply.done  # it may spell what was cut


@STREAM
def test_the_policys_texts_stand_in_place_of_what_is_blocked(upstream, stream):
    terms = Terms(refusal="I can't help with that.", replacement="[cut]", annotate=True)
    says(upstream, "aa*")
    with proxying(upstream.url, terms=terms) as proxy:
        refused = Reply(proxy.chat("tell*me", stream=stream))
        assert (refused.texts, refused.finishes) == ({0: "I can't help with that."}, {0: ["content_filter"]})
        cut = Reply(proxy.chat(stream=stream))
        assert cut.texts == {0: "aa[cut]" if stream else "[cut]"} and cut.finishes == {0: ["content_filter"]}
        assert cut.bodies[0]["prompt_filter_results"][0]["content_filter_results"]["star"]["filtered"] is False
        results = [
            c["content_filter_results"] for b in cut.bodies for c in b["choices"] if "content_filter_results" in c
        ]
        assert results == [{"star": {"filtered": True, "detected": True}}]


# --- clients ---


@STREAM
def test_openais_client_reads_answers_and_blocks(upstream, proxy, stream):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0) as api:
        for said, text, finish in (("fine so far", "fine so far", "stop"), ("aaa*", "aaa", "content_filter")):
            says(upstream, said)
            given = {"model": "far", "messages": [{"role": "user", "content": "go"}], "stream": stream}
            answer = api.chat.completions.create(**given)
            if stream:
                choices = [choice for chunk in answer for choice in chunk.choices]
                assert "".join(c.delta.content or "" for c in choices) == text
                assert choices[-1].finish_reason == finish
            else:
                assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, finish)
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(model="far", messages=[{"role": "user", "content": "b*d"}], stream=stream)
        assert caught.value.code == "content_filter"


def test_the_observer_reads_the_whole_text_as_one(upstream):
    """However the upstream parts it, in bytes or in characters: the ids are those of the text."""
    text = "Ünïcödé ☃ and\n\n more  than that 日本語 🎈 it's <|im_end|> so"
    observer = FakeObserver()
    with proxying(upstream.url, observer=observer) as proxy:
        expected = observer.tokenizer(text, add_special_tokens=False)["input_ids"]
        for size in (1, 2, 5, 100):
            says(upstream, text, size=size)
            response = proxy.chat(stream=True)
            assert Reply(response).texts == {0: text}
            assert observer.streams[-1].read_ids == expected, size
            assert proxy.records(response)[0].coverage.response_scored == len(expected)
