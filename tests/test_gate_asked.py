"""The gate and what may be asked: refused fields and values, bounds, odd bodies, and the call made of them."""

import asyncio
import json

import pytest

from monitor.api.errors import ApiError
from monitor.api.vllm import admit
from monitor.api.vllm.gate import Gate
from monitor.api.vllm.wires import WIRES
from monitor.config import load_settings
from monitor.metrics import Metrics

from .gated import (
    BATCH,
    CHAT,
    MESSAGES,
    RESPONSES,
    TEXT,
    Answer,
    Inner,
    ask,
    call_of,
    chunk,
    part,
    said,
    stream,
    user,
    whole,
)


def refused(model, body, path=CHAT, **bounds):
    inner = Inner(*whole({}))
    answer = Answer(ask(model, inner, body, path, **bounds))
    assert (answer.status, inner.call) == (400, None), "vLLM is not asked"
    assert answer.headers[b"content-type"] == b"application/json"
    return answer.json["error"]


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize("field", admit._REFUSED)
def test_each_refused_field_is_a_400(tiny, path, field):
    for value in ({"a": 1}, "x", {}, "", 0, False):
        error = refused(tiny, {"messages": [user()], field: value}, path)
        assert field in error["message"] and error["message"].endswith("remove it")
    assert call_of(tiny, {"messages": [user()], field: None}, path)


@pytest.mark.parametrize("field", admit._FIXED)
def test_each_refused_value_is_a_400_and_its_opposite_is_not(tiny, field):
    fixed, _ = admit._FIXED[field]
    for other in (not fixed, int(fixed), float(not fixed), [], {}):
        error = refused(tiny, {"messages": [user()], field: other})
        assert error["param"] == field and error["code"] == "unsupported_field"
    for same in (fixed, None):
        assert call_of(tiny, {"messages": [user()], field: same})


@pytest.mark.parametrize("field", admit._SWITCHES)
def test_what_switches_reasoning_in_a_template_is_refused_where_the_template_has_switches(field):
    body = {"messages": [user()], field: {"type": "disabled"}}
    assert admit.admit(CHAT, body, load_settings(), switches=False) == (1, 1)
    with pytest.raises(ApiError) as refusal:
        admit.admit(CHAT, body, load_settings(), switches=True)
    assert refusal.value.error["param"] == field


def test_the_templates_closing_tokens_cant_be_cut_off(tiny):
    for side in ("right", "RIGHT", 1, [], {}):
        for path in (CHAT, RESPONSES, MESSAGES):
            assert "truncation_side" in refused(tiny, {"messages": [user()], "truncation_side": side}, path)["message"]
        assert call_of(tiny, {"prompt": "a", "truncation_side": side}, TEXT), "it has no template"
    for side in ("left", None):
        assert call_of(tiny, {"messages": [user()], "truncation_side": side})


def test_completions_may_choose_their_special_tokens(tiny):
    assert call_of(tiny, {"prompt": "a", "add_special_tokens": True}, TEXT)


@pytest.mark.parametrize("field", admit._FIXED)
@pytest.mark.parametrize("spelling", [("true", "false"), ("YES", "NO"), ("on", "off"), ("1", "0"), ("t", "f")])
def test_a_refused_value_cannot_be_spelt_as_a_string(tiny, field, spelling):
    fixed, _ = admit._FIXED[field]
    refused(tiny, {"messages": [user()], field: spelling[1] if fixed else spelling[0]})


@pytest.mark.parametrize("status", ["in_progress", "incomplete"])
def test_a_response_cannot_continue_its_final_message_by_a_status(tiny, status):
    last = {"type": "message", "role": "assistant", "status": status, "content": [{"type": "output_text", "text": "x"}]}
    refused(tiny, {"input": [user(), last]}, RESPONSES)


def test_refusals_on_anthropics_route_have_its_shape(tiny):
    error = refused(tiny, {"messages": [user()], "chat_template": "x"}, MESSAGES)
    assert error["type"] == "invalid_request_error" and "chat_template" in error["message"]


def test_bounds_on_choices_and_prompts(tiny):
    bounds = {"max_n": 3, "max_prompts": 2}
    assert refused(tiny, {"messages": [user()], "n": 4}, **bounds)["param"] == "n"
    assert call_of(tiny, {"messages": [user()], "n": 3}, **bounds).n == 3
    assert "3 prompts" in refused(tiny, {"prompt": ["a", "b", "c"]}, TEXT, **bounds)["message"]
    assert "3 prompts" in refused(tiny, {"messages": [[user()]] * 3}, BATCH, **bounds)["message"]
    assert refused(tiny, {"messages": [user()], "n": 10**400}, **bounds)["param"] == "n"


@pytest.mark.parametrize("n", ["99", 99.0, " 99 ", "3", 3.0, True, 0, -2, [3], float("nan")])
def test_choices_are_whole_numbers_and_nothing_that_vllm_would_read_as_one(tiny, n):
    for path in (CHAT, TEXT):
        assert refused(tiny, {"messages": [user()], "n": n}, path)["param"] == "n"


@pytest.mark.parametrize(
    ("path", "body", "n", "expected"),
    [
        (CHAT, {"messages": [user()]}, 1, 1),
        (CHAT, {"messages": [user()], "n": 3}, 3, 3),
        (CHAT, {"messages": [user()], "n": None}, 1, 1),
        (TEXT, {"prompt": "a", "n": 2}, 2, 2),
        (TEXT, {"prompt": ["a"]}, 1, 1),
        (TEXT, {"prompt": ["a", "b", "c"], "n": 2}, 2, 6),
        (TEXT, {"prompt": [1, 2, 3], "n": 2}, 2, 2),
        (TEXT, {"prompt": [[1, 2], [3]], "n": 2}, 2, 4),
        (TEXT, {"prompt": [], "n": 2}, 2, 2),
        (TEXT, {}, 1, 1),
        (BATCH, {"messages": [[user()], [user("b"), said("c"), user("d")]]}, 1, 2),
        (RESPONSES, {"input": "hi"}, 1, 1),
        (MESSAGES, {"messages": [user()]}, 1, 1),
    ],
)
def test_expected_sequences(tiny, path, body, n, expected):
    call = call_of(tiny, body, path)
    assert (call.n, call.expected) == (n, expected)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES, {"messages": [user()], "n": 3}),
        (RESPONSES, {"input": "hi", "n": 3}),
        (CHAT, {"messages": [user()], "prompt": ["a", "b"]}),
        (TEXT, {"prompt": "a", "messages": [[user()], [user()]]}),
    ],
)
def test_fields_that_the_route_does_not_read_are_not_counted(tiny, path, body):
    assert call_of(tiny, body, path).expected == 1


@pytest.mark.parametrize(
    ("path", "route", "form"),
    [
        (CHAT, "chat", "chat"),
        (BATCH, "chat-batch", "chat"),
        (TEXT, "completions", "raw"),
        (RESPONSES, "responses", "chat"),
        (MESSAGES, "messages", "chat"),
    ],
)
def test_the_call_knows_its_route_and_format(tiny, path, route, form):
    call = call_of(tiny, {"messages": [user()]}, path)
    assert (call.route, call.format) == (route, form)


@pytest.mark.parametrize("given", [[1.0, 2.0], ["1", 2], [None], [True], [{}]])
def test_a_prompt_that_vllm_would_read_otherwise_than_we_count_it_is_refused(tiny, given):
    assert refused(tiny, {"prompt": given}, TEXT)["param"] == "prompt"


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"\xff\xfe",
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 400,
    ],
    ids=lambda raw: raw[:8],
)
def test_what_is_no_json_object_is_for_vllm_to_refuse(tiny, path, raw):
    error = {"error": {"message": "no JSON"}}
    inner = Inner(*whole(error, 400))
    answer = Answer(ask(tiny, inner, raw, path))
    assert inner.body == raw and (answer.status, answer.json) == (400, error)


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000], ids=["lists", "objects"])
def test_json_that_is_nested_too_deeply_is_for_vllm_to_refuse(tiny, raw):
    call_of(tiny, raw)


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "hi"},
        {"messages": []},
        {"messages": {"role": "assistant"}},
        {"messages": [None, 1, "x", []]},
        {"messages": [[], [None]]},
        {"messages": [{"role": ["assistant"], "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [user(), said(None), user()]},
        {"messages": [user(), said([]), user()]},
        {"messages": [user(), said([None]), user()]},
        {"messages": [user(), said([{"type": "text", "text": None}]), user()]},
        {"messages": [user(), said({"text": "x"}), user()]},
        {"messages": [user(), said("x"), {"role": "wizard", "content": "x"}]},
        {"messages": [said("x"), user()]},
        {"input": 5},
        {"input": [{"type": "function_call_output", "output": "x"}]},
        {"prompt": {"a": 1}},
    ],
    ids=json.dumps,
)
def test_odd_bodies_reach_vllm(tiny, path, body):
    call_of(tiny, body, path)


@pytest.mark.parametrize("field", ["system", "instructions"])
@pytest.mark.parametrize("value", [5, True, {"a": 1}, [None], [{"type": "image"}]], ids=json.dumps)
def test_odd_leading_texts_reach_vllm(tiny, field, value):
    call_of(tiny, {"messages": [user()], field: value})


def test_a_lone_surrogate_in_the_history_reaches_vllm(tiny):
    call_of(tiny, {"messages": [user("\ud800"), said("x"), user()]})


def test_a_body_in_pieces_arrives_whole_and_then_the_client_is_heard(tiny):
    heard = []

    async def inner(scope, receive, send):
        heard.extend([await receive(), await receive()])

    raw = json.dumps({"messages": [user()], "n": 2}).encode()
    ask(tiny, inner, raw, chunks=[raw[:7], raw[7:]], out=[])
    assert heard == [{"type": "http.request", "body": raw, "more_body": False}, {"type": "http.disconnect"}]


@pytest.mark.parametrize("first", [[], [{"type": "http.request", "body": b'{"mess', "more_body": True}]])
def test_a_client_that_leaves_before_it_has_asked_is_not_served(tiny, first):
    incoming, inner, sent = [*first, {"type": "http.disconnect"}], Inner(*whole({})), []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Gate(inner, CHAT, tiny.template, load_settings(), Metrics())({"type": "http"}, receive, send))
    assert inner.call is None and sent == []


def test_an_error_of_the_route_is_not_swallowed_and_leaves_no_call_behind(tiny):
    def broken(inner):
        raise RuntimeError("a bug")

    inner = Inner(stream(), part(chunk()), broken)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(tiny, inner, {"messages": [user()]})
    assert inner.out == []
