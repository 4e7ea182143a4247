"""Logs: every line of stderr is one JSON object whatever a client sends, and nothing of what it wrote is in one."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
from hypothesis import given
from hypothesis import strategies as st

from monitor.api.access import Access
from monitor.config import load_settings
from monitor.logs import REQUEST, JsonFormatter, Lines, TextFormatter, start

from .collector import Collector
from .conftest import calibrated, publish

SECRET = "xylophone"
FORGED = '\n{"level": "forged"}\r\n\x1b[31m\x00\u2028\x85' + SECRET
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(message, *args, name="midstream", error=None, **extra):
    exc_info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord(name, logging.WARNING, "file", 1, message, args, exc_info)
    vars(made).update(extra)
    return made


@contextlib.contextmanager
def request(identity="1" * 32, trace=""):
    token = REQUEST.set((identity, trace))
    yield
    REQUEST.reset(token)


def as_json(made):
    line = JsonFormatter().format(made)
    assert line.isascii() and line.isprintable()
    return json.loads(line)


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def nested():
    """Three exceptions, each of which quotes the client."""
    try:
        try:
            raise ExceptionGroup(SECRET, [KeyError(SECRET)])
        except ExceptionGroup as inner:
            raise RuntimeError(f"can't read {SECRET}") from inner
    except RuntimeError as outer:
        outer.add_note(SECRET)
        return outer


@given(st.text(), st.text())
def test_a_json_line_is_one_line_whatever_is_in_it(message, value):
    said = as_json(record("%s", message, fields={"path": value}))
    assert said["message"] == message.strip() and said["path"] == value
    assert (said["level"], said["logger"]) == ("warning", "midstream")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])


@given(st.text())
def test_a_text_line_is_one_line_too(message):
    line = TextFormatter().format(record("%s", message))
    assert line.isprintable() and len(line.splitlines()) == 1


def test_a_line_names_the_request_it_is_about():
    assert not {"request_id", "trace_id"} & set(as_json(record("x")))
    with request("2" * 32, "3" * 32):
        said = as_json(record("x"))
        assert (said["request_id"], said["trace_id"]) == ("2" * 32, "3" * 32)
        assert TextFormatter().format(record("x")).endswith("midstream: x request_id=" + "2" * 32)


def test_a_traceback_is_one_field_and_quotes_nobody():
    with request():
        said = as_json(record("Exception in ASGI application\n", name="uvicorn.error", error=nested()))
        text = TextFormatter().format(record("x", error=nested()))
    assert said["exception"] == "RuntimeError" and said["message"] == "Exception in ASGI application"
    for whole in (said["traceback"], text):
        frames = [line for line in whole.splitlines() if line.startswith("  File")]
        assert frames and "in nested" in frames[0] and "test_logs.py" in frames[0]
        assert [name in whole for name in ("RuntimeError", "ExceptionGroup", "KeyError")] == [True] * 3
        assert SECRET not in "\n".join(line for line in whole.splitlines() if not line.startswith("    "))
        assert SECRET not in whole


def test_outside_of_a_request_an_exception_says_what_it_says():
    assert "no such disk" in as_json(record("x", error=raised(OSError("no such disk"))))["traceback"]
    loop = RuntimeError("a")
    loop.__cause__ = loop
    assert as_json(record("x", error=raised(loop)))["traceback"].count("RuntimeError: a") == 1


def test_uvicorns_access_log_loses_the_query():
    args = ("1.2.3.4:5", "GET", f"/v1/models?q={SECRET}", "1.1", 200)
    made = record('%s - "%s %s HTTP/%s" %d', *args, name="uvicorn.access")
    assert as_json(made)["message"] == '1.2.3.4:5 - "GET /v1/models HTTP/1.1" 200'


def test_what_is_printed_on_stderr_is_logged_line_by_line(caplog):
    caplog.set_level(logging.INFO, "midstream")
    lines = Lines()
    print("one", "two", file=lines)
    lines.write("10%\r20%\r")
    lines.write("100%\r\n\n%s rest")
    assert [r.getMessage() for r in caplog.records] == ["one two", "100%"]
    assert not lines.isatty() and lines.fileno() == 2 and lines.writable()


def test_text_leaves_an_applications_own_logging_alone():
    root = logging.getLogger()
    before, stderr = list(root.handlers), sys.stderr
    start(load_settings())
    assert root.handlers == before and sys.stderr is stderr


# --- servers of their own: what really comes out ------------------------------------------------------------------


def lines(text):
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(one) for one in found)
    assert "forged" not in {one["level"] for one in found}
    return found


BUG = """
import socket, sys, uvicorn, warnings
from monitor import logs
from monitor.api.edge import Edge
from monitor.config import load_settings
from monitor.metrics import Metrics
settings = load_settings(log_format="json", access_log=True)
logs.start(settings)

async def app(scope, receive, send):
    if scope["type"] == "http":
        raise RuntimeError((await receive())["body"].decode())

listener = socket.create_server(("127.0.0.1", 0))
edge = Edge.of(settings, Metrics())
print("listening", listener.getsockname()[1], file=sys.stderr)
warnings.warn("one of these", stacklevel=1)
config = uvicorn.Config(edge.around(app), lifespan="off", **edge.server_options())
try:
    uvicorn.Server(config).run(sockets=[listener])
except KeyboardInterrupt:
    pass
raise OSError("uncaught")
"""


class Process:
    """A program that says in a log line where it listens; `stop` returns its log, and `code` how it ended."""

    def __init__(self, folder, arguments, **settings):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MIDSTREAM_")}
        environment |= {"XDG_STATE_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        environment |= {f"MIDSTREAM_{k.upper()}": str(v) for k, v in settings.items()}
        self.err = folder / "err.txt"
        with self.err.open("w") as err, (folder / "out.txt").open("w") as out:
            self.process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=environment)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"listening (\d+)|http://127.0.0.1:(\d+)/v1", self.err.read_text())):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, "only a guard"
            time.sleep(0.1)
        self.port = int(found[1] or found[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.code = self.process.wait(60)
        return self.err.read_text()


def test_a_bug_is_logged_with_its_request_and_without_the_body(tmp_path):
    server = Process(tmp_path, ["-c", BUG])
    try:
        answer = httpx.post(server.url + "/v1/chat/completions", content=json.dumps(FORGED), timeout=60)
        assert answer.status_code == 500
    finally:
        text = server.stop(signal.SIGINT)
    said = lines(text)
    (bug,) = [one for one in said if one["logger"] == "uvicorn.error" and one["level"] == "error"]
    (access,) = [one for one in said if one["logger"] == "midstream.access"]
    assert (bug["exception"], bug["message"]) == ("RuntimeError", "Exception in ASGI application")
    assert re.fullmatch("[0-9a-f]{32}", bug["request_id"]) and bug["request_id"] == access["request_id"]
    assert "in app" in bug["traceback"] and access["status"] == 0  # this application answered nothing itself
    assert SECRET not in text
    assert ["one of these" in one["message"] for one in said if one["logger"] == "py.warnings"] == [True]
    assert (said[-1]["level"], said[-1]["exception"]) == ("critical", "OSError")


def test_a_whole_server(tiny, random_probe, tmp_path):
    """Start-up, requests of every kind, both ports, shutdown: all JSON."""
    probes = [(random_probe, {"calibration": calibrated(1e9)})]
    _, settings = publish(tiny, probes, tmp_path / "store")
    collector = Collector()
    arguments = ["-m", "monitor.cli", "serve", "--port", "0", "--model", tiny.module.config.name_or_path]
    server = Process(
        tmp_path,
        arguments,
        store=settings.store,
        log_format="json",
        access_log="true",
        otlp_endpoint=collector.url,
        admin_key="a-key-of-sixteen-characters",
        admin_port=0,
    )
    try:
        body = {"model": tiny.name, "messages": [{"role": "user", "content": FORGED}], "max_tokens": 4}
        asked = httpx.post(
            server.url + "/v1/chat/completions?key=" + SECRET,
            json=body,
            headers={"traceparent": TRACEPARENT, "x-request-id": SECRET, "user-agent": SECRET},
            timeout=60,
        )
        assert asked.status_code == 200
        refused = httpx.post(server.url + "/v1/chat/completions", json=body | {SECRET: FORGED}, timeout=60)
        assert refused.status_code == 400 and SECRET in refused.text  # a refusal may quote; the log may not
        for raw in (
            b"GET /%0a%7b%22level%22:%22forged%22%7d%0d%0a%c3%a9%00%1b HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"nonsense\n" + json.dumps({"level": "forged"}).encode() + b"\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(raw)
                assert client.recv(64).startswith(b"HTTP/1.1 4")
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    finally:
        text = server.stop()
        collector.close()
    said = lines(text)
    assert server.code == 0 and any("midstream ready on" in one["message"] for one in said)
    assert any("admin port on" in one["message"] for one in said)
    access = [one for one in said if one["logger"] == "midstream.access"]
    assert [(one["method"], one["status"]) for one in access] == [("POST", 200), ("POST", 400), *[("GET", 404)] * 2]
    first = access[0]
    assert first["path"] == "/v1/chat/completions" and first["duration_ms"] > 0
    assert first["request_id"] == asked.headers["x-midstream-request-id"]
    assert first["trace_id"] == TRACEPARENT.split("-")[1]
    assert access[2]["path"] == "/%0A%7B%22level%22%3A%22forged%22%7D%0D%0A%C3%A9%00%1B"
    assert len(access[3]["path"]) == 200
    assert SECRET not in text
    _, decided = collector.of(first["request_id"])
    assert (decided["midstream.decision"], decided["gen_ai.usage.output_tokens"]) == ("allow", 4)
    spans = {s.trace_id.hex() for s in collector.spans}
    assert {one["trace_id"] for one in access} == spans and len(spans) == 4
    for line in (tmp_path / "out.txt").read_text().splitlines():
        assert json.loads(line)["event"]


@given(st.text(min_size=1).filter(lambda p: p not in ("/health", "/ready", "/metrics")))
def test_no_path_can_forge_a_line(path):
    def run():
        coroutine = Access(app, None, log=True)(
            {"type": "http", "method": "GET", "path": path, "headers": []}, None, None
        )
        with contextlib.suppress(StopIteration):
            coroutine.send(None)

    async def app(scope, receive, send):
        return None

    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("midstream.access")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        run()
    finally:
        log.removeHandler(handler)
    (line,) = written.getvalue().splitlines()
    assert re.fullmatch(r"[\w/.~%-]{0,200}", json.loads(line)["path"], re.ASCII)
