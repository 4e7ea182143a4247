"""The HTTP side over real sockets, with the official openai client and with bare requests."""

import json
import socket
import time

import httpx
import openai
import pytest
import torch

from monitor.probe import ProbeWeights

from .conftest import LAYER, calibrated

JSON = {"Content-Type": "application/json"}
EOS_OFF = {"logit_bias": {"256": -100}}  # the tiny tokenizer's end token


def client(server, **kwargs):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=kwargs.pop("key", "unused"), max_retries=0, **kwargs)


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def server(tiny, random_probe, serve):
    """A probe that is far from firing: everything is allowed, and everything is held by one token."""
    return serve(
        tiny,
        [(random_probe, {"calibration": calibrated(1e6)})],
        modes={"random": {"prompt": "block", "response": "block"}},
    )


@pytest.fixture
def hair_trigger(tiny, serve):
    """A probe that reads nothing but its bias, above its threshold: every prompt is blocked."""
    probe = ProbeWeights("trigger", {LAYER: torch.zeros(tiny.d_model)}, 1.0)
    return serve(
        tiny, [(probe, {"calibration": calibrated(0.0)})], modes={"trigger": {"prompt": "block", "response": "block"}}
    )


def test_models_health_ready_metrics(server):
    assert [m.id for m in client(server).models.list()] == [server.model.name]
    assert httpx.get(server.url + "/health").json() == {"status": "up"}
    assert httpx.get(server.url + "/ready").json()["status"] == "ready"
    text = httpx.get(server.url + "/metrics").text
    assert "midstream_ready 1.0" in text


def test_chat_streaming_and_not_say_the_same(server):
    api = client(server)
    whole = api.chat.completions.create(
        model=server.model.name, messages=user("hi"), max_tokens=20, temperature=0, n=2, seed=1
    )
    stream = api.chat.completions.create(
        model=server.model.name,
        messages=user("hi"),
        max_tokens=20,
        temperature=0,
        n=2,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, finishes, ids, usage = ["", ""], [None, None], set(), None
    for chunk in stream:
        ids.add(chunk.id)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            assert finishes[choice.index] is None, "nothing comes after a finish chunk"
            finishes[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert finishes == [c.finish_reason for c in whole.choices]
    assert len(ids) == 1 and usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_logprobs_of_chat_and_completions(server):
    api = client(server)
    chat = api.chat.completions.create(
        model=server.model.name, messages=user("hi"), max_tokens=5, logprobs=True, top_logprobs=3, extra_body=EOS_OFF
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens == 5
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in content)
    whole = api.completions.create(model=server.model.name, prompt="once", max_tokens=5, logprobs=2, extra_body=EOS_OFF)
    lp = whole.choices[0].logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.text_offset) == 5


def test_completions_take_lists_and_token_ids(server):
    api = client(server)
    whole = api.completions.create(model=server.model.name, prompt=["one two", "three"], n=2, max_tokens=4)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    assert api.completions.create(model=server.model.name, prompt=[70, 71, 72], max_tokens=2).usage.prompt_tokens == 3


BAD = [
    ({"messages": user("x"), "temprature": 1}, 400, "'temprature' is not supported"),
    ({"messages": user("x"), "temperature": "hot"}, 400, "temperature"),
    ({"messages": user("x"), "temperature": 3}, 400, "temperature"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    ({"messages": user("x"), "n": 0}, 400, "n"),
    ({"messages": user("x"), "n": 999}, 400, "send at most"),
    ({"messages": user("x"), "stop": [""]}, 400, "stop"),
    ({"messages": user("x"), "tools": []}, 400, "'tools' is not supported"),
    ({"messages": user("x"), "model": "gpt-4"}, 404, "not served here"),
    ({"messages": user("word " * 2000)}, 400, "do not fit"),
    ({"messages": user("x"), "max_tokens": 100000}, 400, "do not fit"),
    ({"messages": user("x"), "logit_bias": {"cat": 1}}, 400, "logit_bias"),
    ({"messages": user("x"), "logit_bias": {"99999999": 1}}, 400, "token ids below"),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD)
def test_bad_requests_get_openais_shape_and_a_sentence(server, body, status, says):
    response = server.post("/v1/chat/completions", body)
    error = response.json()["error"]
    assert response.status_code == status and says in error["message"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert server.sink.records == []


def test_strange_numbers_and_texts_end_one_request_and_not_the_engine(server):
    """Each of these once took the engine down or gave a bare 500."""
    for extra in ({"temperature": 1e-40}, {"top_p": 1e-50}, {"temperature": 1e-40, "seed": -(2**70)}):
        assert server.post("/v1/chat/completions", {"messages": user("x"), "max_tokens": 3} | extra).status_code == 200
    surrogate = b'{"model": "tiny-llama", "messages": [{"role": "user", "content": "a\\ud800"}], "\\ud800": 1}'
    for body in (surrogate, surrogate.replace(b', "\\ud800": 1', b"")):
        response = httpx.post(server.url + "/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code == 400 and response.json()["error"]["message"]
    long_key = server.post("/v1/chat/completions", {"messages": user("x"), "logit_bias": {"9" * 5000: 1}})
    assert long_key.status_code == 400
    assert httpx.get(server.url + "/ready").status_code == 200


def test_a_body_over_the_bound_is_413_announced_or_not(server):
    big = b'{"model": "' + b"x" * 3 * 2**20 + b'"}'
    assert httpx.post(server.url + "/v1/chat/completions", content=big, headers=JSON).status_code == 413
    pieces = (big[i : i + 65536] for i in range(0, len(big), 65536))
    response = httpx.post(server.url + "/v1/chat/completions", content=pieces, headers=JSON)
    assert response.status_code == 413 and response.json()["error"]["message"]


def test_more_bad_requests(server):
    broken = httpx.post(server.url + "/v1/chat/completions", content=b"{nope", headers=JSON)
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "bad_json"
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    assert server.post("/v1/completions", {"prompt": []}).status_code == 400
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 400  # one token: nothing to judge
    assert server.post("/v1/completions", {"prompt": [1, 99999]}).status_code == 400
    assert server.post("/v1/completions", {"prompt": "two words", "echo": True}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_a_400_before_any_token(hair_trigger, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client(hair_trigger).chat.completions.create(
            model=hair_trigger.model.name, messages=user("anything"), stream=stream
        )
    assert caught.value.code == "content_filter"
    assert caught.value.body["innererror"]["content_filter_result"] == {"trigger": {"filtered": True, "detected": True}}
    record = hair_trigger.sink.wait(1)[0]
    assert (record.verdict, record.released_tokens, record.finish) == ("block", 0, "content_filter")
    assert caught.value.response.headers["x-midstream-request-id"] == record.request_id
    assert hair_trigger.metric("midstream_blocks_total", model="", probe="trigger", phase="prompt") == 1


def test_of_a_list_of_prompts_the_400_names_the_index(tiny, serve):
    """A probe fitted by hand: it fires where the newest token is '#'."""
    from monitor.engines.embedded.harvest import residual_streams

    prompts = [tiny.template.raw(f"text {c}{c}") for c in "#abcdefgh"]
    rows = {i: s[0][-1].double() for i, s in residual_streams(tiny, prompts, [0])}
    direction = rows[0] - torch.stack([rows[i] for i in range(1, 9)]).mean(0)
    probe = ProbeWeights("hash", {0: direction.float()}, 0.0)
    values = {i: float(rows[i] @ direction) for i in rows}
    threshold = (values[0] + max(v for i, v in values.items() if i)) / 2
    from monitor.aggregate import Aggregation

    last = {"prompt": Aggregation("last"), "response": Aggregation("last")}
    server = serve(
        tiny,
        [(probe, {"calibration": calibrated(threshold), "aggregation": last})],
        modes={"hash": {"prompt": "block", "response": "shadow"}},
    )
    response = server.post("/v1/completions", {"prompt": ["text aa", "text ##", "text bb"], "max_tokens": 3, "n": 2})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["innererror"]["prompt_index"] == 1 and "Prompt 1" in error["message"]
    assert server.post("/v1/completions", {"prompt": ["text aa", "text bb"], "max_tokens": 3}).status_code == 200


def test_missing_scores_fail_closed_with_503_and_retry_after(server):
    server.engine._sets.current.tap.detach()
    for stream in (False, True):
        response = server.post("/v1/chat/completions", {"messages": user("x"), "stream": stream})
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "unavailable"
    assert {r.verdict for r in server.sink.wait(2)} == {"unmonitored"}
    assert server.metric("midstream_unmonitored_tokens_total", cause="not_finite") > 0


def test_a_full_queue_is_429_with_retry_after(tiny, random_probe, serve):
    server = serve(tiny, [(random_probe, {})], max_sequences=1, max_queue=0)
    body = {"model": tiny.name, "messages": user("x"), "max_tokens": 900, "stream": True} | EOS_OFF
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as first:
        lines = first.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        refused = server.post("/v1/chat/completions", {"messages": user("y"), "max_tokens": 2})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "queue_full"
    server.sink.wait(1)  # the first one was aborted: there is room again
    assert server.post("/v1/chat/completions", {"messages": user("y"), "max_tokens": 2}).status_code == 200
    assert server.metric("midstream_rejected_total", status="429") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine(server, stream):
    """Within one token: the engine goes idle although hundreds of tokens were asked for."""
    body = json.dumps(
        {"model": server.model.name, "messages": user("x"), "max_tokens": 900, "stream": stream} | EOS_OFF
    )
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        deadline = time.monotonic() + 30
        while server.engine.steps < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
    record = server.sink.wait(1)[0]
    assert record.finish == "aborted" and record.coverage.response_tokens < 900
    assert server.engine.describe()["active"] == 0


def test_the_key_guards_v1_and_nothing_else_changes(tiny, random_probe, serve):
    server = serve(tiny, [(random_probe, {})], api_key="correct-horse")
    with pytest.raises(openai.AuthenticationError):
        client(server, key="wrong").models.list()
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert client(server, key="correct-horse").models.list().data
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200


def test_a_clients_request_id_is_echoed_and_never_a_key(server):
    body = {"messages": user("x"), "max_tokens": 2}
    ids = set()
    for _ in range(2):
        response = server.post("/v1/chat/completions", body, headers={"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine"
        ids.add(response.headers["x-midstream-request-id"])
    assert len(ids) == 2 and {r.request_id for r in server.sink.wait(2)} == ids
    assert "x-request-id" not in server.post("/v1/chat/completions", body, headers={"X-Request-Id": "a" * 500}).headers


def test_the_engine_dying_makes_the_server_not_ready(server):
    def broken(*args):
        raise RuntimeError("gone")

    handle = server.model.module.register_forward_pre_hook(broken)
    try:
        response = server.post("/v1/chat/completions", {"messages": user("x")})
    finally:
        handle.remove()
    assert response.status_code == 503
    ready = httpx.get(server.url + "/ready")
    assert ready.status_code == 503 and "died" in ready.json()["reason"]


def test_a_stream_whose_scores_go_missing_ends_with_an_error_and_no_done(server):
    body = {"model": server.model.name, "messages": user("x"), "max_tokens": 900, "stream": True} | EOS_OFF
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        server.engine._sets.current.tap.detach()
        rest = [line for line in lines if line]
    assert "[DONE]" not in rest[-1] and json.loads(rest[-1][6:])["error"]["code"] == "unavailable"
    record = server.sink.wait(1)[0]
    assert record.released_tokens == record.coverage.response_scored
