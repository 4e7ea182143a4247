"""Versions of one probe behind both ports: which is live, how often probes were loaded, and what is on record."""

import pytest
import torch

from monitor.audit import Audit
from monitor.probe import ProbeWeights
from probes_store import promote as promoting
from probes_store.store import Store

from .both_ports import Both
from .conftest import LAYER, calibrated, make_card

MODEL = "tiny-llama"


def probe(tiny, bias, layer=LAYER):
    """Every token scores the bias."""
    return ProbeWeights("hair", {layer: torch.zeros(tiny.d_model)}, bias)


def publish(tiny, store, bias, layer=LAYER, **changes):
    one = probe(tiny, bias, layer)
    card = make_card(tiny, one, **({"calibration": calibrated(0.0)} | changes))
    return store.publish(card, one.weight, one.bias).name


@pytest.fixture
def both(tiny, tmp_path):
    """v1 scores 5 everywhere and blocks, v2 -5, v3 1; v1 is live."""
    one = Both(tiny, tmp_path)
    one.store = store = Store(one.settings.store, shipped=tmp_path / "none")
    promoting.pin(store, MODEL, "hair")
    publish(tiny, store, -5.0), publish(tiny, store, 1.0)
    yield one
    one.stop()


def choose(both, text):
    """Write live.json as everybody should: whole, or a server that looks meanwhile finds half of it."""
    path = both.store.overlay / "live.json"
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def live(both):
    """version of each probe in service"""
    found = both.admin("GET", "policy").json()["policies"]["blocks"]["rules"]["chat"]
    return {rule["probe"]: (rule["version"], rule["mode"]) for rule in found if rule["phase"] == "prompt"}


def reloads(both, result):
    return both.metrics.registry.get_sample_value("midstream_probe_reload_total", {"result": result})


def rows(both):
    audit = Audit(both.settings.audit)
    try:
        return [(r["actor"], r["method"], r["path"], r["result"]) for r in audit.latest(1000)[::-1]]
    finally:
        audit.close()
