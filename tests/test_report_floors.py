"""Controls by value: a ridge that must agree with its other form, and a sweep that finds the block."""

import numpy as np
import pytest

from training import metrics
from training.data import Row
from training.metrics import Sample
from training.report.floors import INSIDE, Controls, aurocs, beside, fit_sample, ridge, sweep

D = 12


def made(n=600, seed=0, strength=1.5, keys=6, block=1):
    """Rows of `keys` sources of one label each, and features at three blocks: the label shows at `block` alone."""
    chance = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    rows = [Row(f"text {i}", int(y), "s", str(i), key=f"k{i % keys}") for i, y in enumerate(labels)]
    features = {layer: chance.normal(size=(n, D)).astype(np.float32) for layer in range(3)}
    features[block][:, 0] += strength * labels
    return rows, features, labels


def test_aurocs_are_those_of_the_metrics():
    chance = np.random.default_rng(0)
    values, labels = chance.integers(0, 9, (80, 3)).astype(float), chance.integers(0, 2, 80)
    wanted = [float(metrics.auroc(*Sample.of(v, labels).masses())) for v in values.T]
    assert aurocs(values, labels) == pytest.approx(wanted)


def test_ridge_is_the_same_by_rows_and_by_features():
    """More features than rows take the other system; a feature of zeros changes nothing."""
    _, features, labels = made(n=40)
    x, targets, weights = (
        features[1].astype(float),
        2.0 * labels[:, None] - 1,
        np.random.default_rng(1).random(40) + 0.1,
    )
    few = ridge(x, targets, weights)
    many = ridge(np.hstack([x, np.zeros((40, 60))]), targets, weights)
    assert many[:D] == pytest.approx(few) and many[D:] == pytest.approx(0.0)
    direct = np.linalg.solve(
        (x.T * (weights / weights.sum())) @ x + 0.3 * np.eye(D), (x.T * (weights / weights.sum())) @ targets
    )
    assert few == pytest.approx(direct)


def test_controls_know_nothing_where_there_is_nothing_to_know():
    rows, features, _ = made()
    _, other, labels = made(seed=1)
    found = Controls(rows, features, [1]).figures(other, labels)
    assert found["same_blocks"] > 0.8
    assert found["block_0"] == pytest.approx(0.5, abs=0.08)
    assert INSIDE[0] <= found["shuffled"]["value"] <= INSIDE[1]
    assert found["shuffled"]["low"] < 0.5 < found["shuffled"]["high"]
    assert 0.5 < found["random"] < found["same_blocks"] and found["best_random"] > found["random"]


def test_a_probe_of_several_blocks_has_its_features_side_by_side():
    rows, features, labels = made(block=2)
    assert beside(features, [0, 2]).shape == (600, 2 * D)
    found = Controls(rows, features, [0, 2]).figures(features, labels)
    assert found["same_blocks"] > 0.8 > found["block_0"]


def test_the_sweep_finds_the_block():
    rows, features, _ = made(keys=10)
    swept = sweep(rows, features)
    assert {name: int(np.argmax(areas)) for name, areas in swept.items()} == {"sources": 1, "rows": 1}


def test_a_signal_of_the_source_alone_does_not_hold_for_another_source():
    """Harmful rows of each source lie in a direction of their own: rows that are held out are easy, sources are not."""
    rows, features, _ = made(n=1000, keys=10, strength=0.0)
    for i, row in enumerate(rows):
        features[1][i, int(row.key[1:])] += 3.0
    swept = sweep(rows, features)
    assert swept["rows"][1] > 0.85 and swept["sources"][1] < 0.6


def test_too_few_sources_give_no_figure():
    rows, features, _ = made(keys=2)
    swept = sweep(rows, features)
    assert all(area is not None for area in swept["rows"])
    alone = [Row(r.text, r.label, r.source, r.group, key="a" if r.label else "b") for r in rows]
    assert sweep(alone, features)["sources"] == [None] * 3


def test_the_sample_keeps_groups_whole():
    rows = [Row(f"t{i}", i % 2, "s", str(i // 2)) for i in range(5000)]
    chosen = fit_sample(rows)
    assert len(chosen) == 1000 and len({r.group for r in chosen}) == 500
