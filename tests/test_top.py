"""`midstream top`, the command, against real sockets: once, in a pipe, in a terminal, over an outage."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from monitor.cli import main

from .conftest import calibrated
from .scraped import page

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"NO_PROXY": "127.0.0.1"}


class FakeServer:
    """/metrics with what a list of pages says; its last page is repeated. Keeps the keys it was sent."""

    def __init__(self, *pages):
        self.keys, left = [], list(pages)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.keys.append(self.headers["Authorization"])
                status, body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status if self.path == "/metrics" else 404)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextlib.contextmanager
def fake(*pages):
    server = FakeServer(*pages)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*arguments) -> (exit code, stdout, stderr), in this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("COLUMNS", raising=False)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "top", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return go


def busy(n):
    return (
        200,
        f'# TYPE midstream_requests counter\nmidstream_requests_total{{action="block"}} {n}\nmidstream_ready 1\n',
    )


def test_once_is_one_snapshot_of_two_looks(run):
    with fake(busy(10), busy(14)) as server:
        code, out, err = run("--url", server.url, "--once", "--json", "--interval", "0.5", "--key", "a-secret")
        assert server.keys == ["Bearer a-secret"] * 2
    (line,) = out.splitlines()
    shot = json.loads(line)
    assert (code, err, shot["error"], shot["url"]) == (0, "", None, server.url)
    assert shot["requests"] == {"block": 14}
    assert 0 < shot["request_rates"]["block"] <= 8.0  # 4 in half a second or a little more


def test_once_in_a_pipe_is_text_of_80_columns(run):
    with fake((200, page())) as server:
        code, out, err = run("--url", server.url + "/metrics", "--once", "--interval", "0.1")
    assert (code, err) == (0, "")
    assert "\x1b" not in out and "tiny-llama" in out
    assert max(map(len, out.splitlines())) <= 80


def unreachable(run, url, says):
    code, out, err = run("--url", url, "--once")
    assert (code, out) == (1, "")
    assert err.startswith(f"midstream: {url} can't be reached: ") and says in err and err.count("\n") == 1
    code, out, err = run("--url", url, "--once", "--json")
    assert (code, err) == (1, "") and says in json.loads(out)["error"]


@pytest.mark.parametrize(("answer", "says"), [((500, "oh"), "answers 500"), ((200, "<html>"), "not Prometheus' text")])
def test_once_without_our_metrics_is_exit_code_1(run, answer, says):
    with fake(answer) as server:
        unreachable(run, server.url, says)


def test_once_without_a_server_is_exit_code_1(run):
    with fake(busy(1)) as server:
        pass
    unreachable(run, server.url, "Connection refused")


def test_once_without_a_second_look_is_exit_code_1(run):
    with fake(busy(1), (500, "oh")) as server:
        unreachable(run, server.url, "answers 500")


def test_a_url_that_is_none_is_refused(run):
    said = "midstream: --url 'localhost:8000' must begin with http:// or https://\n"
    assert run("--url", "localhost:8000", "--once") == (2, "", said)


def heeding():
    """A job that a shell started in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_it_goes_on_over_an_outage_and_a_restart_until_ctrl_c():
    with fake(busy(10), (503, ""), busy(3)) as server:
        command = [sys.executable, "-m", "monitor.cli", "top", "--url", server.url, "--json", "--interval", "0.1"]
        with subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
        ) as top:
            lines = [json.loads(top.stdout.readline()) for _ in range(4)]
            top.send_signal(signal.SIGINT)
            assert top.wait(60) == 0
            assert top.stderr.read() == ""
    assert [line["error"] for line in lines] == [None, "it answers 503", None, None]
    rates = [line["request_rates"]["block"] for line in lines if line["error"] is None]
    assert rates[0] is None and rates[1] > 0 and rates[2] == 0  # 3 since the restart, not 7 fewer


def test_a_pipe_gets_one_screen_after_the_other():
    with fake((200, page())) as server:
        command = [sys.executable, "-m", "monitor.cli", "top", "--url", server.url, "--interval", "0.1"]
        with subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
        ) as top:
            lines = []
            while sum(line.startswith("midstream ") for line in lines) < 4:
                lines.append(top.stdout.readline())
            top.send_signal(signal.SIGINT)
            assert (top.wait(60), top.stderr.read()) == (0, "")
    assert sum(line.startswith("last minute") for line in lines) == 1  # the third has one, the fourth is just begun
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_a_terminal_gets_a_screen_of_its_own_and_has_it_back():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with fake((200, page())) as server:
        command = [sys.executable, "-m", "monitor.cli", "top", "--url", server.url, "--interval", "0.1"]
        shown = b""
        terminal = ENVIRONMENT | {"TERM": "xterm-256color"}
        with subprocess.Popen(
            command, env=terminal, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=heeding
        ) as top:
            while shown.count(b"tiny-llama") < 3:
                shown += os.read(ours, 65536)
            top.send_signal(signal.SIGINT)
            while b"\x1b[?1049l" not in shown:
                shown += os.read(ours, 65536)
            assert top.wait(60) == 0
    os.close(ours)
    os.close(theirs)
    assert shown.startswith(b"\x1b[?1049h") and b"Traceback" not in shown


def test_a_real_server(run, serve, tiny, random_probe):
    server = serve(tiny, [(random_probe, {"calibration": calibrated(50.0)})])
    for _ in range(3):
        answer = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 4, "temperature": 0})
        assert answer.status_code == 200
    server.sink.wait(3)
    code, out, err = run("--url", server.url, "--once", "--json", "--interval", "0.2")
    shot = json.loads(out)
    assert (code, err, shot["error"]) == (0, "", None)
    assert shot["requests"] == {"allow": 3}
    assert shot["request_rates"]["allow"] == 0
    assert shot["tokens_scored"]["prompt"] == 3 * len("hello")
    assert (shot["leaked"], shot["fail_open"], shot["unmonitored"]) == (0, 0, {})
    assert shot["score_seconds"]["p99"] > 0
    code, out, _ = run("--url", server.url, "--once", "--interval", "0.1")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
