"""A real PostgreSQL's own ways to lose: texts beside records, numbers that are burnt, tables that are rewritten."""

import os
import socket
import threading

import psycopg
import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic import Cipher, Filter, Label, Said, add_label, erase, erased_from, find_said
from monitor.traffic.database import engine_of, opened
from monitor.traffic.erase import CHUNK
from monitor.traffic.queue import entries, few_readings
from monitor.types import Action

from .test_log_postgres import log_of, server, stored, url  # noqa: F401
from .test_log_text import KEY
from .test_records import record, until

OPTIONS = socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT


def test_a_text_costs_no_record(url):
    drops, texts = [], []
    log_of(url).close()  # the tables are there
    with psycopg.connect(url) as admin:
        admin.execute("ALTER TABLE said ADD CONSTRAINT short CHECK (length(sealed) < 1000)")
    log = log_of(url, drops, cipher=Cipher(KEY), texts_dropped=texts.append)
    for name in ("r1", "r2"):
        log.put(record(name))
    log.say(Said("r1", "x" * 2000, {0: "a"}))
    log.mark_features("f", [])  # comes after all of that
    for _ in range(2):
        log.say(Said("r2", "q", {0: "a"}))
    log.put(record("r3"))
    log.close()
    assert stored(url) == ["r1", "r2", "r3"] and (drops, sum(texts)) == ([], 1)
    assert find_said(url, "r1", Cipher(KEY)) == {} and find_said(url, "r2", Cipher(KEY))[0]["answer"] == "a"


def test_lost_records_evict_none(url):
    """Every attempt burns numbers: the newest are kept by rank."""
    drops = []
    log = log_of(url, drops, keep=100)
    for i in range(100):
        log.put(record(f"r{i}"))
    until(lambda: len(stored(url)) == 100)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("ALTER TABLE readings RENAME TO gone")
        for i in range(90):
            log.put(record(f"lost{i}"))
        until(lambda: sum(drops) == 90)
        admin.execute("ALTER TABLE gone RENAME TO readings")
    log.put(record("after"))
    log.close()
    assert stored(url) == [*(f"r{i}" for i in range(1, 100)), "after"]


def files(url):
    """Where each table lies: another file once it was written anew."""
    with psycopg.connect(url) as database:
        names = "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relname = ANY(%s)"
        return dict(database.execute(names, [["records", "readings", "labels", "said"]]).fetchall())


def test_what_ages_out_does_not_lock_the_log_and_what_is_erased_is_rewritten(url):
    log = log_of(url)
    for i in range(20):
        log.put(record(f"r{i}", created=1.0 if i else 2.0, key="alice" if i else "bob"))
    log.close()
    before = files(url)
    assert len(before) == 4
    log = log_of(url, days=1, clock=lambda: 86_402.0)
    until(lambda: stored(url) == ["r0"])
    log.mark_features("f", [])  # the writer has done with sweeping
    assert files(url) == before
    assert log.erase("bob") == 1
    log.close()
    after = files(url)
    assert all(after[name] != number for name, number in before.items())


def log_with(url, n):
    """n records of alice's: r0, r1, ..."""
    log = log_of(url)
    for i in range(n):
        log.put(record(f"r{i}", key="alice"))
    until(lambda: len(stored(url)) == n)
    return log


def test_labels_of_erased_records_leave_no_bytes(url):
    log_with(url, 3).close()
    add_label(url, "r1", 0, Label.HARMFUL, "somebody")
    assert erased_from(url, lambda engine: erase(engine, key="alice")) == 3
    with psycopg.connect(url) as database:
        assert database.execute("SELECT pg_relation_size('labels')").fetchone() == (0,)


def waits_for_a_lock(url):
    with psycopg.connect(url) as database:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return database.execute(query).fetchone()[0] > 0


def test_an_erase_goes_on_where_another_writer_has_deleted_some_of_it(url):
    """The other one's rows are in none of our counts: a piece that is not full is not the last one."""
    log_with(url, CHUNK + 500).close()
    found = []
    with psycopg.connect(url) as other:
        other.execute("DELETE FROM records WHERE id <= 10")
        thread = threading.Thread(target=lambda: found.append(erased_from(url, lambda e: erase(e, key="alice"))))
        thread.start()
        until(lambda: waits_for_a_lock(url))
        other.commit()
    thread.join(60)
    assert (found, stored(url)) == ([CHUNK + 490], [])


def test_somebody_who_still_reads_what_was_erased_is_told_of(url):
    log = log_with(url, 3)
    with psycopg.connect(url) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT FROM meta")  # a snapshot, and no lock on what goes
        with pytest.raises(ConfigInvalid, match="3 records are erased, but somebody reads the log"):
            log.erase(key="alice")
    assert log.erase(key="alice") == 0
    log.close()


def test_what_goes_while_the_queue_is_read_is_there_until_it_was(url):
    """Readings and their records come by two statements."""
    log_with(url, 3).close()
    with opened(url) as connection:
        found = connection.execute(few_readings(Filter(key="alice", verdicts=frozenset(Action)))).all()
        with psycopg.connect(url) as other:
            other.execute("DELETE FROM records")
        assert {e.body["request_id"] for e in entries(connection, found)} == {"r0", "r1", "r2"}


def test_a_connection_that_is_dead_is_noticed(url):
    """Options of the very socket; that Linux obeys them is Linux's."""
    engine = engine_of(url)
    with engine.connect() as connection:
        number = os.dup(connection.connection.driver_connection.fileno())
        with socket.socket(fileno=number) as wire:
            found = [wire.getsockopt(socket.IPPROTO_TCP, o) for o in OPTIONS]
            alive = wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    engine.dispose()
    assert (alive, found) == (1, [10_000, 5, 5, 2])
