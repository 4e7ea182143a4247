"""Features grow old where the log is off, and beside files that can't be read; a swap of layers costs none."""

import threading

import pytest

from monitor.api.features import retention
from monitor.api.sinks import Sinks
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.traffic.features import Retention, erase_features, read_features, write_features
from monitor.traffic.features.files import drop_older

from .conftest import LAYER
from .feature_log import Slow, find_rows, finish, logged  # noqa: F401
from .test_features import feature
from .test_records import until

DAY = 86_400.0


def names(folder):
    return [f.request_id for f in read_features(folder)]


def running():
    return [t for t in threading.enumerate() if t.name == "midstream-retention"]


def test_what_a_log_left_that_is_off_goes_when_it_is_too_old(tmp_path):
    folder = tmp_path / "features"
    write_features(folder, [feature("old"), feature("young", created=1e12)])
    settings = load_settings(records=tmp_path / "r.sqlite3", features=folder, log_days=1)
    sinks = Sinks(settings, Metrics())
    until(lambda: names(folder) == ["young"])
    sinks.close()
    assert retention(settings.model_copy(update={"log_days": None})) is None
    assert retention(settings.model_copy(update={"log_features": True})) is None  # its writer does it


def test_it_goes_again_and_again_and_ends_at_once(tmp_path):
    now = [2 * DAY]
    write_features(tmp_path, [feature("first", created=DAY / 2), feature("second", created=3 * DAY)])
    one = Retention(tmp_path, 1.0, lambda: now[0], every_s=0.01)
    until(lambda: names(tmp_path) == ["second"])
    now[0] = 5 * DAY
    until(lambda: names(tmp_path) == [])
    one.close()
    Retention(tmp_path, 1.0).close()  # it would wait an hour
    assert not running()


def test_no_folder_is_made_and_no_thread_started_for_nothing(tmp_path):
    settings = load_settings(records=tmp_path / "r.sqlite3", features=tmp_path / "features", log_days=1)
    sinks = Sinks(settings, Metrics())
    assert sinks.retention is None and not running() and not (tmp_path / "features").exists()
    sinks.close()


def with_a_damaged_one(folder):
    """Three files, the first and the last but one can't be read."""
    paths = [write_features(folder, [feature(f"r{i}"), feature(f"s{i}", key="bob", created=2000.0)]) for i in range(4)]
    paths[0].write_bytes(b"PAR1 is not all of it")
    paths[2].unlink()
    paths[2].mkdir()
    return paths


@pytest.mark.parametrize(
    "drop", [lambda folder: erase_features(folder, key="alice"), lambda folder: drop_older(folder, 1500.0)]
)
def test_one_file_that_can_not_be_read_keeps_no_other(tmp_path, drop):
    paths = with_a_damaged_one(tmp_path)
    with pytest.raises(ConfigInvalid, match="2 rows of features are gone") as caught:
        drop(tmp_path)
    told = [p for p in paths if p.name in str(caught.value)]
    assert told == [paths[0], paths[2]]
    paths[0].unlink()
    paths[2].rmdir()
    assert names(tmp_path) == ["s1", "s3"]


def test_a_swap_to_other_layers_costs_no_feature_that_waits_for_its_file(logged, tmp_path):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    for name, layers in (("r1", (LAYER,)), ("r2", (LAYER, LAYER + 1)), ("r3", (LAYER,))):
        reader.layers = layers
        told.offer(name)
        reader.answer()
    finish(told)
    assert told.dropped == [] and told.kept == ["uniform"] * 3
    assert {f.request_id for f in read_features(told.folder, layers=(LAYER,))} == {"r1", "r2", "r3"}
    assert {f.request_id for f in read_features(told.folder, layers=(LAYER + 1,))} == {"r2"}
    marks = {name: find_rows(tmp_path / "records.sqlite3", name) for name in ("r1", "r2", "r3")}
    assert marks["r1"] == marks["r3"] != marks["r2"]
    assert {file for ((_, file),) in marks.values()} == {p.name for p in told.folder.glob("features-*")}
