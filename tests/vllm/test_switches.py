"""T6 on the routes that vLLM alone has: no client switches the monitor off on /v1/responses or /v1/messages."""

import json

import pytest

from ..attacks import ATTEMPTS, Attempt
from ..contract import JSON
from ..siege import send
from ..star import bias
from . import test_leak
from .shared import Forced
from .test_leak import body

web = test_leak.web
P = 3  # where an answer is blocked: two letters come before
ASKED = {"responses": {"input": "aaa*aa"}, "messages": {"messages": [{"role": "user", "content": "aaa*aa"}]}}


def outcome(web, quiet, route, attempt, **more):
    """What became of it: a record, or None for a request that was refused and not computed."""
    before = len(web.sink.records)
    raw = json.dumps(body(route, quiet, False, 1, **more) | attempt.fields).encode()
    response = send(web, "POST", attempt.target(f"/v1/{route}"), attempt.rewrite(raw), JSON | attempt.headers)
    new = web.sink.records[before:]
    assert response.status_code == 200 or 400 <= response.status_code < 500, (attempt.name, response.text)
    assert "*" not in response.text, attempt.name
    if not new:
        assert response.status_code != 200, (attempt.name, response.text)
        return None
    (record,) = new
    assert response.headers["x-midstream-request-id"] == record.request_id, attempt.name
    return record


@pytest.mark.parametrize("route", ["responses", "messages"])
def test_no_client_switches_the_monitor_off(web, quiet, route):
    refused = 0
    for attempt in [Attempt("plain"), *ATTEMPTS]:
        Forced.bias = None
        prompt = outcome(web, quiet, route, attempt, **ASKED[route])
        Forced.bias = bias(quiet, P)
        answer = outcome(web, quiet, route, attempt)
        Forced.bias = None
        for record, released in ((prompt, 0), (answer, P - 1)):
            refused += record is None
            if record is not None:
                assert (record.verdict, record.released_tokens) == ("block", released), attempt.name
                assert record.coverage.unmonitored == 0, attempt.name
        assert attempt.name != "plain" or (prompt is not None and answer is not None)
    assert web.idle()
    print(f"T6 {route}: {len(ATTEMPTS)} attempts, {refused} of {2 * len(ATTEMPTS)} requests refused, 0 unwatched")
