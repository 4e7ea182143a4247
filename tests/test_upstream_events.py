"""Events and responses of an upstream with more in them than their text: all of it is judged, and goes with a cut."""

import json

import pytest

from monitor.types import Action

from .fake_observer import proxy as proxy
from .fake_upstream import event, head, json_answer
from .test_upstream_routes import CALL, named, responds, response_of, said

PLACE = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
CITED = {"type": "url_citation", "url": "http://a", "title": "the cat", "start_index": 0, "end_index": 4}
BAD = CITED | {"title": "b*d"}
SHELL = {"item_id": "sh_1", "output_index": 2, "command_index": 0}
HIDDEN = {
    "an annotation": ("response.output_text.annotation.added", PLACE | {"annotation_index": 0, "annotation": BAD}),
    "a command": ("response.shell_call_command.done", SHELL | {"command": "b*d"}),
    "a piece of a command": ("response.shell_call_command.delta", SHELL | {"delta": "b*d"}),
    "what a command has said": ("response.shell_call_output_content.done", SHELL | {"output": [{"stdout": "b*d"}]}),
    "a field beside a piece of text": ("response.output_text.delta", PLACE | {"delta": "", "snapshot": "b*d"}),
    "an event of next year": ("response.thought.added", {"thoughts": {"deep": ["b*d"]}}),
    "a word in place of a response": ("response.noted", {"response": "b*d"}),
    "a field of the response": ("response.in_progress", {"response": response_of(output_messages=[{"say": "b*d"}])}),
}


def sent(response):
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("name", HIDDEN)
def test_whatever_stands_in_an_event_is_judged(upstream, proxy, name):
    frames = responds("fine")
    upstream.answer = lambda asked: [head(), *frames[:9], named(*HIDDEN[name]), *frames[9:]]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    last = sent(response)[-1]
    assert "*" not in response.text.replace("be*kind", "")  # instructions, which are the client's own
    assert (last["type"], last["response"]["output"][0]["content"][0]["text"]) == ("response.incomplete", "fin")
    assert proxy.records(response)[0].verdict is Action.BLOCK and proxy.idle()


def test_what_is_harmless_passes_as_it_came_and_is_read_once(upstream, proxy):
    cited = said("fine")
    cited["content"][0]["annotations"] = [CITED]
    added = named("response.output_text.annotation.added", PLACE | {"annotation_index": 0, "annotation": CITED})
    done = named("response.output_item.done", {"output_index": 1, "item": cited})
    padded = [f.replace(b'"delta": "f"', b'"delta": "f", "obfuscation": "xyz"') for f in responds("fine")]
    end = named("response.completed", {"response": response_of(cited, output_text="fine", billing={"payer": "you"})})
    frames = [*padded[:10], added, *padded[10:12], done, end]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    assert response.content == b"".join(frames)
    assert proxy.records(response)[0].coverage.response_tokens == len("so \nfine\nhttp://a\nthe cat")


MORE = {"output_messages": [{"message": "fi*ne", "tokens": [42]}], "output_text": "fi*ne", "input_messages": ["go"]}
KEPT = {"id", "object", "created_at", "model", "instructions", "tools", "metadata", "tool_choice", "output", "error"}


def test_beside_a_response_that_is_cut_only_what_is_known_stands(upstream, proxy):
    """vLLM's `enable_response_messages`."""
    upstream.answer = lambda asked: json_answer(response_of(said("fi*ne"), safety_identifier="me", **MORE))
    response = proxy.post("/responses", {"input": "go", "enable_response_messages": True})
    body = response.json()
    assert set(body) == KEPT | {"status", "incomplete_details", "parallel_tool_calls", "safety_identifier"}
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("incomplete", "fi")
    assert body["instructions"] == "be*kind" and "i*" not in response.text and "42" not in response.text


def test_a_text_beside_the_output_of_a_whole_response_is_judged(upstream, proxy):
    harmless = json.dumps(response_of(said("fine"), output_text="fine", raw="too")).encode()
    upstream.answer = lambda asked: json_answer(harmless)
    response = proxy.post("/responses", {"input": "go"})
    assert response.content == harmless
    assert proxy.records(response)[0].coverage.response_tokens == len("fine\ntoo")
    upstream.answer = lambda asked: json_answer(response_of(said("fine"), CALL | {"arguments": "{}"}, raw="b*d"))
    body = proxy.post("/responses", {"input": "go"}).json()
    assert body["status"] == "incomplete" and "raw" not in body
    assert [item["type"] for item in body["output"]] == ["message"], "of an answer that is cut no tool is called"


def test_of_a_piece_that_is_cut_only_its_text_is_left(upstream, proxy):
    piece = named("response.output_text.delta", PLACE | {"sequence_number": 6, "delta": "aa*", "ids": [42]})
    upstream.answer = lambda asked: [head(), *responds("")[:6], piece]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    deltas = [e for e in sent(response) if e["type"] == "response.output_text.delta"]
    assert deltas == [PLACE | {"type": "response.output_text.delta", "sequence_number": 6, "delta": "aa"}]


def test_an_error_passes_as_it_came(upstream, proxy):
    error = named("error", {"sequence_number": 9, "code": "b*d", "message": "gone *", "param": None})
    frames = [*responds("fine so far")[:9], error]
    upstream.answer = lambda asked: [head(), *frames]
    response = proxy.post("/responses", {"input": "go", "stream": True})
    assert response.content == b"".join(frames)


def test_an_error_that_is_no_event_of_responses_is_told_as_one_of_ours(upstream, proxy):
    """And not in silence: it would look like an end."""
    frames = [*responds("fine so far")[:9], event({"error": {"message": "gone", "code": 500}})]
    upstream.answer = lambda asked: [head(), *frames]
    last = sent(proxy.post("/responses", {"input": "go", "stream": True}))[-1]
    assert (last["type"], last["code"]) == ("error", "upstream_unreadable")
