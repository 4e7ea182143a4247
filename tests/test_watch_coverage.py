"""Watch's coverage adds up (T2): a score that is missing or not finite is counted, and is never an allow."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.sequence import Watch
from monitor.types import Action, Mode, Phase

from .steps import both, generate, prompt, rows, rule


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
