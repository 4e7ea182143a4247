"""Probes with several projections: values equal their plain definitions, whole or token by token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.aggregate import PLAIN_KINDS, Aggregation, Running, aggregate, token_scores
from monitor.heads import HEAD_KINDS
from monitor.policy.rule import Rule
from monitor.sequence import Watch
from monitor.types import Action, Caller, Mode, Phase, Prompt, Turn

SIZES = {"mean_last": [2], "multimax": [1, 2, 5], "attention": [2, 6], "rolling_attention": [2, 6]}
NEAR = {"rel": 1e-6, "abs": 1e-5}


def softmax_mean(pairs):
    """pairs: (query, value) of some tokens"""
    top = max(q for q, _ in pairs)
    weights = [math.exp(q - top) for q, _ in pairs]
    return math.fsum(w * v for w, (_, v) in zip(weights, pairs, strict=True)) / math.fsum(weights)


def plain(how, rows):
    """The definitions, without anything incremental. rows: a list of lists of k scores"""
    columns = list(zip(*rows, strict=True))
    if how.kind == "mean_last":
        return math.fsum(columns[0]) / len(rows) + columns[1][-1]
    if how.kind == "multimax":
        return math.fsum(map(max, columns))
    half = len(columns) // 2
    heads = [list(zip(columns[h], columns[half + h], strict=True)) for h in range(half)]
    if how.kind == "attention" or len(rows) < how.window:
        return math.fsum(softmax_mean(head) for head in heads)
    starts = range(len(rows) - how.window + 1)
    return math.fsum(max(softmax_mean(head[i : i + how.window]) for i in starts) for head in heads)


@st.composite
def turns(draw, largest=50.0):
    kind = draw(st.sampled_from(HEAD_KINDS))
    k = draw(st.sampled_from(SIZES[kind]))
    row = st.lists(st.floats(-largest, largest, width=32), min_size=k, max_size=k)
    return Aggregation(kind, window=draw(st.integers(1, 12))), draw(st.lists(row, min_size=1, max_size=30))


@settings(deadline=None, max_examples=400)
@given(turns())
def test_every_kind_equals_its_definition_whole_and_after_each_token(turn):
    how, rows = turn
    running = Running([(Aggregation("max"), 0, 1), (how, 1, len(rows[0]))])
    highest = -math.inf
    for n, row in enumerate(rows, 1):
        running.add([0.0, *row])
        expected = plain(how, rows[:n])
        assert running.values[1] == pytest.approx(expected, **NEAR)
        assert aggregate(how, rows[:n]) == pytest.approx(expected, **NEAR)
        highest = max(highest, running.values[1])
        assert running.highest[1] == highest


@settings(deadline=None, max_examples=200)
@given(turns(largest=2.0**127))
def test_any_finite_scores_give_a_finite_value(turn):
    how, rows = turn
    running = Running([(how, 0, len(rows[0]))])
    for row in rows:
        running.add(row)
    size = max(1.0, float(np.abs(rows).max()))
    assert running.values[0] / size == pytest.approx(aggregate(how, rows) / size, abs=1e-5)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_no_score_is_not_a_value_and_what_does_not_fit_is_refused(kind):
    how = Aggregation(kind)
    assert math.isnan(aggregate(how, np.empty((0, 2))))
    wrong = {"mean_last": (1, 3), "multimax": (0,), "attention": (0, 1, 3), "rolling_attention": (0, 5)}[kind]
    for k in wrong:
        with pytest.raises(ValueError, match=f"'{kind}' can't be had from {k} projections"):
            Rule("p", "v1", 0, Phase.PROMPT, Mode.SHADOW, None, how, "open", n_columns=k)
    with pytest.raises(ValueError, match="'ema' can't be had from 3 projections"):
        Rule("p", "v1", 0, Phase.PROMPT, Mode.SHADOW, None, Aggregation("ema"), "open", n_columns=3)


def test_the_rolling_mean_forgets_what_left_its_window_and_starts_with_a_full_one():
    how = Aggregation("rolling_attention", window=3)
    running = Running([(how, 0, 2)])
    values = []
    for row in ([0, 9], [0, 0], [0, -3], [0, -1e30], [0, 6], [0, 6], [0, 6], [0, 6]):
        running.add(row)
        values.append(running.values[0])
    # 9 alone is not what a text that begins with 9 is worth: the first full window is.
    assert values == pytest.approx([9, 4.5, 2, 2, 2, 2, 6, 6])


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(PLAIN_KINDS), st.lists(st.tuples(*[st.floats(-50, 50, width=32)] * 2), min_size=1, max_size=30))
def test_beside_a_last_token_the_others_read_the_first_projection_alone(kind, rows):
    how, first = Aggregation(kind, window=4), [row[0] for row in rows]
    assert aggregate(how, rows) == aggregate(how, first)
    assert token_scores(how, np.array(rows, np.float32)).tolist() == np.array(first, np.float32).tolist()
    both, alone = Running([(how, 0, 2)]), Running([(how, 0, 1)])
    for row in rows:
        both.add(list(row))
        alone.add([row[0]])
        assert (both.values, both.highest) == (alone.values, alone.highest)


@settings(deadline=None, max_examples=100)
@given(turns())
def test_a_token_is_shown_as_the_value_of_a_turn_of_it_alone(turn):
    how, rows = turn
    shown = token_scores(how, np.array(rows, dtype=np.float32))
    assert shown.shape == (len(rows),)
    for score, row in zip(shown, rows, strict=True):
        # What is averaged, of a kind whose last token counts apart.
        wanted = row[0] if how.kind == "mean_last" else aggregate(how, [row])
        assert score == pytest.approx(wanted, rel=1e-4, abs=1e-4)


# --- in a Watch -------------------------------------------------------------------------------------------------------

N, K = 6, 4


def rules(how, mode=Mode.SHADOW, threshold=None, k=K, **more):
    """A probe of one projection, then one of k."""
    plain_probe = [
        Rule("one", "v1", 0, p, Mode.SHADOW, None, Aggregation("mean"), "open") for p in Phase
    ]  # in all other ways like any probe
    heads = [Rule("heads", "v1", 1, p, mode, threshold, how, "closed", n_columns=k, **more) for p in Phase]
    return [*plain_probe, *heads]


def prompt(*turns, newest=0):
    return Prompt(tuple(range(N)), turns or (Turn(1, N),), newest, "chat")


def made(seed, n=20, width=1 + K):
    return np.random.default_rng(seed).normal(0, 3, (n, width)).astype(np.float32)


def readings(watch):
    return {(r.probe, r.phase): r for r in watch.readings()}


@pytest.mark.parametrize("kind", ["multimax", "attention", "rolling_attention"])
def test_a_watch_aggregates_all_columns_and_shows_one_score_a_token(kind):
    how, rows = Aggregation(kind, window=3), made(1)
    watch = Watch(prompt(Turn(1, 3), Turn(3, N), newest=1), rules(how, Mode.FLAG, threshold=-1e9))
    watch.advance(0, rows[:N], 1)
    for i in range(N, 20):
        watch.advance(i, rows[i : i + 1], 1)
    found, heads = readings(watch), rows[:, 1:]
    values = [aggregate(how, heads[1:3]), aggregate(how, heads[3:N])]
    asked = found["heads", Phase.PROMPT]
    assert asked.value == pytest.approx(max(values), abs=1e-5) and asked.newest == pytest.approx(values[1], abs=1e-5)
    answered = found["heads", Phase.RESPONSE]
    running = [plain(how, heads[N : i + 1].tolist()) for i in range(N, 20)]
    assert answered.value == pytest.approx(max(running), abs=1e-5)
    assert answered.newest == pytest.approx(running[-1], abs=1e-5)
    shown = token_scores(how, heads)
    assert asked.peak_position == 1 + int(shown[1:N].argmax()) and asked.peak_score == shown[1:N].max()
    assert answered.peak_position == N + int(shown[N:].argmax()) and answered.peak_score == shown[N:].max()
    assert asked.sample in shown[1:N] and answered.sample in shown[N:]
    record = watch.record("r", 0, "m", Caller())
    assert record.token_scores["heads"] == pytest.approx(shown, abs=1e-4)
    assert record.token_scores["one"] == pytest.approx(rows[:, 0], abs=1e-4)
    assert np.array_equal(watch.shown(rows), np.stack([rows[:, 0], shown], axis=1))
    assert found["one", Phase.PROMPT].value == pytest.approx(max(rows[1:3, 0].mean(), rows[3:N, 0].mean()), abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(["multimax", "attention", "rolling_attention"]), st.integers(0, 99))
def test_replays_and_chunks_change_nothing(data, kind, seed):
    rows, how = made(seed), Aggregation(kind, window=3)
    whole, pieces = (Watch(prompt(), rules(how)) for _ in range(2))
    whole.replay(0, rows, len(rows) - N)
    fed = 0
    while fed < len(rows):
        end = min(len(rows), fed + data.draw(st.integers(1, 8)))
        pieces.replay(fed - data.draw(st.integers(0, fed)), rows[:0], len(rows) - N)
        first = data.draw(st.integers(0, fed))
        pieces.replay(first, rows[first:end], len(rows) - N)
        fed = end
    assert [r.value for r in whole.readings()] == [r.value for r in pieces.readings()]
    assert whole.coverage == pieces.coverage


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", range(1 + K))
@pytest.mark.parametrize("at", [2, N + 1])
def test_a_score_that_is_missing_in_any_column_is_unmonitored(at, column, bad):
    rows = made(2)
    rows[at, column] = bad
    watch = Watch(prompt(), rules(Aggregation("attention"), Mode.FLAG, threshold=1e9))
    watch.advance(0, rows[:N], 1)
    for i in range(N, 20):
        watch.advance(i, rows[i : i + 1], 1)
    phase = Phase.PROMPT if at < N else Phase.RESPONSE
    broken = "one" if column == 0 else "heads"
    assert [key for key, r in readings(watch).items() if r.value is None] == [(broken, phase)]
    assert watch.verdict is Action.UNMONITORED and dict(watch.coverage.causes) == {"not_finite": 1}


def test_a_missing_query_fails_closed_before_the_token_goes_out():
    rows = made(3)
    rows[N + 1, 1] = math.nan  # a query: no part of what is shown
    watch = Watch(prompt(), rules(Aggregation("attention"), Mode.BLOCK, threshold=1e9))
    watch.advance(0, rows[:N], 1)
    judged = [watch.advance(i, rows[i : i + 1], 1) for i in (N, N + 1)]
    assert [j.released for j in judged] == [1, 1] and judged[-1].finish == "unmonitored"


def test_rows_of_fewer_columns_than_the_rules_read_are_a_gap():
    watch = Watch(prompt(), rules(Aggregation("attention"), Mode.BLOCK, threshold=1e9))
    assert watch.advance(0, made(4, N, 1 + K - 1), 1).finish == "unmonitored"
    assert dict(watch.coverage.causes) == {"missing_probe": N}


def test_evidence_blocks_in_mid_answer():
    rows = np.zeros((20, 1 + K), np.float32)
    rows[N + 3, 1:] = [9, 0, 8, 0]  # query and value of the first head
    watch = Watch(prompt(), rules(Aggregation("attention"), Mode.BLOCK, threshold=4.0))
    judged = [watch.advance(0, rows[:N], 1)]
    judged += [watch.advance(i, rows[i : i + 1], 1) for i in range(N, N + 4)]
    assert (judged[-1].finish, judged[-1].released) == ("content_filter", 3)
