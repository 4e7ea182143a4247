"""Statistics in one pass: merged, subtracted and stored, they are those of the rows themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.errors import ConfigInvalid, ProbeMismatch
from probes_store.moments import Moments
from training.statistics import Cell, Statistics

D = 6
ORIGIN = {"model": "m", "pooling": "mean"}


def rows(n, seed=0, d=D, shift=0.0):
    """Features of unlike scales, one of them a massive activation."""
    x = np.random.default_rng(seed).normal(size=(n, d)) * 10.0 ** np.arange(-3, d - 3) + shift
    x[:, 0] += 24_874.0
    return x


def same(a: Moments, b: Moments, part=1e-12):
    """To rounding, on each feature's own scale; `part` of it."""
    assert a.n == pytest.approx(b.n)
    size = np.sqrt(np.maximum(b.scatter.diagonal(), 0) + 1e-30)
    assert np.abs(a.mean - b.mean).max() <= part * (np.abs(b.mean).max() + 1)
    error = np.abs(a.scatter - b.scatter) / np.outer(size, size)
    assert error[1:, 1:].max() <= part * 1e3, error
    # 24,874 beside 0.001: each square carries the rounding of the mean.
    assert error.max() <= 1e-6, error


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_merging_in_any_order_is_one_pass_over_all(seed, sizes):
    x = rows(sum(sizes), seed)
    parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    whole = Moments.of(x)
    forth, back = Moments.none(D), Moments.none(D)
    for part in parts:
        forth += part
    for part in reversed(parts):
        back = part + back
    assert whole.mean == pytest.approx(x.mean(0))
    assert whole.scatter[1:, 1:] == pytest.approx(np.cov(x.T, bias=True)[1:, 1:] * len(x), rel=1e-9, abs=1e-12)
    same(forth, whole)
    same(back, whole)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 60), st.floats(-100, 100))
def test_what_was_merged_can_be_taken_out(seed, kept, bad, shift):
    good, poison = rows(kept, seed), rows(bad, seed + 1, shift=shift)
    left = Moments.of(np.concatenate([good, poison])) - Moments.of(poison)
    wanted = Moments.of(good)
    assert left.n == kept
    assert np.abs(left.mean - wanted.mean).max() < 1e-7
    scale = np.abs(Moments.of(np.concatenate([good, poison])).scatter).max()
    assert np.abs(left.scatter - wanted.scatter).max() <= 1e-10 * scale


def test_everything_taken_out_leaves_nothing():
    one = Moments.of(rows(7))
    left = one - one
    assert left.n == 0 and not left.mean.any() and not left.scatter.any()
    same(left + one, one)


def test_more_rows_than_there_are_cannot_be_taken_out():
    with pytest.raises(ValueError, match="9 rows can't be taken out of 7"):
        Moments.of(rows(7)) - Moments.of(rows(9))


def test_a_weight_is_as_many_copies():
    x = rows(9)
    same(Moments.of(x).times(3), Moments.of(np.concatenate([x, x, x])))


def collected(n=60, seed=0, layers=(2, 5), sources=("a", "b", "c")):
    x = rows(n * len(layers), seed).reshape(n, len(layers), D)
    labels = np.arange(n) % 2
    names = [sources[i % len(sources)] for i in range(n)]
    statistics = Statistics(D, ORIGIN)
    statistics.add(x, layers, labels, names)
    return statistics, x, labels, np.array(names)


def test_each_cell_is_its_rows():
    statistics, x, labels, names = collected()
    assert statistics.layers == [2, 5] and statistics.sources == ["a", "b", "c"] and len(statistics.cells) == 12
    for (layer, label, source), moments in statistics.cells.items():
        same(moments, Moments.of(x[(labels == label) & (names == source), (2, 5).index(layer)]))
    same(statistics.pooled(5, 1), Moments.of(x[labels == 1, 1]))
    doubled = np.concatenate([x[labels == 0, 0], x[(labels == 0) & (names == "b"), 0]])
    same(statistics.pooled(2, 0, {"b": 2.0}), Moments.of(doubled))


def test_batches_add_up():
    statistics, x, labels, names = collected()
    parts = Statistics(D, ORIGIN)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        parts.add(x[part].astype(np.float64), (2, 5), labels[part], list(names[part]))
    assert parts.cells.keys() == statistics.cells.keys()
    for cell, moments in statistics.cells.items():
        same(parts.cells[cell], moments)


def test_merge_then_subtract_or_leave_a_source_out():
    first, second = collected()[0], collected(seed=1, sources=("c", "d"))[0]
    both = first.merge(second)
    assert both.sources == ["a", "b", "c", "d"]
    back = both.subtract(second)
    assert back.cells.keys() == first.cells.keys()
    for cell, moments in first.cells.items():
        assert np.abs(back.cells[cell].scatter - moments.scatter).max() <= 1e-10 * np.abs(moments.scatter).max()
    without = both.without("d")
    assert without.sources == ["a", "b", "c"]
    assert without.cells[Cell(2, 0, "a")] is first.cells[Cell(2, 0, "a")]  # exact: nothing was computed
    with pytest.raises(ValueError, match="no rows of"):
        first.subtract(collected(sources=("z",))[0])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Statistics(D, {"model": "other", "pooling": "mean"}), "model is 'm' and 'other'"),
        (Statistics(D, {"model": "m"}), "pooling is 'mean' and None"),
        (Statistics(D + 1, ORIGIN), "6 and 7 wide"),
    ],
)
def test_other_features_are_not_merged(other, said):
    for act in (Statistics.merge, Statistics.subtract):
        with pytest.raises(ProbeMismatch, match=said):
            act(collected()[0], other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_adds_nothing(bad):
    statistics, x, labels, names = collected()
    before = dict(statistics.cells)
    x[3, 1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(x, (2, 5), labels, list(names))
    assert statistics.cells == before


def test_shapes_that_do_not_fit_are_refused():
    statistics, x, labels, names = collected()
    for wrong in ((x[:, :1], (2, 5), labels), (x, (2, 5), labels[:-1]), (x[..., :-1], (2, 5), labels)):
        with pytest.raises(ValueError, match="don't fit"):
            statistics.add(*wrong, list(names))


# --- on disk --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_equal_to_the_bit(tmp_path):
    statistics = collected()[0]
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert (loaded.d, loaded.origin, loaded.cells.keys()) == (D, ORIGIN, statistics.cells.keys())
    for cell, moments in statistics.cells.items():
        assert loaded.cells[cell].n == moments.n
        assert np.array_equal(loaded.cells[cell].mean, moments.mean)
        assert np.array_equal(np.triu(loaded.cells[cell].scatter), np.triu(moments.scatter))
        assert np.array_equal(loaded.cells[cell].scatter, loaded.cells[cell].scatter.T)
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_the_same_statistics_are_the_same_bytes(tmp_path):
    statistics = collected()[0]
    for i in range(10):
        shuffled = Statistics(D, dict(reversed(ORIGIN.items())), dict(reversed(statistics.cells.items())))
        (shuffled if i % 2 else statistics).save(tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(10)}) == 1


def test_damage_is_refused_wherever_it_is(tmp_path):
    path = tmp_path / "s.safetensors"
    collected(n=8, layers=(0,), sources=("a",))[0].save(path)
    sound = path.read_bytes()
    for at in range(0, len(sound), 11):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x11]) + sound[at + 1 :])
        with pytest.raises(ConfigInvalid, match="again"):
            Statistics.load(path)
    for other in (b"", b"{}", sound[:-1], sound[: len(sound) // 2], sound + b"0"):
        path.write_bytes(other)
        with pytest.raises(ConfigInvalid, match="make it again"):
            Statistics.load(path)
    with pytest.raises(ConfigInvalid, match="make it again"):
        Statistics.load(tmp_path / "none")
