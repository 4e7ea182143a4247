"""Spans at a real collector: the caller's trace, verdicts and readings, never a text; and a dead one harms nobody."""

import math
import threading
import time

import httpx
import pytest

from monitor.engines.embedded.engine import EmbeddedEngine

from .collector import PARENT, SECRET, TRACE, table
from .collector import collector as collector
from .conftest import LiveServer, Sink, calibrated, publish
from .star import bias

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BLOCK = {"star": {"prompt": "block", "response": "block"}}
AT = 5
EVENT = "gen_ai.evaluation.result"


class Told(Sink):
    """Hands records to the spans too, as Sinks does."""

    spans = None

    def record(self, record):
        super().record(record)
        self.spans.record(record)


class Traced:
    """A watched server whose spans go to `endpoint`. `close` ends the server and sends what is left."""

    def __init__(self, model, probe, threshold, folder, endpoint, **settings):
        given = [(probe, {"calibration": calibrated(threshold)})]
        live, chosen = publish(model, given, folder, modes=BLOCK, otlp_endpoint=endpoint, **settings)
        sink = Told()
        self.server = LiveServer(EmbeddedEngine(model, live, chosen, sink), model, sink, chosen)
        self.spans = sink.spans = self.server.edge.spans
        self.server.start()

    def ask(self, path=CHAT, text=SECRET, headers=None, **more):
        given = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        return self.server.post(path, {"max_tokens": 8, "temperature": 0} | given | more, headers=headers)

    def close(self):
        if self.server is not None:
            self.server.stop()
            self.spans.close()
            self.server = None


@pytest.fixture
def serving(quiet, star_probe, tmp_path):
    running = []

    def start(endpoint, **settings):
        running.append(Traced(quiet, *star_probe, tmp_path / str(len(running)), endpoint, **settings))
        return running[-1]

    yield start
    for one in running:
        one.close()


def exporting():
    """Threads of the SDK and of `close` that still live in this process."""
    return [t for t in threading.enumerate() if t.name in ("midstream-spans", "OtelBatchSpanRecordProcessor")]


@pytest.fixture
def traced(serving, collector):
    return serving(collector.url)


def identity(response):
    return response.headers["x-midstream-request-id"]


def evaluations(span):
    events = [table(e.attributes) for e in span.events if e.name == EVENT]
    assert len(events) == len(span.events)
    return {(e["midstream.choice"], e["midstream.phase"]): e for e in events}


def test_an_allowed_answer(traced, collector):
    before = time.time_ns()
    answer = traced.ask()
    assert answer.status_code == 200
    traced.close()
    span, said = collector.of(identity(answer))
    name = answer.json()["model"]
    assert (span.name, span.kind, span.parent_span_id) == ("chat", 2, b"")
    usage = answer.json()["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "midstream",
        "gen_ai.request.model": name,
        "gen_ai.response.id": identity(answer),
        "gen_ai.response.finish_reasons": [answer.json()["choices"][0]["finish_reason"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": CHAT,
        "midstream.request_id": identity(answer),
        "midstream.decision": "allow",
        "midstream.policy": "default",
        "midstream.coverage.prompt_tokens": usage["prompt_tokens"],
        "midstream.coverage.prompt_scored": usage["prompt_tokens"],
        "midstream.coverage.unmonitored": 0,
    }
    assert {k: said.get(k) for k in expected} == expected
    coverage = {k.removeprefix("midstream.coverage."): v for k, v in said.items() if ".coverage." in k}
    placed = ("prompt_scored", "response_scored", "unmonitored", "final_unscored", "not_computed")
    assert sum(coverage[k] for k in placed) == coverage["prompt_tokens"] + coverage["response_tokens"]
    assert before <= span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
    found = evaluations(span)
    assert set(found) == {(0, "prompt"), (0, "response")}
    for event in found.values():
        assert event["gen_ai.evaluation.name"] == "star" and event["gen_ai.response.id"] == identity(answer)
        assert event["gen_ai.evaluation.score.label"] == "allow" and event["midstream.would_block"] is False
        assert math.isfinite(event["gen_ai.evaluation.score.value"])
        assert event["gen_ai.evaluation.score.value"] < event["midstream.threshold"]
    assert collector.paths == ["/v1/traces"] * len(collector.paths)
    resource = table(collector.resources[0].resource.attributes)
    assert resource["service.name"] == "midstream" and resource["service.version"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_no_error(traced, collector, stream):
    answer = traced.ask(text=SECRET + "*", stream=stream)
    assert answer.status_code == 400
    traced.close()
    span, said = collector.of(identity(answer))
    assert (said["midstream.decision"], said["http.response.status_code"]) == ("block", 400)
    assert said["gen_ai.response.finish_reasons"] == ["content_filter"] and said["gen_ai.usage.output_tokens"] == 0
    assert span.status.code == 0 and "error.type" not in said
    found = evaluations(span)
    prompt, response = found[0, "prompt"], found[0, "response"]
    assert prompt["gen_ai.evaluation.score.label"] == "block"
    assert prompt["gen_ai.evaluation.score.value"] > prompt["midstream.threshold"]
    assert "gen_ai.evaluation.score.value" not in response  # nothing was measured, which is not 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_blocked_stream_and_both_choices(traced, collector, path):
    forced = {"logit_bias": bias(traced.server.model, AT), "frequency_penalty": 2, "max_tokens": 20}
    answer = traced.ask(path, n=2, stream=True, **forced)
    assert answer.status_code == 200 and answer.text.count('"finish_reason":"content_filter"') == 2
    traced.close()
    span, said = collector.of(identity(answer))
    assert said["gen_ai.operation.name"] == ("chat" if path == CHAT else "text_completion")
    assert said["gen_ai.response.finish_reasons"] == ["content_filter"] * 2
    assert (said["midstream.decision"], said["gen_ai.usage.output_tokens"]) == ("block", 2 * (AT - 1))
    assert said["midstream.coverage.prompt_tokens"] == 2 * said.get(
        "gen_ai.usage.input_tokens", said["midstream.coverage.prompt_tokens"] // 2
    )
    assert ("gen_ai.usage.input_tokens" in said) == (
        path == CHAT
    )  # of a list of prompts nobody knows how many there were
    found = evaluations(span)
    assert set(found) == {(i, p) for i in (0, 1) for p in ("prompt", "response")}
    assert found[1, "response"]["gen_ai.evaluation.score.label"] == "block"


def test_an_aborted_answer_has_its_record_though_it_comes_later(traced, collector):
    body = {"model": traced.server.model.name, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 900}
    with httpx.stream("POST", traced.server.url + CHAT, json=body | {"stream": True}, timeout=60) as answer:
        next(answer.iter_lines())
    (record,) = traced.server.sink.wait(1)
    assert record.finish == "aborted"
    traced.close()
    _, said = collector.of(identity(answer))
    assert said["gen_ai.response.finish_reasons"] == ["aborted"] and said["midstream.decision"] == "allow"


def test_several_texts_judged_are_one_span(traced, collector):
    answer = traced.server.post("/v1/moderations", {"input": [SECRET, SECRET + "*"]})
    assert answer.status_code == 200
    traced.close()
    span, said = collector.of(identity(answer))
    assert said["gen_ai.operation.name"] == "moderation" and span.name == "moderation"
    assert said["midstream.decision"] == "block" and "gen_ai.usage.output_tokens" not in said
    ids = {table(e.attributes)["gen_ai.response.id"] for e in span.events}
    assert ids == {identity(answer), identity(answer) + "-1"}


@pytest.mark.parametrize("flags", ["01", "00"])
def test_the_callers_trace_is_joined_and_can_not_switch_the_span_off(traced, collector, flags):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "tracestate": "vendor=1"}
    answer = traced.ask(headers=headers)
    traced.close()
    span, _ = collector.of(identity(answer))
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", f"ff-{TRACE}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}")],
        [("traceparent", SECRET)],
        [("traceparent", "é")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("traceparent", f"00-{TRACE[::-1]}-{PARENT}-01")],
        [("tracestate", "vendor=1")],
    ],
)
def test_a_trace_that_is_not_valid_is_ignored(traced, collector, headers):
    answer = traced.ask(headers=[(k, v.encode()) for k, v in headers])
    assert answer.status_code == 200
    traced.close()
    span, _ = collector.of(identity(answer))
    assert span.parent_span_id == b"" and span.trace_id.hex() not in (TRACE, TRACE[::-1]) and span.trace_state == ""


def test_what_is_refused_has_a_span_and_a_strangers_path_is_not_in_it(serving, collector):
    traced = serving(collector.url, api_key="correct-horse")
    answer = traced.ask()
    strange = httpx.get(f"{traced.server.url}/{SECRET}?{SECRET}=1", headers={"X-Request-Id": SECRET})
    assert (answer.status_code, strange.status_code) == (401, 401)
    assert httpx.get(traced.server.url + "/health").status_code == 200
    traced.close()
    span, said = collector.of(identity(answer))
    assert (span.name, said["http.response.status_code"], len(span.events)) == ("chat", 401, 0)
    assert "midstream.decision" not in said  # nobody decided anything
    span, said = collector.of(identity(strange))
    assert (span.name, "http.route" in said) == ("GET", False)
    assert len(collector.spans) == 2  # /health has none
    assert SECRET.encode() not in b"".join(collector.raw)


def test_no_text_of_anybody_is_exported(traced, collector):
    forced = {"logit_bias": bias(traced.server.model, 30), "frequency_penalty": 2, "max_tokens": 25}
    answers = [traced.ask(path, stream=stream, **forced) for path in (CHAT, TEXT) for stream in (False, True)]
    written = "a" * 25
    assert written in answers[0].text and all(a.status_code == 200 for a in answers)
    refused = traced.ask(text=SECRET + "*", user=SECRET)
    unknown = traced.ask(model=SECRET)
    assert (refused.status_code, unknown.status_code) == (400, 404)
    traced.close()
    assert len(collector.spans) == 6
    exported = b"".join(collector.raw)
    assert SECRET.encode() not in exported and b"aaaa" not in exported


def test_spans_arrive_while_the_server_runs(serving, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "house")
    traced = serving(collector.url)
    answer = traced.ask()
    collector.wait(1)
    _, said = collector.of(identity(answer))
    assert said["midstream.decision"] == "allow"
    assert table(collector.resources[0].resource.attributes)["service.name"] == "house"


@pytest.mark.parametrize("dead", ["refuses", "hangs"])
def test_a_dead_collector_changes_nothing_for_clients(serving, collector, monkeypatch, dead):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "12")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "4")
    url = collector.url
    if dead == "hangs":
        collector.hold.clear()
    else:
        collector.close()
        url = "http://127.0.0.1:9"
    traced = serving(url)
    traced.spans.grace_s = 0.0
    answers = [traced.ask(text=SECRET + "*" * (i % 2)) for i in range(12)]
    assert [a.status_code for a in answers] == [200, 400] * 6
    blocked = [r for r in traced.server.sink.records if r.verdict == "block"]
    assert len(blocked) == 6
    closing = threading.Thread(target=traced.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "only a guard: it gives the collector 5 s"
    # What is left gives up at once, and does not go on for the SDK's 30 s, beside whatever comes next.
    collector.hold.set()
    for thread in exporting():
        thread.join(3)
    assert exporting() == []


def test_more_open_spans_than_the_bound_are_not_made(serving, collector, monkeypatch):
    monkeypatch.setattr("monitor.api.spans._MAX_OPEN", 2)
    traced = serving(collector.url)
    traced.spans.grace_s = 3600.0  # so all of them stay open
    answers = [traced.ask() for _ in range(4)]
    assert [a.status_code for a in answers] == [200] * 4
    traced.close()
    seen = {table(s.attributes)["midstream.request_id"] for s in collector.spans}
    assert seen == {identity(a) for a in answers[:2]}
