"""Drift: PSI by hand, a window that says nothing too early, and the flag ratio beside its target."""

import math
import random

import pytest

from monitor.metrics import Metrics
from monitor.metrics.drift import ENOUGH, WINDOW, Reference, psi
from monitor.types import Phase
from probes_store.calibration import Calibration

from .test_records import reading

CHAT = ("demo", Phase.PROMPT, "chat")


def test_psi_by_hand():
    assert psi([0.0], [-1.0, 1.0]) == 0.0
    # 9.5 and 0.5 of 10 against a half each.
    assert psi([0.0], [1.0] * 9) == pytest.approx(0.45 * math.log(1.9) - 0.45 * math.log(0.1))
    assert psi([0.0], [0.0] * 9) == psi([0.0], [1.0] * 9)  # an edge belongs to the bin below


def benign(n, seed, mean=0.0):
    random_ = random.Random(seed)
    return [random_.gauss(mean, 1) for _ in range(n)]


def watched(values, target=0.01):
    """Metrics of a probe calibrated on 3,000 benign values, told of these."""
    calibration = Calibration.fit(benign(3000, 0), "test")
    threshold = calibration.threshold(target)
    metrics = Metrics()
    metrics.drift.expect({CHAT: Reference(calibration.deciles, threshold, calibration.rate(threshold))})
    for one in values:
        metrics.drift.add("chat", reading(value=one))
    return metrics


def gauge(metrics, name):
    return metrics.registry.get_sample_value(
        f"midstream_{name}", {"probe": "demo", "phase": "prompt", "format": "chat"}
    )


def test_traffic_like_the_calibration_is_no_drift():
    metrics = watched(benign(WINDOW, 1))
    assert 0 < gauge(metrics, "drift_psi_ratio") < 0.05
    assert gauge(metrics, "target_fpr_ratio") == pytest.approx(0.01, rel=0.1)
    low, high = gauge(metrics, "observed_flag_ratio_low"), gauge(metrics, "observed_flag_ratio_high")
    assert 0 < low < gauge(metrics, "observed_flag_ratio") < high < 0.02


def test_a_shift_shows_in_both():
    metrics = watched([*benign(WINDOW, 1), *benign(WINDOW, 2, mean=1.0)])  # the first ones have left the window
    assert gauge(metrics, "drift_psi_ratio") > 0.25
    assert gauge(metrics, "observed_flag_ratio_low") > 2 * gauge(metrics, "target_fpr_ratio")


def test_a_dead_probe_has_a_ratio_of_zero():
    metrics = watched([-5.0] * WINDOW)
    assert gauge(metrics, "observed_flag_ratio") == gauge(metrics, "observed_flag_ratio_low") == 0
    assert gauge(metrics, "observed_flag_ratio_high") < 0.002


def test_too_few_values_say_nothing():
    metrics = watched(benign(ENOUGH - 1, 1))
    names = ("drift_psi_ratio", "observed_flag_ratio", "observed_flag_ratio_low", "observed_flag_ratio_high")
    assert [gauge(metrics, name) for name in names] == [None] * 4
    metrics.drift.add("chat", reading(value=0.0))
    assert all(gauge(metrics, name) is not None for name in names)


def test_values_that_are_missing_or_of_others_do_not_count():
    metrics = watched([None] * ENOUGH)
    for _ in range(ENOUGH):
        metrics.drift.add("raw", reading(value=1.0))
        metrics.drift.add("chat", reading(value=1.0, probe="another"))
    assert gauge(metrics, "observed_flag_ratio") is None


def test_another_threshold_keeps_the_values_another_reference_does_not():
    metrics = watched([0.5] * ENOUGH)
    old = metrics.drift._windows[CHAT].reference
    metrics.probes([], {}, {CHAT: Reference(old.edges, 0.0, 0.5)})
    assert gauge(metrics, "observed_flag_ratio") == 1
    metrics.probes([], {}, {CHAT: Reference((0.0,), 0.0, 0.5)})
    assert gauge(metrics, "observed_flag_ratio") is None and gauge(metrics, "target_fpr_ratio") == 0.5
    metrics.probes([], {})
    assert gauge(metrics, "target_fpr_ratio") is None


def test_a_card_without_deciles_still_has_a_ratio():
    metrics = Metrics()
    metrics.drift.expect({CHAT: Reference((), 0.0, None)})
    for one in benign(ENOUGH, 3):
        metrics.drift.add("chat", reading(value=one))
    assert gauge(metrics, "drift_psi_ratio") is None and 0.3 < gauge(metrics, "observed_flag_ratio") < 0.7


@pytest.mark.parametrize(
    ("values", "stale"),
    [
        (benign(WINDOW, 1), False),
        ([*benign(WINDOW, 1), *benign(WINDOW, 2, mean=1.0)], True),
        ([-5.0] * WINDOW, True),
        (benign(ENOUGH - 1, 1), None),
    ],
)
def test_a_threshold_is_stale_when_its_interval_says_so(values, stale):
    """The same rule as the alert ThresholdStale's, and the release gate's."""
    metrics = watched(values)
    (standing,) = metrics.drift.standings()
    assert (standing.probe, standing.phase, standing.format, standing.stale) == (*CHAT, stale)
    assert standing.n == min(WINDOW, len(values))
    if stale is not None:
        assert standing.observed == gauge(metrics, "observed_flag_ratio")
        assert standing.low <= standing.observed <= standing.high


def test_without_a_certified_rate_no_threshold_is_stale():
    metrics = Metrics()
    metrics.drift.expect({CHAT: Reference((), 0.0, None)})
    for one in benign(ENOUGH, 3):
        metrics.drift.add("chat", reading(value=one))
    (standing,) = metrics.drift.standings()
    assert (standing.stale, standing.psi) == (None, None) and standing.low < standing.observed < standing.high
