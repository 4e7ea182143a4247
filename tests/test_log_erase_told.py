"""An operator erases: written down before, told how far it came, and features go whatever becomes of the records."""

import sqlite3
import sys

import pytest

from monitor.api.features import eraser
from monitor.cli import main
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.traffic import erase, erased_from
from monitor.traffic.erase import CHUNK
from monitor.traffic.features import read_features, write_features

from .test_features import feature
from .test_log_erase import canary, fill, port, rows  # noqa: F401
from .test_records import record


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A state folder with three records of alice's and their features."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "midstream"
    fill(folder / "records.sqlite3", [canary(i, key="alice") for i in range(3)]).close()
    write_features(folder / "features", [feature(f"canary{i}", key="alice") for i in range(3)])
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "log", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return command


def audited(home):
    with sqlite3.connect(home / "audit.sqlite3") as database:
        return database.execute("SELECT path, result FROM audit LEFT JOIN outcome ON audit = id").fetchall()


def test_who_reads_the_log_keeps_neither_the_audit_row_nor_the_features(home, run):
    reader = sqlite3.connect(home / "records.sqlite3", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM records").fetchone()
    code, out, err = run("erase", "--key", "alice")
    reader.close()
    assert (code, out) == (2, "") and "3 records are erased, but somebody reads the log" in err
    assert rows(home / "records.sqlite3") == 0 and read_features(home / "features") == []
    ((what, result),) = audited(home)
    assert what == "key 'alice'" and "3 features are erased" in result and "3 records are erased, but" in result


def test_what_can_not_be_written_down_is_not_done(home, run):
    (home / "audit.sqlite3").write_bytes(b"no database" * 100)
    code, out, err = run("erase", "--key", "alice")
    assert (code, out) == (2, "") and "audit log" in err
    assert rows(home / "records.sqlite3") == 3 and len(read_features(home / "features")) == 3


def test_without_a_log_its_features_go(home, run):
    (home / "records.sqlite3").unlink()
    assert run("erase", "--key", "alice")[0] == 2
    assert read_features(home / "features") == [] and "no records at" in audited(home)[0][1]


def test_features_that_stay_are_told_beside_the_records_that_went(home, run):
    (path,) = (home / "features").glob("features-*")
    path.write_bytes(b"PAR1")
    code, _, err = run("erase", "--id", "chatcmpl-canary1")
    assert code == 2 and "1 records are erased" in err and path.name in err
    assert audited(home)[0][0] == "request 'canary1'" and "1 records are erased" in audited(home)[0][1]


def test_how_far_it_came_is_told_when_it_breaks_off(tmp_path):
    path = tmp_path / "records.sqlite3"
    fill(path, [record(f"r{i}", key="alice") for i in range(CHUNK + 5)]).close()
    with sqlite3.connect(path) as database:
        number = CHUNK + 3  # of the second piece
        database.execute(
            f"CREATE TRIGGER stays BEFORE DELETE ON records WHEN old.id = {number} BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(ConfigInvalid, match=f"^{CHUNK} records are erased, then it failed"):
        erased_from(path, lambda engine: erase(engine, key="alice"))
    assert rows(path) == 5


def test_the_server_erases_features_where_the_records_fail(tmp_path):
    write_features(tmp_path, [feature()])

    class Broken:
        def erase(self, key, request_id):
            raise ConfigInvalid("7 records are erased, but no more")

    with pytest.raises(ConfigInvalid, match="7 records are erased, but no more"):
        eraser(load_settings(features=tmp_path), Broken(), None)("alice", None)
    assert read_features(tmp_path) == []


def test_the_admin_port_knows_a_request_by_what_its_client_saw(port):
    for given in ("chatcmpl-canary1", "cmpl-canary2", "canary3"):
        assert port.ask("POST", "/admin/erase", body={"id": given})[:2] == (200, {"erased": 1})
