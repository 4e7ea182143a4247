"""Answers of an upstream that end early, and what a client must see of each: that it is no whole one."""

import json
import re

import pytest

from monitor.upstream.transport import Bounds

from .fake_observer import proxying
from .fake_upstream import chat_stream, chat_whole, chunked, head, json_answer

TEXT = "Once upon a time there was a café."
PATIENT = Bounds(retries=0, first_s=60, read_s=60, connect_s=30, failures=1000)


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url, bounds=PATIENT) as server:
        yield server


def bodies(response):
    """Every event's data; each is JSON or [DONE]."""
    events = [e for e in re.split(r"\n\n", response.text) if e]
    data = ["".join(line[5:].strip() for line in e.splitlines() if line.startswith("data:")) for e in events]
    return [d if d == "[DONE]" else json.loads(d) for d in data if d]


def check_cut(response):
    """An answer that is no whole one and says so. Returns its text."""
    if response.status_code != 200:
        assert response.status_code in (502, 503, 504) and response.json()["error"]["code"].startswith("upstream_")
        return ""
    *chunks, last = bodies(response)
    assert last["error"]["code"] in ("upstream_truncated", "upstream_unreadable", "upstream_timeout")
    assert "[DONE]" not in chunks and all("error" not in c for c in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(choice["finish_reason"] is None for choice in choices)
    return "".join(choice["delta"].get("content", "") for choice in choices)


def wire(stream, framed):
    """A whole answer as bytes on the wire, head included."""
    if stream:
        parts = chat_stream(TEXT, size=5)
        return b"".join(chunked(*parts) if framed else [head(), *parts])
    (raw,) = json_answer(chat_whole(TEXT))
    return raw if framed else re.sub(rb"Content-Length: \d+\r\n", b"", raw)
