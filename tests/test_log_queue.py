"""The review queue: every filter gives what a plain look at all the records gives, in the same order, page by page."""

import itertools
import random
import sqlite3

import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic import Filter, Label, TrafficLog, add_label, counts, find_labels, review_queue
from monitor.types import SEVERITY, Action, Mode, Phase

from .test_records import reading, record

KEYS, PROBES = ("", "alice", "bob"), ("demo", "other")


def some_records(n=300):
    dice = random.Random(7)
    for i in range(n):
        readings = [
            reading(
                dice.choice([Action.ALLOW, Action.FLAG, Action.BLOCK, Action.UNMONITORED]),
                phase,
                Mode.FLAG,
                value=None if dice.random() < 0.1 else round(dice.uniform(-5, 5), 1),  # ties, too
                probe=probe,
            )
            for probe, phase in itertools.product(PROBES, Phase)
            if dice.random() < 0.8
        ]
        verdict = max((r.action for r in readings), key=SEVERITY.__getitem__, default=Action.UNMONITORED)
        yield record(f"r{i}", i % 2, verdict, readings=tuple(readings), key=dice.choice(KEYS), created=float(i))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """(path, the records in it, the ids of those that are labelled)"""
    path = tmp_path_factory.mktemp("queue") / "records.sqlite3"
    every = list(some_records())
    one = TrafficLog(path, 10_000, 10_000, lambda n: None)
    for each in every:
        one.put(each)
    one.close()
    labelled = set()
    for each in every[::3]:
        add_label(path, each.request_id, each.index, Label.HARMFUL, "ann")
        labelled.add(each.request_id)
    return path, every, labelled


def worth(r):
    missing = 1e300 if r.action is Action.UNMONITORED else -1e300
    return missing if r.value is None else r.value


def rank(one, which):
    """Where a record belongs, the plain way; None: nowhere."""
    if which.probe is None and which.phase is None:
        if not one.readings:
            return 1e300 if one.verdict is Action.UNMONITORED else -1e300
        return max((SEVERITY[r.action], worth(r)) for r in one.readings)[1]
    fitting = [r for r in one.readings if which.probe in (None, r.probe) and which.phase in (None, r.phase)]
    return max(map(worth, fitting), default=None)


def plainly(every, labelled, which):
    found = []
    for number, one in enumerate(every, 1):
        place = rank(one, which)
        fits = (
            place is not None
            and one.verdict in which.verdicts
            and which.key in (None, one.key)
            and (which.since is None or one.created >= which.since)
            and (which.until is None or one.created < which.until)
            and (which.labelled is None or which.labelled == (one.request_id in labelled))
        )
        if fits:
            found.append((place, number, one.request_id))
    return [name for _, _, name in sorted(found, reverse=True)]


FILTERS = [
    Filter(probe, phase, verdicts, key, since, until, labelled)
    for (probe, phase), verdicts, key, (since, until), labelled in itertools.product(
        ((None, None), ("demo", Phase.PROMPT), ("other", Phase.RESPONSE), ("none such", Phase.PROMPT)),
        (Filter().verdicts, frozenset({Action.BLOCK}), frozenset(Action)),
        (None, "alice"),
        ((None, None), (50.0, 250.0)),
        (None, False),
    )
]


@pytest.mark.parametrize("few", [0, 20_000])  # looked through by value, and one by one
def test_every_filter_is_what_a_plain_look_gives(log, monkeypatch, few):
    import monitor.traffic.queue as module

    monkeypatch.setattr(module, "FEW", few or 1)
    path, every, labelled = log
    sizes = set()
    for which in FILTERS:
        expected = plainly(every, labelled, which)
        found = review_queue(path, which, 1000)
        assert [e.body["request_id"] for e in found] == expected, which
        sizes.add(len(found))
    assert len(FILTERS) == 96 and 0 in sizes and max(sizes) == 300


@pytest.mark.parametrize(
    "which", [Filter(), Filter("demo", Phase.PROMPT, labelled=None), Filter(key="bob", labelled=True)]
)
def test_pages_join_to_the_whole(log, which):
    path, every, labelled = log
    found, after = [], None
    while page := review_queue(path, which, 7, after):
        found += [e.body["request_id"] for e in page]
        after = page[-1].place
    assert len(set(found)) == len(found)
    assert (
        found == plainly(every, labelled, which)
        if which.phase is None
        else set(found) == set(plainly(every, labelled, which))
    )


def test_an_entry_says_what_it_is_ordered_by(log):
    path, _, _ = log
    for entry in review_queue(path, Filter(probe="demo", phase=Phase.RESPONSE), 20):
        own = [r for r in entry.body["readings"] if (r["probe"], r["phase"]) == ("demo", "response")]
        assert (entry.probe, entry.phase, entry.value) == ("demo", "response", own[0]["value"])
        assert (entry.q, entry.feature) == (None, None)


@pytest.mark.parametrize("which", [Filter(probe="demo"), Filter(phase=Phase.PROMPT)])
def test_a_probe_is_named_with_its_phase(log, which):
    with pytest.raises(ConfigInvalid, match="name both"):
        review_queue(log[0], which, 10)


def test_counts(log):
    path, every, labelled = log
    expected = {}
    for one in every:
        n, done = expected.get(str(one.verdict), (0, 0))
        expected[str(one.verdict)] = n + 1, done + (one.request_id in labelled)
    assert counts(path) == expected


def test_second_opinions_are_kept(tmp_path):
    path = tmp_path / "records.sqlite3"
    log = TrafficLog(path, 10, 10, lambda n: None)
    log.put(record(verdict=Action.FLAG))
    log.close()
    times = iter([1.0, 2.0])
    for label, by in ((Label.HARMFUL, "ann"), (Label.UNSURE, "ben")):
        add_label(path, "r1", 0, label, by, lambda: next(times))
    assert find_labels(path, "r1", 0) == [
        {"label": "unsure", "by": "ben", "created": 2.0},
        {"label": "harmful", "by": "ann", "created": 1.0},
    ]
    assert find_labels(path, "r1", 1) == []
    assert review_queue(path, Filter(), 10) == [] and len(review_queue(path, Filter(labelled=True), 10)) == 1


def test_the_queue_never_sorts_everything(log):
    """Each of its queries walks an index in the queue's order."""
    from sqlalchemy.dialects import sqlite

    from monitor.traffic.database import opened
    from monitor.traffic.queue import _wide

    path, _, _ = log
    plans = []
    with opened(path) as connection:
        for which in (Filter(), Filter("demo", Phase.PROMPT), Filter(key="alice", labelled=None)):
            for query in _wide(which, (1.0, 7)):
                sql = str(query.limit(50).compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))
                plans.append([row[3] for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + sql)])
    assert len(plans) == 4 + 4 + 8
    for plan in plans:
        assert len(plan) == 1 and ("readings_queue" in plan[0] or "readings_decide" in plan[0]), plan


def test_the_backlog_walks_only_what_waits(log):
    path, _, _ = log
    database = sqlite3.connect(path)
    (plan,) = database.execute("EXPLAIN QUERY PLAN SELECT count(*) FROM records WHERE waiting = 1").fetchall()
    database.close()
    assert "records_waiting" in plan[3]
