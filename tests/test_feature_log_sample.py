"""Who is kept in the feature log, with the probability that is told, and what of them is averaged."""

import math
from random import Random

import pytest

from monitor.traffic.features import Chances
from monitor.traffic.features.sample import spans_of
from monitor.types import Action, Phase, Turn

from .feature_log import PROMPT
from .test_records import coverage, reading, record


@pytest.mark.parametrize("verdict", [Action.FLAG, Action.BLOCK])
def test_every_flag_and_block_is_kept(verdict):
    chances, chance = Chances(0.01, 1.0, 0.2), Random(1)
    kept = [chances.draw(record(verdict=verdict), chance) for _ in range(500)]
    assert {(k.q, k.reason) for k in kept} == {(1.0, "flagged")}
    assert 0 < sum(k.uniform for k in kept) < 20  # they are in the uniform slice no more often than others


@pytest.mark.parametrize(
    ("value", "threshold", "q"),
    [(1.0, 2.0, 0.35), (3.0, 2.0, 0.35), (0.9, 2.0, 0.05), (3.1, 2.0, 0.05), (1.0, None, 0.05), (None, 1.0, 0.05)],
)
def test_the_others_are_kept_with_the_probability_that_is_told(value, threshold, q):
    chances, chance, n = Chances(0.05, 1.0, 0.3), Random(7), 20_000
    one = record(readings=(reading(value=value, threshold=threshold),))
    kept = [k for k in (chances.draw(one, chance) for _ in range(n)) if k is not None]
    assert {k.q for k in kept} == {q}
    spread = 4 * math.sqrt(q * (1 - q) * n)
    assert abs(len(kept) - q * n) < spread
    uniform = [k for k in kept if k.uniform]
    assert abs(len(uniform) - 0.05 * n) < 4 * math.sqrt(0.05 * 0.95 * n)
    assert {k.reason for k in uniform} == {"uniform"} and {k.reason for k in kept if not k.uniform} <= {"near"}


def test_a_probability_is_never_above_one():
    assert Chances(0.8, 5.0, 0.9).draw(record(), Random(1)).q == 1.0


def test_weights_of_one_over_q_count_everybody_once():
    """Horvitz and Thompson: the sum of 1 / q estimates how many sequences there were."""
    chances, chance, total = Chances(0.05, 1.0, 0.3), Random(3), 0.0
    for i in range(20_000):
        verdict = Action.FLAG if i % 50 == 0 else Action.ALLOW
        kept = chances.draw(record(verdict=verdict, readings=(reading(value=float(i % 5)),)), chance)
        total += 0 if kept is None else 1 / kept.q
    assert abs(total - 20_000) < 1500


def test_what_is_averaged():
    one = record(coverage=coverage(prompt_tokens=10, prompt_scored=10, response_scored=4))
    assert spans_of(one, PROMPT) == {Phase.PROMPT: Turn(5, 10), Phase.RESPONSE: Turn(10, 14)}
    refused = record(coverage=coverage(prompt_tokens=10, prompt_scored=10, response_scored=0), finish="content_filter")
    assert spans_of(refused, PROMPT) == {Phase.PROMPT: Turn(5, 10)}


@pytest.mark.parametrize(
    "changes",
    [{"finish": "aborted"}, {"finish": "engine_error"}, {"coverage": coverage(unmonitored=1)}, {"route": "internal"}],
)
def test_what_is_not_whole_or_ours_is_not_kept(changes):
    assert spans_of(record(**changes), PROMPT) == {}
