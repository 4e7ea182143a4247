"""Fits from statistics and of all layers at once: equal to scikit-learn's on the rows, and to the byte each time."""

import numpy as np
import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge

from monitor.errors import ConfigInvalid
from training.evaluate import auroc
from training.families import PENALTIES, difference_of_means, lda, oracle_shrinkage, ridge_left_out, ridge_path
from training.fit import Scaler, balanced, fit_logistic
from training.logistic import fit_logistic_layers
from training.statistics import Statistics

N, D, LAYERS = 400, 12, (3, 7, 9)
SOURCES = ("advice", "dolly", "goals")


def task(n=N, d=D, layers=LAYERS, seed=0, apart=1.5):
    """Correlated features, one of them constant, one dead, one of a massive activation; a quarter is harmful.

    The sources differ in their means, and `goals` has harmful rows only.
    """
    random = np.random.default_rng(seed)
    y = (random.random(n) < 0.25).astype(np.int64)
    names = np.array([SOURCES[2] if label and i % 2 else SOURCES[i % 2] for i, label in enumerate(y)])
    x = random.normal(size=(n, len(layers), d)) @ (random.normal(size=(d, d)) / d**0.5)
    x += np.array([SOURCES.index(s) for s in names])[:, None, None] * 0.3
    x[:, :, 4] += y[:, None] * apart * np.arange(1, len(layers) + 1)
    x[:, :, 1], x[:, :, 2] = 7.0, 0.0
    x[:, :, 3] += 24_874.0
    return x, y, names


def of(x, y, names, layers=LAYERS):
    statistics = Statistics(x.shape[2], {"pooling": "mean"})
    for part in np.array_split(np.arange(len(y)), 5):
        statistics.add(x[part], layers, y[part], list(names[part]))
    return statistics


@pytest.fixture(scope="module")
def data():
    return task()


@pytest.fixture(scope="module")
def statistics(data):
    return of(*data)


def even(y):
    return balanced(y, np.ones(len(y)))


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_difference_of_means(data, statistics):
    x, y, _ = data
    fitted = difference_of_means(statistics, 7)
    apart = x[y == 1, 1].mean(0) - x[y == 0, 1].mean(0)
    assert fitted.weight == pytest.approx(apart, abs=1e-9)
    assert fitted.logits(x[y == 1, 1]).mean() == pytest.approx(-fitted.logits(x[y == 0, 1]).mean(), rel=1e-6)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_lda_is_scikit_learns_on_standardised_rows(data, statistics, shrinkage):
    """Classes that weigh the same: priors of a half, for the covariance too."""
    x, y, _ = data
    fitted = lda(statistics, 7, shrinkage)
    scaler = weighted_scaler(x[:, 1], y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.5, 0.5])
    theirs.fit(scaler(x[:, 1]), y)
    wanted = theirs.decision_function(scaler(x[:, 1]))
    assert fitted.logits(x[:, 1]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert fitted.details["shrinkage"] == shrinkage


def weighted_scaler(x, y):
    """The scaler of rows whose classes weigh the same."""
    weight = even(y) / len(y)
    mean = weight @ x
    deviation = np.sqrt(weight @ (x - mean) ** 2)
    floor = 0.01 * np.median(deviation)
    return Scaler(mean, np.where(deviation < 1e-6, 1.0, np.sqrt(deviation**2 + floor**2)))


def test_shrinkage_is_estimated_as_scikit_learn_does():
    x = np.random.default_rng(0).normal(size=(30, 8)) * np.arange(1, 9)
    x -= x.mean(0)
    assert oracle_shrinkage(np.cov(x.T, bias=True), 30) == pytest.approx(oas(x, assume_centered=True)[1], rel=1e-12)
    assert oracle_shrinkage(np.eye(5), 10) == 1.0


def test_fewer_rows_are_shrunk_more():
    shrinkages = [lda(of(*task(n)), 7).details["shrinkage"] for n in (60, 400, 3000)]
    assert shrinkages == sorted(shrinkages, reverse=True) and 0 < shrinkages[-1] < 0.1 < shrinkages[0] < 1


def test_a_singular_covariance_is_refused_with_the_remedy(statistics):
    with pytest.raises(ConfigInvalid, match="take a shrinkage above 0"):
        lda(statistics, 7, shrinkage=0.0)


def test_the_ridge_path_is_scikit_learns_at_every_penalty(data, statistics):
    x, y, _ = data
    path = ridge_path(statistics, 9)
    assert path.weight.shape == (len(PENALTIES), D) and (path.penalties == np.array(PENALTIES)).all()
    scaler = weighted_scaler(x[:, 2], y)
    for index in range(0, len(PENALTIES), 7):
        theirs = Ridge(alpha=PENALTIES[index] * N, solver="cholesky")
        theirs.fit(scaler(x[:, 2]), 2 * y - 1, sample_weight=even(y))
        wanted = theirs.predict(scaler(x[:, 2]))
        assert path.fitted(index).logits(x[:, 2]) == pytest.approx(wanted, abs=1e-6)
        assert path.values(x[:, 2])[:, index] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan")])
def test_a_penalty_must_be_above_0(statistics, penalty):
    with pytest.raises(ValueError, match="above 0"):
        ridge_path(statistics, 3, [1.0, penalty])


def test_leaving_a_source_out_is_a_fit_without_its_rows(data, statistics):
    x, y, names = data
    left = ridge_left_out(statistics, 7, [1e-3, 1.0])
    assert sorted(left) == sorted(SOURCES)
    for source, found in left.items():
        rest, out = names != source, names == source
        anew = ridge_path(of(x[rest], y[rest], names[rest]), 7, [1e-3, 1.0])
        assert found.path.values(x[:, 1]) == pytest.approx(anew.values(x[:, 1]), abs=1e-7)
        values = anew.values(x[out, 1])
        assert sum(found.rows.values()) == out.sum() and set(found.rows) == set(y[out])
        for label in found.rows:
            assert found.mean[label] == pytest.approx(values[y[out] == label].mean(0), abs=1e-6)
            assert found.deviation[label] == pytest.approx(values[y[out] == label].std(0), abs=1e-6)
        error = ((values - (2 * y[out] - 1)[:, None]) ** 2).mean(0)
        assert found.squared_error() == pytest.approx(error, rel=1e-5)


def test_a_bad_source_taken_out_leaves_the_same_probe_as_if_it_had_never_been_there(data):
    x, y, _ = data
    poison = task(seed=5, apart=-9.0)
    poisoned = of(*data).merge(of(poison[0], poison[1], np.array(["goals"] * N)))
    cured = poisoned.subtract(of(poison[0], poison[1], np.array(["goals"] * N)))
    clean, bad, again = (lda(s, 7).logits(x[:, 1]) for s in (of(*data), poisoned, cured))
    assert again == pytest.approx(clean, abs=1e-6)
    assert auroc(bad[y == 1], bad[y == 0]) < auroc(clean[y == 1], clean[y == 0]) - 0.1


def test_weights_of_sources_are_copies_of_rows(data, statistics):
    x, y, names = data
    twice = np.concatenate([np.arange(N), np.flatnonzero(names == "dolly")])
    copied = of(x[twice], y[twice], names[twice])
    for fit in (lambda s, w: ridge_path(s, 3, [0.1], w).fitted(0), lambda s, w: lda(s, 3, 0.1, w), difference):
        assert fit(statistics, {"dolly": 2.0}).logits(x[:, 0]) == pytest.approx(
            fit(copied, None).logits(x[:, 0]), abs=1e-6
        )


def difference(statistics, weights):
    return difference_of_means(statistics, 3, weights)


@pytest.mark.parametrize("fit", [difference_of_means, lda, ridge_path, ridge_left_out])
def test_a_missing_class_or_layer_is_named(data, fit):
    x, y, names = data
    harmless = of(x[y == 0], y[y == 0], names[y == 0])
    with pytest.raises(ConfigInvalid, match="no row of label 1 at layer 7"):
        fit(harmless, 7)
    with pytest.raises(ConfigInvalid, match="at layer 4"):
        fit(of(*data), 4)


def test_a_source_without_which_a_class_is_missing_cannot_be_left_out(data):
    x, y, _ = data
    names = np.where(y == 1, "goals", "dolly")
    with pytest.raises(ConfigInvalid, match="'dolly' can't be left out"):
        ridge_left_out(of(x, y, names), 7)


def test_the_same_statistics_give_the_same_bytes(data):
    def fitted():
        made = of(*data)
        path = ridge_path(made, 7)
        return b"".join(f.weight.tobytes() + np.float64(f.bias).tobytes() for f in (lda(made, 7), path.fitted(9)))

    assert len({fitted() for _ in range(10)}) == 1


# --- logistic regression of all layers ------------------------------------------------------------------------------


def theirs(x, y, weights, c):
    """scikit-learn's to its end: what the defaults leave on the way is larger than our difference."""
    scaler = Scaler.fit(x)
    model = LogisticRegression(C=c, max_iter=20_000, tol=1e-10)
    model.fit(scaler(x), y, sample_weight=balanced(y, weights))
    return model.decision_function(scaler(x))


@pytest.mark.parametrize(("dtype", "tolerance", "off"), [(torch.float32, 1e-5, 2e-3), (torch.float64, 1e-9, 1e-5)])
@pytest.mark.parametrize("c", [0.001, 0.01, 1.0])
def test_every_layer_is_scikit_learns(data, dtype, tolerance, off, c):
    x, y, _ = data
    weights = np.random.default_rng(1).random(N) + 0.5
    fits = fit_logistic_layers(x, y, weights, c, tolerance, dtype=dtype)
    assert len(fits) == len(LAYERS) and all(f.details["converged"] for f in fits)
    for layer, fitted in enumerate(fits):
        wanted = theirs(x[:, layer], y, weights, c)
        assert np.abs(fitted.logits(x[:, layer]) - wanted).max() <= off * max(1.0, np.abs(wanted).max())


def test_it_agrees_with_the_fit_that_train_uses(data):
    x, y, _ = data
    for layer, fitted in enumerate(fit_logistic_layers(x, y, np.ones(N), 0.01)):
        one = fit_logistic(x[:, layer], y, np.ones(N), 0.01)
        assert fitted.method == one.method and fitted.details["C"] == 0.01
        assert fitted.logits(x[:, layer]) == pytest.approx(one.logits(x[:, layer]), abs=5e-3)


def test_float16_features_of_a_harvest_can_be_fitted(data):
    x, y, _ = data
    half = x.astype(np.float16)
    for layer, fitted in enumerate(fit_logistic_layers(half, y, np.ones(N), 0.01)):
        wanted = theirs(half[:, layer].astype(np.float64), y, np.ones(N), 0.01)
        assert fitted.logits(half[:, layer].astype(np.float64)) == pytest.approx(wanted, abs=2e-3)


def test_separable_rows_and_fewer_rows_than_features():
    x, y, _ = task(40, 80, apart=30.0)
    for c in (0.01, 100.0):
        fits = fit_logistic_layers(x, y, np.ones(40), c, tolerance=1e-7, dtype=torch.float64)
        for layer, fitted in enumerate(fits):
            assert fitted.details["converged"]
            values = fitted.logits(x[:, layer])
            assert values == pytest.approx(theirs(x[:, layer], y, np.ones(40), c), rel=1e-3, abs=1e-2)
            assert values[y == 1].min() > values[y == 0].max()


def test_what_does_not_converge_says_so(data):
    x, y, _ = data
    fits = fit_logistic_layers(x, y, np.ones(N), 1.0, tolerance=1e-12, limit=2, dtype=torch.float64)
    assert [(f.details["converged"], f.details["iterations"]) for f in fits] == [(0, 2)] * len(LAYERS)


def test_layers_in_blocks_are_layers_at_once(data):
    x, y, _ = data
    at_once = fit_logistic_layers(x, y, np.ones(N), 0.1, tolerance=1e-9, dtype=torch.float64)
    singly = fit_logistic_layers(x, y, np.ones(N), 0.1, tolerance=1e-9, dtype=torch.float64, block_bytes=1)
    for layer, (one, other) in enumerate(zip(at_once, singly, strict=True)):
        assert one.details["layer"] == other.details["layer"] == layer
        assert one.logits(x[:, layer]) == pytest.approx(other.logits(x[:, layer]), abs=1e-6)


def test_the_same_rows_give_the_same_bytes(data):
    x, y, _ = data

    def fitted():
        fits = fit_logistic_layers(x.copy(), y, np.ones(N), 0.01)
        return b"".join(f.weight.tobytes() + np.float64(f.bias).tobytes() for f in fits)

    assert len({fitted() for _ in range(10)}) == 1


def test_bad_rows_are_refused(data):
    x, y, _ = data
    spoiled = x.copy()
    spoiled[7, 1, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fit_logistic_layers(spoiled, y, np.ones(N), 0.01)
    with pytest.raises(ValueError, match="no training row has label 1"):
        fit_logistic_layers(x, np.zeros(N, dtype=np.int64), np.ones(N), 0.01)
    with pytest.raises(ValueError, match="don't fit"):
        fit_logistic_layers(x, y[:-1], np.ones(N - 1), 0.01)
