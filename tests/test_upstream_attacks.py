"""T5 and T6 in front of an upstream that takes whatever it is sent: nothing unjudged goes to it, or comes back."""

import json

import pytest

from .fake_observer import proxying
from .fake_upstream import DONE, FakeUpstream, chat_stream, chat_whole, head, json_answer, text_chunk
from .test_upstream_routes import responds, response_of, said

pytest.register_assert_rewrite("tests.siege")

from .attacks import ATTEMPTS, ELSEWHERE, UPGRADES, Attempt  # noqa: E402
from .contract import JSON  # noqa: E402
from .siege import is_block, send  # noqa: E402

OURS = {("POST", "/v1/embeddings")}  # of the paths that other engines do not have
HARMFUL = {
    "chat/completions": {"messages": [{"role": "user", "content": "aaa*aa"}]},
    "completions": {"prompt": "go onaa*"},
    "responses": {"input": "aaa*aa"},
}
HARMLESS = {
    "chat/completions": {"messages": [{"role": "user", "content": "go"}]},
    "completions": {"prompt": "go on"},
    "responses": {"input": "go"},
}


def says(asked):
    """A harmful answer, as its route gives it."""
    text, stream = "aa*aaa", asked.json.get("stream")
    if "responses" in asked.path:
        return [head(), *responds(text)] if stream else json_answer(response_of(said(text)))
    if "chat" in asked.path:
        return [head(), *chat_stream(text)] if stream else json_answer(chat_whole(text))
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    whole = {"id": "c", "object": "text_completion", "created": 7, "model": "far", "choices": [choice]}
    chunks = [*(text_chunk(c) for c in text), text_chunk("", finish="stop"), DONE]
    return [head(), *chunks] if stream else json_answer(whole)


@pytest.fixture(scope="module")
def upstream():
    fake = FakeUpstream()
    fake.answer = says
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url) as server:
        yield server


def ask(proxy, attempt, route, body):
    raw = json.dumps({"model": "far"} | body | attempt.fields).encode()
    return send(proxy, "POST", attempt.target(f"/v1/{route}"), attempt.rewrite(raw), JSON | attempt.headers)


@pytest.mark.parametrize("route", HARMFUL)
def test_no_client_switches_the_monitor_off(upstream, proxy, route):
    assert len(ATTEMPTS) >= 40
    refused = 0
    for attempt in [Attempt("plain"), *ATTEMPTS]:
        asked = len(upstream.asked)
        response = ask(proxy, attempt, route, HARMFUL[route])
        assert 400 <= response.status_code < 500, (attempt.name, response.text)
        assert len(upstream.asked) == asked, f"{attempt.name}: nothing of a blocked prompt goes on"
        refused += not is_block(response)
        response = ask(proxy, attempt, route, HARMLESS[route])
        assert "*" not in response.text.replace("be*kind", ""), attempt.name  # instructions, which are the client's own
        if response.status_code != 200:
            assert 400 <= response.status_code < 500 and len(upstream.asked) == asked, (attempt.name, response.text)
            refused += 1
            continue
        (record,) = proxy.records(response)
        assert (record.verdict, record.finish, record.released_tokens) == ("block", "content_filter", 2), attempt.name
        assert record.coverage.unmonitored == 0 and "content_filter" in response.text
    assert is_block(ask(proxy, Attempt("plain"), route, HARMFUL[route])) and proxy.idle()
    print(f"T6 {route}, in front of an upstream: {len(ATTEMPTS)} attempts, {refused} requests refused, 0 unwatched")


def test_every_other_path_leads_nowhere(upstream, proxy):
    asked, records, elsewhere = len(upstream.asked), len(proxy.sink.records), set(ELSEWHERE) - OURS
    raw = json.dumps({"model": "far", "text": "go"} | HARMLESS["chat/completions"] | HARMLESS["completions"]).encode()
    assert len(elsewhere) >= 60
    for method, path in elsewhere:
        response = send(proxy, method, path, raw, JSON)
        # 307: the spelling without the last slash; an answer is asked for there, if at all.
        assert 400 <= response.status_code < 500 or response.status_code == 307, (method, path, response.text)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/realtime", "/"):
        assert 400 <= send(proxy, "GET", path, b"", UPGRADES).status_code < 500, path
    assert (len(upstream.asked), len(proxy.sink.records)) == (asked, records)
    print(f"T5, in front of an upstream: {len(elsewhere)} other paths, 5 upgrades, nothing went on")


@pytest.mark.parametrize("model", ["\x1b]52;c;aGk=\x07", "far\u202e", "far\nfar", "a" * 200 + "\x9b2J"])
def test_a_models_name_that_a_terminal_would_act_on_goes_nowhere(upstream, proxy, model):
    """The client chooses it, and `midstream show` prints it."""
    asked, records = len(upstream.asked), len(proxy.sink.records)
    for route, body in (HARMLESS | {"embeddings": {"input": "go"}}).items():
        response = proxy.post(f"/{route}", body | {"model": model})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model"), route
    assert (len(upstream.asked), len(proxy.sink.records)) == (asked, records)
