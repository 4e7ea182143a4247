"""Repeat offenders: counted per key in a sliding window, told once, refused for a while; by a fake clock."""

import threading

import pytest

from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.offenders import Offenders
from monitor.types import Action

from .test_records import record

DAY = 86_400.0


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


class Watched:
    """Offenders with their clock, their notices and their metric."""

    def __init__(self, **settings):
        self.clock, self.told, self.metrics, self._n = Clock(), [], Metrics(), 0
        self.them = Offenders(self.metrics.key_events, self.told.append, clock=self.clock, **settings)

    def offend(self, key="alice", verdict=Action.BLOCK, request_id=None, **changes):
        self._n += 1
        self.them.note(record(request_id or f"r{self._n}", verdict=verdict, key=key, **changes))

    def metric(self, key, action):
        return self.metrics.registry.get_sample_value("midstream_key_events_total", {"key": key, "action": action})


def row(key, flags, blocks, refused_for_s=0.0):
    return {"key": key, "flags": flags, "blocks": blocks, "refused_for_s": refused_for_s}


def test_the_window_slides():
    w = Watched(window_s=60.0)
    for t in (0, 20, 40):
        w.clock.now = 1_000.0 + t
        w.offend(verdict=Action.FLAG if t else Action.BLOCK)
    counts = []
    for t in (59.9, 60, 80, 99.9, 100):
        w.clock.now = 1_000.0 + t
        counts.append([(r["flags"], r["blocks"]) for r in w.them.describe()])
    assert counts == [[(2, 1)], [(2, 0)], [(1, 0)], [(1, 0)], []]
    assert w.told == []  # without a limit nobody is an offender
    assert w.them.refused_for("alice") is None


def test_one_notice_a_window_and_the_next_window_has_its_own():
    w = Watched(window_s=60.0, limit=3)
    told_after = []
    for i in range(10):
        w.offend(verdict=Action.FLAG if i % 2 else Action.BLOCK)
        told_after.append(len(w.told))
    assert told_after == [0, 0] + [1] * 8
    assert w.told[0] == {
        "event": "midstream.repeat_offender", "key": "alice", "flags": 1, "blocks": 2, "window_s": 60.0, "time": 1.5,
    }  # fmt: skip
    w.clock.now += 59.9
    w.offend()
    assert len(w.told) == 1
    w.clock.now += 0.1  # the ten of the beginning have gone
    w.offend()
    assert len(w.told) == 1
    w.offend()
    assert len(w.told) == 2
    assert (w.told[1]["flags"], w.told[1]["blocks"]) == (0, 3)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_is_reached_by_that_many(limit):
    w = Watched(limit=limit, block_s=10.0)
    for _ in range(limit - 1):
        w.offend()
    assert (len(w.told), w.them.refused_for("alice")) == (0, None)
    w.offend()
    assert (len(w.told), w.them.refused_for("alice")) == (1, 10.0)


def test_an_offender_is_refused_for_a_while_and_then_not():
    w = Watched(window_s=60.0, limit=2, block_s=30.0)
    w.offend()
    w.offend()
    left = []
    for t in (0, 10, 29.5, 30, 31):
        w.clock.now = 1_000.0 + t
        left.append(w.them.refused_for("alice"))
    assert left == [30.0, 20.0, 0.5, None, None]
    w.offend()  # three in the window: refused again, and told of already
    assert (w.them.refused_for("alice"), len(w.told)) == (30.0, 1)
    w.clock.now = 1_000.0 + 200
    w.offend()
    assert w.them.refused_for("alice") is None


def test_what_ends_while_refused_does_not_make_it_longer():
    w = Watched(limit=1, block_s=30.0)
    w.offend()
    w.clock.now += 20
    w.offend()
    assert w.them.refused_for("alice") == 10.0


def test_without_block_s_nobody_is_refused():
    w = Watched(limit=1)
    for _ in range(50):
        w.offend()
    assert w.them.refused_for("alice") is None
    assert len(w.told) == 1


def test_keys_are_apart():
    w = Watched(limit=2, block_s=30.0)
    w.offend("alice")
    w.offend("bob")
    assert w.told == []
    w.offend("bob")
    assert [e["key"] for e in w.told] == ["bob"]
    assert (w.them.refused_for("alice"), w.them.refused_for("bob"), w.them.refused_for("eve")) == (None, 30.0, None)
    assert w.them.describe() == [row("bob", 0, 2, 30.0), row("alice", 0, 1)]


@pytest.mark.parametrize("verdict", [Action.ALLOW, Action.UNMONITORED])
def test_only_flags_and_blocks_are_events(verdict):
    w = Watched(limit=1)
    w.offend(verdict=verdict)
    assert (w.told, w.them.describe()) == ([], [])
    assert {w.metric("other", a) for a in ("flag", "block")} == {0.0}


def test_the_choices_of_one_request_are_one_event_of_each_kind():
    w = Watched(limit=3)
    for index in range(8):
        w.offend(request_id="same", index=index)
        w.offend(request_id="same", index=index + 8, verdict=Action.FLAG)
    assert (w.them.describe(), w.told) == ([row("alice", 1, 1)], [])
    assert (w.metric("other", "block"), w.metric("other", "flag")) == (8, 8)  # sequences, as in every other metric


def test_a_server_without_keys_counts_and_refuses_nobody():
    w = Watched(limit=1, block_s=30.0)
    for _ in range(5):
        w.offend("")
    assert (w.told, w.them.describe(), w.them.refused_for("")) == ([], [], None)
    assert w.metric("other", "block") == 5


@pytest.mark.parametrize("route", ["moderations", "guardrail"])
def test_asking_for_a_verdict_is_no_offence(route):
    """A gateway sends what its users wrote: refusing the gateway would be an outage."""
    w = Watched(limit=1, block_s=30.0, metric_keys=["gateway"])
    for _ in range(5):
        w.offend("gateway", route=route)
    assert (w.told, w.them.refused_for("gateway"), w.metric("gateway", "block")) == ([], None, 5)


def test_only_listed_keys_are_labels():
    w = Watched(metric_keys=["alice"])
    assert (w.metric("alice", "flag"), w.metric("other", "block")) == (0, 0)  # before any event
    for i in range(500):
        w.offend(f"key{i}")
    w.offend("alice", Action.FLAG)
    samples = [s for f in w.metrics.registry.collect() for s in f.samples if s.name == "midstream_key_events_total"]
    assert (w.metric("alice", "flag"), w.metric("other", "block"), len(samples)) == (1, 500, 4)


def test_memory_is_bounded_and_a_flood_still_offends():
    w = Watched(limit=3, window_s=DAY)
    for _ in range(20_000):
        w.offend()
    key = w.them._keys["alice"]
    assert (len(key.events), len(key.seen), w.them.describe()) == (1000, 1000, [row("alice", 0, 1000)])
    assert len(w.told) == 1
    many = Watched(limit=5_000, window_s=DAY)  # a limit is never above what is kept
    for _ in range(5_000):
        many.offend()
    assert many.told[0]["blocks"] == 5_000


def test_a_key_that_has_calmed_down_is_forgotten():
    w = Watched(window_s=60.0)
    for i in range(100):
        w.offend(f"key{i}")
    w.clock.now += 61
    assert (w.them.describe(), w.them._keys) == ([], {})


def test_clear_lets_a_key_in_again():
    w = Watched(limit=2, block_s=30.0)
    w.offend()
    w.offend()
    assert w.them.clear("alice")
    assert not w.them.clear("alice")
    assert (w.them.refused_for("alice"), w.them.describe()) == (None, [])
    w.offend()
    assert len(w.told) == 1
    w.offend()
    assert len(w.told) == 2  # a new start: a new notice


def test_notes_from_many_threads_are_all_counted():
    w = Watched(limit=800, window_s=DAY, metric_keys=["alice"])

    def offend(thread):
        for i in range(100):
            w.them.note(record(f"t{thread}-{i}", verdict=Action.BLOCK, key="alice"))
            w.them.refused_for("alice")
            w.them.describe()

    threads = [threading.Thread(target=offend, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (w.metric("alice", "block"), w.them.describe(), len(w.told)) == (800, [row("alice", 0, 800)], 1)


def test_the_settings(monkeypatch):
    assert load_settings().offender_limit is None
    monkeypatch.setenv("MIDSTREAM_OFFENDER_METRIC_KEYS", '["alice", "bob"]')
    settings = load_settings(offender_limit=5, offender_block_s=60)
    assert (settings.offender_metric_keys, settings.offender_window_s) == (("alice", "bob"), 3600)
    for wrong in ({"offender_limit": 0}, {"offender_window_s": 0}, {"offender_block_s": -1}):
        with pytest.raises(ConfigInvalid, match=next(iter(wrong))):
            load_settings(**wrong)
    with pytest.raises(ConfigInvalid, match="'offender_block_s' refuses nobody without 'offender_limit'"):
        load_settings(offender_block_s=60)
