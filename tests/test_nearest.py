"""The queue by distance from a threshold: the order is exact, page by page, whichever way it is looked up."""

import random

import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic import Filter, add_label, review_queue
from monitor.traffic.nearest import nearest_queue, threshold_of
from monitor.traffic.review import Label
from monitor.types import Action, Phase

from .test_records import reading, record
from .test_traffic import fill

VALUES = [-3.0, -1.0, 0.1, 0.3, 0.30000000000000004, 1.0, 1.0, 1.7, 2.0, 2.3, 3.0, 5.0, 1e12, None]


def scattered(where):
    """Records of every kind, many of them as far from a threshold of 1 as others."""
    chance, found = random.Random(7), []
    for i in range(120):
        value, verdict = chance.choice(VALUES), chance.choice([Action.FLAG, Action.BLOCK, Action.ALLOW])
        one = reading(Action.ALLOW if value is not None else Action.UNMONITORED, value=value)
        other = reading(Action.ALLOW, Phase.RESPONSE, value=chance.choice(VALUES))
        key = chance.choice(["alice", "bob"])
        found.append(record(f"r{i}", 0, verdict, readings=(one, other), key=key, created=float(i)))
    fill(where, *found)
    for i in range(0, 120, 5):
        add_label(where, f"r{i}", 0, Label.UNSURE, "ann")
    return where


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return scattered(tmp_path_factory.mktemp("log") / "records.sqlite3")


def by_hand(path, which, around):
    """From the other queue, sorted here."""
    entries = review_queue(path, which, 1000)

    def place(entry):
        sign = 1 if entry.value >= around else -1
        return abs(entry.value - around), sign < 0, sign * entry.value, sign * entry.place[1]

    return [e.body["request_id"] for e in sorted((e for e in entries if e.value is not None), key=place)]


@pytest.mark.parametrize("around", [1.0, 0.3, 1e13])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"labelled": None},
        {"verdicts": frozenset(Action)},
        {"key": "bob"},
        {"since": 30.0, "until": 90.0, "key": "alice"},
    ],
)
def test_every_page_is_the_next_nearest(path, around, more):
    check_pages(path, Filter("demo", Phase.PROMPT, **more), around)


def check_pages(where, which, around):
    wanted = by_hand(where, which, around)
    for limit in (3, 1000):
        seen, after = [], None
        while found := nearest_queue(where, which, around, limit, after):
            assert len(found) <= limit
            seen += [entry.body["request_id"] for entry in found]
            after = found[-1].place
        assert seen == wanted and len(wanted) > 8


def test_distances_are_from_one_probe_in_one_phase(path):
    with pytest.raises(ConfigInvalid, match="name a probe and a phase"):
        nearest_queue(path, Filter(), 1.0, 10)
    assert nearest_queue(path, Filter("nobody", Phase.PROMPT), 1.0, 10) == []


def test_the_threshold_in_use_is_that_of_the_newest_records(tmp_path):
    path = tmp_path / "records.sqlite3"
    for name, threshold in (("old", 1.0), ("new", 3.5), ("none", None)):
        fill(path, record(name, readings=(reading(threshold=threshold),)))
    assert threshold_of(path, "demo", "prompt") == 3.5
    assert (threshold_of(path, "demo", "response"), threshold_of(path, "other", "prompt")) == (None, None)
