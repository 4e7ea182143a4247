"""The audit log: every row is on disk when the call returns, stays as it is, and a failure is an error."""

import os
import sqlite3
import stat
import threading

import pytest

from monitor.audit import Audit, AuditFailed
from monitor.errors import ConfigInvalid


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/er/audit.sqlite3"


@pytest.fixture
def audit(path):
    one = Audit(path, clock=lambda: 12.5)
    yield one
    one.close()


def stored(path, table="audit"):
    database = sqlite3.connect(path)
    rows = list(database.execute(f"SELECT * FROM {table} ORDER BY 1"))
    database.close()
    return rows


def test_a_row_is_on_disk_when_the_call_returns(audit, path):
    one = audit.write("admin", "127.0.0.1", "POST", "/admin/policy/reload")
    assert stored(path) == [(1, 12.5, "admin", "127.0.0.1", "POST", "/admin/policy/reload", None, 0)]
    audit.write("unknown", "10.0.0.7", "GET", "/admin/keys", "wrong_key", 41)
    audit.ended(one, "200")
    assert (stored(path)[1][6:], stored(path, "outcome")) == (("wrong_key", 41), [(1, "200")])


def test_the_newest_rows_come_first_with_their_outcome(audit):
    for i in range(5):
        audit.write("admin", "::1", "GET", f"/admin/{i}")
    audit.ended(4, "404")
    rows = audit.latest(3)
    assert [(r["id"], r["path"], r["result"]) for r in rows] == [
        (5, "/admin/4", None), (4, "/admin/3", "404"), (3, "/admin/2", None),
    ]  # fmt: skip
    assert rows[0] == {
        "id": 5, "time": 12.5, "actor": "admin", "peer": "::1", "method": "GET", "path": "/admin/4", "refused": None,
        "unwritten": 0, "result": None,
    }  # fmt: skip


@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET rowid = 9", "REPLACE INTO {} SELECT * FROM {}"])
@pytest.mark.parametrize("table", ["audit", "outcome"])
def test_rows_stay_as_they_are(audit, path, table, statement):
    audit.ended(audit.write("admin", "::1", "GET", "/"), "200")
    before = stored(path, table)
    database = sqlite3.connect(path)
    database.execute("PRAGMA recursive_triggers=ON")  # as REPLACE needs, to ask a trigger
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement.format(table, table))
    database.close()
    assert stored(path, table) == before


def test_two_servers_may_share_the_file(audit, path):
    other = Audit(path)
    rows = [log.write("admin", "::1", "GET", "/") for log in (audit, other, audit, other)]
    other.close()
    assert rows == [1, 2, 3, 4]


def test_many_threads_lose_no_row(audit, path):
    def write(thread):
        for i in range(25):
            audit.ended(audit.write("admin", "::1", "GET", f"/{thread}/{i}"), "200")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({r[5] for r in stored(path)}) == len(stored(path, "outcome")) == 200


def test_texts_are_cut_and_printable(audit):
    audit.write("unknown", "::1", "G\x1b[2JET", "/admin/\r\n\x00\u2028\u202e" + "x" * 10_000, "no_key")
    audit.ended(1, "y" * 300)
    row = audit.latest(1)[0]
    assert (row["method"], row["path"][:13], len(row["path"]), len(row["result"])) == (
        "G?[2JET",
        "/admin/?????x",
        200,
        200,
    )


def test_only_the_owner_may_read(path):
    old = os.umask(0)
    try:
        one = Audit(path)
        one.write("admin", "::1", "GET", "/")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
        one.close()
        os.chmod(path, 0o644)
        Audit(path).close()
        modes["again"] = stat.S_IMODE(path.stat().st_mode)
    finally:
        os.umask(old)
    assert modes == dict.fromkeys((path.name, path.name + "-wal", path.name + "-shm", "again"), 0o600)


def read_only(audit):
    """What a file that has become read-only answers; chmod would not stop root."""
    audit._db.execute("PRAGMA query_only=ON")


def test_a_read_only_file_is_an_error_for_every_row(audit, path):
    one = audit.write("admin", "::1", "GET", "/")
    read_only(audit)
    for call in (lambda: audit.write("admin", "::1", "POST", "/"), lambda: audit.ended(one, "200")):
        with pytest.raises(AuditFailed, match=r"readonly database.*make room or repair"):
            call()
    assert (len(stored(path)), stored(path, "outcome")) == (1, [])
    assert len(audit.latest(10)) == 1


def test_a_locked_or_damaged_file_is_an_error(audit, path, monkeypatch):
    audit.write("admin", "::1", "GET", "/")
    audit._db.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AuditFailed, match="locked"):
        audit.write("admin", "::1", "GET", "/")
    other.execute("ROLLBACK")
    audit.write("admin", "::1", "GET", "/")  # and it goes on where it can
    other.execute("DROP TABLE audit")
    other.close()
    with pytest.raises(AuditFailed, match="no such table"):
        audit.write("admin", "::1", "GET", "/")
    with pytest.raises(AuditFailed, match="can't be read"):
        audit.latest(1)


def test_a_log_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a database, and long enough to be read as a damaged one" * 20)
    for bad in (tmp_path, tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigInvalid, match="set MIDSTREAM_AUDIT"):
            Audit(bad)


def test_pages_and_acts_alone(audit, path):
    """A refused look is an act, and so is a row that tells of what was only counted before it."""
    rows = [("GET", None, 0), ("POST", None, 0), ("HEAD", None, 0), ("GET", "no_key", 0), ("GET", None, 3)]
    for i in range(1000):
        method, refused, unwritten = rows[i % 5] if i < 10 else rows[0]
        audit.write("admin", "::1", method, "/", refused, unwritten)
    acts = [10, 9, 7, 5, 4, 2]
    assert [r["id"] for r in audit.latest(10, reads=False)] == acts
    assert [r["id"] for r in audit.latest(2, before=9, reads=False)] == acts[2:4]
    assert [r["id"] for r in audit.latest(2, before=9)] == [8, 7] and audit.latest(2, before=1) == []
    asked = []
    audit._db.set_trace_callback(asked.append)
    audit.latest(10, reads=False)
    plan = [row[3] for row in audit._db.execute(f"EXPLAIN QUERY PLAN {asked[0]}")]
    assert plan[0] == "SEARCH a USING INDEX audit_acts (id<?)"
