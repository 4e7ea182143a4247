"""Figures of harmful and harmless rows: AUROC as scikit-learn's, intervals as scipy's, exact rates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from training.evaluate import auroc, auroc_interval, clopper_pearson, rate, separation


@settings(deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
)
def test_auroc_equals_sklearn_ties_included(positive, negative):
    got = auroc(np.array(positive, dtype=float), np.array(negative, dtype=float))
    labels = [1] * len(positive) + [0] * len(negative)
    assert got == pytest.approx(roc_auc_score(labels, positive + negative))


def test_auroc_interval_holds_the_value_and_is_reproducible():
    random = np.random.default_rng(0)
    positive, negative = random.normal(1, 1, 60), random.normal(0, 1, 80)
    value, low, high = auroc_interval(positive, negative, rounds=200)
    assert low < value < high
    assert high - low < 0.25
    assert auroc_interval(positive, negative, rounds=200) == (value, low, high)
    assert auroc_interval(positive, negative, rounds=200, seed=1) != (value, low, high)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129), (1, 100, 0.0003, 0.0545)],
)
def test_clopper_pearson_known_values(hits, n, low, high):
    assert clopper_pearson(hits, n) == pytest.approx((low, high), abs=5e-5)
    exact = stats.binomtest(hits, n).proportion_ci(method="exact")
    assert clopper_pearson(hits, n) == pytest.approx((exact.low, exact.high))


def test_rate_counts_strictly_above_and_leaves_out_what_is_missing():
    got = rate([1.0, 2.0, 3.0, math.nan, math.inf], 2.0)
    assert (got["n"], got["hits"], got["rate"]) == (3, 1, 0.3333)
    assert got["low"] < got["rate"] < got["high"]


def test_separation():
    got = separation([3.0, 4.0, 5.0], [0.0, 1.0])
    assert (got["n_harmful"], got["n_harmless"], got["auroc"], got["low"], got["high"]) == (3, 2, 1.0, 1.0, 1.0)
