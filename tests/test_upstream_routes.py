"""The proxy's other routes: completions, responses and embeddings."""

import json

import openai
import pytest

from monitor.policy.file import load_policy
from monitor.types import Action, Terms

from .fake_observer import HTTP, Reply, proxying
from .fake_upstream import DONE, HANG, event, head, json_answer, text_chunk

STREAM = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url) as server:
        yield server


@pytest.fixture
def api(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


# --- completions ---


def completes(upstream, *texts, finish="stop"):
    choices = [{"index": i, "text": t, "logprobs": None, "finish_reason": finish} for i, t in enumerate(texts)]
    whole = {"id": "cmpl-up", "object": "text_completion", "created": 7, "model": "far", "choices": choices}
    chunks = [text_chunk(c, i) for i, t in enumerate(texts) for c in t]
    chunks += [text_chunk("", i, finish) for i in range(len(texts))]
    upstream.answer = lambda asked: [head(), *chunks, DONE] if asked.json.get("stream") else json_answer(whole)
    return json.dumps(whole).encode(), b"".join([*chunks, DONE])


@STREAM
def test_completions_pass_unchanged_and_leak_nothing(upstream, proxy, stream):
    raws = completes(upstream, "it was so", finish="length")
    response = proxy.post("/completions", {"prompt": "once", "stream": stream})
    assert response.content == raws[stream] and upstream.asked[-1].path == "/v1/completions"
    (record,) = proxy.records(response)
    assert (record.format, record.route, record.finish) == ("raw", "completions", "length")
    for p in (1, 2, 7, 32):
        completes(upstream, "a" * (p - 1) + "*bbb")
        reply = Reply(proxy.post("/completions", {"prompt": "once", "stream": stream}))
        assert (reply.texts, reply.finishes) == ({0: "a" * (p - 1)}, {0: ["content_filter"]})
        assert "*" not in reply.raw and reply.done is stream
    assert proxy.idle()


@STREAM
def test_every_prompt_of_a_list_and_every_choice_is_judged(upstream, proxy, stream):
    completes(upstream, "aa", "b*b", "cc", "*")
    response = proxy.post("/completions", {"prompt": ["one", "two"], "n": 2, "stream": stream})
    reply = Reply(response)
    assert reply.texts == {0: "aa", 1: "b", 2: "cc", 3: ""}
    assert [r.finish for r in proxy.records(response, 4)] == ["stop", "content_filter"] * 2
    asked = len(upstream.asked)
    error = proxy.post("/completions", {"prompt": ["one", "t*o"], "n": 2, "stream": stream}).json()["error"]
    assert error["innererror"]["prompt_index"] == 1 and len(upstream.asked) == asked


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], "", [], None, 7, ["a", 7], "x\ud800y"], ids=str)
def test_a_prompt_that_cant_be_read_does_not_go_on(upstream, proxy, prompt):
    asked = len(upstream.asked)
    raw = json.dumps({"model": "far", "prompt": prompt}).encode()
    assert proxy.post("/completions", raw).status_code == 400 and len(upstream.asked) == asked


def test_a_suffix_is_judged_with_its_prompt(upstream, proxy):
    response = proxy.post("/completions", {"prompt": "once", "suffix": "b*d"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "content_filter"


# --- responses ---

MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
CALL = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "look"}


def said(text):
    return MESSAGE | {"content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]}


def response_of(*output, status="completed", **more):
    own = {"id": "resp_up", "object": "response", "created_at": 7.0, "model": "far", "status": status}
    rest = {"error": None, "incomplete_details": None, "instructions": "be*kind", "metadata": {}, "tools": []}
    last = {"parallel_tool_calls": True, "tool_choice": "auto", "output": list(output), "usage": None}
    return own | rest | last | more


def responds(text, calls=""):
    """The events of an answer with reasoning, a text and perhaps a call."""
    place = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
    thought = {"item_id": "rs_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    call = {"item_id": "fc_1", "output_index": 2}
    output = [said(text), *([CALL | {"arguments": calls}] if calls else [])]
    begun = response_of(status="in_progress")
    found = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        ("response.reasoning_text.delta", thought | {"delta": "so "}),
        ("response.reasoning_text.done", thought | {"text": "so "}),
        ("response.output_item.added", {"output_index": 1, "item": MESSAGE | {"status": "in_progress", "content": []}}),
        ("response.content_part.added", place | {"part": part | {"text": ""}}),
        *(("response.output_text.delta", place | {"delta": c, "logprobs": []}) for c in text),
        ("response.output_text.done", place | {"text": text, "logprobs": []}),
        ("response.content_part.done", place | {"part": part | {"text": text}}),
        ("response.output_item.done", {"output_index": 1, "item": said(text)}),
    ]
    if calls:
        found += [
            ("response.output_item.added", {"output_index": 2, "item": CALL | {"arguments": ""}}),
            *(("response.function_call_arguments.delta", call | {"delta": c}) for c in calls),
            ("response.function_call_arguments.done", call | {"arguments": calls}),
            ("response.output_item.done", {"output_index": 2, "item": CALL | {"arguments": calls}}),
        ]
    found.append(("response.completed", {"response": response_of(*output)}))
    return [named(kind, {"sequence_number": i} | data) for i, (kind, data) in enumerate(found)]


def named(kind, data):
    return b"event: " + kind.encode() + b"\n" + event({"type": kind} | data)


def test_a_responses_stream_passes_byte_for_byte_and_reads_each_text_once(upstream, proxy, api):
    frames = responds("fine so far", '{"q": 1}')
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.post("/responses", {"input": "go", "instructions": "be kind", "stream": True})
    assert response.content == b"".join(frames)
    (record,) = proxy.records(response)
    assert (record.route, record.format, record.finish) == ("responses", "chat", "stop")
    assert record.coverage.response_tokens == len('so \nfine so far\nlook\n{"q": 1}')
    events = list(api.responses.create(model="far", input="go", stream=True))
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "fine so far"


@pytest.mark.parametrize("p", [1, 2, 7, 32])
def test_a_blocked_responses_stream_is_incomplete_and_leaks_nothing(upstream, proxy, api, p):
    upstream.answer = lambda asked: [head(), *responds("a" * (p - 1) + "*bbb"), HANG]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    text = "".join(e["delta"] for e in lines if e["type"] == "response.output_text.delta")
    assert text == "a" * (p - 1) and "bbb" not in response.text
    assert lines[-1]["type"] == "response.incomplete"
    assert lines[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert [e["sequence_number"] for e in lines] == list(range(len(lines)))
    assert [e["text"] for e in lines if e["type"] == "response.output_text.done"] == [text]
    assert [e["item"]["status"] for e in lines if e["type"] == "response.output_item.done"] == ["incomplete"]
    assert proxy.records(response)[0].released_tokens == len("so \n") + p - 1
    assert upstream.asked[-1].closed.wait(10)
    final = list(api.responses.create(model="far", input="go", stream=True))[-1]
    assert final.type == "response.incomplete" and final.response.output_text == text
    assert proxy.idle()


@pytest.mark.parametrize("p", [1, 2, 7])
def test_a_policys_text_follows_a_blocked_responses_stream_as_an_item_of_its_own(upstream, p):
    upstream.answer = lambda asked: [head(), *responds("a" * (p - 1) + "*bbb"), HANG]
    with (
        proxying(upstream.url, terms=Terms(replacement="[ended by policy]")) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client,
    ):
        events = list(client.responses.create(model="far", input="go", stream=True))
        assert [e.sequence_number for e in events] == list(range(len(events)))
        assert events[-1].type == "response.incomplete" and server.idle()
        *before, own = events[-1].response.output
        assert [item.content[0].text for item in before] == ["a" * (p - 1)]
        assert own.content[0].text == "[ended by policy]"
        opened = [e.output_index for e in events if e.type == "response.output_item.added"]
        assert opened == [1, 2], "the upstream's message, and ours behind it"
        ended = [e.item.id for e in events if e.type == "response.output_item.done"]
        assert ended == [item.id for item in events[-1].response.output]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == "a" * (p - 1) + "[ended by policy]"
        upstream.answer = lambda asked: json_answer(response_of(said("fi*ne")))
        whole = client.responses.create(model="far", input="go")
        assert (whole.output_text, whole.status) == ("[ended by policy]", "incomplete")


def test_a_piece_of_text_that_is_none_ends_the_answer(upstream, proxy):
    frames = [*responds("fine")[:6], named("response.output_text.delta", {"item_id": "msg_1", "delta": {"a": "b"}})]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    assert '"code":"upstream_unreadable"' in response.text and proxy.idle()


def test_a_text_that_no_delta_has_brought_is_judged_too(upstream, proxy):
    for at in (7, 8, 9):  # the .done events, and the end
        frames = responds("fine")
        frames[at] = frames[at].replace(b"fine", b"f*ne")
        upstream.answer = lambda asked, frames=frames: [head(), *frames]
        response = proxy.post("/responses", {"input": "go", "stream": True})
        assert "f*ne" not in response.text


def test_a_cut_responses_stream_ends_with_an_error(upstream, proxy):
    frames = responds("fine so far")
    for end in range(3, len(frames)):
        upstream.answer = lambda asked, end=end: [head(), *frames[:end]]
        response = proxy.post("/responses", {"input": "go", "stream": True})
        assert '"code":"upstream_truncated"' in response.text and "response.completed" not in response.text
        assert proxy.records(response)[0].finish == "engine_error"


def test_an_upstreams_failure_is_told_as_it_came(upstream, proxy):
    failed = named("response.failed", {"response": response_of(status="failed", error={"code": "x", "message": "y"})})
    frames = [*responds("fine so far")[:9], failed]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    assert response.content == b"".join(frames)
    assert proxy.records(response)[0].finish == "engine_error"


def test_a_whole_response_passes_or_is_cut(upstream, proxy, api):
    raw = json.dumps(response_of(said("fine"), CALL | {"arguments": "{}"}), indent=1).encode()
    upstream.answer = lambda asked: json_answer(raw)
    assert proxy.post("/responses", {"input": [{"role": "user", "content": "go"}]}).content == raw
    upstream.answer = lambda asked: json_answer(response_of(said("fi*ne"), CALL | {"arguments": "{never}"}))
    response = api.responses.create(model="far", input="go")
    assert response.status == "incomplete" and response.incomplete_details.reason == "content_filter"
    assert response.output_text == "fi" and [item.type for item in response.output] == ["message"]


RESPONSES_INPUTS = {
    "text": {"input": "b*d"},
    "instructions": {"input": "x", "instructions": "b*d"},
    "parts": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "b*d"}]}]},
    "a call's output": {"input": [{"type": "function_call_output", "call_id": "1", "output": "b*d"}]},
    "a tool": {"input": "x", "tools": [{"type": "function", "name": "f", "description": "b*d"}]},
    "a format": {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": {"title": "b*d"}}}},
}


@pytest.mark.parametrize("name", RESPONSES_INPUTS)
def test_whatever_responses_gives_the_model_is_judged(upstream, proxy, name):
    asked = len(upstream.asked)
    response = proxy.post("/responses", RESPONSES_INPUTS[name])
    assert response.status_code == 400 and response.json()["error"]["code"] == "content_filter", response.text
    assert len(upstream.asked) == asked


@pytest.mark.parametrize(
    "more",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"background": True},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"type": "computer_call_output", "output": {}}]},
    ],
    ids=str,
)
def test_texts_that_are_kept_elsewhere_are_refused(upstream, proxy, more):
    asked = len(upstream.asked)
    assert proxy.post("/responses", {"input": "x"} | more).status_code == 400
    assert len(upstream.asked) == asked


# --- embeddings ---


def test_embeddings_judge_their_inputs_and_pass(upstream, proxy, api):
    raw = json.dumps({"object": "list", "data": [], "model": "far", "usage": {"prompt_tokens": 2}}, indent=1).encode()
    upstream.answer = lambda asked: json_answer(raw)
    response = proxy.post("/embeddings", {"input": ["one", "two"], "dimensions": 8})
    assert response.content == raw and response.headers["x-midstream-decision"] == "allow"
    identity = response.headers["x-midstream-request-id"]
    first, second = (proxy.sink.of(i)[0] for i in (identity, f"{identity}-1"))
    assert first.route == second.route == "embeddings" and first.coverage.response_tokens == 0
    asked = len(upstream.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        api.embeddings.create(model="far", input=["one", "t*o"])
    assert caught.value.code == "content_filter" and caught.value.body["innererror"]["prompt_index"] == 1
    assert len(upstream.asked) == asked
    assert proxy.sink.records[-1].verdict is Action.BLOCK or proxy.sink.records[-2].verdict is Action.BLOCK


def test_an_override_by_model_or_route_holds_for_embeddings(upstream, proxy, tmp_path):
    upstream.answer = lambda asked: json_answer(b'{"object": "list", "data": []}')
    overrides = [
        {"name": "small", "when": {"model": ["text-embedding-3-small"]}},
        {"name": "vectors", "when": {"route": ["embeddings"]}},
    ]
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"name": "house", "overrides": overrides}))
    before, proxy.engine.live = proxy.engine.live, proxy.engine.live.under(load_policy(path))
    try:
        for model, policy in (("text-embedding-3-small", "small"), ("other", "vectors")):
            response = proxy.post("/embeddings", {"input": "one", "model": model})
            assert response.headers["x-midstream-policy"] == policy
    finally:
        proxy.engine.live = before


@pytest.mark.parametrize("given", [[1, 2], [[1, 2]], [], None, {"a": 1}, [{"image": "x"}]], ids=str)
def test_an_input_that_cant_be_read_does_not_go_on(upstream, proxy, given):
    asked = len(upstream.asked)
    assert proxy.post("/embeddings", {"input": given}).status_code == 400
    assert len(upstream.asked) == asked


def test_the_gateways_guardrail_judges_with_the_observer(upstream, proxy):
    asked = len(upstream.asked)
    body = {"input_type": "response", "texts": ["b*d"], "structured_messages": [{"role": "user", "content": "x"}]}
    response = HTTP.post(proxy.url + "/beta/litellm_basic_guardrail_api", json=body)
    assert response.json()["action"] == "BLOCKED" and len(upstream.asked) == asked
    assert proxy.idle()
