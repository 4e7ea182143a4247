"""The traffic log: what is written is exact, a full queue or disk only costs rows; and the labels of its records."""

import contextlib
import json
import os
import sqlite3
import stat
import threading
import types

import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic import (
    Label,
    TrafficLog,
    add_label,
    count_unlabelled,
    find_records,
    record_json,
    unlabelled,
)
from monitor.types import Action

from .test_records import coverage, record, until


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
        other.execute("ALTER TABLE records RENAME TO gone")
        for i in range(7):
            one.put(record(f"lost{i}"))
        until(lambda: sum(drops) == 7)
        other.execute("ALTER TABLE gone RENAME TO records")
        other.close()
        one.put(record("after"))
    assert stored(path) == ["before", "after"]
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


def strange(kind):
    """Records that JSON can't hold."""
    nested = []
    nested.append(nested)
    return {
        "a type": record("bad", token_scores={"demo": [object()]}),
        "no copy": record("bad", coverage=coverage(causes=types.MappingProxyType({"gap": 1}))),
        "a circle": record("bad", token_scores={"demo": nested}),
    }[kind]


@pytest.mark.parametrize("kind", ["a type", "no copy", "a circle"])
def test_a_record_that_cannot_be_written_costs_itself(path, kind):
    with log(path) as (one, drops):
        for each in (record("before"), strange(kind), record("beside")):
            one.put(each)
        until(lambda: stored(path) == ["before", "beside"])
        one.put(record("after"))
    assert stored(path) == ["before", "beside", "after"]
    assert drops == [1]


# --- labels ---------------------------------------------------------------------------------------------------------


def fill(path, *records):
    with log(path) as (one, _):
        for each in records:
            one.put(each)


def ids(path, limit=100):
    return [(r["request_id"], r["index"]) for r in unlabelled(path, limit)]


def test_the_backlog_is_what_was_not_allowed_and_nobody_has_labelled(path):
    fill(path, *(record(f"r{i}", verdict=verdict) for i, verdict in enumerate(Action)), record("r9", 1, Action.BLOCK))
    assert list(Action) == [Action.ALLOW, Action.FLAG, Action.ESCALATE, Action.BLOCK, Action.UNMONITORED]
    assert ids(path) == [("r9", 1), ("r4", 0), ("r3", 0), ("r2", 0), ("r1", 0)]  # newest first
    assert ids(path, 2) == [("r9", 1), ("r4", 0)]
    assert count_unlabelled(path) == 5
    assert add_label(path, "r9", 1, Label.HARMFUL, "ann") is None
    assert add_label(path, "r3", 0, Label.UNSURE, "ann") is None
    assert (ids(path), count_unlabelled(path)) == ([("r4", 0), ("r2", 0), ("r1", 0)], 3)
    add_label(path, "r0", 0, Label.HARMFUL, "ann")  # allowed, and should not have been: a label, not a backlog
    assert count_unlabelled(path) == 3


def test_choices_of_one_request_are_labelled_apart(path):
    fill(path, *(record("r1", i, Action.FLAG) for i in range(3)))
    add_label(path, "r1", 1, Label.HARMLESS, "ann")
    assert (ids(path), count_unlabelled(path)) == ([("r1", 2), ("r1", 0)], 2)


def test_the_newest_label_counts_and_all_are_kept(path):
    fill(path, record(verdict=Action.FLAG), record("r2", verdict=Action.FLAG))
    times = iter([7.5, 3.5, 1.5])  # a clock that is set back does not make an older label count
    said = [(Label.HARMFUL, "ann"), (Label.UNSURE, "ben"), (Label.HARMLESS, "eve")]
    before = [add_label(path, "r1", 0, label, by, lambda: next(times)) for label, by in said]
    assert before == [None, Label.HARMFUL, Label.UNSURE]
    database = sqlite3.connect(path)
    rows = database.execute('SELECT record, label, "by", created FROM labels ORDER BY id').fetchall()
    database.close()
    assert rows == [(1, "harmful", "ann", 7.5), (1, "unsure", "ben", 3.5), (1, "harmless", "eve", 1.5)]
    assert (ids(path), count_unlabelled(path)) == ([("r2", 0)], 1)


@pytest.mark.parametrize(("request_id", "choice"), [("r2", 0), ("r1", 1), ("' OR 1=1 --", 0)])
def test_a_label_of_nothing_is_refused(path, request_id, choice):
    fill(path, record(verdict=Action.FLAG))
    with pytest.raises(ConfigInvalid, match="there is no record of request"):
        add_label(path, request_id, choice, Label.HARMFUL, "ann")
    assert count_unlabelled(path) == 1


def test_the_backlog_is_of_kept_records(path):
    with log(path, keep=10) as (one, _):
        for i in range(5):
            one.put(record(f"r{i}", verdict=Action.FLAG))
        until(lambda: one.backlog() == 5)
        add_label(path, "r0", 0, Label.HARMFUL, "ann")
        add_label(path, "r4", 0, Label.HARMFUL, "ann")
        assert one.backlog() == 3
        for i in range(5, 14):  # r0, labelled, and r1 to r3, which were not, are dropped
            one.put(record(f"r{i}", verdict=Action.ALLOW if i < 13 else Action.BLOCK))
        until(lambda: "r13" in stored(path))
        assert (one.backlog(), ids(path)) == (1, [("r13", 0)])


def test_the_backlog_is_read_and_labels_are_given_while_the_server_writes(path):
    with log(path) as (one, drops):
        one.put(record("r0", verdict=Action.FLAG))
        until(lambda: one.backlog() == 1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # as the writer does, for a moment
        assert (one.backlog(), ids(path)) == (1, [("r0", 0)])
        other.execute("COMMIT")
        other.close()
        labelling = threading.Thread(target=add_label, args=(path, "r0", 0, Label.HARMFUL, "ann"))
        labelling.start()
        for i in range(1, 500):
            one.put(record(f"r{i}", verdict=Action.FLAG))
        labelling.join()
        until(lambda: one.backlog() == 499)
    assert drops == []


def test_somebody_elses_database_is_left_alone(tmp_path):
    for name, make in (("empty", ""), ("theirs", "CREATE TABLE theirs (a)")):
        database = sqlite3.connect(tmp_path / name)
        database.executescript(make)
        database.close()
        for act in (lambda p: unlabelled(p, 1), lambda p: add_label(p, "r1", 0, Label.HARMFUL, "ann")):
            with pytest.raises(ConfigInvalid, match="no such table: records"):
                act(tmp_path / name)
        database = sqlite3.connect(tmp_path / name)
        tables = [n for (n,) in database.execute("SELECT name FROM sqlite_master")]
        database.close()
        assert tables == (["theirs"] if make else [])
