"""OpenTelemetry: one span for each request, in the caller's trace, with the verdict and every probe's reading. No text.

Names follow the semantic conventions of OpenTelemetry for generative AI; what is ours begins with `midstream.`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Scope

from monitor import __version__
from monitor.config import Settings
from monitor.errors import ConfigInvalid
from monitor.types import SEVERITY, Coverage, ProbeReading, Record

OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/moderations": "moderation",
    "/beta/litellm_basic_guardrail_api": "moderation",
}
"""gen_ai.operation.name by route. A path that is none of these is the client's own text, and in no span."""
_GENERATE_NOTHING = ("embeddings", "moderation")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CONTEXT = (b"traceparent", b"tracestate")
_COUNTS = tuple(f.name for f in dataclasses.fields(Coverage) if f.name != "causes")
_GRACE_S = 3.0
"""A record may come after its answer: the engine ends an aborted sequence at its next step."""
_MAX_OPEN = 10_000
_FLUSH_S = 5.0
_log = logging.getLogger("midstream.spans")


@dataclasses.dataclass(slots=True)
class Open:
    """A request's span. records: with the time they came, ns since 1970; headers: W3C's, for what stands behind us"""

    span: Any
    operation: str
    headers: list[tuple[bytes, bytes]]
    records: list[tuple[int, Record]] = dataclasses.field(default_factory=list)

    @property
    def trace_id(self) -> str:
        return f"{self.span.get_span_context().trace_id:032x}"


class Spans:
    """Those that are open, by our request id. `begin` and `end` belong to the event loop; `record` may be called from
    any thread, and only keeps the record.

    provider: the SDK's TracerProvider, ours alone; exporter: what it sends by; grace_s: how long after its answer a
    request's records may come
    """

    def __init__(self, provider: Any, exporter: Any, grace_s: float = _GRACE_S) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._exporter, self.grace_s, self._trace = provider, exporter, grace_s, trace
        self._tracer = provider.get_tracer("midstream", __version__)
        self._w3c = TraceContextTextMapPropagator()
        self._open: dict[str, Open] = {}
        self._full_since = 0.0

    @classmethod
    def of(cls, settings: Settings, grace_s: float = _GRACE_S) -> Spans | None:
        """None without an endpoint. raises: ConfigInvalid if the packages are missing or the protocol is another"""
        endpoint = settings.otlp_endpoint
        if _switched_off() or (endpoint is None and not _asked_for()):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ImportError as error:
            raise ConfigInvalid(
                "an OTLP endpoint is set, but OpenTelemetry is not installed: pip install midstream[otel], or unset it"
            ) from error
        if endpoint is not None and not endpoint.endswith("/v1/traces"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "midstream"}))
        # The SDK's own default samples as the caller's traceparent says: a client could switch its span off.
        sampler = None if "OTEL_TRACES_SAMPLER" in os.environ else ALWAYS_ON
        provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, exporter, grace_s)

    def begin(self, request_id: str, scope: Scope) -> Open | None:
        """None when too many are open. scope: of the HTTP request; a traceparent that is not valid is ignored"""
        if len(self._open) >= _MAX_OPEN:
            self._say_full()
            return None
        given = [(k.decode(), v.decode("latin-1")) for k, v in scope["headers"] if k in CONTEXT]
        twice = sum(k == "traceparent" for k, _ in given) > 1
        operation = OPERATIONS.get(scope["path"], "")
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        attributes = {"http.request.method": method, "midstream.request_id": request_id}
        if operation:
            attributes |= {"http.route": scope["path"], "gen_ai.operation.name": operation}
            attributes |= {"gen_ai.provider.name": "midstream", "gen_ai.response.id": request_id}
        # Collectors group by name, so it is one of a few: the model, which the conventions append, a client may choose.
        span = self._tracer.start_span(
            operation or method,
            self._w3c.extract({} if twice else _joined(given)),
            self._trace.SpanKind.SERVER,
            attributes,
        )
        outgoing: dict[str, str] = {}
        self._w3c.inject(outgoing, self._trace.set_span_in_context(span))
        headers = [(k.encode(), v.encode("latin-1")) for k, v in outgoing.items()]
        opened = self._open[request_id] = Open(span, operation, headers)
        return opened

    def record(self, record: Record) -> None:
        """Of a finished sequence, whosever it is."""
        # A request that has several texts judged asks as ID, ID-1, ID-2, ...
        opened = self._open.get(record.request_id.partition("-")[0])
        if opened is not None:
            opened.records.append((time.time_ns(), record))

    def end(self, request_id: str, status: int, error: str | None) -> None:
        """The answer has been sent, or nobody is left to take it. status: 0 if none was; error: an exception's type"""
        opened = self._open.get(request_id)
        if opened is None:  # closed before its answer had ended
            return
        span, ended = opened.span, time.time_ns()
        if status:
            span.set_attribute("http.response.status_code", status)
        if error is not None or status >= 500:
            span.set_attribute("error.type", error or str(status))
            span.set_status(self._trace.StatusCode.ERROR)
        asyncio.get_running_loop().call_later(self.grace_s, self._finish, request_id, ended)

    def _finish(self, request_id: str, ended: int) -> None:
        opened = self._open.pop(request_id, None)
        if opened is None:
            return
        if opened.records and opened.span.is_recording():
            describe(opened)
        opened.span.end(ended)

    def close(self, timeout_s: float = _FLUSH_S) -> None:
        """End what is open, and send what is queued for at most `timeout_s`. The event loop has stopped."""
        for request_id in list(self._open):
            self._finish(request_id, time.time_ns())
        # The SDK would wait 30 s for a collector that does not answer, and go on with what it had begun.
        closing = threading.Thread(target=self._provider.shutdown, name="midstream-spans", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            _log.warning("the OTLP collector did not take the last spans in %g s", timeout_s)
            self._exporter.shutdown()

    def _say_full(self) -> None:
        now = time.monotonic()
        if now - self._full_since > 60:
            self._full_since = now
            _log.warning("%d spans are open; new requests have none", _MAX_OPEN)


def _switched_off() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"


def _asked_for() -> bool:
    """By OpenTelemetry's own variables. raises: ConfigInvalid for a protocol that is not spoken here"""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    name = next((n for n in names if os.environ.get(n)), None)
    if name is None:
        return False
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[p] for p in protocols if os.environ.get(p)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigInvalid(
            f"{name} is set with protocol {protocol!r}, but spans go by http/protobuf: set MIDSTREAM_OTLP_ENDPOINT"
        )
    return True


def _joined(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """tracestate may come in several headers."""
    carrier: dict[str, str] = {}
    for name, value in given:
        carrier[name] = f"{carrier[name]},{value}" if name in carrier else value
    return carrier


def describe(opened: Open) -> None:
    """What the records say, as attributes and events of the span. At least one record."""
    span, records = opened.span, sorted((r for _, r in opened.records), key=lambda r: r.index)
    worst = max(records, key=lambda r: SEVERITY[r.verdict])
    attributes: dict[str, Any] = {
        "gen_ai.request.model": worst.model,
        "midstream.decision": worst.verdict.value,
        "midstream.policy": worst.policy,
    }
    for name in _COUNTS:
        attributes[f"midstream.coverage.{name}"] = sum(getattr(r.coverage, name) for r in records)
    if opened.operation not in _GENERATE_NOTHING:
        attributes["gen_ai.response.finish_reasons"] = [r.finish for r in records]
        attributes["gen_ai.usage.output_tokens"] = sum(r.released_tokens for r in records)
        if len(records) == 1 or records[0].route in ("chat", "responses", "messages"):  # one prompt, counted once
            attributes["gen_ai.usage.input_tokens"] = records[0].coverage.prompt_tokens
    span.set_attributes(attributes)
    for came, record in opened.records:
        for reading in record.readings:
            span.add_event("gen_ai.evaluation.result", _evaluation(record, reading), came)


def _evaluation(record: Record, reading: ProbeReading) -> dict[str, Any]:
    """score.value: a logit, absent if there is none; score.label: the verdict of this probe in this phase"""
    given = {
        "gen_ai.evaluation.name": reading.probe,
        "gen_ai.evaluation.score.value": reading.value,
        "gen_ai.evaluation.score.label": reading.action.value,
        "gen_ai.response.id": record.request_id,
        "midstream.choice": record.index,
        "midstream.phase": reading.phase.value,
        "midstream.probe.version": reading.version,
        "midstream.mode": reading.mode.value,
        "midstream.threshold": reading.threshold,
        "midstream.would_block": reading.would_block,
    }
    return {k: v for k, v in given.items() if v is not None}
