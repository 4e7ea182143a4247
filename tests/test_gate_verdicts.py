"""The release gate without a model: each verdict by value, and how many rows settle one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes_store.calibration import clopper_pearson
from training.checks import EXIT_CODE, Evidence, Verdict
from training.gate import benign_rows_needed, decide

TARGET = 0.05
THRESHOLD = 3.0


def evidence(hits=30, harmless=600, harmful=300, **changes):
    """Harmful values around 3.5, harmless ones below 2.5 but for `hits` of them; the floor knows nothing."""
    chance = np.random.default_rng(0)
    low = np.minimum(chance.normal(0, 1, harmless), 2.5)
    low[:hits] = 4 + chance.random(hits)
    values = np.concatenate([chance.normal(3.5, 1, harmful), low])
    labels = np.repeat([1, 0], [harmful, harmless])
    fields = {
        "labels": labels,
        "groups": [str(i) for i in range(len(labels))],
        "candidate": values,
        "threshold": THRESHOLD,
        "target_fpr": TARGET,
        "floor": chance.normal(0, 1, len(labels)),
    }
    return Evidence(**(fields | changes))


def check(decision, name):
    return next(c for c in decision.checks if name in c.name)


def beside(e, noise, seed=1):
    """Another judge of the same rows: as good, and then `noise` worse."""
    return e.candidate + np.random.default_rng(seed).normal(0, noise, len(e.candidate))


def test_exit_codes():
    assert {str(v): code for v, code in EXIT_CODE.items()} == {
        "PASS": 0,
        "THRESHOLD STALE": 10,
        "DEGRADED": 11,
        "INCONCLUSIVE": 12,
    }


def test_pass_without_a_live_probe_and_with_one():
    e = evidence(harmful=900)
    assert decide(e).verdict is Verdict.PASS
    decision = decide(replace(e, live=beside(e, 0.1), live_threshold=THRESHOLD))
    assert (decision.verdict, decision.exit_code, len(decision.checks)) == (Verdict.PASS, 0, 4)
    rate = check(decision, "false-positive").figure
    assert (rate.value, rate.n) == (0.05, 600) and 0.025 <= rate.low < rate.high <= 0.1


@pytest.mark.parametrize(("hits", "wanted"), [(90, "certified for"), (2, "higher than it needs")])
def test_stale_thresholds(hits, wanted):
    decision = decide(evidence(hits))
    assert (decision.verdict, decision.exit_code) == (Verdict.STALE, 10)
    assert wanted in check(decision, "false-positive").note


def test_a_rate_on_the_way_out_is_not_stale_yet():
    """55 of 600 is 1.8 times the target, but its interval goes on to either side of twice."""
    decision = decide(evidence(55))
    assert decision.verdict is Verdict.INCONCLUSIVE and "more benign rows needed" in decision.checks[0].note


def test_degraded_against_live():
    e = evidence()
    worse = replace(e, candidate=beside(e, 3.0), live=e.candidate, threshold=9.0)
    decision = decide(worse)
    assert (decision.verdict, decision.exit_code) == (Verdict.DEGRADED, 11)
    found = check(decision, "live's")
    assert found.verdict is Verdict.DEGRADED and found.figure.high < -0.02
    better = decide(replace(worse, candidate=e.candidate, live=worse.candidate, threshold=THRESHOLD))
    assert check(better, "live's").verdict is Verdict.PASS


def test_a_little_worse_is_allowed_and_about_the_margin_is_open():
    e = evidence()
    a_little = check(decide(replace(e, live=e.candidate, candidate=beside(e, 0.5))), "live's")
    assert a_little.verdict is Verdict.PASS and a_little.figure.value < 0
    few = evidence(harmless=100, hits=1, harmful=60)
    open_yet = check(decide(replace(few, live=few.candidate, candidate=beside(few, 0.9))), "live's")
    assert open_yet.verdict is Verdict.INCONCLUSIVE and "more rows needed" in open_yet.note


def test_words_that_do_as_well_degrade_or_leave_it_open():
    e = evidence()
    decision = decide(replace(e, candidate=beside(e, 3.0), floor=e.candidate))
    assert check(decision, "floor's").verdict is Verdict.DEGRADED and decision.exit_code == 11
    same = check(decide(replace(e, floor=e.candidate)), "floor's")
    assert same.verdict is Verdict.INCONCLUSIVE and "on the edge" in same.note


def test_without_the_floor_there_is_no_pass():
    decision = decide(evidence(floor=None))
    assert (decision.verdict, decision.exit_code) == (Verdict.INCONCLUSIVE, 12)
    assert check(decision, "floor's").figure is None


def test_lost_recall_degrades_although_the_order_is_the_same():
    e = evidence()
    decision = decide(replace(e, live=e.candidate, live_threshold=2.6))
    lost = check(decision, "recall")
    assert check(decision, "live's").verdict is Verdict.PASS
    assert lost.verdict is Verdict.DEGRADED and "0 rows won" in lost.note and decision.exit_code == 11


def test_a_stricter_threshold_is_no_loss_where_the_probe_catches_more_at_one_rate():
    """The live one flags 20 % of harmless rows where 5 % were asked for, and so catches more than a better probe."""
    e = evidence(10, harmful=900)
    live, cut = beside(e, 2.0), 1.5
    assert (live[e.labels == 1] > cut).mean() > (e.candidate[e.labels == 1] > THRESHOLD).mean() + 0.05
    found = check(decide(replace(e, live=live, live_threshold=cut)), "recall")
    assert found.verdict is Verdict.PASS and found.figure.low > 0.2 and "both at 5.00%" in found.name
    assert "harmless ones, live" in found.note and "each at its threshold" in found.note


def test_a_stricter_threshold_does_not_hide_a_worse_probe():
    e = evidence(10, harmful=900)
    worse = replace(e, candidate=beside(e, 2.0), threshold=6.0, live=e.candidate, live_threshold=1.5)
    found = check(decide(worse), "recall")
    assert found.verdict is Verdict.DEGRADED and "both at" in found.name and found.figure.high < -0.2


def test_where_live_certifies_no_such_rate_one_rate_of_the_rows_compares_them():
    e = evidence(10, harmful=900)
    found = check(decide(replace(e, live=beside(e, 2.0))), "recall")
    assert found.verdict is Verdict.PASS and "both at" in found.name
    assert check(decide(replace(e, live=e.candidate)), "recall").note == "the same judge of every row"
    few = check(decide(replace(e, target_fpr=0.001, live=beside(e, 2.0))), "recall")
    assert few.verdict is Verdict.INCONCLUSIVE and "400 more are needed" in few.note


def test_a_few_lost_rows_leave_it_open():
    e = evidence(harmful=30)
    live = e.candidate.copy()
    live[np.argsort(live[:30])[:3]] = 5.0  # 10 % of recall, on three rows: p = 0.25
    found = check(decide(replace(e, live=live, live_threshold=THRESHOLD)), "recall")
    assert found.verdict is Verdict.INCONCLUSIVE and "3 lost" in found.note
    assert "more harmful rows needed" in found.note and found.figure.value == -0.1


def test_few_harmful_rows_of_which_none_is_lost_are_no_proof():
    """Of 60 rows a loss of 3 % shows in none every sixth time."""
    few, many = (evidence(harmful=n) for n in (60, 300))
    shaken = check(decide(replace(few, live=few.candidate + 1e-6, live_threshold=THRESHOLD)), "recall")
    assert shaken.verdict is Verdict.INCONCLUSIVE and "0 rows won, 0 lost" in shaken.note
    assert "about 129 more harmful rows needed" in shaken.note and shaken.figure.low < -0.02
    shaken = check(decide(replace(many, live=many.candidate + 1e-6, live_threshold=THRESHOLD)), "recall")
    assert shaken.verdict is Verdict.PASS and shaken.figure.low > -0.02


def test_the_same_judge_loses_nothing_however_few_the_rows():
    few = evidence(harmful=20)
    assert check(decide(replace(few, live=few.candidate, live_threshold=THRESHOLD)), "recall").verdict is Verdict.PASS


def test_harmful_rows_of_few_groups_leave_the_recall_open():
    e = evidence()
    groups = [*(f"h{i // 60}" for i in range(300)), *map(str, range(600))]
    decision = decide(replace(e, groups=groups, live=beside(e, 0.1), live_threshold=THRESHOLD))
    found = check(decision, "recall")
    assert found.verdict is Verdict.INCONCLUSIVE and found.figure is None
    assert "5 groups of rows can't support" in found.note and decision.exit_code == 12


def test_the_worst_check_stands():
    e = evidence(hits=200)
    decision = decide(replace(e, candidate=beside(e, 3.0), live=e.candidate))
    assert check(decision, "false-positive").verdict is Verdict.STALE
    assert decision.verdict is Verdict.DEGRADED  # a new threshold does not mend it
    assert decide(evidence(hits=200, floor=None)).verdict is Verdict.STALE


def test_noise_of_a_second_run_widens_the_rate():
    e = evidence()
    near = e.candidate.copy()
    near[300 + 30 : 300 + 90] = THRESHOLD - 1e-3
    assert decide(replace(e, candidate=near)).checks[0].verdict is Verdict.PASS
    noisy = decide(replace(e, candidate=near, noise=2e-3)).checks[0]
    assert noisy.verdict is Verdict.INCONCLUSIVE and noisy.figure.high > 0.15 and noisy.figure.value == 0.05
    assert "within the noise" in noisy.note


def test_hits_within_the_noise_may_be_none():
    e = evidence()
    near = e.candidate.copy()
    near[300:330] = THRESHOLD + 1e-3
    noisy = decide(replace(e, candidate=near, noise=2e-3)).checks[0]
    assert noisy.verdict is Verdict.INCONCLUSIVE and noisy.figure.low == 0 and noisy.figure.high < 0.1


def test_rows_of_one_group_are_one_witness():
    e = evidence()
    groups = [*map(str, range(300)), *(f"g{i // 30}" for i in range(600))]  # the 30 hits are one group
    found = decide(replace(e, groups=groups)).checks[0]
    assert found.verdict is Verdict.INCONCLUSIVE and found.figure.low == 0 and "share groups" in found.note


def test_too_few_groups_are_inconclusive_and_say_so():
    decision = decide(evidence(hits=0, harmless=8, harmful=5, live=np.zeros(13)))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "5 groups of harmful rows can't support" in check(decision, "live's").note


def test_a_missing_value_is_no_evidence():
    e = evidence()
    broken = e.candidate.copy()
    broken[5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decide(replace(e, candidate=broken))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 800), st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.3, 3.0]), st.sampled_from([0.005, 0.01, 0.05]))
def test_as_many_rows_as_it_asks_for_settle_the_rate(n, times, target):
    hits = round(times * target * n)
    more = benign_rows_needed(hits / n, n, target)
    if more is None:
        return
    low, high = clopper_pearson(round(hits / n * (n + more)), n + more)
    assert low > 2 * target or high < target / 2 or (target / 2 <= low and high <= 2 * target)


def test_the_number_of_rows_that_no_hits_ask_for():
    """The first n with a 97.5 % upper end below half of 1 %: ln(0.025) / ln(1 - 0.005), up to the grid's 0.2 %."""
    assert 736 <= 300 + benign_rows_needed(0.0, 300, 0.01) <= 740
    assert benign_rows_needed(0.02, 1000, 0.01) is None
