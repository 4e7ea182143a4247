"""The tables' versions: a new log has what `tables` says, and an old one is taken over with all that is in it."""

import json
import sqlite3
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from monitor.errors import ConfigInvalid
from monitor.traffic import (
    Filter,
    Label,
    TrafficLog,
    add_label,
    count_unlabelled,
    find_labels,
    find_records,
    record_json,
    review_queue,
    unlabelled,
)
from monitor.traffic.database import NEWEST, opened
from monitor.traffic.tables import metadata
from monitor.types import Action

from .test_records import reading, record

# What midstream 0.1.0 wrote, before there were versions.
BEFORE = """
CREATE TABLE records (id INTEGER PRIMARY KEY, request_id TEXT NOT NULL, choice INTEGER NOT NULL, created REAL NOT NULL,
    verdict TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX records_request ON records (request_id);
"""
WITH_LABELS = """
CREATE INDEX records_review ON records (request_id, choice) WHERE verdict <> 'allow';
CREATE TABLE labels (id INTEGER PRIMARY KEY, request_id TEXT NOT NULL, choice INTEGER NOT NULL, label TEXT NOT NULL,
    "by" TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX labels_request ON labels (request_id, choice);
"""


def old_log(path, records, labels=()):
    """labels: (request id, choice, label, by, created) each; None: a file from before there were any"""
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.executescript(BEFORE + ("" if labels is None else WITH_LABELS))
    rows = [(r.request_id, r.index, r.created, str(r.verdict), json.dumps(record_json(r))) for r in records]
    database.executemany(
        "INSERT INTO records (request_id, choice, created, verdict, body) VALUES (?, ?, ?, ?, ?)", rows
    )
    if labels:
        insert = 'INSERT INTO labels (request_id, choice, label, "by", created) VALUES (?, ?, ?, ?, ?)'
        database.executemany(insert, labels)
    database.commit()
    database.close()


def old_records():
    yield record("r1", verdict=Action.FLAG, readings=(reading(Action.FLAG, value=1.5),), key="alice")
    yield record("r2", 1, Action.BLOCK, readings=(reading(Action.BLOCK, value=9.5),))
    yield record("r3")
    yield record("r4", verdict=Action.UNMONITORED, readings=())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/records.sqlite3"


# SQLite's INTEGER PRIMARY KEY is never null, and its REAL is a double.
COSMETIC = (("modify_nullable", "id"), ("modify_type", "created"))


def differences(path):
    with opened(path, update=False) as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == NEWEST
        found = compare_metadata(context, metadata)
    return [c for c in found if not (isinstance(c, list) and (c[0][0], c[0][3]) in COSMETIC)]


def start(path):
    TrafficLog(path, 100_000, 10, lambda n: None).close()


def test_a_new_log_has_the_tables_as_they_are_declared(path):
    start(path)
    assert differences(path) == []
    start(path)  # and a second start changes nothing
    assert differences(path) == []


LABELS = [("r1", 0, "unsure", "ann", 1.0), ("r1", 0, "harmful", "ben", 2.0), ("gone", 0, "harmful", "ann", 3.0)]


@pytest.mark.parametrize("by", ["server", "reader", "labeller"])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_an_old_log_is_taken_over_by_whoever_comes_first(path, by, labels):
    old_log(path, old_records(), labels)
    before = find_records(path, "r1") + find_records(path, "r2")  # can be read as it is
    if by == "server":
        start(path)
    elif by == "reader":
        unlabelled(path, 1)
    else:
        add_label(path, "r3", 0, Label.HARMLESS, "eve")
    assert differences(path) == []
    assert find_records(path, "r1") + find_records(path, "r2") == before
    assert [json.loads(json.dumps(record_json(r))) for r in list(old_records())[:2]] == before
    waiting = ["r4", "r2"] if labels else ["r4", "r2", "r1"]
    assert [b["request_id"] for b in unlabelled(path, 10)] == waiting
    assert [e.body["request_id"] for e in review_queue(path, Filter(), 10)] == waiting
    assert [e.body["request_id"] for e in review_queue(path, Filter(key="alice", labelled=None), 10)] == ["r1"]
    expected = [{"label": "harmful", "by": "ben", "created": 2.0}, {"label": "unsure", "by": "ann", "created": 1.0}]
    assert find_labels(path, "r1", 0) == (expected if labels else [])
    assert find_labels(path, "gone", 0) == []


def test_an_old_log_that_is_long_is_taken_over_whole(path):
    old_log(path, [record(f"r{i}", verdict=Action.FLAG, created=float(i)) for i in range(1203)])
    start(path)
    assert count_unlabelled(path) == 1203
    assert len(review_queue(path, Filter(since=0.0), 5000)) == 1203


def test_two_that_start_at_once_take_it_over_once(path):
    old_log(path, [record(f"r{i}", verdict=Action.FLAG) for i in range(500)])
    failed = []

    def go():
        try:
            start(path)
        except ConfigInvalid as error:
            failed.append(error)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert (differences(path), count_unlabelled(path)) == ([], 500)


def test_a_take_over_that_fails_leaves_the_old_log_as_it_was(path):
    old_log(path, [record("r1", verdict=Action.FLAG)], LABELS[:2])
    database = sqlite3.connect(path)
    database.execute("UPDATE records SET body = 'no JSON'")
    database.commit()
    with pytest.raises(ValueError):  # damaged by hand: no log of ours
        start(path)
    tables = {n for (n,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"records", "labels"}
    assert len(database.execute("SELECT * FROM labels").fetchall()) == 2
    database.close()


def test_a_log_of_a_newer_version_is_refused(path):
    start(path)
    database = sqlite3.connect(path)
    database.execute("UPDATE alembic_version SET version_num = 'v99'")
    database.commit()
    database.close()
    for act in (start, lambda p: unlabelled(p, 1)):
        with pytest.raises(ConfigInvalid, match="newer midstream"):
            act(path)
