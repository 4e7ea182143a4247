"""What vLLM refuses only once it streams is told as it is without a stream, on every route and in its own shape."""

import httpx
import pytest
from vllm.exceptions import QueueOverflowError

from .shared import Forced, routes
from .test_leak import body

ROUTES = pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "messages"])


@pytest.fixture(scope="module")
def web(shared):
    with routes(shared) as web:
        yield web


def refused(web, quiet, route, stream):
    """(status, the error as its route spells it, headers)"""
    before = len(web.sink.records)
    response = httpx.post(f"{web.url}/v1/{route}", json=body(route, quiet, stream, 1), timeout=60)
    content = response.json()
    assert content.get("type") == ("error" if route == "messages" else None)
    assert web.idle() and len(web.sink.records) == before
    return response.status_code, content["error"], response.headers


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_the_engine_refuses_is_a_bad_request(web, quiet, route, stream):
    Forced.bias = {"99999999": 1.0}
    status, error, _ = refused(web, quiet, route, stream)
    Forced.bias = None
    assert status == 400 and "99999999" in error["message"], error
    assert "validation error" not in error["message"], "of vLLM's own chunk: a client can't know what it is"


@ROUTES
def test_a_queue_that_has_filled_meanwhile_is_overload(web, quiet, route, monkeypatch):
    def full(n=1, request_id=None):
        if request_id is not None:  # the route itself looked before it began
            raise QueueOverflowError

    monkeypatch.setattr(web.harness.engine, "check_admission", full)
    status, error, headers = refused(web, quiet, route, True)
    assert status == 503 and headers["retry-after"] and "busy" in error["message"]
    if route == "messages":
        assert error["type"] == "overloaded_error"
