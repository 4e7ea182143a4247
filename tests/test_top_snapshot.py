"""Snapshots of `midstream top`: rates, the last minute, quantiles and ages by value, out of readings."""

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from monitor.metrics.table import series
from monitor.top.scrape import Scrape, parse
from monitor.top.snapshot import BARS, ENOUGH, Quantiles, snapshot

from .scraped import page, requests, scrape


def test_one_reading_has_no_rates():
    shot = snapshot([requests(10.0, allow=5)])
    assert shot.requests == {"allow": 5}
    assert set(shot.request_rates.values()) == {None}
    assert shot.token_rate is None and shot.minute == []


def test_rates_are_between_the_two_newest():
    shot = snapshot([requests(6.0, allow=1), requests(8.0, allow=5), requests(10.0, allow=8, block=4)])
    assert shot.request_rates == {"allow": 1.5, "flag": 0, "escalate": 0, "block": 2, "unmonitored": 0}


def test_a_rate_is_of_the_two_newest_however_far_apart():
    """`--interval 60` looks a little less often than once a minute."""
    shot = snapshot([requests(0.0, allow=1), requests(60.5, allow=122)])
    assert (shot.request_rates["allow"], shot.minute, shot.score_seconds.recent) == (2.0, [], False)


def test_a_restart_gives_no_negative_rate():
    before, after = requests(8.0, allow=500, block=40), requests(10.0, allow=6)
    shot = snapshot([requests(7.0, allow=499, block=40), before, after])
    assert (shot.request_rates["allow"], shot.request_rates["block"]) == (3.0, 0.0)
    assert sum(bar.get("allow", 0) for bar in shot.minute) == pytest.approx(1 + 6)
    assert sum(bar.get("block", 0) for bar in shot.minute) == 0


def test_a_clock_that_is_set_back_gives_no_rate():
    shot = snapshot([requests(10.0, allow=1), requests(9.0, allow=2)])
    assert shot.request_rates["allow"] is None


def test_the_minute_has_a_bar_for_each_second():
    scrapes = [requests(100.0 + i, allow=i * (i + 1) / 2, block=i // 60) for i in range(62)]  # i more at second i
    shot = snapshot(scrapes)
    assert len(shot.minute) == BARS == 60
    assert [bar["allow"] for bar in shot.minute] == list(range(2, 62))  # the newest last; what is older is not seen
    assert [i for i, bar in enumerate(shot.minute) if "block" in bar] == [58]


def test_slow_looks_are_spread_over_the_time_between_them():
    shot = snapshot([requests(100.0, allow=0), requests(130.0, allow=60), requests(135.0, allow=60)])
    assert [bar.get("allow", 0) for bar in shot.minute] == [0] * 25 + [2] * 30 + [0] * 5


def steps(at, *seconds):
    registry = CollectorRegistry()
    one = Histogram("midstream_score_seconds", "x", buckets=(1.0, 2.0, 3.0), registry=registry)
    Counter("midstream_requests", "x", registry=registry)
    for s in seconds:
        one.observe(s)
    return parse(generate_latest(registry).decode(), at)


def test_quantiles_are_of_the_last_minute_where_that_is_enough():
    old, few = [0.5] * 1000, [2.5] * (ENOUGH - 1)
    seen = snapshot([steps(0.0, *old), steps(10.0, *old, *few)]).score_seconds
    assert not seen.recent and seen.p50 < 1
    seen = snapshot([steps(0.0, *old), steps(10.0, *old, *few, 2.5)]).score_seconds
    assert seen == Quantiles(2.5, pytest.approx(2.99), True)
    seen = snapshot([steps(0.0, *old, *few, 2.5), steps(70.0, *old, *few, 2.5)]).score_seconds
    assert not seen.recent


def test_ages_need_a_start_and_a_beat():
    shot = snapshot([scrape(100.0, "midstream_heartbeat_timestamp_seconds 97\nmidstream_ready 0\n", started=40.0)])
    assert (shot.uptime_s, shot.heartbeat_s, shot.ready) == (60, 3, False)
    shot = snapshot([scrape(100.0, "midstream_heartbeat_timestamp_seconds 0\n")])  # set up, never beaten
    assert (shot.uptime_s, shot.heartbeat_s, shot.ready) == (None, None, None)


def test_our_own_metrics_are_understood():
    shot = snapshot([parse(page(), 10.0)])
    assert shot.model == "tiny-llama"
    assert shot.requests == {"allow": 1, "flag": 1, "block": 1}
    prompt, response = shot.thresholds
    assert (prompt.probe, prompt.phase, prompt.format) == ("demo", "prompt", "chat")
    assert prompt.threshold == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert (prompt.target, prompt.seen, prompt.low, prompt.high, prompt.psi) == (0.005, 0.012, 0.0081, 0.0171, 0.31)
    assert (response.target, response.seen, response.psi) == (None, None, None)
    events = {e.phase: (e.flags, e.blocks, e.would_block) for e in shot.events}
    assert events == {"prompt": (1, 1, 1), "response": (0, 0, 0)}
    assert shot.events[0].scores.p50 == pytest.approx(0.75, abs=0.05)  # sigmoid(1.23)
    assert shot.tokens_scored == {"prompt": 12, "response": 12}
    assert (shot.final_unscored, shot.leaked, shot.fail_open, shot.unmonitored) == (3, 0, 0, {})
    assert (shot.dropped, shot.backlog, shot.queue) == (0, 2, 0)


def test_every_metric_that_is_read_exists():
    """By what the code asks of a reading, so that a renamed metric does not become a `-`."""
    asked = set()

    class Asked(Scrape):
        def of(self, name, **labels):
            asked.add("midstream_" + name)
            return super().of(name, **labels)

    one = parse(page(), 10.0)
    snapshot([Asked(one.at, one.started, one.series, one.counters)] * 2)
    assert len(asked) > 20
    assert asked <= series()
