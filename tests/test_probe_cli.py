"""`midstream probe`: what is shown of a probe, of its versions, and on the card that hubs read."""

import json
import os
import sys

import pytest
import torch

from probes_store.card import DataFile, ModelId, Threshold
from probes_store.model_card import model_card

from .shelf import NAME, header_of, refused, run, store, told  # noqa: F401
from .stored import LAYER, MODEL, D, make_card, weights


def test_list_names_every_version_and_the_live_one(run):
    found = json.loads(told(run("probe", "list", "--json")))
    assert [(f["probe"], f["version"], f["live"], f["shipped"]) for f in found] == [
        ("demo", "v1", False, False),
        ("demo", "v2", True, False),
    ]
    assert told(run("probes")) == told(run("probe", "list"))
    refused(run("probe", "list", "--model", "org/other"), "there is no probe for model 'other'")


def test_show_gives_the_card_and_what_it_certifies(run, store):
    shown = json.loads(told(run("probe", "show", "demo@v1", "--json")))
    card = store.load(MODEL, "demo", "v1").card
    assert shown["card"] == card.model_dump(mode="json") and shown["live"] is False
    assert shown["weight_norm"] == {str(LAYER): pytest.approx(float(weights()[LAYER].norm()))}
    # 300 benign requests certify 1 % (299 are needed), not 0.5 %.
    chat = [r for r in shown["certified"] if (r["format"], r["phase"]) == ("chat", "prompt")]
    assert [r["rate"] for r in chat] == [0.01, 0.02, 0.05]
    assert chat[0]["threshold"] == card.calibration["chat"]["prompt"].threshold(0.01)
    text = told(run("probe", "show", "demo"))
    for part in ("demo v2 (live, yours", NAME, card.template_hash, "1.00%", "299.000", "2 of 4"):
        assert part in text
    refused(run("probe", "show", "none"), "there is no probe 'none'")
    refused(run("probe", "show", "demo@v9"), "there is no probe tiny/demo v9")


def test_diff_tells_fields_thresholds_and_the_angle(run, store):
    calibration = make_card().calibration["chat"]["prompt"]
    half = calibration.model_copy(update={"tail": tuple(v / 2 for v in calibration.tail)})
    data = (DataFile(file="a.jsonl", sha256="1" * 64, rows=3, positive=1),)
    changed = make_card(description="better", calibration={"chat": {"prompt": half}}, data=data, metrics={"auroc": 0.9})
    store.publish(changed, {LAYER: torch.ones(D)}, 1.0)
    found = json.loads(told(run("probe", "diff", "demo@v1", "demo@v3", "--json")))
    fields = {f["name"]: (f["a"], f["b"]) for f in found["fields"]}
    assert fields["description"] == ("", "better") and fields["calibration.chat.response.n"] == (300, None)
    assert "layers.0" not in fields
    assert found["data"] == [{"name": "a.jsonl", "a": None, "b": "3 rows, 1 positive, sha256 " + "1" * 12}]
    assert found["metrics"] == [{"name": "auroc", "a": None, "b": 0.9}]
    one = next(t for t in found["thresholds"] if (t["phase"], t["rate"]) == ("prompt", 0.01))
    assert one["change"] == one["b"] - one["a"] == -one["a"] / 2
    # Symmetric around zero, so at right angles to all ones; and the mirrored version points the other way.
    assert found["cosine"] == {str(LAYER): pytest.approx(0, abs=1e-7), "all": pytest.approx(0, abs=1e-7)}
    mirrored = json.loads(told(run("probe", "diff", "demo@v1", "demo@v2", "--json")))
    assert mirrored["cosine"]["all"] == pytest.approx(-1)
    text = told(run("probe", "diff", "demo@v1", "demo"))
    assert "cosine of the weights" in text and "bias 0.2500 -> 1.0000" in text


def test_the_angle_of_versions_that_read_other_layers(run, store):
    card = make_card(layers=(LAYER, 3))
    store.publish(card, weights() | {3: torch.ones(D)}, 0.0)
    cosine = json.loads(told(run("probe", "diff", "demo@v1", "demo@v3", "--json")))["cosine"]
    norm = float(weights()[LAYER].norm())
    assert cosine[str(LAYER)] == pytest.approx(1) and "3" not in cosine
    assert cosine["all"] == pytest.approx(norm / (norm**2 + D) ** 0.5)


def test_the_model_card_has_the_header_that_hubs_read(run, store):
    sets = {"xstest": {"recall": {"rate": 0.62, "low": 0.5, "high": 0.7, "n": 200}, "auroc": {"auroc": 0.87}}}
    threshold = Threshold(
        format="chat", phase="prompt", target_fpr=0.01, threshold=299.0, observed_fpr=0.02, fpr_low=0.01, fpr_high=0.03,
        test_rows=50,
    )  # fmt: skip
    files = (f"hf://org/set@{'a' * 40}/train.csv", "mine.jsonl")
    data = tuple(DataFile(file=file, sha256="1" * 64, rows=3, positive=1) for file in files)
    data += (DataFile(file="b.jsonl", sha256="2" * 64, rows=9, positive=4, license="MIT", used={"fit": 5, "test": 2}),)
    card = make_card(metrics={"evaluation": {"sets": sets}}, data=data, thresholds=(threshold,))
    store.publish(card, weights(), 0.0)
    header, body = header_of(told(run("probe", "show", "demo", "--markdown")))
    assert header["base_model"] == NAME and header["library_name"] == "midstream" and header["license"] == "apache-2.0"
    assert header["datasets"] == ["org/set"] and "residual-stream" in header["tags"]
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"]["name"] == "xstest"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"recall": 0.62, "roc_auc": 0.87}
    assert f"| mine.jsonl | - | 3 | 1 | - | {'1' * 64} |" in body and "2.00% [1.00%, 3.00%] of 50" in body
    assert f"| b.jsonl | MIT | 9 | 4 | 5 / 0 / 2 | {'2' * 64} |" in body


def test_text_of_a_card_makes_no_markup_and_a_folder_is_no_base_model(store):
    model = ModelId(name="/home/somebody/Tiny", fingerprint="f" * 16, dtype="float32", quantization="none", n_layers=4)
    store.publish(make_card(model=model, description="x | <script>\n# y", metrics={"a|b\n": 1}), weights(), 0.0)
    text = model_card(store.load(MODEL, "demo", "v3"))
    header, body = header_of(text)
    assert "base_model" not in header and "/home" not in text and "| model | Tiny |" in body
    assert "<script>" not in text and "\n# y" not in text and "| a\\|b | 1 |" in body


def test_help_brings_no_torch():
    """Seconds that `midstream --help` need not wait for."""
    code = (
        "import sys, monitor.cli.probe, monitor.cli.lint; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
