"""A store of one tiny probe, its files and cards, and what is done to them: for all tests of the store."""

import contextlib
import hashlib
import json
import math
import struct
from types import SimpleNamespace

import pytest
import torch

from monitor.aggregate import Aggregation
from monitor.live import ServedModel
from monitor.template import POSITION_RULE
from probes_store.calibration import Calibration
from probes_store.card import Canary, Card, ModelId
from probes_store.store import Store, read_folder

D, LAYER, MODEL = 8, 2, "tiny"
TEMPLATE_HASH = "a" * 64


def make_card(**changes):
    calibration = Calibration.fit([float(i) for i in range(300)], "made up")
    fields = {
        "name": "demo", "version": "v1", "created": "2026-01-01T00:00:00+00:00", "code_version": "0",
        "model": ModelId(name="org/Tiny", fingerprint="f" * 16, dtype="float32", quantization="none", n_layers=4),
        "layers": (LAYER,), "d_model": D, "template_hash": TEMPLATE_HASH, "position_rule": POSITION_RULE,
        "aggregation": {"prompt": Aggregation("mean"), "response": Aggregation("ema")},
        "calibration": {"chat": {"prompt": calibration, "response": calibration}},
        "canaries": (Canary(text="a canary", scores=(0.5, -1.0)),), "sha256": "0" * 64,
    }  # fmt: skip
    return Card(**(fields | changes))


def weights(value=None):
    return {LAYER: torch.linspace(-1, 1, D) if value is None else torch.full((D,), value)}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "overlay", shipped=tmp_path / "shipped")


@pytest.fixture
def folder(store):
    """A published probe: demo v1."""
    return store.publish(make_card(), weights(), 0.25)


def rewrite(folder, data=None, **changes):
    """Replace the weights and fields of the card; the card then vouches for whatever the weights are."""
    path = folder / "probe.safetensors"
    if data is not None:
        path.write_bytes(data)
    card = json.loads((folder / "card.json").read_text())
    card |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} | changes
    (folder / "card.json").write_text(json.dumps(card))


def safetensors(header, body):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + body


def entry(shape=(1, D), start=0, end=4 * D, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def mutate(data, rng):
    """A byte flipped, inserted or removed, a few of these, or the end cut off; always different from `data`."""
    out = bytearray(data)
    while bytes(out) == data:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at, kind = rng.randrange(len(out)), rng.randrange(4)
            if kind == 0:
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                out[at] = rng.randrange(256)
            elif kind == 2:
                out[at:at] = rng.randbytes(rng.choice((1, 1, 8)))
            else:
                del out[at : at + rng.choice((1, 1, 8))]
        if rng.random() < 0.2:
            del out[rng.randrange(len(out)) :]
        out = out or bytearray(b"\0")
    return bytes(out)


@contextlib.contextmanager
def overwriting(path):
    """write(data) in place: truncating to 0 first, as write_bytes does, makes a real disk flush each time (3 ms)."""
    with path.open("r+b", buffering=0) as file:

        def write(data):
            file.seek(0)
            file.write(data)
            file.truncate()

        yield write


def refusal(folder):
    """None if the probe was accepted, else the type of what was raised."""
    try:
        sound(read_folder(folder, shipped=False))
    except Exception as error:
        return type(error).__name__
    return None


def sound(probe):
    """What every accepted probe must be, whatever was done to its files."""
    assert hashlib.sha256((probe.path / "probe.safetensors").read_bytes()).hexdigest() == probe.card.sha256
    assert set(probe.weight) == set(probe.card.layers)
    for vector in probe.weight.values():
        assert vector.shape == (probe.card.d_model,)
        assert vector.dtype == torch.float32
        assert bool(torch.isfinite(vector).all())
    assert math.isfinite(probe.bias)
    return probe


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def served(**changes):
    template = SimpleNamespace(hash=changes.pop("template_hash", TEMPLATE_HASH))
    own = {"name": "org/Tiny", "fingerprint": "f" * 16, "dtype": "float32", "d_model": D, "n_layers": 4}
    return ServedModel(**(own | changes), template=template)
