"""The same log in a real PostgreSQL, started here: what SQLite's has to pass, and a server that goes away."""

import json
import subprocess
import sys
import threading
import time

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.traffic import (
    Cipher,
    Filter,
    Label,
    Said,
    TrafficLog,
    add_label,
    count_unlabelled,
    counts,
    erase,
    erased_from,
    find_labels,
    find_records,
    find_said,
    record_json,
    review_queue,
    unlabelled,
)
from monitor.traffic.database import NEWEST, opened
from monitor.traffic.tables import metadata
from monitor.types import Action, Phase

from .postgres import Unavailable, postgres
from .scripted import scripted
from .test_log_faults import ask
from .test_log_kill import kill_again_and_again
from .test_log_queue import FILTERS, plainly, some_records
from .test_log_text import KEY
from .test_nearest import check_pages, scattered
from .test_records import record, until


@pytest.fixture(scope="module")
def server():
    try:
        with postgres() as one:
            yield one
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def url(server):
    """Of a database of its own."""
    name = f"log{time.monotonic_ns()}"
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    return server.url.rpartition("/")[0] + f"/{name}"


def log_of(url, drops=None, keep=100_000, queue=10_000, **more):
    return TrafficLog(url, keep, queue, (drops if drops is not None else []).append, **more)


def stored(url):
    with psycopg.connect(url) as database:
        return [name for (name,) in database.execute("SELECT request_id FROM records ORDER BY id")]


def test_round_trip_labels_texts_and_erasing(url):
    drops = []
    log = log_of(url, drops, cipher=Cipher(KEY))
    blocked = record("r1", 1, Action.BLOCK, key="alice")
    for one in (record("r1", key="alice"), blocked, record("r2", verdict=Action.FLAG, key="bob")):
        log.put(one)
    log.say(Said("r1", {"prompt": "call me: +49 30 12345678"}, {0: "no", 1: "yes"}))
    until(lambda: log.backlog() == 2)
    log.close()
    assert drops == [] and find_records(url, "r1")[1] == json.loads(json.dumps(record_json(blocked)))
    assert find_said(url, "r1", Cipher(KEY))[1] == {"prompt": {"prompt": "call me: [phone]"}, "answer": "yes"}
    with pytest.raises(ConfigInvalid, match="is not the key"):
        log_of(url, cipher=Cipher("A" * 43 + "="))
    assert [b["request_id"] for b in unlabelled(url, 9)] == ["r2", "r1"]
    assert add_label(url, "r2", 0, Label.HARMFUL, "ann", lambda: 1.0) is None
    assert add_label(url, "r2", 0, Label.UNSURE, "ben", lambda: 2.0) is Label.HARMFUL
    assert [one["by"] for one in find_labels(url, "r2", 0)] == ["ben", "ann"]
    assert counts(url) == {"allow": (1, 0), "block": (1, 0), "flag": (1, 1)} and count_unlabelled(url) == 1
    assert erased_from(url, lambda engine: erase(engine, key="alice")) == 2
    with psycopg.connect(url) as database:
        left = [database.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in metadata.tables]
    assert dict(zip(metadata.tables, left, strict=True)) == {
        "records": 1, "readings": 1, "labels": 2, "said": 0, "meta": 2,
    }  # fmt: skip


def test_every_filter_is_what_a_plain_look_gives(url):
    every = list(some_records())
    log = log_of(url)
    for one in every:
        log.put(one)
    log.close()
    for which in FILTERS:
        if which.labelled is not True:
            found = [e.body["request_id"] for e in review_queue(url, which, 1000)]
            assert found == plainly(every, set(), which), which


def test_the_nearest_to_a_threshold_page_by_page(url):
    scattered(url)
    for around in (1.0, 0.3, 1e13):
        check_pages(url, Filter("demo", Phase.PROMPT), around)
        check_pages(url, Filter("demo", Phase.PROMPT, key="bob", labelled=None), around)


def test_the_tables_are_as_they_are_declared_and_only_the_newest_are_kept(url):
    now = 1e9
    for start in (0, 30):
        log = log_of(url, keep=10, days=1, clock=lambda: now)
        for i in range(start, start + 30):
            log.put(record(f"r{i}", created=now if i != 55 else 1.0))
        log.close()
    log = log_of(url, keep=10, days=1, clock=lambda: now)
    until(lambda: len(stored(url)) == 9)
    log.close()
    assert stored(url) == [f"r{i}" for i in range(50, 60) if i != 55]
    with opened(url) as connection:
        context = MigrationContext.configure(connection)
        assert (context.get_current_revision(), compare_metadata(context, metadata)) == (NEWEST, [])


def test_four_servers_that_start_at_once_share_a_log(url):
    logs, failed = [], []

    def start():
        try:
            logs.append(log_of(url))
        except ConfigInvalid as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    for number, log in enumerate(logs):
        for i in range(300):
            log.put(record(f"r{number}-{i}"))
    for log in logs:
        log.close()
    assert len(set(stored(url))) == 1200


def test_a_server_that_goes_away_costs_exact_drops_and_comes_back(server, url):
    drops = []
    log = log_of(url, drops)
    log.put(record("before"))
    until(lambda: stored(url) == ["before"])
    server.stop()
    for i in range(50):
        log.put(record(f"lost{i}"))
    until(lambda: sum(drops) == 50)
    server.start()
    log.put(record("after"))
    log.close()
    assert (stored(url), sum(drops)) == (["before", "after"], 50)


@pytest.mark.parametrize("fault", ["read-only", "locked"])
def test_a_database_that_refuses_costs_exact_drops(url, fault):
    drops = []
    log = log_of(url, drops)
    log.put(record("before"))
    until(lambda: stored(url) == ["before"])
    with psycopg.connect(url) as other:
        if fault == "locked":
            other.execute("LOCK TABLE records IN ACCESS EXCLUSIVE MODE")
        else:
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on")
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        for i in range(50):
            log.put(record(f"lost{i}"))
        until(lambda: sum(drops) == 50)
        if fault == "locked":
            other.rollback()
        else:
            with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=off") as admin:
                admin.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = off")
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    log.put(record("after"))
    log.close()
    assert (stored(url), sum(drops)) == (["before", "after"], 50)


def test_where_it_is_required_traffic_is_refused_while_it_is_away(server, url):
    settings = load_settings(log_url=url, log_required=True, log_wait_s=20)
    with scripted(settings) as serving:
        assert ask(serving).status_code == 200
        server.stop()
        serving.log._wait_s = 0.3
        assert ask(serving).json()["error"]["code"] == "record"
        assert ask(serving).status_code == 503 and serving.engine.submitted == 2
        server.start()
        until(lambda: not serving.log.refuses)
        serving.log._wait_s = 20
        assert ask(serving).status_code == 200
        assert serving.metric("records_dropped_total") == 0
    assert len(stored(url)) == 3


def test_no_record_of_a_delivered_answer_is_lost(url):
    kill_again_and_again(url, 1, True)


@pytest.mark.attack
def test_t16_ten_kills(url):
    kill_again_and_again(url, 10, True)


@pytest.mark.parametrize("bad", ["mysql://x/y", "postgresql://nobody-there.invalid/x", "::", "postgresql://h:port/x"])
def test_an_address_that_is_none_is_refused_without_its_password(bad):
    with pytest.raises(ConfigInvalid) as caught:
        log_of(bad.replace("://", "://me:the-password@"))
    assert "the-password" not in str(caught.value)


def test_a_server_without_the_driver_says_what_to_install():
    script = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from monitor.errors import ConfigInvalid\nfrom monitor.traffic import count_unlabelled\n"
        "try: count_unlabelled('postgresql://x@127.0.0.1:1/x')\nexcept ConfigInvalid as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert "midstream[postgres]" in done.stdout
