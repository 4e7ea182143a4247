"""A real PostgreSQL's own ways to lose: texts beside records, numbers that are burnt, tables that are rewritten."""

import os
import socket

import psycopg

from monitor.traffic import Cipher, Said, find_said
from monitor.traffic.database import engine_of

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
        names = (
            "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relname IN ('records', 'readings', 'said')"
        )
        return dict(database.execute(names).fetchall())


def test_what_ages_out_does_not_lock_the_log_and_what_is_erased_is_rewritten(url):
    log = log_of(url)
    for i in range(20):
        log.put(record(f"r{i}", created=1.0 if i else 2.0, key="alice" if i else "bob"))
    log.close()
    before = files(url)
    log = log_of(url, days=1, clock=lambda: 86_402.0)
    until(lambda: stored(url) == ["r0"])
    log.mark_features("f", [])  # the writer has done with sweeping
    assert files(url) == before
    assert log.erase("bob") == 1
    log.close()
    after = files(url)
    assert all(after[name] != number for name, number in before.items())


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
