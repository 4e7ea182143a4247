"""Two probes' flags on the same rows: McNemar's p, and an interval that has a width although nothing flips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.flips import mcnemar, share_difference, tango
from training.metrics import Unsupported
from training.recall import harmful_rows_needed


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_equals_the_exact_binomial_test(rows):
    one, other = np.array(rows, dtype=bool).reshape(-1, 2).T
    flips = mcnemar(one, other)
    a, b = int((one & ~other).sum()), int((other & ~one).sum())
    assert (flips.only_one, flips.only_other) == (a, b)
    assert flips.p == pytest.approx(stats.binomtest(a, a + b).pvalue if a + b else 1.0)


def flags(won, lost, n):
    one, other = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    one[:won], other[won : won + lost] = True, True
    return one, other


def test_the_interval_is_the_score_interval():
    assert tango(12, 2, 50) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango(0, 0, 150) == pytest.approx((-z2 / (150 + z2), z2 / (150 + z2)), rel=1e-5)
    assert tango(10, 0, 10)[1] == pytest.approx(1.0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 300))
def test_the_interval_holds_the_value_and_turns_with_the_sides(won, lost, same):
    n = won + lost + same + 1
    low, high = tango(won, lost, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    assert tango(lost, won, n) == pytest.approx((-high, -low), abs=1e-9)


def test_an_interval_misses_a_true_loss_of_the_margin_as_rarely_as_it_says():
    random = np.random.default_rng(0)
    drawn = random.multinomial(200, [0.03, 0.05, 0.92], 400)
    assert np.mean([tango(*row[:2].tolist(), 200)[0] > -0.02 for row in drawn]) < 0.05


def test_rows_of_one_group_are_one_witness():
    one, other = flags(10, 0, 100)
    alone = share_difference(one, other)
    assert (alone.value, alone.n) == (0.1, 100) and alone.low > 0.04
    grouped = share_difference(one, other, [f"g{i // 10}" for i in range(100)])
    assert grouped.low == 0.0 and grouped.high >= alone.high
    with pytest.raises(Unsupported, match="2 groups of rows"):
        share_difference(one, other, [f"g{i // 50}" for i in range(100)])


@pytest.mark.parametrize(("won", "lost", "n"), [(0, 0, 30), (0, 1, 80), (4, 5, 120), (0, 3, 30), (2, 9, 150)])
def test_as_many_harmful_rows_as_it_asks_for_settle_the_recall(won, lost, n):
    total = n + harmful_rows_needed(won, lost, n)
    low, high = tango(won * total / n, lost * total / n, total)
    assert low > -0.02 or high < 0
    assert harmful_rows_needed(0, 0, 30) == pytest.approx(159, abs=3) and harmful_rows_needed(0, 2, 100) is None
