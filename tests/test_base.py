"""The base of a probe: written beside its weights, vouched for by its card, exact to merge, absent from older ones."""

import numpy as np
import pytest

from monitor.errors import ProbeInvalid
from probes_store.base import Base, load_base
from probes_store.moments import Moments
from probes_store.store import Store

from .stored import LAYER, MODEL, D, make_card, weights

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 1, D)) * 10.0 ** np.arange(-2, D - 2), np.arange(40) % 2


def publish(folder, base):
    store = Store(folder, shipped=folder / "none")
    store.publish(make_card(), weights(), 0.5, base)
    return store.load(MODEL, "demo", "v1")


def test_it_comes_back_as_float32_and_the_same_rows_give_the_same_bytes(tmp_path):
    base = Base.of(X, (LAYER,), Y)
    found = load_base(publish(tmp_path, base.dump()))
    assert (found.layers, found.d_model, found.rows(0), found.rows(1)) == ((LAYER,), D, 20, 20)
    for label in (0, 1):
        wanted, got = Moments.of(X[label == Y, 0]), found.cells[LAYER, label]
        np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-6)
        np.testing.assert_allclose(got.scatter, wanted.scatter, rtol=1e-6, atol=1e-6 * np.abs(wanted.scatter).max())
        assert (got.scatter == got.scatter.T).all()
    assert Base.of(X, (LAYER,), Y).dump() == base.dump() == found.dump()


def test_a_plane_over_the_means_comes_back_and_is_not_that_of_more_rows(tmp_path):
    base = Base.of(X, (LAYER,), Y, (np.arange(D) / 7, -0.5))
    weight, bias = load_base(publish(tmp_path, base.dump())).plane
    np.testing.assert_allclose(weight, np.arange(D) / 7, rtol=1e-6)
    assert bias == -0.5 and (base + Base.of(X, (LAYER,), Y)).plane is None


def test_bases_merge_to_that_of_all_rows(tmp_path):
    whole = Base.of(X[:7], (LAYER,), Y[:7]) + Base.of(X[7:], (LAYER,), Y[7:])
    for cell, wanted in Base.of(X, (LAYER,), Y).cells.items():
        np.testing.assert_allclose(whole.cells[cell].scatter, wanted.scatter, rtol=1e-9, atol=1e-3)
    with pytest.raises(ValueError, match="can't be merged"):
        whole + Base.of(X, (LAYER + 1,), Y)


def test_a_label_may_be_missing_a_number_may_not(tmp_path):
    one = Base.of(X, (LAYER,), np.zeros(40, int))
    assert (one.rows(0), one.rows(1)) == (40, 0)
    for bad in (X * np.nan, X[:, :, :0][:, :0]):
        with pytest.raises(ValueError, match=r"finite|fit"):
            Base.of(bad, (LAYER,), Y)


def test_a_probe_without_one_loads_and_says_so(tmp_path):
    probe = publish(tmp_path, None)
    assert probe.card.base_sha256 is None and load_base(probe) is None


def test_what_the_card_does_not_vouch_for_is_refused(tmp_path):
    probe = publish(tmp_path, Base.of(X, (LAYER,), Y).dump())
    path = probe.path / "base.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\0\0\0\0")
    with pytest.raises(ProbeInvalid, match="not the file that its card names"):
        load_base(probe)
    path.unlink()
    with pytest.raises(ProbeInvalid, match="can't be read"):
        load_base(probe)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        Base.of(X, (LAYER + 1,), Y).dump(),
        Base.of(X, (LAYER,), Y + 0).dump()[:-8],
        Base.of(X, (LAYER,), Y, (np.zeros(D + 1), 0.0)).dump(),
    ],
)
def test_another_file_is_refused_even_if_its_hash_is_right(tmp_path, data):
    with pytest.raises(ProbeInvalid, match=r"publish the probe again|not a safetensors"):
        load_base(publish(tmp_path, data))


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    bad = Base(D, {(LAYER, k): Moments(3.0, np.full(D, np.nan), np.eye(D)) for k in (0, 1)})
    with pytest.raises(ProbeInvalid, match="finite"):
        load_base(publish(tmp_path, bad.dump()))
