"""Calibration: thresholds keep the stated false-positive rate, and rates that the rows can't certify are refused."""

import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from probes_store.calibration import DELTA, Calibration, allowed_exceedances, binomial_cdf, rows_needed


def fit(n, **kwargs):
    return Calibration.fit([float(i) for i in range(n)], "made up", **kwargs)


@pytest.mark.parametrize(("alpha", "rows"), [(0.01, 299), (0.005, 598), (0.001, 2995), (0.1, 29), (0.05, 59)])
def test_rows_needed(alpha, rows):
    assert rows_needed(alpha) == rows
    assert allowed_exceedances(rows, alpha) == 0
    assert allowed_exceedances(rows - 1, alpha) is None


def test_rows_needed_at_another_confidence():
    assert rows_needed(0.01, delta=0.01) == 459
    assert allowed_exceedances(458, 0.01, delta=0.01) is None


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(1e-4, 0.9), st.data())
def test_binomial_cdf_equals_scipy(n, p, data):
    j = data.draw(st.integers(0, min(n, 200)))
    assert binomial_cdf(j, n, p) == pytest.approx(stats.binom.cdf(j, n, p), rel=1e-7, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(30, 3000), st.sampled_from([0.1, 0.05, 0.02, 0.01, 0.005, 0.001]))
def test_allowed_exceedances_is_the_largest(n, alpha):
    j = allowed_exceedances(n, alpha)
    largest = int(stats.binom.ppf(DELTA, n, alpha))  # the smallest k with cdf(k) >= delta
    assert (-1 if j is None else j) == (largest if stats.binom.cdf(largest, n, alpha) <= DELTA else largest - 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(299, 2000))
def test_at_most_j_benign_rows_lie_above(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    threshold = Calibration.fit(values, "x").threshold(0.01)
    assert sum(v > threshold for v in values) == allowed_exceedances(n, 0.01)


@pytest.mark.parametrize(
    ("n", "alpha", "message"),
    [
        (100, 0.01, r"100 benign requests .* 1\.000%: 199 more are needed \(299 in all\)"),
        (598, 0.001, r"2397 more are needed \(2995 in all\)"),
        (1, 0.005, r"597 more are needed \(598 in all\)"),
    ],
)
def test_an_unsupported_rate_is_refused_and_says_how_many_are_missing(n, alpha, message):
    with pytest.raises(ValueError, match=message):
        fit(n).threshold(alpha)


def test_a_rate_beyond_the_tail_is_refused():
    with pytest.raises(ValueError, match="the card keeps 101 values"):
        fit(1000).threshold(0.3)


def test_a_huge_count_does_not_hang():
    """A card is data: whatever it claims of n, the start of a server ends. In a process, so that it can be stopped."""
    code = (
        "from probes_store.calibration import Calibration; print('imported', flush=True)\n"
        "try: Calibration(n=10**9, tail=(2.0, 1.0), source='x').threshold(0.01)\n"
        "except ValueError as error: print(error)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "imported\n"
        hangs = threading.Timer(10, child.kill)
        hangs.start()
        said = child.stdout.read()
        hangs.cancel()
    assert "the card keeps 2 values" in said


@pytest.mark.parametrize("n", [29, 30, 299, 600])
@pytest.mark.parametrize("max_alpha", [0.01, 0.1, 0.2])
def test_the_tail_serves_every_rate_up_to_its_maximum(n, max_alpha):
    full = Calibration(n=n, tail=tuple(float(i) for i in range(n - 1, -1, -1)), source="x")
    rates = [max_alpha * share for share in (0.25, 0.5, 0.9, 1.0) if rows_needed(max_alpha * share) <= n]
    kept = fit(n, max_alpha=max_alpha)
    assert [kept.threshold(a) for a in rates] == [full.threshold(a) for a in rates]


@pytest.mark.parametrize(("n", "alpha"), [(299, 0.01), (600, 0.01), (610, 0.005), (300, 0.05)])
def test_realised_rate_is_above_the_stated_one_at_most_as_often_as_stated(n, alpha):
    """With uniform values, the true rate of a threshold t is exactly 1 - t."""
    random = np.random.default_rng(n)
    draws = 200
    rates = [1 - Calibration.fit(random.random(n).tolist(), "x").threshold(alpha) for _ in range(draws)]
    too_high = sum(rate > alpha for rate in rates)
    assert too_high <= stats.binom.ppf(0.999, draws, DELTA)  # 20 of 200: 5 % and a margin
    assert np.mean(rates) > alpha / 10  # and it is not just blocking nothing


def test_ties_only_make_it_flag_less():
    assert Calibration.fit([1.0] * 400, "x").threshold(0.01) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": (1.0, 2.0)}, "descending"),
        ({"tail": (math.nan,)}, "not finite"),
        ({"tail": (math.inf, 1.0)}, "not finite"),
        ({"tail": (3.0, -math.inf)}, "not finite"),
        ({"tail": (3.0, 2.0, 1.0), "n": 2}, "longer than n"),
        ({"tail": ()}, "tail"),
        ({"n": 0}, "n\n"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_tails_are_checked(changes, message):
    with pytest.raises(ValidationError, match=message):
        Calibration(**({"n": 10, "tail": (2.0, 1.0), "source": "x"} | changes))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(bad):
    # sorted() with a NaN in it is in no order: the kept tail may then lack the highest values.
    values = np.random.default_rng(0).normal(size=60).tolist()
    accepted = []
    for place in range(len(values)):
        try:
            Calibration.fit([*values[:place], bad, *values[place:]], "x")
        except ValueError:
            continue
        accepted.append(place)
    assert accepted == []


def test_no_benign_values_are_refused():
    with pytest.raises(ValidationError):
        Calibration.fit([], "x")


def test_round_trip_keeps_the_threshold():
    one = fit(700)
    again = Calibration.model_validate(json.loads(one.model_dump_json()))
    assert again == one
    assert again.threshold(0.005) == one.threshold(0.005)
