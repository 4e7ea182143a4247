"""Policy: the whole table of mode, phase, value and history; a missing or non-finite value is never an allow."""

import itertools
import math

import pytest

from monitor.aggregate import Aggregation
from monitor.policy.rule import Rule, crossed, ends, outcome, worst
from monitor.types import Action, Mode, Phase

THRESHOLD = 2.0
ABOVE = math.nextafter(THRESHOLD, math.inf)
VALUES = (None, math.nan, math.inf, -math.inf, -1e30, 0.0, THRESHOLD, ABOVE, 1e30)
STRENGTH = [Mode.SHADOW, Mode.FLAG, Mode.BLOCK]
DOES = {Mode.SHADOW: Action.ALLOW, Mode.FLAG: Action.FLAG, Mode.BLOCK: Action.BLOCK}


def rule(mode=Mode.BLOCK, phase=Phase.RESPONSE, threshold=THRESHOLD, fail_mode="closed", on_history=Mode.FLAG):
    return Rule("p", "v1", 0, phase, mode, threshold, Aggregation("max"), fail_mode, on_history)


def expected(mode, phase, on_history, value, newest):
    """The table, from the words of DESIGN."""
    if value not in (-1e30, 0.0, THRESHOLD, ABOVE, 1e30):
        return Action.UNMONITORED
    if value not in (ABOVE, 1e30):
        return Action.ALLOW
    if phase is Phase.PROMPT and newest not in (ABOVE, 1e30):  # only a turn of the history is above
        return DOES[STRENGTH[min(STRENGTH.index(mode), STRENGTH.index(on_history))]]
    return DOES[mode]


@pytest.mark.parametrize(("mode", "phase", "on_history"), list(itertools.product(Mode, Phase, Mode)))
def test_outcome_table(mode, phase, on_history):
    one = rule(mode, phase, on_history=on_history)
    for value, newest in itertools.product(VALUES, VALUES):
        got = outcome(one, value, newest)
        assert got is expected(mode, phase, on_history, value, newest), (value, newest)


@pytest.mark.parametrize(("mode", "phase", "value"), list(itertools.product(Mode, Phase, (None, math.nan, math.inf))))
def test_missing_is_unmonitored_whatever_the_newest_turn_says(mode, phase, value):
    for newest in (None, math.nan, 0.0, ABOVE):
        assert outcome(rule(mode, phase), value, newest) is Action.UNMONITORED


def test_crossed_is_strict_and_never_true_of_what_is_not_a_number():
    assert [crossed(rule(), v) for v in VALUES] == [False] * 7 + [True, True]
    assert not crossed(rule(Mode.SHADOW, threshold=None), 1e30)


def test_history_does_not_soften_a_response():
    assert outcome(rule(on_history=Mode.SHADOW), ABOVE) is Action.BLOCK


def test_newest_turn_defaults_to_history():
    assert outcome(rule(phase=Phase.PROMPT), ABOVE) is Action.FLAG
    assert outcome(rule(phase=Phase.PROMPT), ABOVE, ABOVE) is Action.BLOCK


@pytest.mark.parametrize("phase", Phase)
def test_without_calibration_only_shadow(phase):
    for mode in (Mode.FLAG, Mode.BLOCK):
        with pytest.raises(ValueError, match=f"'p' has no calibration for {phase}; only shadow"):
            rule(mode, phase, threshold=None)
    shadow = rule(Mode.SHADOW, phase, threshold=None)
    assert outcome(shadow, 1e30, 1e30) is Action.ALLOW
    assert outcome(shadow, None) is Action.UNMONITORED


@pytest.mark.parametrize(("mode", "fail_mode", "action"), list(itertools.product(Mode, ("open", "closed"), Action)))
def test_what_ends_a_sequence(mode, fail_mode, action):
    fails_closed = action is Action.UNMONITORED and (mode, fail_mode) == (Mode.BLOCK, "closed")
    assert ends(rule(mode, fail_mode=fail_mode), action) is (action is Action.BLOCK or fails_closed)


def test_worst_verdict_stands():
    order = [Action.ALLOW, Action.FLAG, Action.UNMONITORED, Action.BLOCK]
    for a, b in itertools.product(order, order):
        assert worst([a, b]) is order[max(order.index(a), order.index(b))]
    assert worst([]) is Action.ALLOW
