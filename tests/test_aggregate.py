"""Aggregation of one score a token: every kind equals its plain definition, whole or token by token."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.aggregate import PLAIN_KINDS, Aggregation, Running, aggregate

SCORES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)
HOW = st.builds(Aggregation, st.sampled_from(PLAIN_KINDS), st.floats(0.01, 1), st.integers(1, 20))
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


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_no_score_is_not_a_value(kind):
    assert math.isnan(aggregate(Aggregation(kind), []))


def so_far(how, scores):
    """The running value after these scores, without anything incremental."""
    return {
        "last": scores[-1],
        "max": scores[-1],  # whose maximum is taken outside
        "mean": mean(scores),
        "ema": weighted_mean(scores, how.alpha),
        "window_mean_max": mean(scores[-how.window :]),
    }[how.kind]


@settings(deadline=None)
@given(st.data(), st.lists(HOW, min_size=1, max_size=5))
def test_running_values_equal_their_definition_for_each_probe(data, hows):
    columns = data.draw(st.permutations(range(len(hows) + 1)))[: len(hows)]
    row = st.lists(st.floats(-1e4, 1e4, width=32), min_size=len(hows) + 1, max_size=len(hows) + 1)
    rows = data.draw(st.lists(row, min_size=1, max_size=40))
    running = Running([(how, column, 1) for how, column in zip(hows, columns, strict=True)])
    limits = running.limits[:] = data.draw(st.lists(st.floats(-10, 10), min_size=len(hows), max_size=len(hows)))
    highest = [-math.inf] * len(hows)
    for n, scores in enumerate(rows, 1):
        above = running.add(scores)
        assert running.n == n
        for i, (how, column) in enumerate(zip(hows, columns, strict=True)):
            value = running.values[i]
            assert value == pytest.approx(so_far(how, [r[column] for r in rows[:n]]), **NEAR)
            highest[i] = max(highest[i], value)
            assert (i in above) is (value > limits[i])
        assert running.highest == highest and len(set(above)) == len(above)


@pytest.mark.parametrize("kind", ["last", "max"])
def test_a_huge_score_leaves_nothing_behind_where_only_the_newest_counts(kind):
    running = Running([(Aggregation(kind), 0, 1)])
    for score in (-1e30, 3e38, 0.1):
        running.add([score])
        assert running.values == [score], "exactly: thresholds are crossed strictly above"


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_a_dropped_probe_keeps_what_it_had_and_the_others_go_on(kind):
    running = Running([(Aggregation(kind), 0, 1), (Aggregation(kind), 1, 1)])
    running.add([1.0, 1.0])
    running.limits[:] = [0.0, 0.0]
    running.drop(0)
    assert running.add([math.nan, 3.0]) == [1]
    assert (running.values[0], running.highest[0], running.n) == (1.0, 1.0, 2)
    assert running.highest[1] > 1.0


def test_two_answers_share_nothing():
    how = Aggregation("window_mean_max", window=3)
    first, second = Running([(how, 0, 1)]), Running([(how, 0, 1)])
    first.add([100.0])
    second.add([1.0])
    assert second.values == [1.0]


def test_the_average_of_a_turn_is_the_highest_of_its_tokens():
    how, scores = Aggregation("ema", alpha=0.3), [0.5, 4.0, -2.0, 4.5, 0.0]
    running = Running([(how, 0, 1)])
    for score in scores:
        running.add([score])
    assert aggregate(how, scores) == running.highest[0], "a probe is calibrated on what is served"


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
