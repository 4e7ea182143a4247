"""A probe as ONNX: one MatMul and one Add that say what torch says, within 1e-5."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from monitor.aggregate import Aggregation
from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.errors import ConfigInvalid, ProbeInvalid
from monitor.probe import LinearProbe, ProbeBank, ProbeWeights
from probes_store import export as exporting
from probes_store.card import Canary
from probes_store.export import TOLERANCE, build, difference, export
from probes_store.store import Store

from .conftest import make_card as card_of
from .stored import LAYER, MODEL, D, make_card, weights

SHIPPED = ("smollm2-135m-instruct", "harmful-intent", "v1")


def random_weights(*layers, width=D):
    generator = torch.Generator().manual_seed(len(layers))
    return {layer: torch.randn(width, generator=generator) for layer in layers}


@pytest.fixture
def stored(tmp_path):
    """stored(weight, bias, **changes of the card) -> a verified probe"""
    store = Store(tmp_path / "store", shipped=tmp_path / "none")

    def go(weight, bias=0.25, **changes):
        card = make_card(layers=tuple(sorted(weight)), d_model=next(iter(weight.values())).shape[-1], **changes)
        return store.load(MODEL, "demo", store.publish(card, weight, bias).name)

    return go


def logits(path, hidden):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"hidden": hidden.astype(np.float32)})[0]


def test_the_shipped_probe_equals_torch(tmp_path):
    probe = Store().load(*SHIPPED)
    path = tmp_path / "probe.onnx"
    assert export(probe, path) <= TOLERANCE
    linear = LinearProbe(probe.card.d_model)
    with torch.no_grad():
        linear.linear.weight.copy_(probe.weight[15][None])
        linear.linear.bias.fill_(probe.bias)
        hidden = torch.randn(500, probe.card.d_model)
        expected = linear.logits(hidden).numpy()
    assert np.abs(logits(path, hidden.numpy()) - expected).max() <= 1e-5


def test_on_streams_of_a_model_it_equals_the_tap(tiny, tmp_path):
    """Three layers, their streams side by side in ascending order."""
    layers = (3, 0, 2)
    weight = {layer: vector / 8 for layer, vector in random_weights(*layers, width=tiny.d_model).items()}
    probe = ProbeWeights("demo", weight, -0.5)
    store = Store(tmp_path / "store", shipped=tmp_path / "none")
    store.publish(card_of(tiny, probe), weight, -0.5)
    assert export(store.load("tiny-llama", "demo", "v1"), tmp_path / "probe.onnx") <= TOLERANCE
    prompt = tiny.template.encode([{"role": "user", "content": "what is a good recipe for soup?"}])
    ((_, streams),) = residual_streams(tiny, [prompt], sorted(layers))
    expected = score_streams(ProbeBank([probe], tiny.d_model), streams)[:, 0]
    hidden = torch.cat([streams[layer] for layer in sorted(layers)], dim=-1).numpy()
    assert np.abs(logits(tmp_path / "probe.onnx", hidden) - np.asarray(expected)).max() <= 1e-5


def test_several_projections_are_several_logits(stored, tmp_path):
    generator = torch.Generator().manual_seed(5)
    weight = {layer: torch.randn(4, D, generator=generator) for layer in (LAYER, 3)}
    both = {phase: Aggregation("attention") for phase in ("prompt", "response")}
    canaries = (Canary(text="x", scores=(0.0,) * 4),)
    probe = stored(weight, (0.5, -1.0, 2.0, 0.0), projections=4, aggregation=both, canaries=canaries)
    assert export(probe, tmp_path / "probe.onnx") <= TOLERANCE
    hidden = torch.randn(9, 2 * D, generator=generator)
    expected = hidden @ torch.cat([weight[LAYER], weight[3]], dim=1).T + torch.tensor(probe.bias)
    got = logits(tmp_path / "probe.onnx", hidden.numpy())
    assert got.shape == (9, 4) and np.abs(got - expected.numpy()).max() <= 1e-5
    assert {p.key: p.value for p in build(probe).metadata_props}["projections"] == "4"


def test_the_graph_is_one_product_and_one_sum_and_says_what_it_is(stored):
    probe = stored(random_weights(LAYER, 3))
    model = build(probe)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    said = {p.key: p.value for p in model.metadata_props}
    assert said["layers"] == f"{LAYER},3" and said["sha256"] == probe.card.sha256
    assert said["position_rule"] == probe.card.position_rule and said["fingerprint"] == probe.card.model.fingerprint
    assert build(probe).SerializeToString() == model.SerializeToString()


def test_the_file_passes_onnx_own_check_and_takes_any_number_of_tokens(stored, tmp_path):
    path = tmp_path / "probe.onnx"
    export(stored(weights()), path)
    onnx.checker.check_model(str(path), full_check=True)
    assert [logits(path, np.ones((n, D))).shape for n in (0, 1, 7)] == [(0,), (1,), (7,)]


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e3, 1e30])
def test_small_and_huge_weights_agree(stored, tmp_path, scale):
    assert export(stored({LAYER: weights()[LAYER] * scale}, bias=-3.0), tmp_path / "probe.onnx") <= TOLERANCE


def test_the_check_would_notice_another_probe(stored, tmp_path, monkeypatch):
    probe, other = stored(weights()), stored(weights(), bias=0.2501)
    assert difference(probe, build(other).SerializeToString()) == pytest.approx(1e-4, rel=0.1)
    monkeypatch.setattr(exporting, "build", lambda _: build(other))
    with pytest.raises(ProbeInvalid, match=r"differ by 0\.0001.* nothing was written"):
        export(probe, tmp_path / "probe.onnx")
    assert list(tmp_path.glob("*onnx*")) == []


def test_a_place_that_cannot_be_written(stored, tmp_path):
    with pytest.raises(ConfigInvalid, match="can't be written"):
        export(stored(weights()), tmp_path / "none" / "probe.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigInvalid, match="can't be written"):
        export(stored(weights()), tmp_path / "folder")
    assert list(tmp_path.glob(".onnx-*")) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_the_remedy_is_named(stored, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # what an import of something not installed finds
    with pytest.raises(ConfigInvalid, match=rf"{missing} is not installed; pip install midstream\[onnx\]"):
        export(stored(weights()), tmp_path / "probe.onnx")
