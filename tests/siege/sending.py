"""Sending what no client library would: paths and headers as they are written, and what of it reached the engine."""

import contextlib
import http.client

import httpx
import pytest

from ..contract import Server, address


def sampled(every: int) -> pytest.MarkDecorator:
    """`every`: 1 for all cases in `make attack`, more for a sample in `make test`."""
    cases = [pytest.param(every, id="sample"), pytest.param(1, id="all", marks=pytest.mark.attack)]
    return pytest.mark.parametrize("every", cases)


def ms(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1e3:.1f} ms, p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms"


def send(server: Server, method: str, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
    """The path as it is written: httpx would tidy it."""
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


def is_block(response: httpx.Response) -> bool:
    if response.status_code != 400:
        return False
    error = response.json().get("error", {})
    return isinstance(error, dict) and error.get("code") == "content_filter"
