"""Features that are erased or too old go: those that wait, are read or are written, and by whatever command."""

import subprocess
import sys

import httpx

from monitor.api.features import eraser
from monitor.traffic import TrafficLog, erase, erased_from, find_records
from monitor.traffic.features import erase_features, read_features

from .conftest import calibrated, publish
from .feature_log import FLAG_ALL, Running, Slow, chat, feature_names, finish, logged, running  # noqa: F401
from .test_demo import Process
from .test_records import until


def test_another_process_erases_while_the_server_runs(logged, tmp_path):
    """Records first, then files: what the server has not written yet finds no record."""
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1")
    reader.answer()
    until(lambda: told.traffic.depth == 0)
    assert erased_from(tmp_path / "records.sqlite3", lambda engine: erase(engine, request_id="r1")) == 1
    assert erase_features(told.folder, request_id="r1") == 0
    finish(told)
    assert told.dropped == ["no_record"] and list(told.folder.glob("features-*")) == []


def test_erasing_reaches_what_waits_what_is_read_and_what_is_written(logged):
    told, reader = logged(flush_s=0.01), Slow()
    told.log.attach(reader)
    told.offer("r1", key="alice")
    reader.answer()
    until(lambda: told.kept == ["uniform"])
    told.offer("r2", key="alice")  # being read
    told.offer("r3", key="alice")  # waits
    told.offer("r4", key="bob")
    assert told.traffic.erase("alice") == 3
    assert told.log.erase("alice") == 2
    reader.answer()  # r2's
    reader.answer()
    until(lambda: len(told.kept) == 2)
    finish(told)
    assert {f.request_id for f in read_features(told.folder)} == {"r4"}
    assert told.dropped == []


def test_erased_while_it_waits_for_its_file(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1")
    told.offer("r1-1")
    reader.answer()
    reader.answer()
    assert told.log.erase(request_id="r1") == 0
    finish(told)
    assert list(told.folder.glob("features-*")) == []


def test_retention_is_the_logs(logged):
    told, reader = logged(flush_s=0.01, days=1.0, clock=lambda: 100_000.0), Slow()
    told.log.attach(reader)
    told.offer("old", created=1.0)
    reader.answer()
    until(lambda: told.kept == ["uniform"])
    finish(told)
    again = logged(days=1.0, clock=lambda: 100_000.0)  # at start, and every hour
    until(lambda: list(again.folder.glob("features-*")) == [])


def test_erasing_takes_records_and_features(tiny, running):
    one = running(log_features=True, **FLAG_ALL)
    one.ask(chat(tiny, "hello"), "r1")
    until(lambda: one.sinks.features.depth == 0)
    assert eraser(one.settings, one.sinks.traffic, one.sinks.features)("alice", None) == 1
    one.stop()
    assert feature_names(one) == [] and find_records(one.settings.records, "r1") == []


def test_features_of_a_log_that_is_off_by_now_are_erased_too(tiny, random_probe, tmp_path):
    one = Running(tiny, random_probe, tmp_path, log_features=True, **FLAG_ALL)
    one.ask(chat(tiny, "hello"), "r1")
    one.stop()
    assert len(one.kept) == 2
    traffic = TrafficLog(one.settings.records, 10, 10, lambda n: None)
    assert eraser(one.settings, traffic, None)(None, "r1") == 1
    traffic.close()
    assert feature_names(one) == []


def test_the_server_keeps_and_the_command_erases(tiny, random_probe, tmp_path):
    publish(tiny, [(random_probe, {"calibration": calibrated(1e6)})], tmp_path / "store")
    config = tmp_path / "settings.yaml"
    paths = {name: tmp_path / name for name in ("store", "features", "records", "audit")}
    own = paths | {"model": tiny.module.config.name_or_path, "log_features": "true", "feature_rate": 1}
    config.write_text("".join(f"{name}: {value}\n" for name, value in own.items()))
    server = Process(tmp_path, "--config", str(config))
    try:
        body = {"model": tiny.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
        until(lambda: "\nmidstream_feature_queue_depth 0.0" in httpx.get(server.url + "/metrics", timeout=60).text)
    finally:
        server.stop()
    request_id = answer.headers["x-midstream-request-id"]
    kept = read_features(tmp_path / "features")
    assert [(f.request_id, f.phase, f.q, f.reason) for f in kept[:1]] == [(request_id, "prompt", 1.0, "uniform")]
    command = [sys.executable, "-m", "monitor.cli", "log", "erase", "--id", request_id, "--config", str(config)]
    erased = subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=120)
    assert erased.stdout == f"erased 1 records and {len(kept)} features\n", erased.stderr
    assert read_features(tmp_path / "features") == []
