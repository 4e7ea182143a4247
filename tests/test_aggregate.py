"""Aggregation: every kind equals its plain definition, whole or token by token."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.aggregate import KINDS, Aggregation, aggregate, fold

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


@settings(deadline=None)
@given(HOW, SCORES)
def test_running_values_equal_their_definition(how, scores):
    step = fold(how)
    for i, score in enumerate(scores):
        so_far = scores[: i + 1]
        expected = {
            "last": score,
            "max": score,  # whose maximum the caller takes
            "mean": mean(so_far),
            "ema": weighted_mean(so_far, how.alpha),
            "window_mean_max": mean(so_far[-how.window :]),
        }[how.kind]
        assert step(score) == pytest.approx(expected, **NEAR)


def test_two_folds_share_nothing():
    how = Aggregation("window_mean_max", window=3)
    first, second = fold(how), fold(how)
    first(100.0)
    assert second(1.0) == 1.0


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
