"""`midstream top`: rates and quantiles by value, the screen at 80 columns, and the command against real sockets."""

import contextlib
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from rich.console import Console

from monitor.aggregate import Aggregation
from monitor.cli import main
from monitor.metrics import Metrics
from monitor.metrics.table import series
from monitor.policy.rule import Rule
from monitor.top.scrape import Scrape, Unreachable, grown, grown_buckets, parse, quantile
from monitor.top.snapshot import BARS, ENOUGH, Quantiles, snapshot
from monitor.top.view import draw
from monitor.types import Action, Mode, Phase

from .conftest import calibrated
from .test_records import reading, record

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"NO_PROXY": "127.0.0.1"}


def scrape(at, samples="", started=None):
    lines = "# TYPE midstream_requests counter\n" + samples
    one = parse(lines, at)
    return Scrape(one.at, started, one.series, one.counters)


def requests(at, **verdicts):
    return scrape(at, "".join(f'midstream_requests_total{{action="{v}"}} {n}\n' for v, n in verdicts.items()))


# --- one reading ----------------------------------------------------------------------------------------------------


def test_series_are_found_and_summed_by_label():
    one = parse(
        "# TYPE midstream_blocks counter\n"
        'midstream_blocks_total{model="a",probe="p",phase="prompt"} 1\n'
        'midstream_blocks_total{model="b",probe="p",phase="prompt"} 2\n'
        'midstream_blocks_total{model="b",probe="p",phase="response"} 4\n'
        "# TYPE midstream_ready gauge\nmidstream_ready 1\n"
        'other_blocks_total{model="b"} 8\n',
        5.0,
    )
    assert one.total("blocks_total") == 7
    assert one.total("blocks_total", model="b") == 6
    assert one.by("phase", "blocks_total") == {"prompt": 3, "response": 4}
    assert (one.total("ready"), one.at, one.started) == (1, 5.0, None)


def test_what_is_not_there_is_not_known_and_what_did_not_happen_is_0():
    one = parse("# TYPE midstream_blocks counter\n# TYPE midstream_drift_psi_ratio gauge\n", 0.0)
    assert one.total("blocks_total", probe="p") == 0  # a counter with labels has no series before its first event
    assert one.total("drift_psi_ratio") is None
    assert one.total("flags_total") is None


def test_a_value_that_is_not_finite_is_not_known():
    one = parse("midstream_ready NaN\nmidstream_active_sequences +Inf\nmidstream_waiting_prompts 3\n", 0.0)
    assert [one.total(n) for n in ("ready", "active_sequences", "waiting_prompts")] == [None, None, 3]


def test_the_start_is_the_process_or_the_oldest_counter():
    text = "midstream_a_created 70\nmidstream_b_created 60\n"
    assert parse(text + "midstream_ready 1\n", 100.0).started == 60
    assert parse(text + "midstream_ready 1\nprocess_start_time_seconds 50\n", 100.0).started == 50


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<html><body>hello</body></html>", "not Prometheus' text"),
        ("midstream_ready one\n", "not Prometheus' text"),
        ("", "no metrics of Midstream's"),
        ("# TYPE vllm:num_requests gauge\nvllm:num_requests 4\n", "no metrics of Midstream's"),
    ],
)
def test_another_page_is_told(text, says):
    with pytest.raises(Unreachable, match=says):
        parse(text, 0.0)


# --- what grew ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "more"),
    [(7, 5, 2), (5, 5, 0), (3, 5, 3), (0, 5, 0), (4, None, 4), (None, 4, None), (None, None, None)],
)
def test_a_counter_that_fell_began_again(new, old, more):
    assert grown(new, old) == more


def test_a_histogram_that_fell_began_again_as_one():
    old = {0.1: 2.0, 1.0: 9.0, math.inf: 10.0}
    assert grown_buckets({0.1: 2.0, 1.0: 10.0, math.inf: 12.0}, old) == {0.1: 0, 1.0: 1, math.inf: 2}
    again = {0.1: 5.0, 1.0: 6.0, math.inf: 7.0}  # its first bucket did not fall
    assert grown_buckets(again, old) == again
    assert grown_buckets(again, {}) == again


def test_quantiles_are_lines_within_a_bucket():
    buckets = {1.0: 10.0, 2.0: 30.0, 4.0: 40.0, math.inf: 40.0}
    assert quantile(0.25, buckets) == 1.0
    assert quantile(0.5, buckets) == 1.5
    assert quantile(0.875, buckets) == 3.0
    assert quantile(1.0, buckets) == 4.0


def test_a_quantile_above_the_last_bound_is_that_bound():
    assert quantile(0.99, {1.0: 1.0, 2.0: 2.0, math.inf: 100.0}) == 2.0


def test_nothing_observed_has_no_quantile():
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {1.0: 0.0, math.inf: 0.0}) is None


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_one_reading_has_no_rates():
    shot = snapshot([requests(10.0, allow=5)])
    assert shot.requests == {"allow": 5}
    assert set(shot.request_rates.values()) == {None}
    assert shot.token_rate is None and shot.minute == []


def test_rates_are_between_the_two_newest():
    shot = snapshot([requests(6.0, allow=1), requests(8.0, allow=5), requests(10.0, allow=8, block=4)])
    assert shot.request_rates == {"allow": 1.5, "flag": 0, "escalate": 0, "block": 2, "unmonitored": 0}


def test_a_restart_gives_no_negative_rate():
    before, after = requests(8.0, allow=500, block=40), requests(10.0, allow=6)
    shot = snapshot([requests(7.0, allow=499, block=40), before, after])
    assert (shot.request_rates["allow"], shot.request_rates["block"]) == (3.0, 0.0)
    assert sum(bar.get("allow", 0) for bar in shot.minute) == pytest.approx(1 + 6)
    assert sum(bar.get("block", 0) for bar in shot.minute) == 0


def test_a_clock_that_is_set_back_gives_no_rate():
    shot = snapshot([requests(10.0, allow=1), requests(9.0, allow=2)])
    assert shot.request_rates["allow"] is None


def test_the_minute_has_a_bar_for_each_second():
    scrapes = [requests(100.0 + i, allow=i * (i + 1) / 2, block=i // 60) for i in range(62)]  # i more at second i
    shot = snapshot(scrapes)
    assert len(shot.minute) == BARS == 60
    assert [bar["allow"] for bar in shot.minute] == list(range(2, 62))  # the newest last; what is older is not seen
    assert [i for i, bar in enumerate(shot.minute) if "block" in bar] == [58]


def test_slow_looks_are_spread_over_the_time_between_them():
    shot = snapshot([requests(100.0, allow=0), requests(130.0, allow=60), requests(135.0, allow=60)])
    assert [bar.get("allow", 0) for bar in shot.minute] == [0] * 25 + [2] * 30 + [0] * 5


def steps(at, *seconds):
    registry = CollectorRegistry()
    one = Histogram("midstream_score_seconds", "x", buckets=(1.0, 2.0, 3.0), registry=registry)
    Counter("midstream_requests", "x", registry=registry)
    for s in seconds:
        one.observe(s)
    return parse(generate_latest(registry).decode(), at)


def test_quantiles_are_of_the_last_minute_where_that_is_enough():
    old, few = [0.5] * 1000, [2.5] * (ENOUGH - 1)
    seen = snapshot([steps(0.0, *old), steps(10.0, *old, *few)]).score_seconds
    assert not seen.recent and seen.p50 < 1
    seen = snapshot([steps(0.0, *old), steps(10.0, *old, *few, 2.5)]).score_seconds
    assert seen == Quantiles(2.5, pytest.approx(2.99), True)
    seen = snapshot([steps(0.0, *old, *few, 2.5), steps(70.0, *old, *few, 2.5)]).score_seconds
    assert not seen.recent


def test_ages_need_a_start_and_a_beat():
    shot = snapshot([scrape(100.0, "midstream_heartbeat_timestamp_seconds 97\nmidstream_ready 0\n", started=40.0)])
    assert (shot.uptime_s, shot.heartbeat_s, shot.ready) == (60, 3, False)
    shot = snapshot([scrape(100.0, "midstream_heartbeat_timestamp_seconds 0\n")])  # set up, never beaten
    assert (shot.uptime_s, shot.heartbeat_s, shot.ready) == (None, None, None)


def page():
    """Our own metrics after some traffic, as text."""
    metrics = Metrics(model="tiny-llama")
    rules = [Rule("demo", "v1", 0, phase, Mode.BLOCK, 1.5, Aggregation("mean"), "closed") for phase in Phase]
    metrics.probes([("demo", "v1", "ab" * 32, "2", "harm")], {"chat": rules})
    for gauge, value in (
        ("target_fpr_ratio", 0.005), ("observed_flag_ratio", 0.012), ("observed_flag_ratio_low", 0.0081),
        ("observed_flag_ratio_high", 0.0171), ("drift_psi_ratio", 0.31),
    ):  # fmt: skip
        getattr(metrics, gauge).labels("demo", "prompt", "chat").set(value)
    metrics.record(record())
    metrics.record(record(verdict=Action.FLAG, readings=(reading(Action.FLAG),)))
    metrics.record(record(verdict=Action.BLOCK, readings=(reading(Action.BLOCK), reading(would_block=True))))
    metrics.scored(0.00002, 7)
    metrics.review_backlog.set(2)
    return generate_latest(metrics.registry).decode()


def test_our_own_metrics_are_understood():
    shot = snapshot([parse(page(), 10.0)])
    assert shot.model == "tiny-llama"
    assert shot.requests == {"allow": 1, "flag": 1, "block": 1}
    prompt, response = shot.thresholds
    assert (prompt.probe, prompt.phase, prompt.format) == ("demo", "prompt", "chat")
    assert prompt.threshold == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert (prompt.target, prompt.seen, prompt.low, prompt.high, prompt.psi) == (0.005, 0.012, 0.0081, 0.0171, 0.31)
    assert (response.target, response.seen, response.psi) == (None, None, None)
    events = {e.phase: (e.flags, e.blocks, e.would_block) for e in shot.events}
    assert events == {"prompt": (1, 1, 1), "response": (0, 0, 0)}
    assert shot.events[0].scores.p50 == pytest.approx(0.75, abs=0.05)  # sigmoid(1.23)
    assert shot.tokens_scored == {"prompt": 12, "response": 12}
    assert (shot.final_unscored, shot.leaked, shot.fail_open, shot.unmonitored) == (3, 0, 0, {})
    assert (shot.dropped, shot.backlog, shot.queue) == (0, 2, 0)


def test_every_metric_that_is_read_exists():
    """By what the code asks of a reading, so that a renamed metric does not become a `-`."""
    asked = set()

    class Asked(Scrape):
        def of(self, name, **labels):
            asked.add("midstream_" + name)
            return super().of(name, **labels)

    one = parse(page(), 10.0)
    snapshot([Asked(one.at, one.started, one.series, one.counters)] * 2)
    assert len(asked) > 20
    assert asked <= series()


# --- the screen -----------------------------------------------------------------------------------------------------


def drawn(*args, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(*args))
    return console.file.getvalue()


def styled(*args):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(draw(*args))
    return console.file.getvalue()


RED = "\x1b[1;31m"


def test_the_screen_fits_into_80_columns():
    text = drawn("http://127.0.0.1:8000", snapshot([parse(page(), 10.0)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    (seen,) = [line for line in lines if "0.50%" in line]
    assert " ".join(seen.split()) == "demo chat prompt 0.818 0.50% 1.20% [0.81, 1.71] 0.310"
    (events,) = [line for line in lines if line.split()[:2] == ["demo", "prompt"]]
    assert events.split()[2:5] == ["1", "1", "1"]
    for part in (
        "tiny-llama",
        "unmonitored 0 · leaked 0 · fail open 0",
        "queue 0 · dropped 0 · to review 2",
        "* since",
    ):
        assert part in text
    assert "held back " in text and "… " not in text


def test_long_names_fold_and_numbers_stay_whole():
    text = drawn("http://127.0.0.1:8000", snapshot([parse(page().replace('"demo"', f'"{"p" * 50}"'), 10.0)]))
    assert max(map(len, text.splitlines())) <= 80
    assert "1.20% [0.81, 1.71]" in text and "0.310" in text
    assert text.count("p" * 10) >= 2


def test_what_is_missing_is_a_dash():
    text = drawn("http://127.0.0.1:8000", snapshot([parse("midstream_ready 1\n", 10.0)]))
    assert "ready · up - · heartbeat - ago" in text
    assert "queue - · dropped - · to review -" in text
    assert "leaked - · fail open -" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('midstream_unmonitored_tokens_total{cause="gap"} 3', "unmonitored 3 (gap 3)"),
        ("midstream_leaked_tokens_total 1", " · leaked 1"),
        ("midstream_fail_open_total 2", " · fail open 2"),
        ("midstream_records_dropped_total 9", " · dropped 9"),
        ("midstream_heartbeat_timestamp_seconds 50", "50 s"),
        ("midstream_ready 0", "not ready"),
    ],
)
def test_what_must_be_0_is_red_where_it_is_not(line, says):
    well = styled("u", snapshot([parse("midstream_ready 1\nmidstream_heartbeat_timestamp_seconds 98\n", 100.0)]))
    assert RED not in well
    ill = styled("u", snapshot([parse("# TYPE midstream_requests counter\n" + line, 100.0)]))
    assert RED + says in ill


def test_the_minute_is_drawn_to_one_scale():
    scrapes = [requests(0.0, allow=0, block=0), requests(1.0, allow=80, block=10), requests(2.0, allow=80, block=10)]
    lines = drawn("u", snapshot(scrapes)).splitlines()
    (allowed,) = [line for line in lines if line.startswith("allow ")]
    (others,) = [line for line in lines if line.startswith("others ")]
    assert allowed.split()[1:] == ["·" * 58 + "█·", "80"]
    assert others.split()[1:] == ["·" * 58 + "▂·", "10"]


def test_a_servers_words_cannot_move_the_cursor():
    text = 'midstream_blocks_total{model="\x1b[2Jm",probe="\x1b[31mp",phase="prompt"} 1\nmidstream_ready 1\n'
    assert "\x1b" not in drawn("u", snapshot([parse(text, 0.0)]), "failed \x1b[2J")


# --- the command ----------------------------------------------------------------------------------------------------


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


def test_the_outage_is_said_in_the_view():
    shot = snapshot([parse(page(), 10.0)])
    text = drawn("http://127.0.0.1:8000", shot, "ConnectError: [Errno 111] Connection refused")
    assert "can't be reached, trying again: ConnectError" in text and "tiny-llama" in text
    assert "can't be reached, trying again: it answers 500" in drawn("http://127.0.0.1:8000", None, "it answers 500")


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
