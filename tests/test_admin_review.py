"""The console's routes over a real log: pages of the queue, labels, and one request with its texts."""

import time

import pytest

from monitor.traffic import count_unlabelled, find_labels
from monitor.traffic.turns import is_text, turns_of
from monitor.types import Action

from .admin_port import BEARER, ID
from .console_port import ConsolePort, chat
from .console_port import port as port
from .test_records import record


def filled(port, n=7):
    for i in range(n):
        port.say(f"{i:032x}", f"question {i}", value=float(i), verdict=Action.FLAG if i % 2 else Action.BLOCK)
    port.written()


def queue(port, query=""):
    status, body, _ = port.ask("GET", f"/admin/queue{query}")
    assert status == 200, body
    return body


def numbers(body):
    return [int(entry["id"], 16) for entry in body["entries"]]


def test_pages_of_the_queue(port):
    filled(port)
    first = queue(port, "?limit=3")
    entry = first["entries"][0]
    assert {k: entry[k] for k in ("choice", "verdict", "probe", "phase", "value", "threshold", "key", "label")} == {
        "choice": 0, "verdict": "block", "probe": "demo", "phase": "prompt", "value": 6.0, "threshold": 2.0,
        "key": "alice", "label": None,
    }  # fmt: skip
    second = queue(port, f"?limit=3&after={first['next']}")
    third = queue(port, f"?limit=3&after={second['next']}")
    assert (numbers(first), numbers(second), numbers(third)) == ([6, 5, 4], [3, 2, 1], [0])
    assert third["next"] is None


def test_the_nearest_to_the_threshold_page_by_page(port):
    filled(port)
    seen, after = [], ""
    while after is not None:
        page = queue(port, f"?order=threshold&probe=demo&phase=prompt&limit=2{after and '&after=' + after}")
        seen, after = seen + numbers(page), page["next"]
    assert (seen, page["around"]) == ([2, 3, 1, 4, 0, 5, 6], 2.0)
    assert numbers(queue(port, "?order=threshold&probe=demo&phase=prompt&around=6.2&limit=2")) == [6, 5]
    assert port.status("GET", "/admin/queue?order=threshold") == 422
    assert port.status("GET", "/admin/queue?order=threshold&probe=nobody&phase=prompt") == 422


def test_filters(port):
    filled(port)
    port.say("f" * 32, "allowed", value=1.5, verdict=Action.ALLOW, key="")
    port.written()
    assert numbers(queue(port, "?verdict=flag")) == [5, 3, 1]
    assert numbers(queue(port, "?verdict=flag&verdict=block&key=nobody")) == []
    assert len(numbers(queue(port, "?verdict=allow&labelled=any&probe=demo&phase=prompt"))) == 1
    assert numbers(queue(port, f"?since={time.time() + 60}")) == []
    port.ask("POST", "/admin/labels", BEARER, {"id": f"{6:032x}", "label": "harmless"})
    done = queue(port, "?labelled=yes")
    assert (numbers(done), done["entries"][0]["label"]["label"]) == ([6], "harmless")
    assert numbers(queue(port, "?limit=1")) == [5]
    assert port.ask("GET", "/admin/queue/counts")[1] == {"unlabelled": 6}


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "order=random", "phase=both", "verdict=bad", "after=x", "after=[1]", "after=[1,2,3]",
     "since=x", "after=[%22a%22,1]", "after=[1,1e400]", "after=[NaN,99999999999999999999]", "after={}",
     "probe=" + "x" * 129],
)  # fmt: skip
def test_a_wrong_question_is_said(port, query):
    status, body, _ = port.ask("GET", f"/admin/queue?{query}")
    assert (status, bool(body["error"]["message"])) == (400, True)


def test_a_probe_without_a_phase_is_said(port):
    filled(port)
    assert "name both, or neither" in port.ask("GET", "/admin/queue?probe=demo")[1]["error"]["message"]


def test_labels_and_what_is_wrong_with_them(port):
    filled(port)
    one = {"id": f"{1:032x}", "choice": 0, "label": "harmful"}
    assert port.ask("POST", "/admin/labels", BEARER, one)[1] == one | {"by": "admin", "before": None}
    again = one | {"label": "unsure", "by": "ben", "id": f"chatcmpl-{1:032x}"}
    assert port.ask("POST", "/admin/labels", BEARER, again)[1] == one | {
        "label": "unsure", "by": "ben", "before": "harmful",
    }  # fmt: skip
    assert [(row["label"], row["by"]) for row in find_labels(port.path, one["id"], 0)] == [
        ("unsure", "ben"), ("harmful", "admin"),
    ]  # fmt: skip
    for body, status, says in (
        (one | {"id": "0" * 31 + "a"}, 404, "there is no record of request"),
        (one | {"choice": 7}, 404, "choice 7; it may be older"),
        ({"id": "f" * 32, "label": "harmful"}, 404, "there is no record of request"),
        (one | {"label": "bad"}, 400, "label"),
        (one | {"by": ""}, 400, "by"),
        (one | {"by": "a\tb"}, 422, "can be printed"),
        (one | {"choice": -1}, 400, "choice"),
        (one | {"id": "a b"}, 400, "id"),
        (one | {"more": 1}, 400, "more"),
        ("{", 400, "JSON"),
    ):
        got, answer, _ = port.ask("POST", "/admin/labels", BEARER, body)
        assert (got, says in answer["error"]["message"]) == (status, True), (body, answer)
    assert count_unlabelled(port.path) == 6
    said = [r["result"] for r in port.rows()]
    assert said[:4] == [
        f"200 labelled {one['id']}/0 harmful by admin", f"200 labelled {one['id']}/0 unsure, was harmful by ben",
        f"404 label {'0' * 31}a harmful", f"404 label {one['id']} harmful",
    ]  # fmt: skip


def test_of_several_choices_one_has_to_be_named(port):
    port.say(ID, "hi")
    port.log.put(record(ID, 1, Action.FLAG))
    port.written()
    status, body, _ = port.ask("POST", "/admin/labels", BEARER, {"id": ID, "label": "harmful"})
    assert (status, "has choices 0, 1; say which with choice" in body["error"]["message"]) == (422, True)


def test_of_several_choices_one_is_sent_in_full(port):
    port.say(ID, "hi", "yes")
    port.log.put(record(ID, 3, Action.FLAG))
    port.written()

    def look(query):
        status, body, _ = port.ask("GET", f"/admin/requests/{ID}{query}")
        return (status, body["indices"], body["choice"]["record"]["index"], body["choice"]["answer"])

    assert look("") == look("?choice=0") == (200, [0, 3], 0, "yes")
    assert look("?choice=3") == (200, [0, 3], 3, None)
    status, body, _ = port.ask("GET", f"/admin/requests/{ID}?choice=1")
    assert (status, "choice 1; it may be older" in body["error"]["message"]) == (404, True)
    assert port.status("GET", f"/admin/requests/{ID}?choice=-1") == 400


def test_one_request_with_its_text_by_tokens(port):
    port.say(ID, "Wie heißt du? 🙂", "Ich? é")
    port.written()
    one = port.ask("GET", f"/admin/requests/{ID}")[1]["choice"]
    assert (one["turns"], one["answer"]) == ([{"role": "user", "content": "Wie heißt du? 🙂"}], "Ich? é")
    pieces = one["tokens"]["prompt"]
    assert len(pieces) == one["record"]["coverage"]["prompt_tokens"] == len(one["record"]["token_scores"]["demo"]) - 7
    assert "".join(pieces) == port.template.render(one["turns"])
    assert "".join(one["tokens"]["answer"]) == "Ich? é"
    assert port.status("GET", "/admin/requests/" + "0" * 32) == 404
    assert port.status("GET", "/admin/requests/a%20b") == 400


def test_a_text_that_was_redacted_has_no_tokens(port):
    port.say(ID, "mail eve@example.com", "she is at [mail]")
    port.written()
    one = port.ask("GET", f"/admin/requests/{ID}")[1]["choice"]
    assert one["turns"][0]["content"] == "mail [mail]"
    assert one["tokens"] == {"prompt": None, "answer": None}


def test_without_the_key_of_the_texts_there_are_none(tmp_path):
    one = ConsolePort(tmp_path, texts=False)
    try:
        one.say(ID, "hello")
        one.written()
        body = one.ask("GET", f"/admin/requests/{ID}")[1]
        assert (body["choice"]["turns"], body["lens"]) == (None, False)
        assert "no log_key" in body["no_text"]
        status, answer, _ = one.ask("POST", "/admin/lens", BEARER, {"id": ID})
        assert (status, "needs kept text" in answer["error"]["message"]) == (404, True)
    finally:
        one.stop()


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (None, []),
        (chat("a", "b"), [("user", "a"), ("assistant", "b")]),
        ({"prompt": "text"}, [("", "text")]),
        ({"prompt": ["one", "two", "three", "four", "five"]}, [("", "four")]),
        ({"prompt": ["one", "two"], "n": 2}, [("", "two")]),
        ({"prompt": ["one", "two", "three"], "n": 2}, [("", "two")]),
        ({"prompt": ["one", "two"], "n": None}, [("", "two")]),
        ({"prompt": [[1], [2], [3], [4]]}, [("", "[4]")]),
        ({"prompt": [1, 2, 3]}, [("", "[1, 2, 3]")]),
        ({"input": "hi", "instructions": "be kind"}, [("system", "be kind"), ("user", "hi")]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}, [("user", "hi")]),
        (
            {"system": "be kind", "messages": [{"role": "user", "content": "hi"}]},
            [("system", "be kind"), ("user", "hi")],
        ),
        ({"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}, 7]}, [("user", "a\nb"), ("", "7")]),
        ({"messages": [{"role": "user", "content": [{"image": 1}]}]}, [("user", '[{"image": 1}]')]),
        ({"texts": ["a"]}, [("", "a")]),
    ],
)
def test_a_prompt_of_any_route_is_turns(prompt, turns):
    assert [(t["role"], t["content"]) for t in turns_of(prompt, 3)] == turns


def test_token_ids_are_no_text():
    for prompt in ({"prompt": "[1, 2]"}, {"prompt": ["a", "b"]}, {"input": ["[1]"]}, chat("a", "b"), None):
        assert is_text(prompt)
    assert not is_text({"prompt": [1, 2]}) and not is_text({"prompt": [[1], [2, 3]]})
