"""An OTLP/HTTP collector in this process: a real socket, and the protobuf of what came."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SECRET = "xylophone"  # in every prompt of these tests
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def plain(value):
    """An AnyValue as Python has it."""
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [plain(v) for v in found.values] if kind == "array_value" else found


def table(attributes):
    return {a.key: plain(a.value) for a in attributes}


class Collector:
    """raw: bodies as they came; hold: while it is clear, no export is answered"""

    def __init__(self):
        self.raw, self.paths, self.hold = [], [], threading.Event()
        self.hold.set()
        told, collector = threading.Condition(), self
        self._told = told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                with told:
                    collector.raw.append(body)
                    collector.paths.append(self.path)
                    told.notify_all()
                collector.hold.wait(60)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def resources(self):
        return [r for body in self.raw for r in ExportTraceServiceRequest.FromString(body).resource_spans]

    @property
    def spans(self):
        return [span for r in self.resources for scope in r.scope_spans for span in scope.spans]

    def wait(self, n=1, timeout_s=60):
        """At least n spans; the time-out only guards against hanging."""
        deadline = time.monotonic() + timeout_s
        with self._told:
            while len(self.spans) < n:
                assert self._told.wait(deadline - time.monotonic()), f"{len(self.spans)} of {n} spans"
        return self.spans

    def of(self, request_id):
        """(span, attributes) of one request."""
        found = [(s, table(s.attributes)) for s in self.spans]
        (one,) = [(s, a) for s, a in found if a.get("midstream.request_id") == request_id]
        return one


@pytest.fixture
def collector():
    running = Collector()
    yield running
    running.close()
