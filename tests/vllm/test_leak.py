"""Nothing of a triggering token or later reaches a client of vLLM's server, on any route that generates."""

import json

import httpx
import pytest

from ..conftest import calibrated
from ..star import STAR, STOP, bias, fit_star_probe, token
from .shared import Forced, blocking, load, routes


@pytest.fixture(scope="module")
def web(shared, quiet, tmp_path_factory):
    probe, threshold = fit_star_probe(quiet)
    published = [(probe, {"calibration": calibrated(threshold)})]
    load(shared, quiet, tmp_path_factory.mktemp("store"), published, modes=blocking("star"))
    with routes(shared) as web:
        yield web


def body(route, quiet, stream, n, **more):
    base = {"model": quiet.name, "stream": stream}
    if route == "chat/completions":
        base |= {"messages": [{"role": "user", "content": "go"}], "max_tokens": 40, "n": n, "logprobs": True}
    elif route == "completions":
        base |= {"prompt": "go on", "max_tokens": 40, "n": n, "logprobs": 1}
    elif route == "responses":
        base |= {"input": "go", "max_output_tokens": 40}
    else:
        base |= {"messages": [{"role": "user", "content": "go"}], "max_tokens": 40}
    if stream and n > 1:
        base |= {"stream_options": {"include_usage": True}}
    return base | more


def send(web, quiet, route, p, stream, n, after=None, **more):
    Forced.bias = bias(quiet, p, after)
    with httpx.stream("POST", f"{web.url}/v1/{route}", json=body(route, quiet, stream, n, **more), timeout=60) as r:
        raw = r.read().decode()
        assert r.status_code == 200, raw
        return raw, r.headers["x-midstream-request-id"]


def events(raw):
    return [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]


def parse(route, raw, stream, n):
    """Per choice the text and every finish reason, as this route spells it."""
    if route in ("chat/completions", "completions"):
        texts, finishes = [""] * n, [[] for _ in range(n)]
        for part in events(raw) if stream else [json.loads(raw)]:
            for choice in part["choices"]:
                holder = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
                texts[choice["index"]] += holder.get("content") or ""
                finishes[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
        return texts, finishes
    if route == "responses":
        found = events(raw)[-1] if stream else {"type": "response.incomplete", "response": json.loads(raw)}
        assert found["type"] == "response.incomplete"
        whole = found["response"]
        text = "".join(c["text"] for item in whole["output"] for c in item.get("content") or ())
        if stream:
            assert text == "".join(e["delta"] for e in events(raw) if e["type"] == "response.output_text.delta")
        return [text], [[whole["status"], whole["incomplete_details"]["reason"]]]
    if stream:
        found = events(raw)
        text = "".join(e["delta"]["text"] for e in found if e["type"] == "content_block_delta")
        (ending,) = [e["delta"] for e in found if e["type"] == "message_delta"]
        assert found[-1]["type"] == "message_stop"
    else:
        ending = json.loads(raw)
        text = "".join(block["text"] for block in ending["content"])
    return [text], [[ending["stop_reason"], ending["stop_sequence"]]]


FILTERED = {
    "chat/completions": ["content_filter"],
    "completions": ["content_filter"],
    "responses": ["incomplete", "content_filter"],
    "messages": ["refusal", None],
}
CASES = [("chat/completions", 1), ("chat/completions", 3), ("completions", 1), ("completions", 3)]
CASES += [("responses", 1), ("messages", 1)]
# 512 requests in all with every position; these have the ends, and one position past each power of two.
POSITIONS = pytest.mark.parametrize(
    "positions",
    [
        pytest.param((1, 2, 3, 9, 17, 32), id="sample"),
        pytest.param(range(1, 33), id="all", marks=pytest.mark.attack),
    ],
)


def check(web, quiet, route, p, stream, n, after=None, **more):
    raw, request_id = send(web, quiet, route, p, stream, n, after, **more)
    texts, finishes = parse(route, raw, stream, n)
    assert texts == ["a" * (p - 1)] * n
    assert finishes == [FILTERED[route]] * n
    assert chr(STAR) not in raw
    records = web.sink.of(request_id)
    assert [r.index for r in records] == list(range(n))
    for record in records:
        response = next(r for r in record.readings if r.phase == "response")
        assert response.crossed_at == record.coverage.prompt_tokens + p - 1
        assert (record.released_tokens, record.finish, record.coverage.unmonitored) == (p - 1, "content_filter", 0)


@POSITIONS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "n"), CASES)
def test_no_character_of_the_trigger_on_any_route(web, quiet, route, n, stream, positions):
    for p in positions:
        check(web, quiet, route, p, stream, n)
    assert web.idle()


@POSITIONS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ["stop string", "end token"])
def test_the_step_that_ends_the_answer_is_judged_first(web, quiet, ending, stream, positions):
    after = token(quiet, STOP) if ending == "stop string" else quiet.tokenizer.eos_token_id
    more = {"stop": ["!"]} if ending == "stop string" else {}
    for p in positions:
        check(web, quiet, "chat/completions", p, stream, 3, after, **more)
    assert web.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_a_list_of_prompts(web, quiet, stream):
    """Each choice of each prompt ends alone, at its own index. No logprobs: vLLM can't echo them for n > 1."""
    for p in (1, 4):
        raw, request_id = send(
            web, quiet, "completions", p, stream, 2, prompt=["go on", "go on"], echo=True, logprobs=None
        )
        texts, finishes = parse("completions", raw, stream, 4)
        assert {t.removeprefix("go on") for t in texts} == {"a" * (p - 1)}
        assert finishes == [["content_filter"]] * 4 and chr(STAR) not in raw
        assert [r.index for r in web.sink.of(request_id)] == [0, 1, 2, 3]


def test_a_batch_of_conversations(web, quiet):
    conversation = [{"role": "user", "content": "go"}]
    raw, _ = send(
        web, quiet, "chat/completions/batch", 3, False, 2, messages=[conversation, conversation], max_tokens=9
    )
    texts, finishes = parse("chat/completions", raw, False, 2)
    assert texts == ["aa", "aa"] and finishes == [["content_filter"]] * 2


def test_the_control_without_the_trigger_everything_is_released(web, quiet):
    """p beyond max_tokens: the same request, nothing fires."""
    raw, request_id = send(web, quiet, "chat/completions", 60, True, 1)
    assert parse("chat/completions", raw, True, 1) == (["a" * 40], [["length"]])
    assert web.sink.of(request_id)[0].verdict == "allow"


def test_a_trigger_as_the_very_last_token_is_final_unscored(web, quiet):
    raw, request_id = send(web, quiet, "chat/completions", 4, False, 1, max_tokens=4)
    assert parse("chat/completions", raw, False, 1) == (["aaa*"], [["length"]])
    assert web.sink.of(request_id)[0].coverage.final_unscored == 1
