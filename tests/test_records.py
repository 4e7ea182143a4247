"""Records: what is told and counted is exact; a full queue or a slow receiver only costs notices."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from monitor.notice import Webhook, notice, print_line
from monitor.types import Action, Coverage, Mode, Phase, ProbeReading, Record


def coverage(**changes):
    fields = {
        "prompt_tokens": 4, "response_tokens": 5, "prompt_scored": 4, "response_scored": 4,
        "final_unscored": 1, "unmonitored": 0, "not_computed": 0, "causes": {},
    }  # fmt: skip
    return Coverage(**(fields | changes))


def reading(action=Action.ALLOW, phase=Phase.PROMPT, mode=Mode.BLOCK, value=1.23456789, **changes):
    fields = {
        "probe": "demo", "version": "v1", "threshold": 2.0000001, "newest": value, "peak_position": 3,
        "peak_score": 1.5, "crossed_at": None, "would_block": False,
    }  # fmt: skip
    return ProbeReading(phase=phase, mode=mode, value=value, action=action, **(fields | changes))


def record(request_id="r1", index=0, verdict=Action.ALLOW, **changes):
    fields = {
        "created": 1.5, "model": "tiny", "route": "chat", "format": "chat", "finish": "stop", "released_tokens": 5,
        "held_tokens": 1, "coverage": coverage(), "readings": (reading(),), "counted": ((1, 2),),
        "token_scores": {"demo": [0.5, -1.25]},
    }  # fmt: skip
    return Record(request_id=request_id, index=index, verdict=verdict, **(fields | changes))


def until(condition):
    """Wait for another thread; the bound only guards against hanging."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- notices --------------------------------------------------------------------------------------------------------


def test_an_allow_is_no_notice():
    assert notice(record()) is None


@pytest.mark.parametrize("verdict", [Action.FLAG, Action.BLOCK, Action.UNMONITORED])
def test_the_shape_of_a_notice(verdict):
    readings = (
        reading(Action.BLOCK, crossed_at=7, value=3.456789),
        reading(Action.ALLOW),
        reading(Action.ALLOW, Phase.RESPONSE, Mode.SHADOW, 5.0, would_block=True),
        reading(Action.UNMONITORED, Phase.RESPONSE, value=None, threshold=None),
    )
    event = notice(
        record("r9", 2, verdict, readings=readings, coverage=coverage(unmonitored=3), finish="content_filter")
    )
    probes = event.pop("probes")
    assert event == {
        "event": f"midstream.{verdict}", "request_id": "r9", "choice": 2, "time": 1.5, "model": "tiny",
        "route": "chat", "key": "", "policy": "default",
        "finish": "content_filter", "released_tokens": 5, "scored_by": "engine", "unmonitored": 3,
    }  # fmt: skip
    common = {"probe": "demo", "version": "v1"}
    assert probes == [
        common | {"phase": "prompt", "mode": "block", "action": "block", "value": 3.4568, "threshold": 2.0,
                  "crossed_at": 7},
        common | {"phase": "response", "mode": "shadow", "action": "allow", "value": 5.0, "threshold": 2.0,
                  "crossed_at": None},
        common | {"phase": "response", "mode": "block", "action": "unmonitored", "value": None, "threshold": None,
                  "crossed_at": None},
    ]  # fmt: skip


def test_a_notice_holds_no_scores_and_is_one_line(capsys):
    event = notice(record(verdict=Action.FLAG))
    assert "token_scores" not in json.dumps(event)
    print_line(event | {"model": "two\nlines"})
    out = capsys.readouterr().out
    assert (out.count("\n"), out[-1]) == (1, "\n")
    assert json.loads(out) == event | {"model": "two\nlines"}


class Receiver:
    """A webhook's receiver: answers with the statuses given, then 200; keeps what it got. `gate` holds answers back."""

    def __init__(self, *statuses):
        self.got, self.gate, left = [], threading.Event(), list(statuses)
        self.gate.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                receiver.got.append((self.command, self.path, self.headers["Content-Type"], body))
                receiver.gate.wait(20)
                self.send_response(left.pop(0) if left else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def bodies(self):
        return [json.loads(body) for method, _, _, body in self.got if method == "POST"]

    def stop(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receive(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = []

    def start(*statuses):
        running.append(Receiver(*statuses))
        return running[-1]

    yield start
    for receiver in running:
        receiver.stop()


def send(url, events, attempts=4, queue_size=100):
    """Put, then close: closing sends what is queued, and does not wait between retries."""
    results = []
    hook = Webhook(url, queue_size, attempts, results.append)
    for event in events:
        hook.put(event)
    hook.close(20)
    return Counter(results)


def test_the_webhook_posts_json_and_close_flushes(receive):
    receiver, events = receive(), [{"n": i} for i in range(20)]
    assert send(receiver.url, events) == {"sent": 20}
    assert receiver.bodies() == events
    assert {got[:3] for got in receiver.got} == {("POST", "/hook", "application/json")}


@pytest.mark.parametrize(
    ("statuses", "attempts", "result", "tries"),
    [
        ((500, 503), 4, "sent", 3),
        ((429,), 4, "sent", 2),
        ((500, 500, 500, 500), 3, "failed", 3),
        ((500,), 1, "failed", 1),
        ((400,), 4, "failed", 1),
        ((404,), 4, "failed", 1),
        ((500, 400), 4, "failed", 2),
    ],
)
def test_the_webhook_retries_what_may_pass(receive, statuses, attempts, result, tries):
    receiver = receive(*statuses)
    assert send(receiver.url, [{"n": 1}], attempts) == {result: 1}
    assert receiver.bodies() == [{"n": 1}] * tries


def test_one_refused_notice_does_not_stop_the_next(receive):
    receiver = receive(400)
    assert send(receiver.url, [{"n": 1}, {"n": 2}]) == {"failed": 1, "sent": 1}


def test_a_receiver_that_is_away_is_counted():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert send(f"http://127.0.0.1:{port}/", [{"n": 1}, {"n": 2}], attempts=2) == {"failed": 2}


def test_a_full_webhook_queue_drops_and_counts(receive):
    receiver, results = receive(), []
    receiver.gate.clear()
    hook = Webhook(receiver.url, 2, 1, results.append)
    hook.put({"n": 0})
    until(lambda: receiver.got)  # the thread is busy with the first one; two may wait
    for n in range(1, 6):
        hook.put({"n": n})
    assert results == ["dropped"] * 3
    receiver.gate.set()
    hook.close(20)
    assert Counter(results) == {"sent": 3, "dropped": 3}
    assert receiver.bodies() == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_redirect_never_counts_as_sent_without_the_notice(receive):
    """urllib follows a 302 with a GET and no body."""
    receiver = receive(302)
    result = send(receiver.url, [{"n": 1}], attempts=1)
    delivered = [json.loads(body) for method, path, _, body in receiver.got if path == "/elsewhere" and body]
    assert result == ({"sent": 1} if delivered else {"failed": 1})


@pytest.mark.parametrize("answer", [b"garbage\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000])
def test_a_receiver_that_speaks_no_http_costs_its_notice_only(monkeypatch, answer):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listener, results = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    hook = Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", 10, 1, results.append)
    hook.put({"n": 1})
    hook.put({"n": 2})
    hook.close(20)
    listener.shutdown(socket.SHUT_RDWR)  # closing alone would leave the thread in `accept`
    listener.close()
    serving.join(20)
    assert results == ["failed", "failed"] and not serving.is_alive()
