"""Records: what is written, told and counted is exact; a full queue, disk or receiver only costs rows."""

import contextlib
import json
import os
import socket
import sqlite3
import stat
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import generate_latest

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.notice import Webhook, notice, print_line
from monitor.policy.rule import Rule
from monitor.traffic import TrafficLog, find_records, record_json
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


# --- the traffic log ------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/er/records.sqlite3"


@contextlib.contextmanager
def log(path, keep=100_000, queue_size=10_000):
    """A log, and the list of its drops."""
    drops = []
    one = TrafficLog(path, keep, queue_size, drops.append)
    try:
        yield one, drops
    finally:
        one.close()


def stored(path):
    database = sqlite3.connect(path)
    rows = [r for (r,) in database.execute("SELECT request_id FROM records ORDER BY id")]
    database.close()
    return rows


def test_round_trip(path):
    second = record(index=1, verdict=Action.BLOCK, readings=(), coverage=coverage(causes={"not_finite": 2}))
    with log(path) as (one, drops):
        for each in (second, record(), record("r2")):
            one.put(each)
    found = find_records(path, "r1")
    assert found == json.loads(json.dumps([record_json(record()), record_json(second)]))  # by choice
    assert (found[0]["readings"][0]["value"], found[0]["readings"][0]["phase"]) == (1.23456789, "prompt")
    assert (found[1]["verdict"], found[1]["coverage"]["causes"]) == ("block", {"not_finite": 2})
    assert (find_records(path, "r3"), find_records(path, "' OR 1=1 --"), drops) == ([], [], [])


def test_close_writes_everything_in_order(path):
    names = [f"r{i}" for i in range(1000)]
    with log(path) as (one, drops):
        for name in names:
            one.put(record(name))
    assert stored(path) == names
    assert (drops, one.depth) == ([], 0)


def test_a_full_queue_drops_and_counts_exactly(path):
    with log(path, queue_size=5) as (one, drops):
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # the writer waits for this lock; it may hold one batch of 256
        for i in range(1000):
            one.put(record(f"r{i}"))
        assert one.depth <= 5
        other.execute("COMMIT")
        other.close()
    assert set(drops) == {1}
    assert len(drops) >= 1000 - 256 - 5
    assert len(stored(path)) == 1000 - len(drops)


def test_only_the_newest_are_kept(path):
    for start in (0, 30):  # and across restarts
        with log(path, keep=10) as (one, drops):
            for i in range(start, start + 30):
                one.put(record(f"r{i}"))
    assert stored(path) == [f"r{i}" for i in range(50, 60)]
    assert drops == []


def test_a_failing_disk_is_counted_and_survived(path):
    with log(path) as (one, drops):
        one.put(record("before"))
        until(lambda: stored(path) == ["before"])
        other = sqlite3.connect(path, isolation_level=None)
        schema = other.execute("SELECT sql FROM sqlite_master WHERE name = 'records'").fetchone()[0]
        other.execute("DROP TABLE records")
        for i in range(7):
            one.put(record(f"lost{i}"))
        until(lambda: sum(drops) == 7)
        other.execute(schema)
        other.close()
        one.put(record("after"))
    assert stored(path) == ["after"]
    assert sum(drops) == 7


def test_only_the_owner_may_read(path):
    old = os.umask(0)
    try:
        with log(path) as (one, _):
            one.put(record())
            until(lambda: path.with_name(path.name + "-wal").exists())
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == {path.name + end: 0o600 for end in ("", "-wal", "-shm")}


def test_a_log_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a database, and long enough to be read as a damaged one" * 20)
    for bad in (tmp_path, tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigInvalid, match="set MIDSTREAM_RECORDS"):
            TrafficLog(bad, 10, 10, lambda n: None)


@pytest.mark.parametrize("name", ["a b.sqlite3", "a#b.sqlite3", "a?b.sqlite3", "50%41.sqlite3"])
def test_any_file_name_can_be_read_back(tmp_path, name):
    with log(tmp_path / name) as (one, _):
        one.put(record())
    assert [r["request_id"] for r in find_records(tmp_path / name, "r1")] == ["r1"]


def test_a_file_that_is_no_log_is_refused(tmp_path):
    with pytest.raises(ConfigInvalid, match="no records"):
        find_records(tmp_path / "none", "r1")
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("junk", "empty"):
        with pytest.raises(ConfigInvalid, match=name):
            find_records(tmp_path / name, "r1")


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
        "finish": "content_filter", "released_tokens": 5, "unmonitored": 3,
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

    threading.Thread(target=serve, daemon=True).start()
    hook = Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", 10, 1, results.append)
    hook.put({"n": 1})
    hook.put({"n": 2})
    hook.close(20)
    listener.close()
    assert results == ["failed", "failed"]


# --- metrics --------------------------------------------------------------------------------------------------------


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"midstream_{name}", labels)


def test_counts_per_action():
    metrics = Metrics()
    for action in (Action.ALLOW, Action.ALLOW, Action.FLAG, Action.BLOCK, Action.UNMONITORED):
        finish = {Action.BLOCK: "content_filter", Action.UNMONITORED: "unmonitored"}.get(action, "stop")
        missing = action is Action.UNMONITORED
        one = reading(action, value=None if missing else 3.0)
        cover = coverage(prompt_scored=3, unmonitored=1, causes={"not_finite": 1}) if missing else coverage()
        metrics.record(record(verdict=action, finish=finish, readings=(one,), coverage=cover))
    counts = {a: value(metrics, "requests_total", route="chat", action=a) for a in Action}
    assert counts == {Action.ALLOW: 2, Action.FLAG: 1, Action.ESCALATE: None, Action.BLOCK: 1, Action.UNMONITORED: 1}
    assert value(metrics, "flags_total", probe="demo", phase="prompt") == 1
    assert value(metrics, "blocks_total", probe="demo", phase="prompt") == 1
    assert value(metrics, "tokens_scored_total", phase="prompt") == 4 * 4 + 3
    assert value(metrics, "tokens_scored_total", phase="response") == 5 * 4
    assert value(metrics, "final_unscored_tokens_total") == 5
    assert value(metrics, "unmonitored_tokens_total", cause="not_finite") == 1
    assert value(metrics, "request_score_count", probe="demo", phase="prompt") == 4  # a missing value is no 0
    assert value(metrics, "held_tokens_count") == 5
    assert value(metrics, "fail_open_total") == 0
    assert {f: value(metrics, "finished_total", finish=f) for f in ("stop", "content_filter", "unmonitored")} == {
        "stop": 3, "content_filter": 1, "unmonitored": 1,
    }  # fmt: skip


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("finish", ["stop", "length", "unmonitored", "aborted"])
def test_fail_open_is_an_answer_served_over_missing_scores_of_a_blocking_probe(mode, finish):
    metrics = Metrics()
    broken = tuple(reading(Action.UNMONITORED, phase, mode, None) for phase in Phase)
    metrics.record(record(verdict=Action.UNMONITORED, finish=finish, readings=broken))
    assert value(metrics, "fail_open_total") == (mode is Mode.BLOCK and finish in ("stop", "length"))


def test_would_block_and_extreme_values():
    metrics = Metrics()
    for logit in (1e30, -1e30):
        shadow = reading(mode=Mode.SHADOW, value=logit, would_block=logit > 0)
        metrics.record(record(readings=(shadow,)))
    assert value(metrics, "would_block_total", probe="demo", phase="prompt") == 1
    assert value(metrics, "request_score_sum", probe="demo", phase="prompt") == pytest.approx(1.0)


def samples(metrics):
    return {(s.name, *sorted(s.labels.items())) for family in metrics.registry.collect() for s in family.samples}


def test_labels_are_bounded():
    metrics = Metrics()
    metrics.record(record())
    before = samples(metrics)
    for i in range(500):
        metrics.record(record(f"id{i}", i, created=float(i), model=f"model{i}", token_scores={f"t{i}": [0.0]}))
    assert samples(metrics) == before
    assert value(metrics, "requests_total", route="chat", action="allow") == 501


def test_probes_are_listed_and_their_counters_start_at_zero():
    metrics = Metrics()
    how = Aggregation("max")
    rules = {
        "chat": [Rule("demo", "v1", 0, Phase.PROMPT, Mode.BLOCK, 1.5, how, "closed")],
        "raw": [Rule("demo", "v1", 0, Phase.PROMPT, Mode.SHADOW, None, how, "closed")],
    }
    metrics.probes([("demo", "v1", "ab" * 32, "2")], rules)
    assert value(metrics, "probe_info", probe="demo", version="v1", sha256="ab" * 8, layers="2") == 1
    assert value(metrics, "threshold_logit", probe="demo", phase="prompt", format="chat") == 1.5
    assert value(metrics, "threshold_logit", probe="demo", phase="prompt", format="raw") is None
    for name in ("flags_total", "blocks_total", "would_block_total"):
        assert [value(metrics, name, probe="demo", phase=phase) for phase in Phase] == [0, 0]


def test_exposition_has_every_name_with_our_prefix():
    metrics = Metrics()
    metrics.record(record(coverage=coverage(causes={"gap": 1})))
    metrics.scored(0.001, 7)
    metrics.records_dropped.inc(3)
    metrics.webhook.labels("sent").inc()
    metrics.rejected.labels("429").inc()
    depth = [4.0]
    metrics.gauge("record_queue_depth", "Records that wait.", lambda: depth[0])
    names = {line.split()[2] for line in generate_latest(metrics.registry).decode().splitlines() if "# TYPE" in line}
    assert all(name.startswith("midstream_") for name in names)
    wanted = (
        "requests_total", "finished_total", "tokens_scored_total", "final_unscored_tokens_total",
        "unmonitored_tokens_total", "fail_open_total", "flags_total", "blocks_total", "would_block_total",
        "request_score", "score_seconds", "held_tokens", "threshold_logit", "probe_info", "records_dropped_total",
        "webhook_total", "rejected_total", "ready", "record_queue_depth",
    )  # fmt: skip
    assert {f"midstream_{name}" for name in wanted} <= names
    assert value(metrics, "score_seconds_count") == 1
    depth[0] = 9.0
    assert value(metrics, "record_queue_depth") == 9
