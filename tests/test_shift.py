"""Shift: 1 for harmless traffic like the training rows, whatever the width; far above for other traffic."""

import dataclasses

import numpy as np
import pytest

from monitor.api.admin.control import harmless
from monitor.config import load_settings
from monitor.live import load_live
from monitor.metrics import Metrics
from monitor.metrics.shift import ENOUGH, WINDOW, Normal, Shift
from monitor.probe import ProbeWeights
from monitor.types import Phase
from probes_store.base import Base
from probes_store.moments import Moments
from probes_store.store import Store

from .conftest import LAYER, calibrated, make_card

D = 96


def rows(chance, n, d=D, moved=0.0):
    """Like a residual stream: few directions vary much, the others little, none alike."""
    turned = np.linalg.qr(np.random.default_rng(5).normal(size=(d, d)))[0]
    scale = 1 / np.arange(1, d + 1) ** 0.7
    x = chance.normal(size=(n, d)) * scale
    x[:, 3] += moved * scale[3]
    return (x @ turned + 4.0).astype(np.float32)


def gauge(metrics, probe="p", phase=Phase.PROMPT):
    metrics.shift.show(metrics)
    return metrics.registry.get_sample_value("midstream_drift_mahalanobis_ratio", {"probe": probe, "phase": str(phase)})


@pytest.mark.parametrize(("d", "reference"), [(16, 2000), (96, 2000), (96, 150)])
def test_it_is_one_for_traffic_like_the_reference(d, reference):
    """On average over draws; with fewer reference rows than 10 for a dimension, not much more."""
    chance, found = np.random.default_rng(1), []
    for _ in range(40):
        normal = Normal.of(Moments.of(rows(chance, reference, d)))
        found.append(normal.distance(rows(chance, 200, d).astype(np.float64).mean(0), 200))
    mean, error = float(np.mean(found)), float(np.std(found) / np.sqrt(len(found)))
    print(f"{d} wide, {reference} rows: {mean:.3f} +- {error:.3f}")
    assert abs(mean - 1) < (0.1 if reference >= 2000 else 0.3)


def test_it_is_the_exact_distance_where_all_directions_are_kept():
    chance = np.random.default_rng(2)
    x = rows(chance, 1000, 20).astype(np.float64)
    normal, live = Normal.of(Moments.of(x)), rows(chance, 300, 20, moved=0.5).astype(np.float64).mean(0)
    apart = live - x.mean(0)
    exact = apart @ np.linalg.solve(np.cov(x.T), apart) / (20 * (1 / 300 + 1 / 1000))
    assert normal.distance(live, 300) == pytest.approx(exact, rel=1e-6)


def test_too_few_rows_or_none_that_vary_are_no_reference():
    assert Normal.of(Moments.none(8)) is None
    assert Normal.of(Moments.of(np.ones((500, 8)))) is None
    assert Normal.of(Moments.of(rows(np.random.default_rng(1), 99))) is None


def test_the_gauge():
    chance, metrics = np.random.default_rng(3), Metrics()
    normal = Normal.of(Moments.of(rows(chance, 3000)))
    metrics.shift.expect({("p", Phase.PROMPT): {2: normal}})
    for row in rows(chance, ENOUGH - 1):
        metrics.shift.add(Phase.PROMPT, (1, 2), np.stack([row * 9, row]))
        metrics.shift.add(Phase.RESPONSE, (2,), row[None] * 9)
    assert gauge(metrics) is None
    for row in rows(chance, 500):
        metrics.shift.add(Phase.PROMPT, (2,), row[None])
    assert 0.7 < gauge(metrics) < 1.4
    for row in rows(chance, 2 * WINDOW, moved=2.0):  # another traffic, until nothing is left of the first
        metrics.shift.add(Phase.PROMPT, (2,), row[None])
    assert gauge(metrics) > 10
    for row in rows(chance, WINDOW):
        metrics.shift.add(Phase.PROMPT, (2,), row[None])
    assert 0.7 < gauge(metrics) < 1.4
    metrics.shift.expect({("p", Phase.PROMPT): {2: normal, 3: normal}})  # a layer that nobody has read
    metrics.drift_mahalanobis_ratio.clear()
    assert gauge(metrics) is None


def test_other_widths_start_anew():
    shift = Shift()
    shift.add(Phase.PROMPT, (2,), np.ones((1, 8), np.float32))
    shift.add(Phase.PROMPT, (2,), np.ones((1, 4), np.float32))
    assert [len(w.rows) for w in shift._windows.values()] == [1]


def test_the_reference_is_what_training_left_beside_the_probe(tiny, tmp_path):
    chance, store = np.random.default_rng(4), Store(tmp_path, shipped=tmp_path / "none")
    features = np.stack([rows(chance, 600, tiny.d_model), rows(chance, 600, tiny.d_model)], axis=1)
    features[300:] += 50  # the harmful ones are not the reference
    base = Base.of(features, (1, LAYER), (np.arange(600) >= 300).astype(np.int64))
    for name, of_answers in (("prompts", False), ("answers", True), ("old", None)):
        weight = {layer: _zeros(tiny.d_model) for layer in (1, LAYER)}
        probe, calibration = ProbeWeights(name, weight, 0.0), calibrated(1e6)
        if of_answers:
            calibration = {form: {"response": phases["response"]} for form, phases in calibration.items()}
        card = make_card(tiny, probe, calibration=calibration)
        store.publish(card, probe.weight, probe.bias, None if of_answers is None else base.dump())
    live = load_live(tiny.served(), store, load_settings(store=tmp_path))
    found = harmless(live)
    assert found.keys() == {("prompts", Phase.PROMPT), ("answers", Phase.RESPONSE)}
    assert set(found["prompts", Phase.PROMPT]) == {1, LAYER}
    assert found["prompts", Phase.PROMPT][1].n == 300
    metrics = Metrics()
    metrics.shift.expect(found)
    for first, second in zip(rows(chance, 100, tiny.d_model), rows(chance, 100, tiny.d_model), strict=True):
        metrics.shift.add(Phase.PROMPT, (1, LAYER), np.stack([first, second]))
    assert 0.5 < gauge(metrics, "prompts") < 1.7 and gauge(metrics, "old") is None


def _zeros(d):
    import torch

    return torch.zeros(d)


def test_a_reference_is_plain_numbers():
    normal = Normal.of(Moments.of(rows(np.random.default_rng(1), 400)))
    assert {f.name for f in dataclasses.fields(normal)} == {"n", "mean", "axes", "variances", "rest"}
    assert np.allclose(normal.axes.T @ normal.axes, np.eye(normal.axes.shape[1]), atol=1e-9)
