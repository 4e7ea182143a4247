"""T21: what is too old goes by itself, what is erased is gone: rows, readings, labels, texts, and their bytes."""

import json
import sqlite3
import subprocess
import sys
import time

import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic import Label, TrafficLog, add_label, erase, erased_from, find_records
from monitor.traffic.erase import CHUNK
from monitor.types import Action

from .admin_port import BEARER, AdminPort
from .admin_port import KEY as ADMIN_KEY
from .test_log_text import KEY, Cipher, Said
from .test_records import reading, record, until

DAY = 86_400.0
TABLES = ("records", "readings", "labels", "said")


def fill(path, records, days=None, clock=time.time, **more):
    log = TrafficLog(path, 1_000_000, 100_000, lambda n: None, days=days, clock=clock, **more)
    for one in records:
        log.put(one)
    return log


def rows(path, table="records"):
    database = sqlite3.connect(path)
    (n,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    database.close()
    return n


def bytes_of(path):
    return b"".join(p.read_bytes() for p in path.parent.iterdir() if p.name.startswith(path.name))


def canary(i, **changes):
    """A record whose every part can be found in the file."""
    readings = (reading(Action.FLAG, probe=f"canary{i}"),)
    return record(f"canary{i}", verdict=Action.FLAG, readings=readings, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.sqlite3"


def test_t21_ten_thousand_old_rows_go_and_their_bytes(path):
    now = 100 * DAY
    old = [canary(i, created=now - 31 * DAY) for i in range(10_000)]
    young = [record(f"young{i}", created=now - 29 * DAY) for i in range(50)]
    fill(path, [*old, *young]).close()
    add_label(path, "canary7", 0, Label.HARMFUL, "somebody-who-labels")
    assert (rows(path), rows(path, "readings")) == (10_050, 10_050) and b"canary7" in bytes_of(path)
    began = time.monotonic()
    log = fill(path, [], days=30, clock=lambda: now)
    until(lambda: log._swept == 0 and rows(path) == 50)
    took = time.monotonic() - began
    kept = bytes_of(path)  # the server still runs: its -wal is there
    assert b"canary" not in kept and b"somebody-who-labels" not in kept and b"young7" in kept
    log.close()
    assert [rows(path, t) for t in TABLES] == [50, 50, 0, 0]
    print(f"10,000 old rows gone and scrubbed in {took:.1f} s")


def test_while_old_ones_go_new_ones_are_written(path):
    now = 100 * DAY
    fill(path, [record(f"old{i}", created=1.0) for i in range(5 * CHUNK)]).close()
    log = fill(path, [record(f"new{i}", created=now) for i in range(500)], days=1, clock=lambda: now)
    until(lambda: rows(path) == 500)
    log.close()


def test_without_days_nothing_is_too_old(path):
    fill(path, [record("r1", created=1.0)], days=None).close()
    fill(path, [], days=None).close()
    assert rows(path) == 1


def with_everything(path):
    """Two keys and no key, each with records, labels and texts."""
    log = fill(path, [], cipher=Cipher(KEY))
    for key in ("alice", "bob", ""):
        for i in range(3):
            name = f"{key or 'nobody'}-request-{i}".replace("-", "")
            log.put(canary(name, key=key))
            log.say(Said(f"canary{name}", {"prompt": "x"}, {0: "y"}))
    log.close()
    for name in ("canaryalicerequest0", "canarybobrequest0"):
        add_label(path, name, 0, Label.HARMFUL, f"labels{name}")


def test_a_tenant_is_erased_and_the_others_stay(path):
    with_everything(path)
    assert [rows(path, t) for t in TABLES] == [9, 9, 2, 9]
    assert erased_from(path, lambda engine: erase(engine, key="alice")) == 3
    assert [rows(path, t) for t in TABLES] == [6, 6, 1, 6]
    kept = bytes_of(path)
    assert b"alice" not in kept and b"canarybobrequest2" in kept and b"canarynobodyrequest2" in kept
    assert find_records(path, "canaryalicerequest0") == []
    assert erased_from(path, lambda engine: erase(engine, key="")) == 3
    assert b"nobody" not in bytes_of(path)
    assert erased_from(path, lambda engine: erase(engine, key="alice")) == 0


def test_a_request_is_erased_with_all_it_judged(path):
    names = ["aa", "aa-1", "aa-22", "aab", "a", "ba"]
    fill(path, [*(record(n) for n in names), record("aa", 1)]).close()
    assert erased_from(path, lambda engine: erase(engine, request_id="aa")) == 4
    database = sqlite3.connect(path)
    assert [n for (n,) in database.execute("SELECT request_id FROM records ORDER BY id")] == ["aab", "a", "ba"]
    database.close()
    assert erased_from(path, lambda engine: erase(engine, request_id="%")) == 0


def test_more_than_one_piece_is_erased(path):
    fill(path, [record(f"r{i}", key="alice" if i % 2 else "bob") for i in range(5 * CHUNK)]).close()
    assert erased_from(path, lambda engine: erase(engine, key="bob")) == 2.5 * CHUNK
    assert rows(path) == rows(path, "readings") == 2.5 * CHUNK


@pytest.mark.parametrize("whose", [{}, {"key": "a", "request_id": "b"}])
def test_nobody_is_erased_by_mistake(path, whose):
    fill(path, [record()]).close()
    with pytest.raises(ConfigInvalid, match="say whose"):
        erased_from(path, lambda engine: erase(engine, **whose))
    assert rows(path) == 1


def test_somebody_who_reads_is_told_of(path):
    fill(path, [canary(i) for i in range(100)]).close()
    server = fill(path, [])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM records").fetchone()
    with pytest.raises(ConfigInvalid, match="run it again"):
        server.erase(key="")
    reader.close()
    assert server.erase(key="") == 0
    assert b"canary" not in bytes_of(path)
    server.close()


def test_what_was_handed_over_before_is_erased_too(path):
    log = fill(path, [canary(i, key="alice") for i in range(2000)])
    assert log.erase(key="alice") == 2000
    log.put(canary("after", key="alice"))
    log.close()
    assert rows(path) == 1


# --- by an operator -------------------------------------------------------------------------------------------------


class WithLog(AdminPort):
    """The admin port over a real log."""

    def __init__(self, folder):
        self.log = fill(folder / "records.sqlite3", [canary(i, key="alice") for i in range(5)])
        super().__init__(folder)

    async def _main(self):
        import dataclasses

        self.operations = dataclasses.replace(self.operations, erase=self.log.erase)
        await super()._main()


@pytest.fixture
def port(tmp_path):
    server = WithLog(tmp_path)
    yield server
    server.stop()
    server.log.close()


def test_the_admin_port_erases(port, path):
    assert port.ask("POST", "/admin/erase", body={"id": "canary1"})[:2] == (200, {"erased": 1})
    assert port.ask("POST", "/admin/erase", body={"key": "alice"})[:2] == (200, {"erased": 4})
    assert b"canary" not in bytes_of(path)
    assert port.status("POST", "/admin/erase", body={"key": f"a\n{ADMIN_KEY}"}) == 200
    assert [(r["path"], r["result"]) for r in port.rows()] == [
        ("/admin/erase", "200 request canary1: 1 erased"),
        ("/admin/erase", "200 key 'alice': 4 erased"),
        ("/admin/erase", "200 key 'a\\n[key]': 0 erased"),
    ]


@pytest.mark.parametrize(
    "body", [{}, {"key": "alice", "id": "canary1"}, {"id": "%"}, {"key": 1}, {"all": True}, {"key": "x" * 65}]
)
def test_the_admin_port_refuses_what_is_not_one_of_both(port, path, body):
    assert port.status("POST", "/admin/erase", body=body) == 400
    assert port.status("POST", "/admin/erase", headers={}, body={"key": "alice"}) == 401
    assert port.status("GET", "/admin/erase", headers=BEARER) == 405
    assert port.log.depth == 0 and rows(path) == 5


def test_the_command_erases_and_leaves_an_audit_row(tmp_path, monkeypatch, capfd):
    from monitor.cli import main

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "midstream/records.sqlite3"
    fill(path, [canary(i, key="alice") for i in range(3)]).close()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "log", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    assert run("status", "--json") == (0, json.dumps({"flag": {"records": 3, "labelled": 0}}) + "\n", "")
    assert run("erase", "--id", "chatcmpl-canary1") == (0, "erased 1 records\n", "")
    assert run("erase", "--key", "alice") == (0, "erased 2 records\n", "")
    assert b"canary" not in bytes_of(path)
    for wrong in ([], ["--key", "a", "--id", "b"], ["--texts", "--key", "a"]):
        code, out, err = run("erase", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1) and "erase what?" in err
    database = sqlite3.connect(tmp_path / "midstream/audit.sqlite3")
    query = "SELECT actor, method, path, result FROM audit JOIN outcome ON audit = id ORDER BY id"
    assert database.execute(query).fetchall() == [
        ("command", "ERASE", "request 'canary1'", "1 erased"),
        ("command", "ERASE", "key 'alice'", "2 erased"),
    ]
    database.close()


def test_erasing_does_not_need_the_server_to_stop(path):
    """From another process, while records come."""
    log = fill(path, [canary(i, key="alice") for i in range(100)])
    until(lambda: rows(path) == 100)
    script = (
        "import sys, pathlib; from monitor.traffic import erase, erased_from; "
        "print(erased_from(pathlib.Path(sys.argv[1]), lambda e: erase(e, key='alice')))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    n = 0
    while process.poll() is None:
        log.put(record(f"other{n}"))
        n += 1
        time.sleep(0.005)
    assert process.communicate()[0] == "100\n"
    log.close()
    assert rows(path) == n and b"canary" not in bytes_of(path)
