"""Spans without a server: where they go, when there are none, what becomes of an error, and whose parent they are."""

import asyncio
import builtins
import contextlib
import subprocess
import sys

import pytest

from monitor.api.access import Access
from monitor.api.edge import Edge
from monitor.api.spans import Spans
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics

from .collector import PARENT, SECRET, TRACE, table
from .collector import collector as collector
from .test_records import record

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("status", [None, 503])
def test_what_fails_is_an_error_of_its_span(collector, status):
    """status: of the answer; None: a bug of ours"""

    async def app(scope, receive, send):
        if status is None:
            raise RuntimeError(SECRET)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})

    async def run():
        async def send(message):
            return None

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await Access(app, spans, log=False)(scope, None, send)

    spans = Spans.of(load_settings(otlp_endpoint=collector.url))
    with pytest.raises(RuntimeError) if status is None else contextlib.nullcontext():
        asyncio.run(run())
    spans.close()
    (span,) = collector.spans
    assert (span.status.code, table(span.attributes)["error.type"]) == (2, "RuntimeError" if status is None else "503")
    assert SECRET.encode() not in b"".join(collector.raw)


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported():
    code = (
        "import sys; from monitor.api.edge import Edge; from monitor.config import load_settings;"
        "from monitor.metrics import Metrics;"
        "assert Edge.of(load_settings(), Metrics()).spans is None;"
        "import monitor.api.serve;"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout == "[]\n", shown.stderr


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigInvalid, match=r"pip install midstream\[otel\]"):
        Edge.of(load_settings(otlp_endpoint="http://127.0.0.1:4318"), Metrics())


@pytest.mark.parametrize(
    ("environment", "given", "path"),
    [
        ({}, "http://HOST", "/v1/traces"),
        ({}, "http://HOST/v1/traces", "/v1/traces"),
        ({}, "http://HOST/behind/", "/behind/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://HOST"}, None, "/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://HOST/mine"}, None, "/mine"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http://HOST", "/v1/traces"),
    ],
)
def test_where_spans_go(collector, monkeypatch, environment, given, path):
    host = collector.url.removeprefix("http://")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("HOST", host))
    spans = Spans.of(load_settings(otlp_endpoint=given and given.replace("HOST", host)))
    spans.begin("1" * 32, {"type": "http", "method": "POST", "path": CHAT, "headers": []})
    spans.close()
    assert collector.paths == [path] and len(collector.spans) == 1


@pytest.mark.parametrize("off", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_when_there_are_none(monkeypatch, off):
    for name, value in off.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert Spans.of(load_settings()) is None


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigInvalid, match="MIDSTREAM_OTLP_ENDPOINT"):
        Spans.of(load_settings())
    with pytest.raises(ConfigInvalid, match="otlp_endpoint"):
        load_settings(otlp_endpoint="collector:4317")


def test_what_stands_behind_gets_our_span_as_its_parent(collector):
    """vLLM reads traceparent from the request: its spans are children of ours."""
    spans = Spans.of(load_settings(otlp_endpoint=collector.url))
    headers = [(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())]
    opened = spans.begin("1" * 32, {"type": "http", "method": "POST", "path": CHAT, "headers": headers})
    spans.close()
    ((name, value),) = opened.headers
    (span,) = collector.spans
    assert (name, value.decode()) == (b"traceparent", f"00-{TRACE}-{span.span_id.hex()}-01")
    assert opened.trace_id == TRACE


def test_a_span_is_named_by_its_operation_never_by_a_client(collector):
    """In front of an upstream the model is what the client calls it, and a method is any word."""
    spans = Spans.of(load_settings(otlp_endpoint=collector.url))
    asked = [("POST", CHAT), ("POST", "/v1/embeddings"), ("GET", "/"), (SECRET, "/")]
    for i, (method, path) in enumerate(asked):
        spans.begin(f"{i:032x}", {"type": "http", "method": method, "path": path, "headers": []})
        spans.record(record(f"{i:032x}", model="any-model-at-all"))
    spans.close()
    assert [span.name for span in collector.spans] == ["chat", "embeddings", "GET", "_OTHER"]
    assert SECRET.encode() not in b"".join(collector.raw)


def test_embeddings_are_an_operation_that_generates_nothing(collector):
    spans = Spans.of(load_settings(otlp_endpoint=collector.url))
    spans.begin("1" * 32, {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []})
    spans.record(record("1" * 32))
    spans.close()
    _, said = collector.of("1" * 32)
    assert (said["gen_ai.operation.name"], said["http.route"]) == ("embeddings", "/v1/embeddings")
    assert not [name for name in said if "usage" in name or "finish" in name]
