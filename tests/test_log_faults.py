"""T17: a disk that is full, fails, is read-only, locked or slow. Traffic goes on, drops are exact; or it is refused."""

import contextlib
import sqlite3
import threading
import time

import pytest

from monitor.config import load_settings
from monitor.traffic import TrafficLog, find_records
from monitor.traffic.receipts import Receipt

from .scripted import scripted
from .test_records import record, until

QUEUE = 100
INJECTED = {"io": "disk I/O error", "no room": "database or disk is full"}


class Disk:
    """What is under a log: `connect` for it, `fail` with one fault and `mend` it again."""

    def __init__(self, path):
        self.path, self.fault, self.opened = path, None, []
        self._lock = None

    def connect(self, *args, **kwargs):
        disk = self

        class Cursor(sqlite3.Cursor):
            def executemany(self, statement, rows):
                disk.write()
                return super().executemany(statement, rows)

            def execute(self, statement, *rest):
                if statement.startswith("INSERT"):  # one row
                    disk.write()
                return super().execute(statement, *rest)

        class Connection(sqlite3.Connection):
            def cursor(self, factory=Cursor):
                return super().cursor(factory)

        self.opened.append(sqlite3.connect(*args, factory=Connection, **kwargs))
        return self.opened[-1]

    def write(self):
        if self.fault in INJECTED:
            raise sqlite3.OperationalError(INJECTED[self.fault])
        if self.fault == "slow":
            time.sleep(0.1)  # of the records, and of their readings

    def _pragma(self, text):
        for connection in self.opened:
            sqlite3.Connection.cursor(connection, sqlite3.Cursor).execute(f"PRAGMA {text}")

    def fail(self, fault):
        self.fault = fault
        if fault == "full":  # SQLite's own answer to a disk without room
            self._pragma("max_page_count=1")
        elif fault == "read-only":
            self._pragma("query_only=ON")
        elif fault == "locked":
            self._lock = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._lock.execute("BEGIN IMMEDIATE")

    def mend(self):
        if self.fault == "full":
            self._pragma("max_page_count=1000000")
        elif self.fault == "read-only":
            self._pragma("query_only=OFF")
        elif self.fault == "locked":
            self._lock.rollback()
            self._lock.close()
        self.fault = None


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path / "records.sqlite3")


def stored(path):
    database = sqlite3.connect(path)
    names = [name for (name,) in database.execute("SELECT request_id FROM records ORDER BY id")]
    database.close()
    return names


ERRORS = ("no room", "io", "read-only", "locked")


@pytest.mark.parametrize("fault", ["full", "io", "read-only", "locked", "slow"])
def test_traffic_goes_on_and_drops_are_exact(disk, fault):
    drops = []
    log = TrafficLog(disk.path, 100_000, QUEUE, drops.append, connect=disk.connect)
    log.put(record("before"))
    until(lambda: stored(disk.path) == ["before"])
    disk.fail(fault)
    for i in range(1000):  # "full" takes what fits into the pages there are
        log.put(record(f"r{i}", token_scores={"demo": [0.5] * 1000}))
        assert log.depth <= QUEUE
    until(lambda: log.depth == 0)
    disk.mend()
    until(lambda: sum(drops) + len(stored(disk.path)) == 1001)
    assert sum(drops) > 0
    log.put(record("after"))
    log.close()
    kept = stored(disk.path)
    assert (kept[0], kept[-1], sum(drops)) == ("before", "after", 1002 - len(kept))
    database = sqlite3.connect(disk.path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


ASK = {"model": "scripted", "prompt": "go", "max_tokens": 3}


@contextlib.contextmanager
def served(disk, **settings):
    """A healthy disk has all the time that it needs; `spoil` leaves it little."""
    chosen = load_settings(records=disk.path, log_wait_s=20, **settings)
    with scripted(chosen, connect=disk.connect) as server:
        yield server


def spoil(server, disk, fault):
    server.log._wait_s = 0.2
    disk.fail(fault)


def mend(server, disk):
    server.log._wait_s = 20
    disk.mend()


def ask(server, stream=False):
    return server.client.post("/v1/completions", json=ASK | {"stream": stream})


@pytest.mark.parametrize("fault", [*ERRORS, "slow"])
def test_clients_are_answered(disk, fault):
    with served(disk) as server:
        assert ask(server).status_code == 200
        spoil(server, disk, fault)
        answers = [ask(server, stream) for stream in (False, True, True)]
        assert [a.status_code for a in answers] == [200] * 3
        assert all("length" in a.text for a in answers)
        if fault in ERRORS:
            until(lambda: server.metric("records_dropped_total") == 3)
        mend(server, disk)
        assert ask(server).status_code == 200
    assert len(stored(disk.path)) == (2 if fault in ERRORS else 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ERRORS)
def test_where_the_log_is_required_no_end_goes_out_without_its_record(disk, fault, stream):
    with served(disk, log_required=True) as server:
        assert ask(server, stream).status_code == 200
        spoil(server, disk, fault)
        first = ask(server, stream)  # it was let in before anybody knew
        name = first.headers["x-midstream-request-id"]
        if stream:
            assert first.status_code == 200 and '"code":"record"' in first.text
            assert "[DONE]" not in first.text and '"finish_reason":"length"' not in first.text
        else:
            assert first.status_code == 503 and first.json()["error"]["code"] == "record"
            assert first.headers["retry-after"]
        refused = ask(server, stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "record")
        assert server.engine.submitted == 2
        assert server.client.get("/health").status_code == 200
        mend(server, disk)
        until(lambda: not server.log.refuses)
        assert ask(server, stream).status_code == 200
        assert server.metric("records_dropped_total") == 0
        assert server.metric("limited_total", limit="record") == 2
    assert len(stored(disk.path)) == 3  # that of the answer without an end, too
    assert find_records(disk.path, name)[0]["request_id"] == name


def test_a_slow_log_that_is_required_makes_answers_late_but_whole(disk):
    with served(disk, log_required=True) as server:
        disk.fail("slow")
        assert [ask(server, stream).status_code for stream in (False, True)] == [200, 200]
        disk.mend()
    assert len(stored(disk.path)) == 2


def test_a_required_log_that_stays_broken_does_not_keep_the_server_from_stopping(disk):
    drops = []
    log = TrafficLog(disk.path, 100, QUEUE, drops.append, required=True, connect=disk.connect)
    disk.fail("io")
    for i in range(QUEUE + 300):
        log.put(record(f"r{i}"))
    until(lambda: log.refuses)
    closing = threading.Thread(target=log.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert (stored(disk.path), sum(drops)) == ([], QUEUE + 300)


def test_nobody_waits_for_a_log_in_trouble(disk, monkeypatch):
    """After the first answer that waited in vain, none does until something was written again."""
    waited, wait = [], Receipt.wait

    async def counted(receipt, seconds):
        written = await wait(receipt, seconds)
        waited.append(written)
        return written

    monkeypatch.setattr(Receipt, "wait", counted)
    with served(disk) as server:
        assert ask(server).status_code == 200
        assert waited == [True]
        spoil(server, disk, "locked")
        assert [ask(server).status_code for _ in range(6)] == [200] * 6
        assert waited == [True, None]
        mend(server, disk)
    assert len(stored(disk.path)) == 7
