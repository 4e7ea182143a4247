"""The console's live view: records as they are put, without text, and no gap that is not told."""

import json

from monitor.types import Action

from .admin_port import BEARER, events
from .console_port import port as port
from .test_records import record


def test_live_records_come_as_they_are_put_and_have_no_text(port):
    port.say("before", "a secret question")
    with port.open("GET", "/admin/live") as answer:
        assert answer.headers.get_content_type() == "text/event-stream"
        stream = events(answer)
        assert next(stream) == {"began": 0}
        first = next(stream)
        port.say("after", "another secret", verdict=Action.BLOCK)
        second = next(stream)
    assert [(e["id"], e["verdict"], e["readings"][0]["value"]) for e in (first, second)] == [
        ("before", "flag", 3.0), ("after", "block", 3.0),
    ]  # fmt: skip
    assert "secret" not in json.dumps([first, second])


def test_who_can_not_follow_is_told_how_much_went_by(port):
    with port.open("GET", "/admin/live") as answer:
        stream = events(answer)
        next(stream)
        for i in range(400):
            port.feed.put(port.say(f"r{i}", "x"))
        missed = next(stream)
    assert "missed" in missed or missed["id"].startswith("r")


def lines(port, n, **headers):
    """The first n events of the live view: (id, what it says)."""
    with port.open("GET", "/admin/live", BEARER | headers) as answer:
        found, number = [], None
        for line in answer:
            if line.startswith(b"id: "):
                number = int(line[4:])
            elif line.startswith(b"data: "):
                found.append((number, json.loads(line[6:])))
                if len(found) == n:
                    return found


def test_who_comes_back_goes_on_where_it_was(port):
    for i in range(3):
        port.say(f"r{i}", "x")
    first = lines(port, 4)
    assert first[0] == (0, {"began": 0})
    assert [(number, e["id"], e["old"]) for number, e in first[1:]] == [(i + 1, f"r{i}", True) for i in range(3)]
    again = lines(port, 3, **{"Last-Event-ID": "1"})
    assert again[0] == (1, {"began": 1})
    assert [(number, e["id"], e["old"]) for number, e in again[1:]] == [(2, "r1", False), (3, "r2", False)]
    for forged in ("", "x", "-1", "9" * 30, "1e3"):
        assert lines(port, 2, **{"Last-Event-ID": forged})[1][1]["id"] == "r0"
    for i in range(3, 400):
        port.feed.put(record(f"r{i}", 0, Action.FLAG))
    missed, next_ = lines(port, 3, **{"Last-Event-ID": "3"})[1:]
    assert missed == (144, {"missed": 141}) and (next_[0], next_[1]["id"]) == (145, "r144")
