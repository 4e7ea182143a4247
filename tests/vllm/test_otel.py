"""vLLM: our span around a request, vLLM's own below it, the caller's trace around both; and logs of both as JSON."""

import json

import httpx
import pytest

from ..collector import PARENT, SECRET, TRACE, table
from ..collector import collector as collector
from ..conftest import calibrated
from .conftest import EAGER, VllmServer

MODES = json.dumps({"random": {"prompt": "block", "response": "block"}})


@pytest.fixture
def server(tiny, random_probe, collector, tmp_path, monkeypatch):
    # vLLM's exporter speaks gRPC unless it is told otherwise.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    running = VllmServer(
        tmp_path,
        tiny,
        [(random_probe, {"calibration": calibrated(1e6)})],
        [*EAGER, "--otlp-traces-endpoint", collector.url + "/v1/traces"],
        modes=MODES,
        otlp_endpoint=collector.url,
        log_format="json",
        access_log="true",
        cache=str(tmp_path / "cache"),
    )
    yield running
    running.stop()


def test_one_trace_of_the_caller_us_and_vllm(server, collector):
    server.wait()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "n": 2}
    answer = server.post("/v1/chat/completions?key=" + SECRET, body, headers=headers)
    assert answer.status_code == 200
    httpx.post(f"{server.url}/{SECRET}%0A", json={}, timeout=60)
    identity = answer.headers["x-midstream-request-id"]
    assert server.stop() == 0
    span, said = collector.of(identity)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (said["gen_ai.operation.name"], said["midstream.decision"]) == ("chat", "allow")
    assert said["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert len(said["gen_ai.response.finish_reasons"]) == 2
    events = [table(e.attributes) for e in span.events]
    assert {(e["midstream.choice"], e["midstream.phase"]) for e in events} == {
        (i, phase) for i in (0, 1) for phase in ("prompt", "response")
    }
    below = [s for s in collector.spans if s.parent_span_id == span.span_id]
    assert {s.name for s in below} == {"llm_request"} and {s.trace_id.hex() for s in below} == {TRACE}
    assert SECRET.encode() not in b"".join(collector.raw)

    log = [json.loads(line) for line in server_log(server).splitlines() if line.startswith("{")]
    loggers = {one["logger"] for one in log if "logger" in one}
    assert {"midstream", "midstream.access"} <= loggers and any(name.startswith("vllm") for name in loggers)
    access = [one for one in log if one.get("logger") == "midstream.access"]
    assert [(one["path"], one["status"]) for one in access] == [("/v1/chat/completions", 200), (f"/{SECRET}%0A", 404)]
    assert (access[0]["request_id"], access[0]["trace_id"]) == (identity, TRACE)


def server_log(server):
    return (server._folder / "log").read_text(errors="replace")
