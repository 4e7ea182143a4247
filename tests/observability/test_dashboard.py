"""The dashboard: what the code builds, of metrics that exist, and every query gives data from a real Prometheus."""

import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.grafana.dashboard import JSON_FILE, ROWS, UID, dashboard, text
from deploy.grafana.panel import COUNT, lines
from monitor.aggregate import Aggregation
from monitor.metrics import Metrics
from monitor.metrics.drift import Reference
from monitor.metrics.expose import exposition
from monitor.metrics.table import TABLE, series
from monitor.policy.rule import Rule
from monitor.types import Action, Coverage, Escalation, Mode, Phase, ProbeReading, Record

from . import debian

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules.yml"
OF_PROMETHEUS = {"ALERTS", "up"}
MODEL, PROBE = "tiny.model", "harmful-intent"
ENDED = {Action.ALLOW: -3.0, Action.FLAG: 2.0, Action.BLOCK: 2.5, Action.UNMONITORED: None}
LABELS = {  # of what no record sets: other modules count it
    "rejected": ["429"],
    "limited": ["rate_per_key"],
    "key_events": ["partner", "flag"],
    "records_dropped": [],
    "texts_dropped": [],
    "features_kept": ["uniform"],
    "features_dropped": ["queue_full"],
    "notice_lines": ["written"],
    "webhook": ["sent"],
    "policy_reloads": ["loaded"],
    "probe_reload": ["loaded"],
    "admin_requests": ["done"],
}


def broken():
    """The dashboard with one more panel, of a metric that does not exist."""
    wrong = lines("Broken", "Asks for what nobody counts.", COUNT, ("sum(rate(midstream_no_such_total[5m]))", ""))
    return dashboard([*ROWS, ("Broken", [wrong])])


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board):
    return [(panel, target) for panel in panels(board) for target in panel["targets"]]


def metrics_in(expr):
    """Names of metrics in PromQL: what is left of it without strings, selectors, windows, groupings and functions."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*+(?!\s*\()", bare)
    return set(names) - {"and", "or", "unless", "bool", "offset"}


def known():
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return series() | {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def unknown_metrics(board):
    asked = {name for _, target in queries(board) for name in metrics_in(target["expr"])}
    return asked - known() - OF_PROMETHEUS


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_is_what_the_code_builds():
    assert JSON_FILE.read_text() == text(dashboard()), "run: python -m deploy.grafana.dashboard"


def test_its_address_never_changes():
    assert json.loads(JSON_FILE.read_text())["uid"] == UID == "midstream"


def test_every_panel_has_a_number_of_its_own():
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(numbers) == len(set(numbers)) > 40


def test_every_panel_says_what_it_shows():
    for panel in panels(dashboard()):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert {t["datasource"]["uid"] for t in [panel, *panel["targets"]]} == {"${datasource}"}


def test_titles_are_distinct_within_a_row():
    for title, of_row in ROWS:
        assert len({panel.title for panel in of_row}) == len(of_row), title


def test_panels_do_not_lie_on_one_another():
    taken = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ("sum(midstream_ready)", {"midstream_ready"}),
        ('sum by (le, probe) (rate(a_bucket{x="b_total", y=~"$c"}[$__rate_interval]))', {"a_bucket"}),
        ("histogram_quantile(0.99, sum(rate(a[5m])) ) / on (probe) group_left (version) b or vector(0)", {"a", "b"}),
        ('count(ALERTS{a="b"}) > 1e-4 and time() - job:x:p50_5m offset 1h > bool 2', {"ALERTS", "job:x:p50_5m"}),
    ],
)  # fmt: skip
def test_names_are_found(expr, names):
    assert metrics_in(expr) == names


def test_every_metric_exists():
    assert unknown_metrics(dashboard()) == set()


def test_a_metric_that_does_not_exist_is_found():
    assert unknown_metrics(broken()) == {"midstream_no_such_total"}


def test_every_metric_of_the_table_is_shown():
    shown = {name for _, target in queries(dashboard()) for name in metrics_in(target["expr"])}
    hidden = {m.exposed for m in TABLE if not any(name.startswith(m.exposed) for name in shown)}
    assert hidden == set()


# --- data -----------------------------------------------------------------------------------------------------------


def reading(phase, action, value):
    return ProbeReading(
        probe=PROBE, version="v1", phase=phase, mode=Mode.BLOCK, threshold=1.7, value=value, newest=value,
        peak_position=3, peak_score=1.5, crossed_at=None, action=action, would_block=action is Action.FLAG,
        sample=value,
    )  # fmt: skip


def record(action, value):
    missing = value is None
    return Record(
        request_id="r1", index=0, created=1.5, model=MODEL, route="chat", format="chat", verdict=action, finish="stop",
        released_tokens=5, held_tokens=1, held_seconds=0.02, counted=((1, 2),), token_scores={},
        coverage=Coverage(4, 5, 4, 4, 1, missing, 0, {"nan": 1} if missing else {}),
        readings=tuple(reading(phase, action, value) for phase in Phase),
        escalations=(Escalation(PROBE, Phase.PROMPT, 3, 1.2, -2.0, "clear"),),
    )  # fmt: skip


class Server:
    """Metrics of a Midstream that never rests: before every scrape some sequences have finished."""

    def __init__(self):
        self.metrics = Metrics(model=MODEL)
        rules = [
            Rule(PROBE, "v1", column, phase, Mode.BLOCK, 1.7, Aggregation("mean"), "closed")
            for column, phase in enumerate(Phase)
        ]
        edges = tuple(i / 2 - 2 for i in range(9))
        references = {(PROBE, phase, "chat"): Reference(edges, 1.7, 0.005) for phase in Phase}
        self.metrics.probes([(PROBE, "v1", "ab" * 32, "15", "harm")], {"chat": rules}, references)
        for name, value in (
            ("active_sequences", 3),
            ("waiting_prompts", 1),
            ("record_queue_depth", 2),
            ("feature_queue_depth", 1),
        ):
            self.metrics.read(name, lambda value=value: value)
        self.metrics.review_backlog.set(4)
        self.metrics.drift_mahalanobis_ratio.labels(PROBE, Phase.PROMPT).set(1.2)
        self.metrics.calibration_rows_needed.labels(PROBE).set(98)
        self.metrics.ready.set(1)
        for _ in range(70):
            self.finish()

    def finish(self):
        for action, value in ENDED.items():
            self.metrics.record(record(action, value))

    def scrape(self):
        self.finish()
        self.metrics.scored(0.0004, 12)
        self.metrics.heartbeat_timestamp_seconds.set_to_current_time()
        for name, labels in LABELS.items():
            counter = getattr(self.metrics, name)
            (counter.labels(*labels) if labels else counter).inc()
        return exposition(self.metrics.registry)


@pytest.fixture(scope="module")
def scraped():
    """host:port of /metrics."""
    midstream = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = midstream.scrape()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def ask(tools, scraped, tmp_path_factory):
    """A query of Prometheus' API, once it has scraped often enough for rates."""
    folder = tmp_path_factory.mktemp("prometheus")
    alert = {"alert": "Always", "expr": "vector(1)", "labels": {"severity": "info"}}
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": [alert]}]}))
    job = {"job_name": "midstream", "static_configs": [{"targets": [scraped]}]}
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config = {"global": every, "rule_files": ["rules.yml"], "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    with (
        debian.prometheus(tools, folder / "prometheus.yml", folder) as url,
        httpx.Client(base_url=f"{url}/api/v1/", timeout=20) as client,
    ):

        def ask(path, **parameters):
            answer = client.get(path, params=parameters)
            assert answer.status_code == 200, f"{parameters}: {answer.text}"
            return answer.json()["data"]

        deadline = time.monotonic() + 60
        while not ask("query", query="count_over_time(up[30s]) >= 6 and on () ALERTS")["result"]:
            assert time.monotonic() < deadline, "Prometheus does not scrape"
            time.sleep(0.2)
        yield ask


def as_grafana_would(expr, model, probe):
    """Variables replaced. Grafana's rate interval is four scrapes."""
    values = {"$model": model, "$probe": probe, "$__rate_interval": "4s"}
    for name, value in values.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def answer_to(ask, target, **values):
    expr = as_grafana_would(target["expr"], **values)
    if target.get("instant"):
        return ask("query", query=expr)["result"]
    now = time.time()
    return ask("query_range", query=expr, start=now - 3, end=now, step=1)["result"]


def has_data(result):
    samples = [value for found in result for _, value in found.get("values", [found.get("value")])]
    return any(math.isfinite(float(value)) for value in samples)


CHOSEN = {"model": r"(tiny\\.model)", "probe": "(harmful-intent)"}  # as Grafana writes chosen values into a regex
ALL = {"model": ".*", "probe": ".*"}


@pytest.mark.parametrize("values", [ALL, CHOSEN], ids=["all", "chosen"])
def test_every_query_returns_data(ask, values):
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel, target in queries(dashboard())
        if not has_data(answer_to(ask, target, **values))
    ]
    assert empty == []


def test_a_query_of_nothing_returns_none(ask):
    panel, target = queries(broken())[-1]
    assert panel["title"] == "Broken" and not has_data(answer_to(ask, target, **ALL))


def test_what_is_not_chosen_is_not_shown(ask):
    """A panel that names a variable obeys it."""
    for panel, target in queries(dashboard()):
        for name in ("model", "probe"):
            if f"${name}" in target["expr"] and "vector(0)" not in target["expr"]:
                assert not has_data(answer_to(ask, target, **(ALL | {name: "another"}))), panel["title"]


def test_legends_name_labels_that_the_series_have(ask):
    for panel, target in queries(dashboard()):
        wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for found in answer_to(ask, target, **ALL):
            assert wanted <= set(found["metric"]), f"{panel['title']}: {target['legendFormat']}"


def test_variables_offer_what_is_there(ask):
    chosen = {v["name"]: v for v in dashboard()["templating"]["list"]}
    assert list(chosen) == ["datasource", "model", "probe"]
    for name, value in (("model", MODEL), ("probe", PROBE)):
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", chosen[name]["query"]).groups()
        assert metric in series()
        assert ask(f"label/{label}/values", **{"match[]": metric}) == [value]
