"""Watch's readings: which positions count, the sample, the peak, and a streak that one token breaks."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from monitor.aggregate import PLAIN_KINDS
from monitor.sequence import Watch
from monitor.types import Action, Mode, Phase, Turn

from .steps import both, prompt, rows, rule


def test_positions_outside_the_turns_do_not_count():
    watch = Watch(prompt(6, (Turn(3, 5),)), both())
    watch.advance(0, rows(24874, 99, 99, 1, 2, 99), 1)
    reading = watch.readings()[0]
    assert (reading.value, reading.peak_position, watch.verdict) == (2.0, 4, Action.ALLOW)


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
