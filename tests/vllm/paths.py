"""Paths of vLLM's server, those that there are and those that there are not: none gives an unjudged answer."""

import json

import httpx
import pytest
from starlette.routing import Mount, Route

from monitor.api.vllm.gate import Gate
from monitor.api.vllm.serve import _HARMLESS
from monitor.api.vllm.wires import WIRES

from .forcing import CHAT, USER, record, say, works

ELSEWHERE = [
    "/invocations",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/generative_scoring",
    "/cohere/v2/chat",
    "/v2/chat",
    "/v1/embeddings",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/load_lora_adapter",
    "/update_weights",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/sleep",
    "/pause",
    "/start_profile",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1/%63hat/completions",
    "/v1/chat%2fcompletions",
    "/v1/chat/completions/",
    "/v1/completions/",
    "/V1/chat/completions",
    "/v1/chat/completions;x",
    "/v1/chat/completions?x=1",
    "/v1/./chat/completions",
    "/x/../v1/chat/completions",
    "/v1/responses/",
    "/v1/responses/resp_1/cancel",
    "/v1/messages/",
    "/v1/messages/batches",
]


JUDGED_ONLY = ("/v1/moderations", "/beta/litellm_basic_guardrail_api")


class Routes:
    def test_every_route_is_harmless_or_gated_or_ours(self, web):
        for route in web.app.routes:
            if route.path in WIRES:
                assert isinstance(route, Route) and isinstance(route.app, Gate), route.path
            else:
                assert route.path in {*_HARMLESS, "/ready", *JUDGED_ONLY}, route.path
        gated = {route.path for route in web.app.routes if route.path in WIRES}
        assert gated == set(WIRES)
        assert [r.path for r in web.app.routes if isinstance(r, Mount)] == ["/metrics"]

    @pytest.mark.parametrize("path", ELSEWHERE)
    def test_no_path_gives_an_unjudged_answer(self, web, path):
        say(web.model, "aaaaaaaa")
        everything = {
            "messages": USER,
            "prompt": "go on",
            "input": "go",
            "text": "go",
            "message": "go",
            "max_tokens": 8,
        }
        everything |= {"token_ids": [70, 71], "sampling_params": {"max_tokens": 8}, "method": "x", "query": "a"}
        raw = json.dumps(everything | {"model": web.model.name}).encode()
        for method in ("POST", "GET", "PUT"):
            response = ask_raw(web, method, path, raw)
            if response.status_code == 200:
                assert record(web, response).coverage.unmonitored == 0, path
            else:
                assert response.status_code in (307, 400, 404, 405), (path, response.text)
                assert "aaaa" not in response.text

    def test_other_methods_do_not_generate(self, web):
        for path in WIRES:
            for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD"):
                assert ask_raw(web, method, path, b"{}").status_code == 405

    def test_other_content_types_are_refused_or_judged(self, web):
        raw = json.dumps({"model": web.model.name, "messages": USER, "max_tokens": 3}).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""):
            response = httpx.post(web.url + CHAT, content=raw, headers={"Content-Type": kind}, timeout=60)
            assert response.status_code in (400, 415) or record(web, response).coverage.unmonitored == 0

    def test_a_repeated_key_is_read_once_and_the_same_by_all(self, web):
        """The gate and vLLM both take the last one."""
        say(web.model, "aaaa")
        model = json.dumps(web.model.name)
        for first, last, status in (("false", "true", 400), ("true", "false", 200)):
            raw = f'{{"model": {model}, "messages": [{{"role": "user", "content": "go"}}], "max_tokens": 3, '
            raw += f'"use_beam_search": {first}, "use_beam_search": {last}}}'
            headers = {"Content-Type": "application/json"}
            response = httpx.post(web.url + CHAT, content=raw.encode(), headers=headers, timeout=60)
            assert response.status_code == status
        assert works(web)


def ask_raw(web, method, path, content):
    """As it is written: httpx would tidy the path."""
    target = httpx.URL(web.url).copy_with(raw_path=path.encode())
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=60) as client:
        return client.request(method, target, content=content, headers=headers)
