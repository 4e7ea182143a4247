"""Watch: coverage adds up (T2), nothing unjudged is released, a missing score is never an allow."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.aggregate import PLAIN_KINDS, Aggregation
from monitor.policy.rule import Rule
from monitor.sequence import Watch
from monitor.types import Action, Caller, Mode, Phase, Prompt, Turn


def prompt(n, turns=None, newest=0):
    return Prompt(tuple(range(n)), turns or (Turn(min(1, n - 1), n),), newest, "chat")


def rule(phase, mode=Mode.BLOCK, threshold=5.0, kind="max", column=0, fail_mode="closed", **more):
    return Rule(f"p{column}", "v1", column, phase, mode, threshold, Aggregation(kind), fail_mode, **more)


def both(**kwargs):
    return [rule(Phase.PROMPT, **kwargs), rule(Phase.RESPONSE, **kwargs)]


def rows(*values):
    return np.array(values, dtype=np.float32).reshape(len(values), -1)


def generate(watch, scores, n_answer, finish="length"):
    """As an engine does: the prompt in one step, then the row of each token one step after it was sampled."""
    n = watch.n_prompt
    seen = [watch.advance(0, scores[:n], n_new=1, finish=finish if n_answer == 1 else None)]
    for i in range(1, n_answer):
        if seen[-1].finish:
            break
        last = i == n_answer - 1
        seen.append(watch.advance(n + i - 1, scores[n + i - 1 : n + i], 1, finish if last else None))
    return seen


def test_four_prompt_tokens_and_five_generated_give_eight_rows():
    watch = Watch(prompt(4), both())
    judged = generate(watch, np.zeros((8, 1), np.float32), 5)
    assert [j.released for j in judged] == [0, 1, 2, 3, 5]
    c = watch.coverage
    assert (c.prompt_scored, c.response_scored, c.final_unscored, c.unmonitored) == (4, 4, 1, 0)
    assert watch.verdict is Action.ALLOW


@pytest.mark.parametrize("mode", [Mode.SHADOW, Mode.FLAG])
def test_without_a_blocking_probe_nothing_is_held(mode):
    judged = generate(Watch(prompt(4), both(mode=mode)), np.zeros((8, 1), np.float32), 5)
    assert [j.released for j in judged] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("end", [None, "stop", "length"])
def test_a_trigger_is_never_released_even_when_its_row_comes_with_the_end(at, end):
    n_answer = at + 1
    scores = np.zeros((4 + n_answer, 1), np.float32)
    scores[4 + at - 1] = 9.0
    watch = Watch(prompt(4), both())
    judged = generate(watch, scores, n_answer, finish=end)
    assert judged[-1].finish == "content_filter"
    assert judged[-1].released == at - 1
    response = watch.readings()[1]
    assert (response.crossed_at, response.action) == (4 + at - 1, Action.BLOCK)


def test_the_last_sampled_token_goes_out_under_the_verdict_before_it():
    scores = np.zeros((8, 1), np.float32)
    watch = Watch(prompt(4), both())
    judged = generate(watch, scores, 5)
    assert judged[-1].released == 5 and watch.coverage.final_unscored == 1


def test_a_blocked_prompt_releases_nothing_although_a_token_was_sampled():
    watch = Watch(prompt(4), both())
    judged = watch.advance(0, rows(0, 0, 9, 0), n_new=1)
    assert (judged.released, judged.finish, watch.verdict) == (0, "content_filter", Action.BLOCK)


def test_a_harmful_turn_in_the_history_flags_and_the_newest_blocks():
    turns = (Turn(1, 3), Turn(4, 6))
    history = Watch(prompt(6, turns, newest=1), both())
    assert history.advance(0, rows(0, 9, 0, 0, 0, 0), 1).finish is None
    assert history.verdict is Action.FLAG
    newest = Watch(prompt(6, turns, newest=1), both())
    assert newest.advance(0, rows(0, 0, 0, 0, 9, 0), 1).finish == "content_filter"
    strict = Watch(prompt(6, turns, newest=1), both(on_history=Mode.BLOCK))
    assert strict.advance(0, rows(0, 9, 0, 0, 0, 0), 1).finish == "content_filter"


def test_positions_outside_the_turns_do_not_count():
    watch = Watch(prompt(6, (Turn(3, 5),)), both())
    watch.advance(0, rows(24874, 99, 99, 1, 2, 99), 1)
    reading = watch.readings()[0]
    assert (reading.value, reading.peak_position, watch.verdict) == (2.0, 4, Action.ALLOW)


@pytest.mark.parametrize("at", [2, 5])
def test_a_candidate_without_a_score_changes_no_verdict(at):
    """A version on trial: its reading says that it has no value, and nothing else is any different."""
    trial = [replace(r, probe="p0@v2") for r in both(mode=Mode.SHADOW, column=1)]
    scores = np.zeros((8, 2), np.float32)
    scores[at, 1] = np.nan
    watch = Watch(prompt(4), [*both(), *trial])
    judged = generate(watch, scores, 5)
    assert judged[-1].finish == "length" and watch.verdict is Action.ALLOW
    assert (watch.coverage.unmonitored, dict(watch.coverage.causes)) == (0, {})
    found = {(r.probe, r.phase): (r.action, r.value is None) for r in watch.readings()}
    broken = Phase.PROMPT if at < 4 else Phase.RESPONSE
    assert found.pop(("p0@v2", broken)) == (Action.UNMONITORED, True)
    assert set(found.values()) == {(Action.ALLOW, False)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_score_that_is_not_finite_fails_closed(bad, at):
    scores = np.zeros((8, 1), np.float32)
    scores[at] = bad
    watch = Watch(prompt(4), both())
    judged = generate(watch, scores, 5)
    assert judged[-1].finish == "unmonitored" and watch.verdict is Action.UNMONITORED
    assert judged[-1].released == max(0, at - 4)
    assert dict(watch.coverage.causes) == {"not_finite": 1}


def test_open_or_flagging_probes_serve_on_and_say_unmonitored():
    for kwargs in ({"fail_mode": "open"}, {"mode": Mode.FLAG}):
        scores = np.zeros((8, 1), np.float32)
        scores[5] = np.nan
        watch = Watch(prompt(4), both(**kwargs))
        judged = generate(watch, scores, 5)
        assert (judged[-1].finish, judged[-1].released, watch.verdict) == ("length", 5, Action.UNMONITORED)
        assert watch.readings()[1].value is None


def test_a_gap_is_unmonitored_and_not_an_allow():
    watch = Watch(prompt(4), both())
    watch.advance(0, rows(0, 0), 0)
    judged = watch.advance(3, rows(0), 1)
    assert (judged.finish, watch.verdict, watch.coverage.unmonitored) == ("unmonitored", Action.UNMONITORED, 1)


def test_a_silent_tap_never_allows():
    watch = Watch(prompt(4), both())
    judged = watch.advance(0, np.empty((0, 1), np.float32), 1)  # a token was sampled, so the prompt was fed
    assert (judged.finish, judged.released, watch.coverage.unmonitored) == ("unmonitored", 0, 4)


def test_a_tap_that_falls_silent_ends_the_answer_at_the_next_token():
    watch = Watch(prompt(4), both())
    watch.advance(0, np.zeros((4, 1), np.float32), 1)
    assert watch.advance(4, np.zeros((1, 1), np.float32), 1).released == 1
    judged = watch.advance(5, np.empty((0, 1), np.float32), 1)
    assert (judged.finish, judged.released, dict(watch.coverage.causes)) == ("unmonitored", 1, {"missing_rows": 1})


def test_one_probe_that_breaks_does_not_blind_another():
    rules = [*both(mode=Mode.FLAG), rule(Phase.RESPONSE, column=1)]
    watch = Watch(prompt(2), rules)
    watch.advance(0, rows([np.nan, 0], [0, 0]), 1)
    judged = watch.advance(2, rows([0, 9]), 1)
    assert judged.finish == "content_filter" and judged.released == 0


def test_an_aborted_sequence_releases_nothing_more_and_counts_what_never_ran():
    watch = Watch(prompt(4), both())
    watch.advance(0, rows(0, 0), 0)
    judged = watch.advance(2, np.empty((0, 1), np.float32), 0, "aborted")
    assert (judged.finish, judged.released) == ("aborted", 0)
    assert (watch.coverage.not_computed, watch.coverage.unmonitored, watch.verdict) == (2, 0, Action.ALLOW)


class Clock:
    """Seconds as a test sets them; counts how often it was read."""

    def __init__(self):
        self.now, self.reads = 100.0, 0

    def __call__(self):
        self.reads += 1
        return self.now


def stepped(watch, clock, seconds, scores, finish=None):
    """The prompt, then one token a step; `seconds` passes before each step after the first."""
    n = watch.n_prompt
    watch.advance(0, np.zeros((n, 1), np.float32), 1)
    for i, (wait, score) in enumerate(zip(seconds, scores, strict=True)):
        clock.now += wait
        watch.advance(n + i, rows(score), 1, finish if i == len(scores) - 1 else None)
    return watch.record("r", 0, "m", Caller())


class TestHeldSeconds:
    def test_a_token_waits_for_the_step_that_scores_it_and_the_longest_is_kept(self):
        clock = Clock()
        watch = Watch(prompt(4), both(), clock=clock)
        assert stepped(watch, clock, [0.5, 2.0, 0.25], [0, 0, 0]).held_seconds == 2.0
        assert clock.reads <= 4, "once a step"

    def test_without_a_blocking_probe_nothing_waits(self):
        clock = Clock()
        watch = Watch(prompt(4), both(mode=Mode.FLAG), clock=clock)
        assert stepped(watch, clock, [0.5, 2.0], [0, 0]).held_seconds == 0.0

    def test_what_never_goes_out_has_not_waited(self):
        clock = Clock()
        watch = Watch(prompt(4), both(), clock=clock)
        record = stepped(watch, clock, [0.5, 8.0], [0, 9])
        assert (record.finish, record.released_tokens, record.held_seconds) == ("content_filter", 1, 0.5)

    def test_several_that_wait_for_a_second_judge_count_from_the_first(self):
        clock = Clock()
        watch = Watch(prompt(4), both(escalate=2.0, kind="last"), clock=clock)
        record = stepped(watch, clock, [1.0, 1.0, 1.0], [3, 0, 0])
        assert (record.held_seconds, watch.released) == (0.0, 0)
        clock.now += 4.0
        assert watch.resolve(-9.0).released == 3
        assert watch.record("r", 0, "m", Caller()).held_seconds == 7.0, "sampled with the prompt's step"

    def test_the_last_token_goes_out_as_it_is_sampled(self):
        clock = Clock()
        watch = Watch(prompt(4), both(), clock=clock)
        record = stepped(watch, clock, [0.5, 0.25], [0, 0], finish="stop")
        assert (record.released_tokens, record.held_seconds) == (3, 0.5)


class TestSample:
    def test_every_counted_position_is_drawn_and_no_other(self):
        turns = (Turn(1, 2), Turn(3, 5))
        scores = np.arange(9, dtype=np.float32)[:, None]
        watch = Watch(prompt(6, turns, newest=1), both(mode=Mode.SHADOW, threshold=None), chance=Random(0))
        watch.advance(0, scores[:6], 1)
        for i in range(3):
            watch.advance(6 + i, scores[6 + i : 7 + i], 1)
        drawn = [[r.sample for r in watch.readings()] for _ in range(3000)]
        for phase, positions in ((0, {1, 3, 4}), (1, {6, 7, 8})):
            counts = Counter(d[phase] for d in drawn)
            assert set(counts) == positions
            assert all(850 < n < 1150 for n in counts.values()), "each as likely: 1000, give or take six deviations"

    def test_a_phase_without_a_value_has_no_sample(self):
        watch = Watch(prompt(4), both(mode=Mode.FLAG))
        watch.advance(0, rows(0, 0, np.nan, 0), 1)
        assert [r.sample for r in watch.readings()] == [None, None], "broken, and not begun"
        watch.advance(4, rows(1.5), 1)
        assert [r.sample for r in watch.readings()] == [None, 1.5]

    def test_a_prompt_of_which_nothing_counts_has_none(self):
        watch = Watch(prompt(4, (Turn(2, 2),)), both(fail_mode="open"))
        watch.advance(0, rows(1, 1, 1, 1), 1)
        assert watch.readings()[0].sample is None and watch.readings()[0].value is None


class TestPeak:
    def test_the_first_of_equal_scores_up_to_the_one_that_ended_it(self):
        watch = Watch(prompt(2), both(kind="ema", threshold=2.5))
        watch.advance(0, np.zeros((2, 1), np.float32), 1)
        watch.advance(2, rows(1, 4, 0, 4, 9, 99), 6)  # many rows at once: those after the crossing are not looked at
        reading = watch.readings()[1]
        assert watch.finish == "content_filter"
        assert (reading.peak_position, reading.peak_score, reading.crossed_at) == (3, 4.0, 3)

    def test_of_a_probe_that_broke_it_is_what_came_before(self):
        rules = [rule(Phase.RESPONSE, Mode.FLAG), rule(Phase.RESPONSE, Mode.FLAG, column=1)]
        watch = Watch(prompt(1), rules)
        watch.advance(0, rows([0, 0]), 1)
        for i, row in enumerate(([1, 1], [2, 3], [np.nan, 3], [7, 2])):
            watch.advance(1 + i, rows(row), 1)
        broken, whole = watch.readings()
        assert (broken.value, broken.peak_score, broken.peak_position) == (None, 2.0, 2)
        assert (whole.value, whole.peak_score, whole.peak_position, whole.newest) == (3.0, 3.0, 2, 2.0)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_a_streak_is_broken_by_one_token_below(kind):
    watch = Watch(prompt(2), [rule(Phase.RESPONSE, Mode.FLAG, kind=kind, threshold=5.0, consecutive=2)])
    watch.advance(0, np.zeros((2, 1), np.float32), 1)
    crossed = []
    for i, score in enumerate((9, -40, 9, -40, 400, 400)):
        watch.advance(2 + i, rows(score), 1)
        crossed.append(watch.readings()[0].crossed_at)
    assert crossed == [None] * 5 + [7]


@given(data=st.data())
@settings(max_examples=2000, deadline=None)
def test_t2_every_position_is_counted_once(data):
    """Prompts 1-512, answers 1-128, chunks, gaps, replays: the sum is exact and no gap is silent."""
    n_prompt = data.draw(st.integers(1, 512))
    n_answer = data.draw(st.integers(1, 128))
    score_last = data.draw(st.booleans())
    fail_mode = data.draw(st.sampled_from(["open", "closed"]))
    holes = data.draw(st.sets(st.integers(0, n_prompt + n_answer - 2), max_size=3))
    how = data.draw(st.sampled_from(["absent", "nan"]))
    watch = Watch(prompt(n_prompt), both(fail_mode=fail_mode))

    def send(first, end, n_new, finish):
        """Rows [first, end), in pieces around absent ones; the step's tokens and end go with the last piece."""
        block = np.zeros((end - first, 1), np.float32)
        pieces, start = [], first
        for hole in sorted(h for h in holes if first <= h < end):
            block[hole - first] = np.nan
            if how == "absent":
                pieces.append((start, hole))
                start = hole + 1
        pieces.append((start, end))
        for a, b in pieces[:-1]:
            watch.advance(a, block[a - first : b - first])
        a, b = pieces[-1]
        return watch.advance(a, block[a - first : b - first], n_new, finish)

    fed = 0
    while fed < n_prompt:
        end = min(n_prompt, fed + data.draw(st.integers(1, 200)))
        replay = data.draw(st.integers(0, min(fed, 3)))
        judged = send(
            fed - replay,
            end,
            1 if end == n_prompt else 0,
            "length" if end == n_prompt and n_answer == 1 and not score_last else None,
        )
        fed = end
    for i in range(1, n_answer + score_last):
        if judged.finish:
            break
        sampled = 1 if i < n_answer else 0
        last = i == n_answer - 1 + score_last
        judged = send(fed, fed + 1, sampled, "length" if last else None)
        fed += 1
    if n_answer == 1 and score_last and not judged.finish:
        judged = send(fed, fed + 1, 0, "length")
    c = watch.coverage
    total = c.prompt_tokens + c.response_tokens
    assert c.prompt_scored + c.response_scored + c.unmonitored + c.final_unscored + c.not_computed == total
    assert sum(c.causes.values()) == c.unmonitored
    if judged.finish == "length":
        assert c.not_computed == 0
        assert c.final_unscored == (0 if score_last else 1)
        assert c.unmonitored == len(holes)
        assert judged.released == n_answer
        if holes:
            assert fail_mode == "open" and watch.verdict is Action.UNMONITORED
    else:
        assert judged.finish == "unmonitored" and holes and fail_mode == "closed"
        assert judged.released <= max(0, min(holes) - n_prompt)


@pytest.mark.parametrize("fail_mode", ["closed", "open"])
def test_rows_before_a_missing_one_are_judged_first(fail_mode):
    """All in one call, as a second model reads: what crosses before the hole blocks, and goes no further."""
    watch = Watch(prompt(4), both(fail_mode=fail_mode))
    watch.advance(0, np.zeros((4, 1), np.float32), 1)
    judged = watch.advance(4, rows(0, 0, 9, 0, np.nan, 0), 6)
    assert (judged.released, judged.finish, watch.verdict) == (2, "content_filter", Action.BLOCK)


def test_a_hole_of_one_probe_does_not_blind_the_others():
    rules = [r for c in (0, 1) for r in both(column=c)]
    watch = Watch(prompt(4), rules)
    watch.advance(0, np.zeros((4, 2), np.float32), 1)
    judged = watch.advance(4, rows([0, 0], [0, 9], [np.nan, 0]), 3)
    assert (judged.released, judged.finish, watch.verdict) == (1, "content_filter", Action.BLOCK)


def test_at_a_hole_nothing_more_goes_out():
    watch = Watch(prompt(4), both())
    watch.advance(0, np.zeros((4, 1), np.float32), 1)
    judged = watch.advance(4, rows(0, 0, np.nan, 9), 4)
    assert (judged.released, judged.finish, watch.verdict) == (2, "unmonitored", Action.UNMONITORED)
    assert dict(watch.coverage.causes) == {"not_finite": 1}
