"""Refusals: what is malformed, unfit or too large is a 4xx in OpenAI's shape, and leaves no record."""

import json
from typing import Any

import httpx
import openai
import pytest

from .exchange import BOTH, CHAT, HTTP, JSON, STREAM, TEXT, Server, asked, forced, user

MALFORMED = [b"{nope", b"", b"[]", b'"text"', b"null", b"7", b"\xff\xfe", b'{"model": "x"']
BAD = [
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": "hot"},
    {"temperature": -1},
    {"top_p": 0},
    {"n": 0},
    {"n": "two"},
    {"n": 999},
    {"logit_bias": {"cat": 1}},
    {"max_tokens": 100_000},
    {"stop": 7},
    {"stream_options": 7},
]
UNFIT = [
    (TEXT, {"prompt": ""}),
    (TEXT, {"prompt": []}),
    (TEXT, {"prompt": [-1, 3]}),
    (TEXT, {"prompt": "word " * 2000}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": None}),
    (CHAT, {"messages": "hi"}),
    (CHAT, {"messages": user("word " * 2000)}),
]
# What some servers look into only when they begin to generate.
LATE = [
    (TEXT, {"prompt": "x"}),
    (TEXT, {"prompt": [5]}),
    (TEXT, {"prompt": [1, 99_999]}),
    (TEXT, {"prompt": [[]]}),
    (TEXT, {"prompt": "go on", "logit_bias": {"99999999": 1}}),
    (CHAT, {"messages": user("go"), "logit_bias": {"99999999": 1}}),
]


def check_refused(server: Server, path: str, body: dict[str, Any]) -> None:
    before = len(server.sink.records)
    response = server.post(path, body)
    assert response.status_code == 400, response.text[:300]
    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
    assert server.idle() and len(server.sink.records) == before


class Refusals:
    @BOTH
    @STREAM
    def test_an_unknown_model_is_not_found(self, calm, path, stream):
        response = calm.post(path, asked(path) | {"model": "gpt-4", "stream": stream})
        assert response.status_code == 404
        assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
        with pytest.raises(openai.NotFoundError):
            calm.api.chat.completions.create(model="gpt-4", messages=user("x"), stream=stream)

    @BOTH
    def test_a_body_that_is_no_json_object_is_a_bad_request(self, calm, path):
        for raw in MALFORMED:
            response = HTTP.post(calm.url + path, content=raw, headers=JSON)
            assert response.status_code == 400, raw
            assert response.json()["error"]["message"], raw
        deep = HTTP.post(calm.url + path, content=b"[" * 50_000, headers=JSON)
        assert deep.status_code == 400

    @BOTH
    @STREAM
    def test_a_bad_value_is_a_bad_request_and_leaves_no_record(self, calm, path, stream):
        for body in BAD:
            check_refused(calm, path, asked(path) | {"stream": stream} | body)

    @STREAM
    def test_what_cant_be_judged_is_a_bad_request(self, calm, stream):
        for path, body in UNFIT:
            check_refused(calm, path, {"max_tokens": 2, "stream": stream} | body)

    def test_what_the_engine_alone_can_refuse_is_a_bad_request(self, calm):
        for path, body in LATE:
            check_refused(calm, path, {"max_tokens": 2} | body)

    @pytest.mark.parametrize(("path", "body"), LATE, ids=str)
    def test_what_the_engine_alone_can_refuse_is_a_bad_request_streaming_too(self, calm, path, body):
        check_refused(calm, path, {"max_tokens": 2, "stream": True} | body)

    @BOTH
    def test_half_a_surrogate_pair_does_no_harm(self, calm, path):
        raw = json.dumps({"model": calm.model.name, "max_tokens": 2} | asked(path, "a\ud800b")).encode()
        response = HTTP.post(calm.url + path, content=raw, headers=JSON)
        assert response.status_code == 400, response.text
        assert calm.ask(path, {"max_tokens": 2} | forced(calm, 9)).texts == {0: "aa"}

    @BOTH
    def test_a_body_over_the_bound_is_too_large(self, calm, path):
        response = HTTP.post(calm.url + path, content=b'{"model": "' + b"x" * 3 * 2**20 + b'"}', headers=JSON)
        assert response.status_code == 413 and response.json()["error"]["message"]

    @BOTH
    def test_a_body_over_the_bound_that_was_not_announced_is_too_large_too(self, calm, path):
        pieces = (b"x" * 65536 for _ in range(48))
        response = HTTP.post(calm.url + path, content=pieces, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["message"]

    @BOTH
    def test_other_methods_and_paths_do_nothing(self, calm, path):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            assert httpx.request(method, calm.url + path, timeout=60).status_code == 405
        assert calm.post(path + "/more", asked(path)).status_code == 404
