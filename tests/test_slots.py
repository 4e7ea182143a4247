"""SlotScores: a cached token has the score its slot was filled with, or none."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.engines.vllm.slots import SlotScores, slots_of

BLOCK, N_BLOCKS, N_BANKS, WIDTH = 4, 6, 2, 3


def table(*blocks):
    return np.array(blocks, dtype=np.int32)


def ints(*values):
    return np.array(values, dtype=np.int32)


def up_to(n):
    return np.arange(n, dtype=np.int32)


def scores(n, start=0.0):
    return (start + np.arange(n * N_BANKS * WIDTH, dtype=np.float32)).reshape(n, N_BANKS, WIDTH)


def filled(n, epochs=(1, 2), tokens=None):
    """A cache whose slots 0 to n hold the tokens 10, 11, ..."""
    cache = SlotScores(N_BLOCKS * BLOCK, N_BANKS, WIDTH)
    cache.write(np.arange(n), up_to(n), tokens if tokens is not None else up_to(n) + 10, epochs, scores(n))
    return cache


def test_slots_follow_the_block_table():
    assert slots_of(table(5, 2, 9), 4, ints(0, 3, 4, 8, 11)).tolist() == [20, 23, 8, 36, 39]
    assert slots_of(table(5), 1, ints(0)).tolist() == [5]
    assert slots_of(table(5, 2), 4, ints()).tolist() == []


def test_slots_of_a_large_cache_do_not_overflow():
    """Block ids are int32; block x size is not."""
    assert slots_of(table(2**28), 16, ints(3)).tolist() == [2**32 + 3]


def test_what_was_written_is_read_back_and_is_a_copy():
    cache = filled(5)
    found = cache.read(np.arange(5), up_to(5) + 10, (1, 2))
    assert found.dtype == np.float32 and found.tolist() == scores(5).tolist()
    found[:] = 0
    assert cache.read(np.arange(5), up_to(5) + 10, (1, 2)).tolist() == scores(5).tolist()


def test_a_fresh_cache_has_no_score_even_for_epoch_minus_one():
    cache = SlotScores(N_BLOCKS * BLOCK, N_BANKS, WIDTH)
    assert np.isnan(cache.read(np.arange(3), ints(-1, -1, -1), (-1, -1))).all()


def test_reading_nothing_gives_no_rows():
    assert filled(5).read(np.arange(0), ints(), (1, 2)).shape == (0, N_BANKS, WIDTH)


def test_another_token_reads_as_missing_and_its_neighbours_do_not():
    found = filled(3).read(np.arange(3), ints(10, 99, 12), (1, 2))
    assert np.isnan(found[1]).all() and found[[0, 2]].tolist() == scores(3)[[0, 2]].tolist()


def test_the_same_token_at_another_position_reads_as_missing():
    cache = filled(3, tokens=ints(7, 7, 7))
    assert np.isnan(cache.read(np.array([1, 0, 2]), ints(7, 7, 7), (1, 2))).all(axis=(1, 2)).tolist() == [1, 1, 0]


def test_an_epoch_that_differs_in_one_bank_makes_only_that_bank_missing():
    found = filled(3).read(np.arange(3), up_to(3) + 10, (1, 3))
    assert found[:, 0].tolist() == scores(3)[:, 0].tolist() and np.isnan(found[:, 1]).all()


def test_a_roll_back_is_a_new_epoch_and_reads_nothing_old():
    assert np.isnan(filled(2, epochs=(1, 2)).read(np.arange(2), ints(10, 11), (3, 4))).all()


def test_a_nan_that_was_written_stays_a_nan():
    """A bank without probes writes NaN under its epoch."""
    cache = filled(1)
    cache.write(np.arange(1), ints(0), ints(10), (1, -1), np.full((1, N_BANKS, WIDTH), np.nan, np.float32))
    assert np.isnan(cache.read(np.arange(1), ints(10), (1, -1))).all()


def test_two_requests_of_one_step_share_blocks():
    """B hits the block that A fills in the same step: write all, then read."""
    cache = SlotScores(N_BLOCKS * BLOCK, N_BANKS, WIDTH)
    a, b = table(3, 1), table(3, 5)
    tokens = up_to(6) + 10
    cache.write(slots_of(a, BLOCK, up_to(6)), up_to(6), tokens, (1, 2), scores(6))
    own = ints(4, 5)
    cache.write(slots_of(b, BLOCK, own), own, ints(50, 51), (1, 2), scores(2, 500))
    shared = cache.read(slots_of(b, BLOCK, up_to(4)), tokens[:4], (1, 2))
    assert shared.tolist() == scores(6)[:4].tolist()
    # And A's own second block is not B's.
    assert cache.read(slots_of(a, BLOCK, up_to(6)), tokens, (1, 2)).tolist() == scores(6).tolist()
    whole = cache.read(slots_of(b, BLOCK, up_to(6)), ints(10, 11, 12, 13, 50, 51), (1, 2))
    assert whole[4:].tolist() == scores(2, 500).tolist()


def test_a_block_that_is_reused_forgets_its_last_request():
    cache = filled(8)
    cache.write(np.arange(4), up_to(4), ints(10, 11, 77, 78), (1, 2), scores(4, 500))
    found = cache.read(np.arange(8), up_to(8) + 10, (1, 2))
    # The two tokens that are the same have the new scores, which belong to them as much as the old ones.
    assert found[:2].tolist() == scores(4, 500)[:2].tolist() and np.isnan(found[2:4]).all()
    assert found[4:].tolist() == scores(8)[4:].tolist()


blocks = st.lists(st.integers(0, N_BLOCKS - 1), min_size=1, max_size=4, unique=True)
epochs = st.tuples(st.integers(-1, 2), st.integers(-1, 2))


@st.composite
def writes(draw):
    """Positions [first, first + n) of one request."""
    chosen = draw(blocks)
    first = draw(st.integers(0, len(chosen) * BLOCK - 1))
    n = draw(st.integers(1, len(chosen) * BLOCK - first))
    return "write", chosen, first, draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), draw(epochs)


@st.composite
def reads(draw):
    """Positions [0, n) of one request."""
    chosen = draw(blocks)
    n = draw(st.integers(0, len(chosen) * BLOCK))
    return "read", chosen, 0, draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), draw(epochs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(writes(), reads()), max_size=30))
def test_a_read_is_what_a_dict_of_slots_says_or_nan(steps):
    cache, model, count = SlotScores(N_BLOCKS * BLOCK, N_BANKS, WIDTH), {}, 0.0
    for kind, chosen, first, given_tokens, given_epochs in steps:
        n, tokens = len(given_tokens), ints(*given_tokens)
        positions = np.arange(first, first + n, dtype=np.int32)
        slots = slots_of(table(*chosen), BLOCK, positions)
        assert slots.tolist() == [chosen[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, first + n)]
        if kind == "write":
            rows = scores(n, count)
            count += rows.size
            cache.write(slots, positions, tokens, given_epochs, rows)
            for i, slot in enumerate(slots.tolist()):
                model[slot] = (first + i, given_tokens[i], given_epochs, rows[i])
            continue
        found = cache.read(slots, tokens, given_epochs)
        expected = np.full((n, N_BANKS, WIDTH), np.nan, np.float32)
        for i, slot in enumerate(slots.tolist()):
            position, token, of_epochs, row = model.get(slot, (None, None, (), None))
            for bank in range(N_BANKS):
                if (position, token) == (i, given_tokens[i]) and of_epochs[bank] == given_epochs[bank]:
                    expected[i, bank] = row[bank]
        np.testing.assert_array_equal(found, expected)
