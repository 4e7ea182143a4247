"""Watch: nothing unjudged is released, and what goes out has waited for its score and no longer."""

import numpy as np
import pytest

from monitor.sequence import Watch
from monitor.types import Action, Caller, Mode, Turn

from .steps import both, generate, prompt, rows


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
