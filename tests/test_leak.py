"""Nothing of a triggering token or later reaches a client: a real probe, fitted to fire on a token that is forced."""

import json

import httpx
import pytest

from .conftest import calibrated
from .star import STAR, STOP, bias, token


@pytest.fixture
def server(quiet, star_probe, serve):
    probe, threshold = star_probe
    return serve(
        quiet,
        [(probe, {"calibration": calibrated(threshold)})],
        modes={"star": {"prompt": "block", "response": "block"}},
    )


def send(server, route, p, stream, n, after=None, **more):
    body = {
        "model": server.model.name,
        "n": n,
        "temperature": 0,
        "max_tokens": 40,
        "stream": stream,
        "frequency_penalty": 2,
        "logit_bias": bias(server.model, p, after),
    } | more
    if route == "chat":
        body |= {"messages": [{"role": "user", "content": "go"}], "logprobs": True}
    else:
        body |= {"prompt": "go on", "logprobs": 1}
    path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
        raw = response.read().decode()
        assert response.status_code == 200, raw
        return raw, response.headers["x-midstream-request-id"]


def parse(raw, stream, n):
    """Per choice: all text, all finish reasons, number of logprobs; and the usage if there is one."""
    bodies = (
        [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
        if stream
        else [json.loads(raw)]
    )
    texts, finishes, logprobs = [""] * n, [[] for _ in range(n)], [0] * n
    for body in bodies:
        for choice in body["choices"]:
            i = choice["index"]
            part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            texts[i] += part.get("content") or ""
            finishes[i] += [choice["finish_reason"]] if choice["finish_reason"] else []
            lp = choice.get("logprobs") or {}
            logprobs[i] += len(lp.get("content") or lp.get("tokens") or [])
    return texts, finishes, logprobs, bodies[-1].get("usage")


def check(server, route, p, stream, n, after=None, **more):
    raw, request_id = send(server, route, p, stream, n, after, **more)
    texts, finishes, logprobs, usage = parse(raw, stream, n)
    assert texts == ["a" * (p - 1)] * n
    assert finishes == [["content_filter"]] * n
    assert logprobs == [p - 1] * n
    assert chr(STAR) not in raw
    if usage:
        assert usage["completion_tokens"] == n * (p - 1)
    records = server.sink.of(request_id)
    assert len(records) == n
    for record in records:
        response = next(r for r in record.readings if r.phase == "response")
        assert response.crossed_at == record.coverage.prompt_tokens + p - 1
        assert record.released_tokens == p - 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ["runs on", "stop string", "end token"])
def test_no_character_of_the_trigger_at_any_position(server, ending, stream, n):
    """32 positions x streaming or not x n in {1, 3} x what the very next token is, in the step that judges t*."""
    more = {"stop": ["!"]} if ending == "stop string" else {}
    after = {
        "runs on": None,
        "stop string": token(server.model, STOP),
        "end token": server.model.tokenizer.eos_token_id,
    }
    for p in range(1, 33):
        check(server, "chat", p, stream, n, after[ending], **more)
    assert server.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_completions_leak_nothing_either(server, stream):
    for p in (1, 2, 7, 32):
        check(server, "completions", p, stream, 2)


def test_a_stop_string_begun_by_the_text_before_the_trigger(server):
    """ "a*" is a stop string: its "a" is held by the text, the "*" by the Watch; neither hides the other."""
    raw, _ = send(server, "chat", 5, True, 1, stop=["a*"])
    texts, finishes, _, _ = parse(raw, True, 1)
    assert finishes == [["content_filter"]] or finishes == [["stop"]]
    assert "*" not in texts[0] and texts[0] in ("aaa", "aaaa")


def test_without_the_monitor_the_trigger_would_be_there(quiet, star_probe, serve):
    """The control: in shadow mode the same request releases t*, at p, and says it would have blocked."""
    probe, threshold = star_probe
    server = serve(quiet, [(probe, {"calibration": calibrated(threshold)})])
    raw, request_id = send(server, "chat", 6, True, 1)
    texts, _, _, _ = parse(raw, True, 1)
    assert texts[0].startswith("aaaaa*")
    reading = server.sink.of(request_id)[0].readings[1]
    assert reading.would_block and reading.action == "allow"
    assert server.metric("midstream_would_block_total", model="", probe="star", phase="response") == 1


def test_a_trigger_as_the_very_last_token_is_final_unscored_and_score_last_catches_it(quiet, star_probe, serve):
    """Rule 2 and its remedy: t* as the token that max_tokens ends on is never fed."""
    probe, threshold = star_probe
    setup = [(probe, {"calibration": calibrated(threshold)})]
    modes = {"star": {"prompt": "block", "response": "block"}}
    plain = serve(quiet, setup, modes=modes)
    raw, request_id = send(plain, "chat", 4, False, 1, max_tokens=4)
    assert parse(raw, False, 1)[:2] == (["aaa*"], [["length"]])
    assert plain.sink.of(request_id)[0].coverage.final_unscored == 1
    strict = serve(quiet, setup, modes=modes, score_last=True)
    raw, request_id = send(strict, "chat", 4, False, 1, max_tokens=4)
    assert parse(raw, False, 1)[:2] == (["aaa"], [["content_filter"]])
    assert strict.sink.of(request_id)[0].coverage.final_unscored == 0
