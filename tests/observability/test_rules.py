"""The shipped configuration of Prometheus and Alertmanager: valid, complete, and about metrics that exist."""

import re
import subprocess
from pathlib import Path

import httpx
import pytest
import typer
import yaml

from monitor.cli import app
from monitor.config import PREFIX, Settings
from monitor.metrics.table import TABLE, series

from ..web import until
from . import debian

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
TESTS = yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text())
EVERY = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in EVERY if "alert" in rule]
RECORDED = {rule["record"] for rule in EVERY if "record" in rule}
WANTED = {
    "MonitorDown",
    "FailOpenActive",
    "UnmonitoredTokens",
    "HarmfulIntentBurst",
    "FlagRateAboveTarget",
    "FlagRateZero",
    "ScoreDrift",
    "ThresholdStale",
    "LogDropped",
    "ReviewBacklog",
    "ScoringSlow",
    "ProbeMismatch",
    "LeakedTokens",
}
ALERT = pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
NAME = re.compile(r"\b(?:\w+:)?midstream_\w+(?::\w+)?")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=DEPLOY / "prometheus")
    return done.returncode, done.stdout + done.stderr


def unknown(expression):
    """Names of ours that no metric and no recording rule has; a label's value is not one."""
    return set(NAME.findall(re.sub(r'"[^"]*"', "", expression))) - series() - RECORDED


def test_promtool_accepts_configuration_and_rules(tools):
    code, said = run(tools.promtool, "check", "config", "prometheus.yml")
    assert code == 0, said
    code, said = run(tools.promtool, "check", "rules", "--lint=all", "--lint-fatal", "rules.yml")
    assert code == 0, said


def test_promtool_sees_every_alert_fire_and_stay_silent(tools):
    code, said = run(tools.promtool, "test", "rules", "rules_test.yml")
    assert code == 0, said


def test_the_unit_tests_can_fail(tools, tmp_path):
    """A threshold that is moved is noticed."""
    rules = (DEPLOY / "prometheus/rules.yml").read_text()
    assert rules.count("midstream_review_backlog > 500") == 1
    (tmp_path / "rules.yml").write_text(
        rules.replace("midstream_review_backlog > 500", "midstream_review_backlog > 499")
    )
    only = [test for test in TESTS["tests"] if test["name"].startswith("ReviewBacklog")]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(TESTS | {"tests": only}))
    code, said = run(tools.promtool, "test", "rules", tmp_path / "rules_test.yml")
    assert code != 0 and 'instance="b:8000"' in said


def test_the_alerts_that_were_asked_for_are_there():
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names)) and WANTED.issubset(names)


@ALERT
def test_an_alert_says_what_whom_and_where(rule):
    name = rule["alert"]
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert rule["annotations"]["runbook_url"] == f"deploy/runbook.md#{name.lower()}"
    assert all(rule["annotations"].values())


@ALERT
def test_an_alert_has_a_section_in_the_runbook(rule):
    sections = re.split(r"^## ", (DEPLOY / "runbook.md").read_text(), flags=re.MULTILINE)[1:]
    own = [section for section in sections if section.splitlines()[0] == rule["alert"]]
    assert len(own) == 1
    for part in ("**Means:**", "**Look:**", "**Do:**"):
        assert part in own[0]


@ALERT
def test_an_alert_is_tested_firing_and_silent(rule):
    cases = [case for test in TESTS["tests"] for case in test["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert [case for case in cases if case["exp_alerts"]]
    assert [case for case in cases if not case["exp_alerts"]]


def test_the_runbook_speaks_of_alerts_and_metrics_that_exist():
    text = (DEPLOY / "runbook.md").read_text()
    anchors = {rule["alert"].lower() for rule in ALERTS}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= anchors
    assert set(re.findall(r"^## (\w+)", text, re.MULTILINE)) == {rule["alert"] for rule in ALERTS}
    assert unknown(text) == set()


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_exists(rule):
    assert unknown(rule["expr"]) == set()


def test_a_misspelt_metric_is_noticed():
    assert unknown("rate(midstream_flag_total[5m]) > midstream_flags_total") == {"midstream_flag_total"}
    assert unknown("model:midstream_crossing:increase5m > 10") == {"model:midstream_crossing:increase5m"}
    assert unknown('up{job="midstream_prod"} == midstream_ready') == set()


def test_every_histogram_has_its_quantiles():
    histograms = {metric.exposed for metric in TABLE if metric.kind == "histogram"}
    recorded = {name.split(":")[1] for name in RECORDED if name.endswith(":p99_5m")}
    assert recorded == histograms == {name.split(":")[1] for name in RECORDED if name.endswith(":p50_5m")}


def test_unit_tests_feed_series_that_exist():
    for test in TESTS["tests"]:
        for given in test["input_series"]:
            name, labels = re.fullmatch(r"(\w+)\{(.*)\}", given["series"]).groups()
            metric = next((m for m in TABLE if name in (m.exposed, f"{m.exposed}_count", f"{m.exposed}_bucket")), None)
            assert metric is not None or name == "up", name
            own = set(re.findall(r'(\w+)="', labels)) - {"job", "instance", "le"}
            assert own == set(metric.labels if metric else ()), given["series"]


def test_amtool_accepts_the_configuration(tools):
    code, said = run(tools.amtool, "check-config", DEPLOY / "alertmanager/alertmanager.yml")
    assert code == 0, said


def test_a_critical_alert_waits_least():
    route = yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())["route"]
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    routes = [route] + route["routes"]
    critical = next(child for child in routes if child.get("matchers") == ['severity = "critical"'])
    for wait in ("group_wait", "group_interval", "repeat_interval"):
        others = [child[wait] for child in routes if child is not critical]
        assert all(
            int(critical[wait][:-1]) * seconds[critical[wait][-1]] < int(o[:-1]) * seconds[o[-1]] for o in others
        )


def test_an_instance_that_nobody_watches_says_nothing_else(tools, tmp_path):
    """By a real Alertmanager. Hidden: what is not critical, of that instance."""
    down = labels("MonitorDown", "critical", "a:8000")
    given = {
        "hidden": labels("ScoreDrift", "warning", "a:8000"),
        "hidden too": labels("ThresholdStale", "info", "a:8000"),
        "of another": labels("ScoreDrift", "warning", "b:8000"),
        "critical": labels("LeakedTokens", "critical", "a:8000"),
        "of many": {"alertname": "HarmfulIntentBurst", "severity": "critical", "job": "midstream", "model": "big"},
        "of many too": {"alertname": "ProbeMismatch", "severity": "warning", "job": "midstream", "probe": "harm"},
    }
    with debian.alertmanager(tools, DEPLOY / "alertmanager/alertmanager.yml", tmp_path) as url:
        sent = [{"labels": one} for one in (down, *given.values())]
        httpx.post(url + "/api/v2/alerts", json=sent).raise_for_status()

        def inhibited():
            kept = httpx.get(url + "/api/v2/alerts").json()
            assert len(kept) == len(sent)
            return [alert["labels"] for alert in kept if alert["status"]["inhibitedBy"]]

        until(lambda: len(inhibited()) >= 2)  # it inhibits a moment after it has taken them
        hidden = inhibited()
    assert sorted(name for name, one in given.items() if one in hidden) == ["hidden", "hidden too"]
    assert len(hidden) == 2


def labels(alert, severity, instance):
    return {"alertname": alert, "severity": severity, "job": "midstream", "instance": instance}


def test_the_runbook_names_commands_routes_and_settings_that_exist():
    text = (DEPLOY / "runbook.md").read_text()
    commands = typer.main.get_command(app).commands
    named = set(re.findall(r"(?:`|^)midstream ([a-z]+)(?: ([a-z]+))?", text, re.MULTILINE))
    assert len(named) >= 8
    for command, sub in named:
        assert command in commands
        assert not sub or sub in commands[command].commands
    admin = "".join(path.read_text() for path in sorted((DEPLOY.parent / "monitor/api/admin").glob("*.py")))
    paths = set(re.findall(r'@app\.(?:get|post)\("([^"]+)"', admin))
    assert set(re.findall(r"/admin/[a-z/]+", text)) <= paths
    settings = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(r"MIDSTREAM_\w+", text)) <= settings
