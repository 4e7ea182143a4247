"""Texts: each is kept once, one that can't be kept costs no record, and what is lost is counted."""

import sqlite3

import pytest

from monitor.traffic import Cipher, Said, TrafficLog, find_said
from monitor.traffic.receipts import Receipts

from .test_log_faults import Disk, stored
from .test_log_text import KEY, find_all
from .test_records import record, until


class World:
    """A log that keeps texts; what it lost."""

    def __init__(self, path, **more):
        self.path, self.drops, self.texts = path, [], []
        self.log = TrafficLog(
            path, 1000, 1000, self.drops.append, texts_dropped=self.texts.append, cipher=Cipher(KEY), **more
        )

    @property
    def lost(self):
        """Records, texts."""
        return sum(self.drops), sum(self.texts)

    def said(self, name="r1"):
        return find_said(self.path, name, Cipher(KEY))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.sqlite3"


class HangsUpInBetween(Receipts):
    """The event loop closes the request right after the engine's record was counted in."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def expect(self, request_id, choice):
        found = super().expect(request_id, choice)
        whole = Said("r1", {"prompt": "q"}, {0: "a"})
        if choices := self.close("r1", whole):
            self.log.say(whole.of(choices))
        return found


def test_a_hangup_while_its_record_comes_costs_nothing(path):
    world = World(path)
    world.log._receipts = HangsUpInBetween(world.log)
    receipt = world.log._receipts.open("r1")
    receipt.digest = "d"
    world.log.put(record("r1"))
    world.log.put(record("r2"))
    world.log.close()
    assert stored(path) == ["r1", "r2"] and world.said()[0]["answer"] == "a"
    assert world.lost == (0, 0)


def test_of_a_request_with_several_records_only_its_own_brings_the_text(path):
    world = World(path)
    with world.log.followed("r1", lambda: Said("r1", {"prompt": "q"}, {})) as receipt:
        receipt.digest = "d"
        world.log.put(record("r1-1"))  # its client goes before the first one has its record
    for name in ("r1-2", "r1", "r1-3"):
        world.log.put(record(name))
    world.log.close()
    assert sorted(stored(path)) == ["r1", "r1-1", "r1-2", "r1-3"] and set(find_all(path).values()) == {"d"}
    assert sorted(world.said()) == [0] and world.lost == (0, 0)


def test_the_same_text_twice_is_kept_once(path):
    world = World(path)
    world.log.put(record("r1"))
    for _ in range(2):
        world.log.say(Said("r1", "q", {0: "a"}))
    world.log.put(record("r2"))
    world.log.close()
    assert stored(path) == ["r1", "r2"] and sorted(world.said()) == [0] and world.lost == (0, 0)


class NoTexts(Disk):
    """A disk that takes everything but texts."""

    def connect(self, *args, **kwargs):
        connection = super().connect(*args, **kwargs)
        connection.execute(
            "CREATE TEMP TRIGGER IF NOT EXISTS no_texts BEFORE INSERT ON said BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        return connection


class NoTextsAtAll(Disk):
    """Without room for a text, SQLite ends the whole transaction."""

    def connect(self, *args, **kwargs):
        connection = super().connect(*args, **kwargs)
        connection.execute(
            "CREATE TEMP TRIGGER IF NOT EXISTS no_room BEFORE INSERT ON said BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
        )
        return connection


def with_one_text(path, disk):
    World(path).log.close()  # the tables are there
    world = World(path, connect=disk.connect)
    world.log.put(record("r1"))
    world.log.say(Said("r1", "q", {0: "a", 1: "b"}))
    world.log.put(record("r2"))
    world.log.close()
    return world


def test_a_text_that_can_not_be_kept_costs_no_record(path):
    world = with_one_text(path, NoTexts(path))
    assert stored(path) == ["r1", "r2"] and world.said() == {} and world.lost == (0, 2)


def test_where_the_transaction_is_gone_records_are_not_counted_as_written(path):
    world = with_one_text(path, NoTextsAtAll(path))
    assert len(stored(path)) + sum(world.drops) == 2 and sum(world.texts) == 2


def test_a_text_of_no_record_is_counted(path):
    world = World(path)
    world.log.put(record("r1"))
    world.log.say(Said("r1", "q", {0: "a", 1: "b"}))
    world.log.say(Said("nobody", "q", {0: "a"}))
    world.log.close()
    assert sorted(world.said()) == [0] and sum(world.texts) == 2


def test_a_text_whose_late_record_has_no_room_is_counted(path):
    world = World(path)
    world.log.put(record("r0"))
    until(lambda: stored(path) == ["r0"])
    with world.log.followed("r1", lambda: Said("r1", {"prompt": "q"}, {})) as receipt:
        receipt.digest = "d"
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    n = 0
    while not world.drops:
        world.log.put(record(f"x{n}"))
        n += 1
    world.log.put(record("r1"))
    lock.execute("ROLLBACK")
    lock.close()
    world.log.close()
    assert sum(world.texts) == 1 and world.said() == {}
