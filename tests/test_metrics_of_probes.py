"""Figures of probes: equal to their definitions, with intervals that hold, and refused where the rows are too few."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from probes_store.calibration import DELTA, Calibration, allowed_exceedances, clopper_pearson
from probes_store.store import SHIPPED, read_folder
from training.evaluate import brier, calibrations, ece, set_figures
from training.metrics import (
    Figure,
    Sample,
    Unsupported,
    auprc,
    auroc,
    conformal_threshold,
    false_alarms_a_day,
    interval,
    log_auroc,
    over_sets,
    paired,
    recall_at,
    share_above,
    threshold_at,
)

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(0, 4)), min_size=2, max_size=60)


def gaussian(n, m, distance=1.0, seed=0):
    """n harmful and m harmless values, `distance` apart: an AUROC of Phi(distance / sqrt(2))"""
    random = np.random.default_rng(seed)
    values = np.concatenate([random.normal(distance, 1, n), random.normal(0, 1, m)])
    return values, np.repeat([1, 0], [n, m])


# --- the figures themselves ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ROWS)
def test_auroc_and_auprc_equal_sklearn_with_ties_and_weights(rows):
    values, labels, weights = (np.array(column) for column in zip(*rows, strict=True))
    weights[np.flatnonzero(labels == 0)[:1]] = weights[np.flatnonzero(labels == 1)[:1]] = 1
    if len(set(labels.tolist())) < 2:
        with pytest.raises(Unsupported, match="0 harm"):
            Sample.of(values, labels)
        return
    masses = Sample.of(values, labels).masses(weights.astype(float))
    assert float(auroc(*masses)) == pytest.approx(roc_auc_score(labels, values, sample_weight=weights))
    assert float(auprc(*masses)) == pytest.approx(average_precision_score(labels, values, sample_weight=weights))


def test_log_auroc_is_the_mean_recall_over_the_logarithm_of_the_rate():
    values, labels = gaussian(300, 2000)
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    points = 10 ** np.linspace(-3, -1, 20_001)
    recall = [tpr[np.searchsorted(fpr, f, side="right") - 1] for f in points]
    assert float(log_auroc(*Sample.of(values, labels).masses())) == pytest.approx(np.mean(recall), abs=1e-3)


@settings(deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 1.0]))
def test_recall_at_a_rate_is_the_best_that_any_threshold_gives(rows, rate):
    values, labels, _ = (np.array(column) for column in zip(*rows, strict=True))
    values, labels = np.append(values, [0, 0]), np.append(labels, [0, 1])
    harmful, harmless = values[labels == 1], values[labels == 0]
    cuts = [c for c in [-9, *values] if (harmless > c).mean() <= rate + 1e-9]
    best = max((harmful > c).mean() for c in cuts)
    assert float(recall_at(rate)(*Sample.of(values, labels).masses())) == pytest.approx(best)
    if rate < 1:  # at 1 the lowest harmless value is as low as a threshold goes
        assert (harmful > threshold_at(harmless, rate)).mean() == pytest.approx(best)


def test_log_auroc_at_its_ends():
    labels = np.repeat([1, 0], [5, 1000])
    assert float(log_auroc(*Sample.of(labels, labels).masses())) == pytest.approx(1)
    assert float(log_auroc(*Sample.of(-labels, labels).masses())) == 0
    assert float(log_auroc(*Sample.of(np.zeros(1005), labels).masses())) == 0  # one threshold, and it flags all


def test_brier_and_calibration_error_by_hand():
    probability, labels = np.tile([0.2, 0.2, 0.2, 0.2, 0.2, 0.8], 50), np.tile([0, 0, 0, 0, 1, 0], 50)
    assert brier(probability, labels) == pytest.approx((4 * 0.04 + 2 * 0.64) / 6)
    assert ece(probability, labels) == pytest.approx(0.8 / 6)  # 0.2 is right, 0.8 never happens


def test_calibration_error_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(0)
    probability = random.choice([0.1, 0.5, 0.9], 400)
    labels = (random.random(400) < probability).astype(int)
    by_label = np.argsort(labels)
    assert ece(probability, labels) == pytest.approx(ece(probability[by_label], labels[by_label]))


def test_platt_and_isotonic_mend_logits_that_are_too_sure():
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, 3000)
    labels = (random.random(3000) < 1 / (1 + np.exp(-logits))).astype(int)
    found = calibrations(Sample.of(5 * logits, labels))
    assert found["platt"]["ece"] < 0.03 < 0.1 < found["logit"]["ece"]
    assert found["isotonic"]["ece"] < 0.05
    assert found["platt"]["brier"] < found["logit"]["brier"] > found["isotonic"]["brier"]


def test_calibrations_are_never_measured_on_the_groups_they_were_fitted_on():
    """Pairs of equal values and labels at random: a step function that saw one of a pair would know the other."""
    values = np.repeat(np.random.default_rng(0).normal(size=600), 2)
    labels = np.repeat(np.random.default_rng(1).integers(0, 2, 600), 2)
    groups = [str(i // 2) for i in range(1200)]
    assert calibrations(Sample.of(values, labels, groups))["isotonic"]["brier"] > 0.24


def test_over_sets_names_the_one_that_fails():
    assert over_sets({"a": 0.9, "b": 0.5, "c": 1.0}) == {"mean": pytest.approx(0.8), "minimum": 0.5, "worst": "b"}


def test_false_alarms_a_day_keep_the_interval():
    assert false_alarms_a_day(Figure(0.01, 0.005, 0.02, 600), 50_000) == Figure(500, 250, 1000, 600)


# --- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_of_auroc_holds_the_truth_as_often_as_it_says():
    truth = stats.norm.cdf(1 / math.sqrt(2))
    found = [interval(auroc, Sample.of(*gaussian(60, 80, seed=i)), rounds=200, seed=i) for i in range(200)]
    held = sum(f.low <= truth <= f.high for f in found)
    assert held >= stats.binom.ppf(0.001, 200, 0.93)  # a percentile interval is known to be a little narrow
    assert np.mean([f.high - f.low for f in found]) < 0.2  # and it is not just wide


@pytest.mark.parametrize("metric", [auroc, auprc])
def test_copies_of_a_row_in_its_group_are_no_evidence(metric):
    values, labels = gaussian(40, 50)
    groups = [f"{i:03}" for i in range(90)]
    once = interval(metric, Sample.of(values, labels, groups), rounds=300)
    copied = Sample.of(np.repeat(values, 5), np.repeat(labels, 5), np.repeat(groups, 5).tolist())
    again = interval(metric, copied, rounds=300)
    assert (again.low, again.high) == pytest.approx((once.low, once.high))
    alone = interval(metric, Sample.of(copied.values, copied.labels), rounds=300)
    assert alone.high - alone.low < 0.7 * (once.high - once.low)


def test_both_rows_of_a_pair_are_drawn_together():
    values, labels = gaussian(30, 30)
    pairs = Sample.of(values, labels, [str(i % 30) for i in range(60)])
    for drawn in pairs.draws(150, 0):
        assert np.array_equal(drawn[:, :30], drawn[:, 30:]) and (drawn.sum(axis=1) == 60).all()


def test_rows_that_are_all_in_order_leave_room_below_one():
    values, labels = np.repeat([1.0, 0.0], [20, 30]), np.repeat([1, 0], [20, 30])
    found = interval(auroc, Sample.of(values, labels), rounds=50)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.025 ** (1 / 20))
    turned = interval(auroc, Sample.of(-values, labels), rounds=50)
    assert (turned.low, turned.value) == (0.0, 0.0) and turned.high == pytest.approx(1 - 0.025 ** (1 / 20))
    with pytest.raises(Unsupported, match="auprc, so it has no interval"):
        interval(auprc, Sample.of(values, labels), rounds=50)


def test_a_probe_against_itself_differs_by_nothing():
    values, labels = gaussian(50, 50)
    one = Sample.of(values, labels)
    assert paired(auroc, one, Sample.of(2 * values + 1, labels), rounds=50) == Figure(0.0, 0.0, 0.0, 100)


def test_two_probes_that_order_these_rows_alike_may_differ_on_others():
    values, labels = gaussian(20, 40, distance=20)
    other = values.copy()
    other[:20] = other[:20][::-1]
    found = paired(auroc, Sample.of(values, labels), Sample.of(other, labels), rounds=50)
    assert found.value == 0 and found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 20))


def test_a_paired_difference_is_sharper_than_two_intervals():
    values, labels = gaussian(100, 100)
    worse = values + np.random.default_rng(1).normal(0, 0.3, 200)
    one, other = Sample.of(values, labels), Sample.of(worse, labels)
    both = [interval(auroc, s, rounds=400) for s in (one, other)]
    found = paired(auroc, one, other, rounds=400)
    assert found.value == pytest.approx(both[0].value - both[1].value)
    assert found.high - found.low < 0.6 * min(f.high - f.low for f in both)


def test_a_paired_difference_wants_the_same_rows():
    values, labels = gaussian(20, 20)
    with pytest.raises(ValueError, match="the same rows"):
        paired(auroc, Sample.of(values, labels), Sample.of(values, labels[::-1].copy()))


def test_a_rate_is_clopper_and_pearsons_until_rows_share_groups():
    values = np.repeat([2.0, 0.0], [30, 270])
    found = share_above(values, 1.0)
    assert (found.value, found.n) == (0.1, 300) and (found.low, found.high) == clopper_pearson(30, 300)
    grouped = share_above(values, 1.0, [str(i // 10) for i in range(300)])
    assert grouped.low < found.low - 0.02 and grouped.high > found.high + 0.02
    assert share_above([1.0], 1.0).value == 0.0  # strictly above


# --- what the rows can't support ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (lambda: interval(auroc, Sample.of(*gaussian(9, 50))), r"9 groups of harmful rows .* 1 more are needed \(10"),
        (lambda: interval(auroc, Sample.of(*gaussian(50, 3))), "3 groups of harmless rows .* 7 more"),
        (lambda: log_auroc(*Sample.of(*gaussian(10, 999)).masses()), r"999 .*: 1 more are needed \(1000 in all\)"),
        (lambda: ece(np.full(149, 0.5), np.ones(149)), r"149 rows .*: 1 more are needed \(150"),
        (lambda: calibrations(Sample.of(*gaussian(100, 899))), "999 rows .*: 1 more are needed"),
        (lambda: share_above([], 0.0), "0 rows can't support a rate"),
        (lambda: share_above([1.0] * 20, 0.0, ["one"] * 20), "1 groups of rows .* 9 more"),
        (lambda: conformal_threshold(fitted(98), 0.01), r"98 harmless rows .*: 1 more are needed \(99 in all\)"),
        (lambda: conformal_threshold(fitted(2000), 0.3), "the card keeps 201 values"),
        (lambda: brier(np.empty(0), np.empty(0)), "0 rows"),
        (lambda: over_sets({}), "0 sets"),
    ],
)
def test_refused_with_the_number_of_rows_that_are_missing(figure, message):
    with pytest.raises(Unsupported, match=message):
        figure()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_missing_are_no_values(bad):
    with pytest.raises(ValueError, match="not finite"):
        Sample.of([1.0, bad], [1, 0])
    with pytest.raises(ValueError, match="not finite"):
        share_above([1.0, bad], 0.0)


def test_the_figures_of_a_set_say_what_they_leave_out():
    values, labels = gaussian(100, 300)
    found = set_figures([*values, math.nan], [*labels, 1], [str(i) for i in range(401)], 1.0, requests_a_day=1000)
    assert (found["harmful"], found["harmless"], found["unmonitored"]) == (100, 300, 1)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(labels, values))
    assert found["recall"]["value"] == np.mean(values[:100] > 1) and found["recall"]["n"] == 100
    assert found["false_alarms_a_day"]["high"] == pytest.approx(1000 * found["fpr"]["high"])
    assert set(found["refused"]) == {"log_auroc", "calibration"}
    assert "700 more are needed" in found["refused"]["log_auroc"]


def test_a_set_of_one_label_has_one_rate():
    found = set_figures([1.0, 2.0, 3.0], [0, 0, 0], ["a", "b", "c"], 2.5)
    assert found["fpr"]["value"] == pytest.approx(1 / 3)
    assert set(found["refused"]) == {"recall", "auroc", "auprc", "log_auroc", "calibration"}


# --- certified false-positive rates hold --------------------------------------------------------------------------

SPLITS = 200


def fitted(n):
    return Calibration.fit([float(i) for i in range(n)], "made up")


def heavy():
    """Everyday values, and a few rows that look harmful: what real traffic is like."""
    random = np.random.default_rng(7)
    return np.concatenate([random.normal(-4, 1.5, 2900), random.standard_t(2, 100)])


def stored():
    """The harmless values that the shipped card was calibrated on: its tail, all that a threshold depends on, and as
    many lower ones as there were."""
    card = read_folder(SHIPPED / "smollm2-135m-instruct" / "harmful-intent" / "v1", shipped=True).card
    calibration = card.calibration["chat"]["prompt"]
    lower = min(calibration.tail) - 1 - np.arange(calibration.n - len(calibration.tail))
    return np.concatenate([calibration.tail, lower])


POOLS = pytest.mark.parametrize("pool", [heavy(), stored()], ids=["heavy", "stored"])


@POOLS
@pytest.mark.parametrize("alpha", [0.01, 0.02])
def test_certified_rates_hold_on_random_samples_of_harmless_values(pool, alpha):
    """The pool is the traffic, so the true rate of a threshold is known: above its bound in 5 % of the samples."""
    random, n = np.random.default_rng(1), 600
    rates = [
        (pool > Calibration.fit(random.choice(pool, n).tolist(), "x").threshold(alpha)).mean() for _ in range(SPLITS)
    ]
    assert sum(rate > alpha for rate in rates) <= stats.binom.ppf(0.999, SPLITS, DELTA)
    assert np.mean(rates) > alpha / 5  # and it is not just flagging nothing


@POOLS
@pytest.mark.parametrize("alpha", [0.01, 0.02])
def test_certified_rates_hold_on_the_other_half_of_random_splits(pool, alpha):
    """A half has noise of its own. How often its rate exceeds the bound is known exactly: the values above the
    threshold fall on either side like the cards of a shuffled deck."""
    random, half = np.random.default_rng(2), len(pool) // 2
    allowed = allowed_exceedances(half, alpha)
    exceeded = 0
    for _ in range(SPLITS):
        mixed = random.permutation(pool)
        threshold = Calibration.fit(mixed[:half].tolist(), "x").threshold(alpha)
        exceeded += (mixed[half:] > threshold).mean() > alpha
    # At least `over` unseen values stand above the (allowed + 1)-th highest of the calibrated half.
    over = math.floor(alpha * (len(pool) - half)) + 1
    chance = stats.hypergeom.cdf(allowed, len(pool), half, allowed + over)
    assert exceeded <= stats.binom.ppf(0.999, SPLITS, chance)
    assert chance < 0.15


@POOLS
def test_a_conformal_rate_holds_on_average_and_is_never_stricter_than_the_certified_one(pool):
    random, n, alpha = np.random.default_rng(3), 600, 0.01
    drawn = [Calibration.fit(random.choice(pool, n).tolist(), "x") for _ in range(SPLITS)]
    rates = [float((pool > conformal_threshold(c, alpha)).mean()) for c in drawn]
    assert all(conformal_threshold(c, alpha) <= c.threshold(alpha) for c in drawn)
    assert np.mean(rates) <= alpha + 3 * np.std(rates) / math.sqrt(SPLITS)
    assert np.mean(rates) > alpha / 2
    assert sum(rate > alpha for rate in rates) > 3 * DELTA * SPLITS  # an average is all that it promises
