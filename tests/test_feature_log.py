"""The feature log's queue: what waits is read and written; what can't be is dropped and counted, and nobody waits."""

import math
import sys
from types import SimpleNamespace

import pytest

from monitor.api.features import feature_log
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.traffic.features import read_features
from monitor.types import Action, Phase

from .conftest import LAYER
from .feature_log import PROMPT, Slow, find_rows, finish, logged  # noqa: F401
from .test_records import coverage, record


def test_a_full_queue_drops_and_counts_and_nobody_waits(logged, tmp_path):
    told, reader = logged(size=4), Slow()
    for i in range(10):
        told.offer(f"r{i}")  # nobody reads yet
    assert told.dropped == ["queue_full"] * 6 and told.log.depth == 4
    told.log.attach(reader)
    for value in (1.0, None, math.nan, 1e6):
        reader.answer(value)
    finish(told)
    assert sorted(told.dropped[6:]) == ["not_finite", "not_finite", "not_read"]
    got = read_features(told.folder)
    assert [(f.request_id, f.phase, f.n_tokens) for f in got] == [("r0", "prompt", 5), ("r0", "response", 4)]
    assert told.kept == ["uniform"]
    (kept,) = find_rows(tmp_path / "records.sqlite3", "r0")
    assert kept == (1.0, next(told.folder.glob("features-*")).name)
    assert find_rows(tmp_path / "records.sqlite3", "r9") == [(None, None)]


def test_what_waits_when_the_server_ends_is_counted(logged):
    told = logged()
    told.log.attach(Slow())
    told.offer("r1")
    told.offer("r2")
    finish(told)
    assert told.dropped == ["not_read", "not_read"] and list(told.folder.glob("features-*")) == []


def test_without_its_record_a_feature_is_not_written(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.log.offer(record("nobody", coverage=coverage(prompt_tokens=10, prompt_scored=10)), PROMPT, range(15))
    reader.answer()
    finish(told)
    assert told.dropped == ["no_record"] and list(told.folder.glob("features-*")) == []


def test_tokens_that_are_missing_are_not_guessed(logged):
    told = logged()
    told.log.attach(Slow())
    told.log.offer(record(coverage=coverage(prompt_tokens=10, prompt_scored=10)), PROMPT, range(12))
    assert told.dropped == ["not_read"] and told.log.depth == 0


def test_a_disk_that_fails_costs_features_and_is_told(logged, capsys, monkeypatch):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    monkeypatch.setattr("monitor.traffic.features.writer.write_features", _no_space)
    told.offer("r1")
    reader.answer()
    finish(told)
    assert told.dropped == ["not_written"] and "no space" in capsys.readouterr().err


def _no_space(*_args):
    raise OSError(28, "no space left on device")


def test_the_uniform_slice_is_seen_by_drift(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1", verdict=Action.FLAG)
    reader.answer(2.0)
    finish(told)
    assert [(phase, layers, vectors.shape) for phase, layers, vectors in told.seen] == [
        (Phase.PROMPT, (LAYER,), (1, 8)),
        (Phase.RESPONSE, (LAYER,), (1, 8)),
    ]
    assert told.kept == ["flagged"]


# --- servers that have none -------------------------------------------------------------------------------------------


def test_without_pyarrow_the_server_does_not_start(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    settings = load_settings(log_features=True, features=tmp_path / "features", records=tmp_path / "r.sqlite3")
    with pytest.raises(ConfigInvalid, match=r"midstream\[parquet\]"):
        feature_log(settings, tiny.served(), SimpleNamespace(mark_features=None), Metrics())


def test_behind_an_upstream_it_is_refused(tmp_path):
    from monitor.api.upstream.serve import serve

    settings = load_settings(upstream="http://127.0.0.1:1/v1", log_features=True, port=0, features=tmp_path)
    with pytest.raises(ConfigInvalid, match="the observer behind --upstream gives scores, never activations"):
        serve(settings)
