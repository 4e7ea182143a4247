"""Midstream, Prometheus and Alertmanager, all real: harmful traffic wakes somebody, and so does a monitor that dies.

Time runs SPEED times faster than in deploy/: every duration of the shipped files (scrape and evaluation intervals,
ranges and offsets in expressions, `for`, Alertmanager's waiting) is divided by it, and nothing else of the rules is
changed. rules_test.yml deals with the true durations, in promtool's time.
"""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from monitor.config import cache_dir
from monitor.engines.demo import demo_model

from ..test_demo import MODEL, Process
from . import debian

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DATA = ROOT.parent / "shared" / "data"
SPEED = 10
AT_ONCE = 2
# `for: 1m`, `[5m]`, `offset 10m`; a name that ends like one (increase5m) is none.
DURATION = re.compile(r"(?<=: )\d+[smhd]$|(?<=\[)\d+[smhd](?=\])|(?<=offset )\d+[smhd]", re.MULTILINE)
MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def faster(text: str) -> str:
    return DURATION.sub(lambda found: f"{int(found[0][:-1]) * MS[found[0][-1]] // SPEED}ms", text)


class Receiver(ThreadingHTTPServer):
    """Keeps what Alertmanager sends."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Taker)
        self.told = []
        self.new = threading.Condition()

    def alerts(self):
        return [alert for message in list(self.told) for alert in message["alerts"]]

    def names(self):
        return {alert["labels"]["alertname"] for alert in self.alerts()}

    def wait(self, name, timeout_s=90.0):
        """The first alert of that name; the time-out only guards against hanging."""
        with self.new:
            assert self.new.wait_for(lambda: name in self.names(), timeout_s), self.told
        return next(alert for alert in self.alerts() if alert["labels"]["alertname"] == name)


class Taker(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.new:
            self.server.told.append(message)
            self.server.new.notify_all()
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def receiver():
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def monitor(tmp_path_factory):
    """`midstream serve` with the shipped probe, in one thread: two that wait for each other would starve Prometheus."""
    demo_model(cache_dir())  # else converted while the server is waited for
    folder = tmp_path_factory.mktemp("monitor")
    (folder / "settings.yml").write_text("threads: 1\n")
    process = Process(folder, "--config", str(folder / "settings.yml"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def prometheus(tools, monitor, receiver, tmp_path_factory):
    """Its URL. It scrapes the monitor and tells an Alertmanager, which tells the receiver."""
    folder = tmp_path_factory.mktemp("prometheus")

    def derived(shipped, replaced):
        text = faster((DEPLOY / shipped).read_text())
        for old, new in replaced.items():
            assert text.count(old) == 1, f"{shipped} no longer speaks of {old}"
            text = text.replace(old, new)
        path = folder / Path(shipped).name
        path.write_text(text)
        return path

    (folder / "rules.yml").write_text("groups: []")
    hook = {"host.docker.internal:9095": f"127.0.0.1:{receiver.server_port}"}
    with debian.alertmanager(tools, derived("alertmanager/alertmanager.yml", hook), folder) as teller:
        targets = {"alertmanager:9093": address(teller), "midstream:8000": address(monitor.url)}
        with debian.prometheus(tools, derived("prometheus/prometheus.yml", targets), folder) as url:
            # Prometheus looks for targets 5 s after its start, fast or not: until then they would be found absent.
            until(lambda: value(url, 'up{job="midstream"}') == 1)
            derived("prometheus/rules.yml", {})
            httpx.post(url + "/-/reload", timeout=30).raise_for_status()
            yield url


def address(url):
    return url.removeprefix("http://")


def prompts(file, label):
    rows = map(json.loads, (DATA / file).read_text().splitlines())
    return [row["text"] for row in rows if row["label"] == label]


def blocked(monitor, text):
    messages = [{"role": "user", "content": text}]
    try:
        monitor.api.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, temperature=0)
    except openai.BadRequestError as error:
        assert error.code == "content_filter"
        return True
    return False


def value(prometheus, expression):
    """Of the only series; None without any."""
    answer = httpx.get(prometheus + "/api/v1/query", params={"query": expression}, timeout=30).json()
    found = answer["data"]["result"]
    return float(found[0]["value"][1]) if found else None


def until(holds, timeout_s=60.0):
    """The time-out only guards against hanging."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "shipped", ["prometheus/prometheus.yml", "prometheus/rules.yml", "alertmanager/alertmanager.yml"]
)
def test_time_runs_faster_and_nothing_else_changes(shipped):
    text = (DEPLOY / shipped).read_text()
    quick = faster(text)
    assert len(DURATION.findall(text)) >= 3
    assert DURATION.sub("T", text) == re.sub(r"(?<![a-z])\d+ms", "T", quick)
    assert re.search(r"\[\d+[smhd]\]|: \d+[smhd]$|offset \d+[smhd]\b", quick, re.MULTILINE) is None
    assert (
        faster("for: 1m\nexpr: x[5m] offset 10m / y:p99_5m")
        == "for: 6000ms\nexpr: x[30000ms] offset 60000ms / y:p99_5m"
    )


def test_harmful_intent_and_then_a_dead_monitor_wake_somebody(prometheus, monitor, receiver):
    harmless, harmful = prompts("alpaca_5k.jsonl", 0)[:8], prompts("jailbreakbench.jsonl", 1)
    assert sum(blocked(monitor, text) for text in harmless) <= 1
    # Prometheus has seen all of them before anything is said of silence.
    until(lambda: value(prometheus, "sum(midstream_requests_total)") == len(harmless))
    assert receiver.told == []

    woken = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = pool.map(lambda text: not woken.is_set() and blocked(monitor, text), harmful)
        burst = receiver.wait("HarmfulIntentBurst")
        woken.set()
        assert sum(verdicts) >= 10
    assert burst["status"] == "firing"
    assert burst["labels"]["model"].endswith("SmolLM2-135M-Instruct")
    assert burst["labels"]["severity"] == "critical"
    assert re.search(r"about [1-9]\d+ sequences", burst["annotations"]["description"])
    # ScoringSlow, which may fire beside it, speaks of how busy this machine is.
    assert receiver.names() - {"ScoringSlow"} == {"HarmfulIntentBurst"}

    monitor.process.kill()
    down = receiver.wait("MonitorDown")
    assert down["labels"]["instance"] == address(monitor.url)
    assert down["annotations"]["runbook_url"] == "deploy/runbook.md#monitordown"

    told = json.dumps(receiver.told)
    assert not [text for text in harmful + harmless if json.dumps(text)[1:-1] in told]
