"""Fits without a model: they fold into what is served, weigh classes and rows, and are the same again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.probe import ProbeBank, ProbeWeights
from training import fit
from training.evaluate import auroc

from .rows import blobs

EPOCHS = 100


def adam(x, y, weights, epochs=EPOCHS, **kwargs):
    return fit.fit_torch(x, y, weights, epochs, range(epochs), **kwargs)


def logistic(x, y, weights):
    return fit.fit_logistic(x, y, weights, c=0.1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(4, 12), st.integers(-6, 6))
def test_folding_changes_no_logit(seed, n, d, exponent):
    random = np.random.default_rng(seed)
    x, _ = blobs(n, d, seed=seed)
    x[:, 4:] *= 10.0**exponent
    scaler, weight, bias = fit.Scaler.fit(x), random.normal(size=d), float(random.normal())
    folded, folded_bias = scaler.fold(weight, bias)
    fresh = np.concatenate([x, x[::-1] * 1.01])  # rows it was not fitted on, too; constants that changed
    assert x @ folded + folded_bias == pytest.approx(scaler(x) @ weight + bias, abs=1e-4)
    assert fresh @ folded + folded_bias == pytest.approx(scaler(fresh) @ weight + bias, rel=1e-6, abs=1e-4)


def test_folded_weights_give_the_same_logits_when_served():
    x, y = blobs()
    fitted = logistic(x, y, np.ones(len(y)))
    bank = ProbeBank([ProbeWeights("p", {0: torch.from_numpy(fitted.weight).float()}, fitted.bias)], x.shape[1])
    served = bank.combine(torch.from_numpy(x).float()[None] @ bank.weight)[:, 0].numpy()
    assert served == pytest.approx(fitted.logits(x), abs=0.02)  # float32 beside an activation of 24,874


def test_constant_features_are_not_amplified():
    x, _ = blobs()
    scaler = fit.Scaler.fit(x)
    assert (scaler.scale[1], scaler.scale[3]) == (1.0, 1.0)
    x[:, 1] += np.random.default_rng(1).normal(size=len(x)) * 1e-10  # rounding, not signal
    assert fit.Scaler.fit(x).scale[1] == 1.0
    assert np.isfinite(fit.Scaler.fit(np.zeros((3, 4)))(np.zeros((3, 4)))).all()


@pytest.mark.parametrize("solve", [adam, logistic])
def test_both_fits_separate_an_easy_problem(solve):
    x, y = blobs()
    fitted = solve(x, y, np.ones(len(y)))
    new, labels = blobs(seed=1)
    logits = fitted.logits(new)
    assert auroc(logits[labels == 1], logits[labels == 0]) > 0.95
    assert np.mean((logits > 0) == (labels == 1)) > 0.9  # 0 is between the classes: > 0 leans harmful
    assert np.isfinite(fitted.weight).all()


@pytest.mark.parametrize("solve", [adam, logistic])
def test_fits_are_reproducible_and_rank_noise_at_chance(solve):
    x, y = blobs(apart=0.0)
    first, second = (solve(x, y, np.ones(len(y))) for _ in range(2))
    assert first.weight.tolist() == second.weight.tolist()
    assert (first.bias, first.details, first.method) == (second.bias, second.details, second.method)
    new, labels = blobs(400, apart=0.0, seed=1)
    logits = first.logits(new)
    assert 0.4 < auroc(logits[labels == 1], logits[labels == 0]) < 0.6


@pytest.mark.parametrize("solve", [adam, logistic])
def test_classes_and_rows_are_weighted(solve):
    x, y = blobs()
    few = np.flatnonzero(y == 1)[:10]
    keep = np.concatenate([np.flatnonzero(y == 0), few])
    rare = solve(x[keep], y[keep], np.ones(len(keep)))
    assert np.mean(rare.logits(x[y == 1]) > 0) > 0.7  # ten to one against it
    flipped, weights = np.concatenate([y, 1 - y]), np.concatenate([np.ones(len(y)), np.full(len(y), 1e-3)])
    twice = solve(np.concatenate([x, x]), flipped, weights)
    logits = twice.logits(x)
    assert auroc(logits[y == 1], logits[y == 0]) > 0.95  # the wrong labels weigh nothing


def test_balanced_row_weights():
    labels, weights = np.array([0, 0, 0, 1]), np.array([1.0, 1.0, 2.0, 5.0])
    assert fit.balanced(labels, weights).tolist() == [0.5, 0.5, 1.0, 2.0]
    assert weights.tolist() == [1.0, 1.0, 2.0, 5.0]
    for label in (0, 1):
        with pytest.raises(ValueError, match=f"no training row has label {1 - label}"):
            fit.balanced(np.full(3, label), np.ones(3))


def test_one_tick_per_epoch():
    x, y = blobs(20)
    ticks = []
    fitted = fit.fit_torch(x, y, np.ones(20), 7, (ticks.append(i) for i in range(7)))
    assert (ticks, fitted.details["epochs"]) == (list(range(7)), 7)


def test_platt_finds_the_slope_that_made_the_labels():
    random = np.random.default_rng(0)
    values = random.normal(0, 3, 20_000)
    labels = (random.random(20_000) < 1 / (1 + np.exp(-(0.8 * values - 0.5)))).astype(np.int64)
    slope, intercept = fit.fit_platt(values, labels)
    assert (slope, intercept) == (pytest.approx(0.8, abs=0.05), pytest.approx(-0.5, abs=0.05))


def test_platt_stays_finite_on_rows_that_a_line_separates():
    slope, intercept = fit.fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert 0 < slope < 10 and abs(intercept) < 1
