"""LiteLLM's Generic Guardrail API: requests as its client sends them, over a real socket, planted values behind it."""

import json
import math

import httpx
import pytest

from monitor.api.guardrail import guardrail_routes
from monitor.types import Mode

from .doors import ID, MODEL, FakeScorer, door, judging, listening, turns

PATH = "/beta/litellm_basic_guardrail_api"
MODES = {"harmful-intent": Mode.BLOCK, "weapons": Mode.FLAG, "fraud": Mode.SHADOW}
PLANTED = {
    "bomb": {"harmful-intent": 3.0, "weapons": 2.0},
    "gun": {"weapons": 1.5},
    "scam": {"fraud": 2.5},
    "broken": {"harmful-intent": math.nan},
}
SENT = {
    "request_data": {"user_api_key_alias": "someone", "user_api_key_team_id": None},
    "request_headers": {"host": "gateway", "authorization": "[present]"},
    "litellm_version": "1.90.0",
    "litellm_call_id": "call-1",
    "litellm_trace_id": None,
    "additional_provider_specific_params": {"threshold": 99, "modes": {"harmful-intent": "shadow"}},
    "images": None,
    "tools": None,
    "tool_calls": None,
    "model": "gpt-4o",
}


def user(text):
    return {"role": "user", "content": text}


def said(text, *calls):
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def call(arguments):
    return {"id": "c1", "type": "function", "function": {"name": "run", "arguments": arguments}}


@pytest.fixture(scope="module")
def made():
    scorer = FakeScorer(PLANTED, MODES)
    with listening(door(guardrail_routes(judging(scorer, max_prompts=4)))) as url, httpx.Client(base_url=url) as client:
        yield scorer, client


@pytest.fixture
def scorer(made):
    made[0].reset()
    return made[0]


@pytest.fixture
def post(made, scorer):
    headers = {"content-type": "application/json", "x-api-key": "k"}
    return lambda **fields: made[1].post(PATH, content=json.dumps(SENT | fields), headers=headers)


@pytest.fixture
def ask(post):
    def asked(**fields):
        answer = post(**fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["midstream"]["request_id"] == ID
        return answer.json()

    return asked


def test_an_allowed_conversation(ask, scorer):
    messages = [{"role": "developer", "content": "be brief"}, user("hi"), said("hello"), user("how are you?")]
    answer = ask(input_type="request", texts=[m["content"] for m in messages], structured_messages=messages)
    assert answer["action"] == "NONE" and "blocked_reason" not in answer and "texts" not in answer
    assert answer["midstream"] | {"request_id": ""} == {
        "request_id": "",
        "judged_as": "conversation",
        "findings": [],
        "not_judged": {},
    }
    ((identity, prompt, answered, caller),) = scorer.calls
    assert (identity, answered) == (ID, "")
    assert turns(prompt) == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "how are you?"),
    ]
    assert (caller.key, caller.route, caller.model) == ("tenant-1", "guardrail", MODEL)


def test_a_blocked_request(ask):
    answer = ask(input_type="request", texts=["a bomb"], structured_messages=[user("a bomb")])
    assert answer["action"] == "BLOCKED"
    assert answer["blocked_reason"] == "The prompt was blocked by the safety monitor (harmful-intent)."
    assert answer["midstream"]["findings"] == [
        {"probe": "harmful-intent", "phase": "prompt", "action": "block"},
        {"probe": "weapons", "phase": "prompt", "action": "flag"},
    ]


@pytest.mark.parametrize(("text", "findings"), [("gun", ["weapons"]), ("scam", []), ("hello", [])])
def test_only_a_blocking_probe_blocks_and_a_flag_is_reported(ask, text, findings):
    for fields in ({"input_type": "request"}, {"input_type": "response"}):
        answer = ask(texts=[text], **fields)
        assert answer["action"] == "NONE"
        assert [f["probe"] for f in answer["midstream"]["findings"]] == findings
        assert "1.5" not in str(answer), "values stay here"


def test_without_messages_each_text_is_a_users_turn(ask, scorer):
    answer = ask(input_type="request", texts=["one", "bomb", "one"])
    assert (answer["action"], answer["midstream"]["judged_as"]) == ("BLOCKED", "texts")
    assert sorted(str(turns(c[1])) for c in scorer.calls) == ["[('user', 'bomb')]", "[('user', 'one')]"]


def test_a_text_that_the_messages_lack_is_judged_too(ask, scorer):
    answer = ask(input_type="request", texts=["hi", "bomb"], structured_messages=[user("hi")])
    assert answer["action"] == "BLOCKED" and len(scorer.calls) == 2


def test_parts_tool_results_and_tool_calls_are_read(ask, scorer):
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, image, {"type": "text", "text": "here"}]},
        said(None, call('{"q": "x"}')),
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "tool_result", "content": "found"}]},
        said("", {"type": "custom", "custom": {"input": "y"}}),
        user("and now?"),
    ]
    fields = {"texts": ["look", "here", "found", "and now?"], "images": ["data:,"], "tools": [{"type": "function"}]}
    answer = ask(input_type="request", structured_messages=messages, tool_calls=[call('{"q": "x"}')], **fields)
    assert answer["midstream"]["not_judged"] == {"images": 1, "parts": 1, "tools": 1}
    assert answer["midstream"]["judged_as"] == "conversation"
    ((_, prompt, _, _),) = scorer.calls
    assert [role for role, _ in turns(prompt)] == ["user", "assistant", "user", "assistant", "user"]
    assert [text for _, text in turns(prompt)][:3] == ["look\nhere", '{"q": "x"}', "found"]
    assert '"input": "y"' in turns(prompt)[3][1]


@pytest.mark.parametrize("kind", ["request", "response"])
def test_the_arguments_of_a_tool_call_are_judged(ask, kind):
    answer = ask(input_type=kind, texts=[], tool_calls=[call('{"q": "bomb"}')])
    assert answer["action"] == "BLOCKED"
    where = {"request": "prompt", "response": "response"}[kind]
    assert {f["phase"] for f in answer["midstream"]["findings"]} == {where}


def test_messages_without_text_do_not_hide_the_texts(ask, scorer):
    """LiteLLM's A2A route sends a message of another shape."""
    strange = [{"role": "user", "parts": [{"kind": "text", "text": "bomb"}]}]
    answer = ask(input_type="request", texts=["bomb"], structured_messages=strange)
    assert (answer["action"], answer["midstream"]["judged_as"], len(scorer.calls)) == ("BLOCKED", "texts", 1)


def test_a_conversation_that_does_not_fit_is_judged_text_by_text(ask, scorer):
    messages = [user("x" * 300), said("y" * 300), user("a bomb")]
    answer = ask(input_type="request", texts=["x" * 300, "a bomb"], structured_messages=messages)
    assert (answer["action"], answer["midstream"]["judged_as"]) == ("BLOCKED", "texts")


def test_a_blocked_response(ask, scorer):
    answer = ask(input_type="response", texts=["a fine start", "take a bomb"])
    assert answer["blocked_reason"] == "The answer was blocked by the safety monitor (harmful-intent)."
    assert {f["phase"] for f in answer["midstream"]["findings"]} == {"response"}
    assert answer["midstream"]["judged_as"] == "answers without their prompt"
    assert sorted(c[2] for c in scorer.calls) == ["a fine start", "take a bomb"]
    assert {str(turns(c[1])) for c in scorer.calls} == {"[('user', '')]"}


def test_a_response_is_judged_after_its_conversation(ask, scorer):
    answer = ask(input_type="response", texts=["fine", ""], structured_messages=[user("hi")])
    assert (answer["action"], answer["midstream"]["judged_as"]) == ("NONE", "answers")
    ((_, prompt, answered, _),) = scorer.calls
    assert (turns(prompt), answered) == ([("user", "hi")], "fine")


def test_a_response_after_a_conversation_that_does_not_fit(ask, scorer):
    answer = ask(input_type="response", texts=["bomb"], structured_messages=[user("x" * 500)])
    assert (answer["action"], answer["midstream"]["judged_as"]) == ("BLOCKED", "answers without their prompt")


@pytest.mark.parametrize("kind", ["request", "response"])
def test_nothing_to_judge(ask, scorer, kind):
    answer = ask(input_type=kind, texts=None, images=["data:,"])
    assert answer["action"] == "NONE" and answer["midstream"]["not_judged"] == {"images": 1}
    assert scorer.calls == []


class TestFailure:
    """What LiteLLM's own fail mode decides about is 503; what is nobody's outage is 400."""

    @pytest.mark.parametrize("kind", ["request", "response"])
    def test_a_missing_score_that_fails_closed(self, post, kind):
        answer = post(input_type=kind, texts=["hello", "broken"])
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and "action" not in answer.json()

    def test_a_missing_score_that_fails_open_is_reported(self, ask, scorer):
        scorer.fail_mode = "open"
        answer = ask(input_type="request", texts=["broken"])
        assert answer["action"] == "NONE"
        assert [(f["probe"], f["action"]) for f in answer["midstream"]["findings"]] == [
            ("harmful-intent", "unmonitored")
        ]

    def test_a_block_beside_a_missing_score(self, ask):
        assert ask(input_type="request", texts=["bomb", "broken"])["action"] == "BLOCKED"

    def test_a_full_queue(self, post, scorer):
        scorer.full = True
        assert post(input_type="request", texts=["hello"]).status_code == 503

    @pytest.mark.parametrize(
        "fields",
        [
            {"input_type": "request", "texts": [str(i) for i in range(5)]},
            {"input_type": "response", "texts": [str(i) for i in range(5)]},
            {"input_type": "request", "texts": ["x" * 500]},
            {"input_type": "response", "texts": ["x" * 500]},
            {"input_type": "other", "texts": ["x"]},
            {"texts": ["x"]},
            {"input_type": "request", "texts": "x"},
            {"input_type": "request", "structured_messages": ["x"]},
            {"input_type": "request", "tool_calls": "x"},
        ],
    )
    def test_a_bad_request(self, post, fields):
        answer = post(**fields)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize("message", [{}, {"content": 7}, {"role": 7, "content": {"text": {"a": 1}}}])
    @pytest.mark.parametrize("calls", [7, "x", [None], {"function": 3}])
    def test_messages_of_any_shape_are_read_or_refused(self, ask, message, calls):
        """Newer gateways send what nobody knows yet; nothing of it may be a 500."""
        strange = [user("hi"), message | {"role": "assistant", "tool_calls": calls, "function_call": calls}]
        assert ask(input_type="request", structured_messages=strange)["action"] == "NONE"

    def test_half_a_surrogate_pair(self, post):
        half = "\ud800"
        for fields in ({"texts": [half]}, {"structured_messages": [user(half)]}, {"tool_calls": [call(half)]}):
            assert post(input_type="request", **fields).status_code == 400


def test_a_model_name_chooses_nothing(ask, scorer):
    ask(input_type="request", texts=["x"], model="tiny")
    assert scorer.calls[0][3].model == MODEL
