"""Metrics: what is counted is exact, in the one table, bounded in series, and adds up over processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.metrics.expose import pulse
from monitor.metrics.processes import shared_folder
from monitor.metrics.table import TABLE, markdown, series
from monitor.offenders import Offenders
from monitor.policy.rule import Rule
from monitor.types import Action, Escalation, Mode, Phase

from .test_records import coverage, reading, record, until

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(tiny, random_probe, serve):
    return serve(tiny, [(random_probe, {})])


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"midstream_{name}", labels)


def test_counts_per_action():
    metrics = Metrics(model="m")
    for action in (Action.ALLOW, Action.ALLOW, Action.FLAG, Action.BLOCK, Action.UNMONITORED):
        finish = {Action.BLOCK: "content_filter", Action.UNMONITORED: "unmonitored"}.get(action, "stop")
        missing = action is Action.UNMONITORED
        one = reading(action, value=None if missing else 3.0)
        cover = coverage(prompt_scored=3, unmonitored=1, causes={"not_finite": 1}) if missing else coverage()
        metrics.record(record(verdict=action, finish=finish, readings=(one,), coverage=cover))
    counts = {a: value(metrics, "requests_total", model="m", policy="default", action=a) for a in Action}
    assert counts == {Action.ALLOW: 2, Action.FLAG: 1, Action.ESCALATE: None, Action.BLOCK: 1, Action.UNMONITORED: 1}
    assert value(metrics, "flags_total", model=metrics.model, probe="demo", phase="prompt") == 1
    assert value(metrics, "blocks_total", model=metrics.model, probe="demo", phase="prompt") == 1
    assert value(metrics, "tokens_scored_total", phase="prompt") == 4 * 4 + 3
    assert value(metrics, "tokens_scored_total", phase="response") == 5 * 4
    assert value(metrics, "final_unscored_tokens_total") == 5
    assert value(metrics, "unmonitored_tokens_total", cause="not_finite") == 1
    assert value(metrics, "request_score_count", probe="demo", phase="prompt") == 4  # a missing value is no 0
    assert value(metrics, "held_tokens_count") == 5
    assert value(metrics, "fail_open_total") == 0
    ends = {
        f: value(metrics, "finished_total", route="chat", finish=f) for f in ("stop", "content_filter", "unmonitored")
    }
    assert ends == {"stop": 3, "content_filter": 1, "unmonitored": 1}


@pytest.mark.parametrize("result", ["failed", "overflow", "clear"])
@pytest.mark.parametrize("finish", ["stop", "unmonitored"])
def test_fail_open_is_an_answer_served_without_that_of_the_second_judge_too(result, finish):
    metrics = Metrics()
    asked = Escalation("demo", Phase.PROMPT, 3, 1.0, None, result)
    metrics.record(record(finish=finish, escalations=(asked,)))
    assert value(metrics, "fail_open_total") == (result != "clear" and finish == "stop")


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
    assert value(metrics, "would_block_total", model=metrics.model, probe="demo", phase="prompt") == 1
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
    assert value(metrics, "requests_total", model="", policy="default", action="allow") == 501


def test_probes_are_listed_and_their_counters_start_at_zero():
    metrics = Metrics()
    how = Aggregation("max")
    rules = {
        "chat": [Rule("demo", "v1", 0, Phase.PROMPT, Mode.BLOCK, 1.5, how, "closed")],
        "raw": [Rule("demo", "v1", 0, Phase.PROMPT, Mode.SHADOW, None, how, "closed")],
    }
    metrics.probes([("demo", "v1", "ab" * 32, "2", "harm")], rules)
    assert value(metrics, "probe_info", probe="demo", version="v1", sha256="ab" * 8, layers="2", kind="harm") == 1
    assert value(metrics, "threshold_logit", probe="demo", phase="prompt", format="chat") == 1.5
    assert value(metrics, "threshold_logit", probe="demo", phase="prompt", format="raw") is None
    for name in ("flags_total", "blocks_total", "would_block_total"):
        assert [value(metrics, name, model="", probe="demo", phase=phase) for phase in Phase] == [0, 0]


def test_exposition_has_every_name_with_our_prefix():
    metrics = Metrics()
    metrics.record(record(coverage=coverage(causes={"gap": 1})))
    metrics.scored(0.001, 7)
    metrics.records_dropped.inc(3)
    metrics.webhook.labels("sent").inc()
    metrics.rejected.labels("429").inc()
    depth = [4.0]
    metrics.read("record_queue_depth", lambda: depth[0])
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


# --- the table ------------------------------------------------------------------------------------------------------


def test_readme_has_the_table():
    text = (ROOT / "README.md").read_text()
    begin, end = "<!-- metrics -->\n", "<!-- /metrics -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == markdown()


def test_every_row_is_exposed_and_nothing_else():
    metrics = Metrics()
    metrics.probes([("demo", "v1", "ab" * 32, "2", "harm")], {})
    families = {f.name for f in metrics.registry.collect()}
    assert families == {f"midstream_{m.name}" for m in TABLE} and len(families) == len(TABLE)
    assert series() >= {m.exposed for m in TABLE}
    with pytest.raises(AttributeError, match="no metric 'nothing'"):
        metrics.nothing  # noqa: B018


def test_every_metric_is_set_somewhere():
    """A row that no code ever touches would be a promise that nobody keeps."""
    code = "".join(p.read_text() for p in (ROOT / "monitor").rglob("*.py") if p.name != "table.py")
    idle = [m.name for m in TABLE if f".{m.name}" not in code and f'"{m.name}"' not in code]
    assert idle == []


# --- what leaks, what waits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "at", "released", "leaked"), [
    (Phase.RESPONSE, 6, 2, 0), (Phase.RESPONSE, 6, 3, 1), (Phase.RESPONSE, 6, 5, 3),
    (Phase.PROMPT, 3, 0, 0), (Phase.PROMPT, 3, 1, 1), (Phase.RESPONSE, None, 5, 0),
])  # fmt: skip
def test_a_leak_is_what_went_out_at_or_after_the_crossing(phase, at, released, leaked):
    """4 tokens of prompt: position 6 is the answer's third token, so two may be out."""
    metrics = Metrics()
    crossed = reading(Action.BLOCK if at is not None else Action.ALLOW, phase, crossed_at=at)
    metrics.record(record(readings=(crossed,), released_tokens=released))
    assert value(metrics, "leaked_tokens_total") == leaked


def test_a_sample_and_the_wait_are_observed():
    metrics = Metrics()
    metrics.record(record(readings=(reading(sample=0.0), reading(phase=Phase.RESPONSE)), held_seconds=0.03))
    assert value(metrics, "token_score_sum", probe="demo", phase="prompt") == 0.5
    assert value(metrics, "token_score_count", probe="demo", phase="response") is None
    assert value(metrics, "holdback_seconds_bucket", le="0.05") == 1
    assert value(metrics, "holdback_seconds_bucket", le="0.025") == 0


# --- who scrapes ----------------------------------------------------------------------------------------------------


def test_the_heart_stops_with_the_server():
    metrics, reason = Metrics(), [None]
    with pulse(metrics, lambda: reason[0], every_s=0.01):
        until(lambda: value(metrics, "heartbeat_timestamp_seconds") > 0)
        reason[0] = "the engine has died"
        until(lambda: value(metrics, "ready") == 0)
        last = value(metrics, "heartbeat_timestamp_seconds")
        time.sleep(0.05)
        assert value(metrics, "heartbeat_timestamp_seconds") == last <= time.time()


ONE_OF_SEVERAL = """
import sys
from monitor.metrics import Metrics
from monitor.metrics.expose import exposition, pulse
from tests.test_records import record

metrics = Metrics(model="m")
metrics.read("active_sequences", lambda: float(sys.argv[1]))
metrics.read("review_backlog", lambda: 3.0)
metrics.probes([("demo", sys.argv[2], "ab" * 32, "2", "harm")], {})
for _ in range(int(sys.argv[1])):
    metrics.record(record())
with pulse(metrics, lambda: None):
    print("up", flush=True)
    for _ in sys.stdin:
        print(exposition(metrics.registry).decode() + "# EOF", flush=True)
"""


class Process:
    def __init__(self, folder, n, version):
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-c", ONE_OF_SEVERAL, str(n), version]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        assert self._process.stdout.readline() == "up\n"

    def scrape(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        text = "".join(iter(self._process.stdout.readline, "# EOF\n"))
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def stop(self):
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


def test_several_processes_add_up(tmp_path):
    first, second = Process(tmp_path, 2, "v1"), Process(tmp_path, 3, "v2")
    requests = ("midstream_requests_total", ("action", "allow"), ("model", "m"), ("policy", "default"))
    versions = [
        (
            "midstream_probe_info",
            ("kind", "harm"),
            ("layers", "2"),
            ("probe", "demo"),
            ("sha256", "ab" * 8),
            ("version", v),
        )
        for v in ("v1", "v2")
    ]
    both = second.scrape()
    assert first.scrape()[requests] == both[requests] == 5
    assert both["midstream_held_tokens_count",] == 5
    assert both["midstream_active_sequences",] == 5 and both["midstream_review_backlog",] == 3
    assert [both[v] for v in versions] == [1, 1] and both["midstream_ready",] == 1
    first.stop()
    alone = second.scrape()
    assert alone[requests] == 5  # what was counted stays counted
    assert alone["midstream_active_sequences",] == 3 and versions[0] not in alone
    second.stop()


def test_a_folder_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "gone"))
    with pytest.raises(ConfigInvalid, match="is not a folder that can be written; make an empty one"):
        shared_folder()


def test_strangers_add_no_series(server):
    """100,000 names of keys and hostile values of everything that a client chooses."""
    metrics = server.sink.metrics
    offenders = Offenders(metrics.key_events, lambda event: None, metric_keys=("known",))
    hostile = 'x"} 1\nmidstream_ready{a="'
    for i in range(100_000):
        one = record(f"{hostile}{i}", key=f"{hostile}{i}", model=f"{hostile}{i}", verdict=Action.FLAG)
        offenders.note(one)
        metrics.record(one)
    for i in range(200):
        headers = {"X-Request-Id": f"tenant-{i}", "X-Tenant": f"t{i}", "User-Agent": f"a{i}"}
        url = server.url + (f"/v1/chat/completions?tenant={i}" if i % 2 else f"/v1/unknown-{i}")
        body = {"model": f"m{i}" if i % 3 else server.model.name, "user": f"u{i}", "metadata": {"tenant": str(i)}}
        body |= {"messages": [{"role": "user", "name": f"n{i}", "content": "hi"}], "max_tokens": 1}
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code in (200, 400, 404)
    took = []
    with httpx.Client() as scraper:
        for _ in range(9):
            began = time.perf_counter()
            text = scraper.get(server.url + "/metrics").text
            took.append(time.perf_counter() - began)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    print(f"{len(lines)} series, a scrape {1e3 * min(took):.1f} ms")
    assert "tenant" not in text and hostile[:3] not in text
    assert len(lines) <= 200
    assert min(took) <= 0.1
