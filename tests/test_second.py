"""The second judge: what a Watch does while it waits for an answer, and with one, without one, or another probe's."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from monitor.aggregate import Aggregation
from monitor.policy.rule import Rule, Second
from monitor.policy.second import logit
from monitor.sequence import Watch
from monitor.types import Action, Caller, Mode, Phase, Prompt, Turn

N_PROMPT = 4
CALM, UNSURE, SURE = -3.0, 1.0, 5.0  # below the band from 0 to 2, in it, above it


def rules(**changes):
    fields = {"mode": Mode.BLOCK, "threshold": 2.0, "escalate": 0.0, "fail_mode": "closed"} | changes
    return [Rule("p", "v1", 0, phase, aggregation=Aggregation("last"), **fields) for phase in Phase]


def watch(second=None, **changes):
    prompt = Prompt(tuple(range(N_PROMPT)), (Turn(1, N_PROMPT),), 0, "chat")
    return Watch(prompt, rules(**changes), second or Second(recheck_tokens=3, max_held=8))


def fed(one, *scores, finish=None):
    """A prompt, then one token a step; each step samples the next one. Returns what is released after each."""
    released = []
    for i, score in enumerate(scores):
        first, n = (0, N_PROMPT) if i == 0 else (N_PROMPT + i - 1, 1)
        rows = np.full((n, 1), score, np.float32)
        last = finish if i == len(scores) - 1 else None
        released.append(one.advance(first, rows, 1, last).released)
    return released


def record(one):
    return one.record("r", 0, "m", Caller())


class TestAnswers:
    def test_nothing_from_the_uncertain_token_on_goes_out_while_the_question_is_open(self):
        one = watch()
        assert fed(one, CALM, CALM, UNSURE, CALM, CALM) == [0, 1, 1, 1, 1]
        question = one.question
        assert (question.phase, question.position, question.n_read) == (Phase.RESPONSE, N_PROMPT + 1, N_PROMPT + 2)
        assert one.finish is None and one.verdict is Action.ESCALATE

    def test_yes_blocks_at_the_uncertain_token(self):
        one = watch()
        fed(one, CALM, CALM, UNSURE, CALM)
        judged = one.resolve(logit(0.999))
        assert (judged.released, judged.finish) == (1, "content_filter")
        (asked,) = record(one).escalations
        assert (asked.result, asked.position, asked.value) == ("block", N_PROMPT + 1, UNSURE)
        assert record(one).verdict is Action.BLOCK and record(one).readings[1].crossed_at == N_PROMPT + 1

    def test_no_lets_everything_on_that_waited(self):
        one = watch()
        fed(one, CALM, CALM, UNSURE, CALM, CALM)
        assert one.resolve(logit(0.001)).released == 4 and one.question is None
        assert fed_on(one, 5, CALM).released == 5
        assert record(one).escalations[0].result == "clear" and record(one).verdict is Action.ALLOW

    def test_a_certain_token_blocks_without_waiting_for_the_answer(self):
        one = watch()
        fed(one, CALM, CALM, UNSURE, CALM)
        judged = fed_on(one, 4, SURE)
        assert (judged.finish, judged.released) == ("content_filter", 1)
        assert one.resolve(logit(0.001)).finish == "content_filter", "too late"

    def test_the_engines_end_waits_too(self):
        one = watch()
        assert fed(one, CALM, CALM, UNSURE, finish="stop") == [0, 1, 1] and one.finish is None
        assert one.resolve(logit(0.001)).released == 3 and one.finish == "stop"

    def test_and_is_a_block_if_the_answer_is_yes(self):
        one = watch()
        fed(one, CALM, CALM, UNSURE, finish="length")
        assert one.resolve(logit(0.999)).finish == "content_filter" and one.released == 1

    @pytest.mark.parametrize("finish", ["aborted", "engine_error"])
    def test_an_abort_waits_for_nobody(self, finish):
        one = watch()
        fed(one, CALM, UNSURE)
        nothing = np.empty((0, 1), np.float32)
        assert one.advance(one.n_scored, nothing, 0, finish).finish == finish and one.question is None

    @pytest.mark.parametrize(("fail_mode", "finish"), [("closed", "unmonitored"), ("open", None)])
    def test_no_answer_is_the_fail_modes(self, fail_mode, finish):
        one = watch(fail_mode=fail_mode)
        fed(one, CALM, CALM, UNSURE, CALM)
        judged = one.resolve(None)
        assert judged.finish == finish and judged.released == (1 if finish else 3)
        assert record(one).escalations[0].result == "failed"

    def test_more_than_max_held_tokens_wait_for_nobody(self):
        one = watch(Second(max_held=4))
        released = fed(one, CALM, UNSURE, *[CALM] * 6)
        assert released[-1] == 0 and one.finish == "unmonitored" and one.max_held <= 5
        assert record(one).escalations[0].result == "overflow"

    def test_after_an_answer_it_is_quiet_for_a_while_and_then_asked_again(self):
        one = watch()
        fed(one, CALM, UNSURE)
        one.resolve(logit(0.001))
        asked = []
        for i in range(2, 8):
            fed_on(one, i, UNSURE)
            asked.append(one.question is not None)
        assert asked.index(True) == 2, "recheck_tokens is 3"

    def test_min_tokens_and_consecutive_hold_for_the_band_too(self):
        one = watch(min_tokens=3, consecutive=2)
        seen = []
        fed(one, CALM)
        for i, score in enumerate([UNSURE, UNSURE, CALM, UNSURE, UNSURE], 1):
            fed_on(one, i, score)
            seen.append(one.question is not None)
        assert seen == [False, False, False, False, True]

    def test_a_peak_that_may_not_block_does_not_speak_in_the_question(self):
        one = watch(min_tokens=4, consecutive=2)
        fed(one, CALM, 50 * SURE, CALM, CALM, UNSURE, UNSURE)
        assert one.question is not None
        assert one.resolve(logit(0.5)).finish is None
        (asked,) = record(one).escalations
        assert (asked.value, asked.result) == (UNSURE, "clear")

    def test_a_certain_token_in_the_call_that_overflows_is_a_block(self):
        """Several rows in one call: the block stands, though more tokens wait than may."""
        one = watch(Second(max_held=2))
        fed(one, CALM, UNSURE)
        judged = one.advance(N_PROMPT + 1, np.array([[CALM], [SURE], [CALM], [CALM]], np.float32), 4)
        assert (judged.finish, judged.released) == ("content_filter", 0)
        assert record(one).verdict is Action.BLOCK and record(one).escalations == ()

    def test_only_what_waits_for_the_answer_counts_as_held(self):
        one = watch(Second(max_held=4))
        fed(one, CALM)
        rows = np.full((6, 1), CALM, np.float32)
        rows[4] = UNSURE
        judged = one.advance(N_PROMPT, rows, 6)
        assert one.question is not None and judged.released == 4

    def test_a_given_answer_waits_however_long_it_is(self):
        one = watch(Second(max_held=2))
        rows = np.full((N_PROMPT + 20, 1), CALM, np.float32)
        rows[N_PROMPT + 1] = UNSURE
        assert one.replay(0, rows, 20).finish is None and one.question is not None
        assert one.resolve(logit(0.001)).finish == "stop" and one.released == 20

    def test_another_probe_that_comes_to_need_an_answer_gets_its_own(self):
        """The first question was about less: whoever answers it has not read the rest."""
        two = [*rules(), *(replace(r, probe="q", column=1) for r in rules())]
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(1, N_PROMPT),), 0, "chat")
        one = Watch(prompt, two, Second(recheck_tokens=50, max_held=50))
        one.advance(0, np.full((N_PROMPT, 2), CALM, np.float32), 1)
        for i, row in enumerate([[UNSURE, CALM], [CALM, CALM], [CALM, UNSURE], [CALM, CALM]]):
            one.advance(N_PROMPT + i, np.array([row], np.float32), 1)
        first = one.question
        assert first.position == N_PROMPT
        judged = one.resolve(logit(0.001))
        assert one.question is not None and one.question is not first
        assert (one.question.position, judged.released, one.verdict) == (N_PROMPT + 2, 2, Action.ESCALATE)
        assert one.resolve(logit(0.999)).finish == "content_filter" and one.released == 2
        asked = record(one).escalations
        assert [(e.probe, e.position, e.result) for e in asked] == [
            ("p", N_PROMPT, "clear"), ("q", N_PROMPT + 2, "block"),
        ]  # fmt: skip


def fed_on(one, i, score):
    return one.advance(N_PROMPT + i - 1, np.full((1, 1), score, np.float32), 1)


class TestPrompts:
    def test_nothing_goes_out_before_the_answer(self):
        one = watch()
        assert fed(one, UNSURE, CALM, CALM) == [0, 0, 0] and not one.prompt_judged
        assert one.question.n_read == N_PROMPT
        one.resolve(logit(0.001))
        assert one.prompt_judged and one.released == 2

    def test_yes_is_a_blocked_prompt(self):
        one = watch()
        fed(one, UNSURE)
        assert one.resolve(logit(0.999)).finish == "content_filter"
        assert [r.action for r in record(one).readings] == [Action.BLOCK, Action.ALLOW]

    @pytest.mark.parametrize("on_history", Mode)
    def test_what_only_the_history_makes_uncertain_is_asked_about_where_history_may_block(self, on_history):
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(0, 2), Turn(2, 4)), 1, "chat")
        one = Watch(prompt, rules(on_history=on_history), Second())
        one.advance(0, np.array([[UNSURE], [UNSURE], [CALM], [CALM]], np.float32), 1)
        assert (one.question is not None) is (on_history is Mode.BLOCK)

    @pytest.mark.parametrize("on_history", [Mode.FLAG, Mode.SHADOW])
    def test_a_refused_turn_does_not_speak_in_a_later_turns_question(self, on_history):
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(0, 2), Turn(2, 4)), 1, "chat")
        one = Watch(prompt, rules(on_history=on_history), Second())
        one.advance(0, np.array([[SURE], [50 * SURE], [CALM], [UNSURE]], np.float32), 1)
        assert one.question is not None
        one.resolve(logit(0.3))
        (asked,) = record(one).escalations
        assert (asked.value, asked.result) == (UNSURE, "clear")
        assert one.verdict is (Action.FLAG if on_history is Mode.FLAG else Action.ALLOW)


class TestOtherProbes:
    @pytest.mark.parametrize(("on_history", "says"), [(Mode.FLAG, -10.0), (Mode.BLOCK, 90.0)])
    def test_of_a_prompt_another_probe_says_what_may_block_of_it(self, on_history, says):
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(0, 2), Turn(2, 4)), 1, "chat")
        other = Rule(
            "q", "v1", 1, Phase.PROMPT, Mode.SHADOW, 99.0, Aggregation("last"), "closed", on_history=on_history
        )
        one = Watch(prompt, [*rules(), other], Second(probes=("q",)))
        rows = np.array([[CALM, 90.0], [CALM, 90.0], [CALM, -10.0], [UNSURE, -10.0]], np.float32)
        one.advance(0, rows, 1)
        assert record(one).escalations[0].second == says

    @pytest.mark.parametrize(("other", "finish"), [(10.0, "content_filter"), (-10.0, None)])
    def test_another_probe_answers_at_once(self, other, finish):
        second = Rule("q", "v1", 1, Phase.RESPONSE, Mode.SHADOW, 99.0, Aggregation("last"), "closed")
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(1, N_PROMPT),), 0, "chat")
        one = Watch(prompt, [*rules(), second], Second(probes=("q",)))
        one.advance(0, np.array([[CALM, 0.0]] * N_PROMPT, np.float32), 1)
        judged = one.advance(N_PROMPT, np.array([[UNSURE, other]], np.float32), 1)
        assert one.question is None and judged.finish == finish
        assert record(one).escalations[0].second == other

    def test_without_its_value_the_fail_mode_decides(self):
        second = Rule("q", "v1", 1, Phase.RESPONSE, Mode.SHADOW, 99.0, Aggregation("last"), "closed")
        prompt = Prompt(tuple(range(N_PROMPT)), (Turn(1, N_PROMPT),), 0, "chat")
        one = Watch(prompt, [*rules(), second], Second(probes=("q",)))
        one.advance(0, np.array([[CALM, 0.0]] * N_PROMPT, np.float32), 1)
        assert one.advance(N_PROMPT, np.array([[UNSURE, np.nan]], np.float32), 1).finish == "unmonitored"


@pytest.mark.parametrize(("p", "value"), list(itertools.product((0.2, 0.8), (-1.0, 1.0))))
def test_both_judges_count(p, value):
    assert Second().combined(value, logit(p)) == pytest.approx(0.55 * value + 0.45 * logit(p))
