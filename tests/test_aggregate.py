"""Aggregation: every kind equals its plain definition, and a replayed position changes nothing."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monitor.aggregate import KINDS, Aggregation, Running, aggregate, fold

SCORES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)
HOW = st.builds(Aggregation, st.sampled_from(KINDS), st.floats(0.01, 1), st.integers(1, 20))
NEAR = {"rel": 1e-6, "abs": 1e-6}


def mean(scores):
    return math.fsum(scores) / len(scores)


def weighted_mean(scores, alpha):
    weights = [(1 - alpha) ** (len(scores) - 1 - i) for i in range(len(scores))]
    return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)


def plain(how, scores):
    """The definitions, without anything incremental."""
    if how.kind == "last":
        return scores[-1]
    if how.kind == "mean":
        return mean(scores)
    if how.kind == "max":
        return max(scores)
    if how.kind == "ema":
        return max(weighted_mean(scores[: i + 1], how.alpha) for i in range(len(scores)))
    if len(scores) <= how.window:
        return mean(scores)
    return max(mean(scores[i : i + how.window]) for i in range(len(scores) - how.window + 1))


@settings(deadline=None, max_examples=200)
@given(HOW, SCORES)
def test_every_kind_equals_its_definition(how, scores):
    assert aggregate(how, scores) == pytest.approx(plain(how, scores), **NEAR)


@pytest.mark.parametrize(
    ("kind", "value"), [("last", 0.0), ("mean", 2.0), ("max", 6.0), ("ema", 4.0), ("window_mean_max", 3.5)]
)
def test_known_values(kind, value):
    # ema at alpha 0.5: 1, (0.5 + 0.25) / 0.75 = 1, (3 + 0.25 + 0.125) / 0.875, ...: the maximum follows the 6.
    scores = [1.0, 1.0, 6.0, 0.0]
    expected = {"ema": (3 + 0.25 + 0.125) / 0.875}.get(kind, value)
    assert aggregate(Aggregation(kind, alpha=0.5, window=2), scores) == pytest.approx(expected)


def test_alpha_one_is_the_maximum_and_window_one_too():
    scores = [3.0, -2.0, 7.0, 1.0]
    assert aggregate(Aggregation("ema", alpha=1.0), scores) == 7.0
    assert aggregate(Aggregation("window_mean_max", window=1), scores) == 7.0


def test_window_forgets_what_left_it():
    # 1e30 is a finite logit (test_store: such weights load); a running sum must not keep its rounding error for ever.
    how = Aggregation("window_mean_max", window=4)
    assert aggregate(how, [-1e30, 5.0, 5.0, 5.0, 5.0]) == pytest.approx(5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_score_is_not_a_value(kind):
    assert math.isnan(aggregate(Aggregation(kind), []))
    assert Running(Aggregation(kind), 0).value is None


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(HOW, SCORES, st.integers(0, 1000), st.data())
def test_replayed_positions_change_nothing(how, scores, start, data):
    running, seen, position = Running(how, start), [], start
    while position < start + len(scores):
        # As after a preemption: go back any number of positions, then on, with whatever the replay computed.
        for again in range(data.draw(st.integers(start, position)), position):
            assert running.add(again, data.draw(st.floats(-1e6, 1e6))) == seen[-1]
        seen.append(running.add(position, scores[position - start]))
        position += 1
    step = fold(how)
    assert seen == [step(s) for s in scores]
    assert running.value == seen[-1] == aggregate(how, scores)


@settings(deadline=None)
@given(HOW, SCORES, st.integers(0, 1000))
def test_peaks(how, scores, start):
    running = Running(how, start)
    for position, score in enumerate(scores, start):
        running.add(position, score)
    assert running.peak == max(aggregate(how, scores[: i + 1]) for i in range(len(scores)))
    assert running.peak_score == max(scores)
    assert running.peak_position == start + scores.index(max(scores))


def test_peak_stays_when_the_value_falls():
    running = Running(Aggregation("last"), 5)
    values = [running.add(5 + i, s) for i, s in enumerate([1.0, 9.0, 2.0])]
    assert (values, running.value, running.peak, running.peak_position) == ([1.0, 9.0, 2.0], 2.0, 9.0, 6)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"kind": "median"}, "median"),
        ({"kind": ""}, "unknown"),
        *[({"kind": "ema", "alpha": a}, f"alpha {a}") for a in (0, -0.1, 1.01, math.nan, math.inf)],
        *[({"kind": "window_mean_max", "window": w}, f"window {w}") for w in (0, -3)],
    ],
)
def test_bad_settings_are_refused_by_name(settings_, named):
    with pytest.raises(ValueError, match=named):
        Aggregation(**settings_)
