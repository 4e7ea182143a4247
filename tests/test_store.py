"""Store (T23): a damaged, forged or misplaced probe never loads, and never raises anything but our errors."""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import struct
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from monitor.aggregate import Aggregation
from monitor.config import load_settings
from monitor.errors import ConfigInvalid, MidstreamError, ProbeInvalid, ProbeMismatch
from monitor.live import ServedModel, assemble, load_live
from monitor.template import POSITION_RULE
from probes_store.calibration import Calibration
from probes_store.card import Canary, Card, ModelId
from probes_store.promote import Choice, promote, shadow
from probes_store.store import BASE, MAX_FILE_BYTES, Store, model_slug, read_folder

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


# --- T23: mutated files ---------------------------------------------------------------------------------------------


def test_20000_mutated_files_are_refused(store):
    folder = store.publish(make_card(calibration={}), weights(), 0.25)
    rng, path = random.Random(23), folder / "probe.safetensors"
    original = path.read_bytes()
    seen = Counter()
    with overwriting(path) as write:
        for _ in range(20_000):
            write(mutate(original, rng))
            seen[refusal(folder)] += 1
        assert seen == {"ProbeInvalid": 20_000}
        write(original)
    assert refusal(folder) is None


def test_mutated_files_that_the_card_vouches_for(store):
    folder = store.publish(make_card(calibration={}), weights(), 0.25)
    rng, path, card_path = random.Random(24), folder / "probe.safetensors", folder / "card.json"
    original, card = path.read_bytes(), card_path.read_bytes()
    digest = hashlib.sha256(original).hexdigest().encode()
    seen = Counter()
    with overwriting(path) as write, overwriting(card_path) as write_card:
        for _ in range(4_000):
            data = mutate(original, rng)
            write(data)
            write_card(card.replace(digest, hashlib.sha256(data).hexdigest().encode()))
            seen[refusal(folder)] += 1
    assert set(seen) == {None, "ProbeInvalid"}
    assert min(seen.values()) > 100  # the parser was reached, and it refused


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08" + b"\0" * 7,
        safetensors(b"[" * 10_000, b""),
        safetensors({}, b""),
        struct.pack("<Q", 2**63) + b"{}",
        safetensors({"bias": entry((1,), 0, 4)}, b"\0" * 4),
        *(
            safetensors({"bias": entry((1,), 0, 4), f"weight.{LAYER}": weight}, b"\0" * (4 + 4 * D))
            for weight in (
                entry(start=4, end=4 + 4 * D, dtype="F99"),
                entry(start=4, end=4 + 4 * D, dtype="I32"),
                entry((2, D), 4, 4 + 4 * D, dtype="F16"),
                entry((1, 2 * D), 4, 4 + 4 * D, dtype="BF16"),
                entry((4, D), 4, 4 + 4 * D, dtype="F8_E4M3"),
                entry((4, D), 4, 4 + 4 * D, dtype="F8_E8M0"),
                entry((8, D), 4, 4 + 4 * D, dtype="F4"),
                entry((1, D // 2), 4, 4 + 4 * D, dtype="C64"),
                entry((D,), 4, 4 + 4 * D),
                entry((D, 1), 4, 4 + 4 * D),
                entry((-1, D), 4, 4 + 4 * D),
                entry((1, D), 0, 4 * D),
                entry((1, D), 4, 2**62),
            )
        ),
        *(
            safetensors({"bias": entry((1,), 0, 4), f"weight.{LAYER}": entry(shape, 4, 4)}, b"\0" * 4)
            for shape in ((0, D), (0, 2**62), (0, 2**63), (0, 2**64 - 1), (2**40, 0, 2**40), (0,) * 70)
        ),
        safetensors(
            {"bias": entry((1,), 0, 4), f"weight.{LAYER}": entry(start=4, end=4 + 4 * D), "extra": entry((0,), 0, 0)},
            b"\0" * (4 + 4 * D),
        ),
    ],
)
def test_hostile_headers_are_refused(folder, data):
    rewrite(folder, data)
    with pytest.raises(ProbeInvalid, match=r"probe\.safetensors"):
        read_folder(folder, shipped=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused(folder, name, value):
    body = [0.0] + [1.0] * D
    body[1 if name == "weight" else 0] = value
    header = {"bias": entry((1,), 0, 4), f"weight.{LAYER}": entry(start=4, end=4 + 4 * D)}
    rewrite(folder, safetensors(header, struct.pack(f"<{1 + D}f", *body)))
    with pytest.raises(ProbeInvalid, match=f"{name}.* is not finite float32"):
        read_folder(folder, shipped=False)


def test_huge_finite_weights_load(store):
    """1e30 is a float32: the store takes it; a score that then overflows is NaN or inf, hence unmonitored."""
    probe = sound(read_folder(store.publish(make_card(), weights(1e30), 0.0), shipped=False))
    assert float(probe.weight[LAYER].max()) == pytest.approx(1e30)


# --- T23: mutated cards ---------------------------------------------------------------------------------------------

JUNK = (None, True, -1, 0, 2**70, 1e308, math.nan, math.inf, "", "x", "../x", "\u2028", [], [[]], {}, {"a": 1}, [1] * 9)


def places(node, path=()):
    """Every place of a JSON tree that can be changed."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate_tree(text, rng):
    tree = json.loads(text)
    # Not every value of a tail, or nothing else would be drawn; `n`: test_calibration has a huge one.
    path = rng.choice([p for p in places(tree) if "tail" not in p[:-1] and p[-1] != "n"])
    node = tree
    for key in path[:-1]:
        node = node[key]
    kind = rng.randrange(3)
    if kind == 0:
        del node[path[-1]]
    elif kind == 1 and isinstance(node, dict):
        node["surprise"] = node.pop(path[-1])
    else:
        node[path[-1]] = rng.choice(JUNK)
    return json.dumps(tree).encode()


def test_2000_mutated_cards(folder):
    rng, path = random.Random(25), folder / "card.json"
    original = path.read_bytes()
    seen = Counter()
    with overwriting(path) as write:
        for i in range(2_000):
            write(mutate(original, rng) if i % 2 else mutate_tree(original, rng))
            seen[refusal(folder)] += 1
    assert set(seen) == {None, "ProbeInvalid"}
    assert min(seen.values()) > 100


def test_a_mutated_card_that_loads_never_breaks_the_start(store, folder):
    """What a server does next with an accepted card: stack it and resolve its rules."""
    rng, path, chosen = random.Random(26), folder / "card.json", load_settings(store=store.overlay)
    original = path.read_bytes()
    seen = Counter()
    with overwriting(path) as write:
        for _ in range(1_000):
            write(mutate_tree(original, rng))
            try:
                probe = store.load(MODEL, "demo", "v1")
                assemble([probe], probe.card.d_model, chosen)
            except MidstreamError:
                seen["refused"] += 1
            except Exception as error:
                seen[repr(error)] += 1
            else:
                seen["served"] += 1
    assert set(seen) == {"refused", "served"}


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": {}},
        {"aggregation": {"prompt": {"kind": "max"}}},
        {"aggregation": {"prompt": {"kind": "max", "windwo": 3}, "response": {"kind": "max"}}},
        {"aggregation": {"prompt": {"kind": "median"}, "response": {"kind": "max"}}},
        {"canary_tolerance": math.inf},
        {"canary_tolerance": math.nan},
        {"canary_tolerance": 0},
        {"canaries": []},
        {"canaries": [{"text": "x", "scores": []}]},
        {"calibration": {"chat": {"prompt": {"n": 300, "tail": [1.0, math.nan], "source": "x"}}}},
        {"calibration": {"chat": {"history": {"n": 300, "tail": [1.0], "source": "x"}}}},
        {"layers": []},
        {"layers": [-1]},
        {"d_model": 0},
        {"name": "../x"},
        {"name": "Demo"},
        {"name": "x" * 65},
        {"version": "1"},
        {"version": "v1\n"},
        {"version": "v../../x"},
        {"schema_version": 2},
        {"sha256": "A" * 64},
        {"surprise": 1},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_cards_that_must_not_load(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(ProbeInvalid):
        read_folder(folder, shipped=False)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"\xff\xfe", b"{", b"[" * 100_000, b'{"name": "\\ud800"}'])
def test_a_card_that_is_not_a_card(folder, text):
    (folder / "card.json").write_bytes(text)
    with pytest.raises(ProbeInvalid, match=r"card\.json"):
        read_folder(folder, shipped=False)


# --- T23: misplaced files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"layers": [LAYER + 1]}, {"layers": [LAYER, 3]}, {"d_model": D + 1}])
def test_a_card_for_other_weights_is_refused(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(ProbeInvalid, match="its card wants"):
        read_folder(folder, shipped=False)


def served(**changes):
    template = SimpleNamespace(hash=changes.pop("template_hash", TEMPLATE_HASH))
    own = {"name": "org/Tiny", "fingerprint": "f" * 16, "dtype": "float32", "d_model": D, "n_layers": 4}
    return ServedModel(**(own | changes), template=template)


def test_a_probe_serves_the_model_it_was_trained_on(store, folder):
    live = load_live(served(), store, load_settings(store=store.overlay))
    assert [p.card.name for p in live.probes] == ["demo"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fingerprint": "e" * 16}, "model"),
        ({"d_model": D * 2}, "width"),
        ({"n_layers": 5}, "number of layers"),
        ({"template_hash": "b" * 64}, "template"),
    ],
)
def test_a_probe_of_another_model_is_refused(store, folder, changes, named):
    with pytest.raises(ProbeMismatch, match=named):
        load_live(served(**changes), store, load_settings(store=store.overlay))


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_that_the_model_lacks_is_refused(store, layer):
    store.publish(make_card(layers=(layer,)), {layer: torch.ones(D)}, 0.0)
    with pytest.raises(ProbeMismatch, match=f"reads layer {layer}, the model has layers 0 to 3"):
        load_live(served(), store, load_settings(store=store.overlay))


BAD_PARTS = ("../x", "..", ".", "", "/etc", "a/b", "a\\..", "a\0b", "~", "X", "x" * 200, "-x", "x\n")


@pytest.mark.parametrize("bad", BAD_PARTS)
def test_path_parts_are_refused(store, folder, bad):
    for model, probe, version in ((bad, "demo", "v1"), (MODEL, bad, "v1"), (MODEL, "demo", bad)):
        with pytest.raises(ConfigInvalid, match="there is no probe"):
            store.load(model, probe, version)


def test_a_real_folder_outside_is_out_of_reach(store, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "outside/demo/v1")
    read_folder(tmp_path / "outside/demo/v1", shipped=False)  # sound, but elsewhere
    for model, probe in (("../outside", "demo"), (str(tmp_path / "outside"), "demo"), (MODEL, "../../outside/demo")):
        with pytest.raises(ConfigInvalid):
            store.load(model, probe, "v1")


@settings(deadline=None)
@given(st.text(max_size=60))
def test_a_model_name_makes_one_plain_folder_name(name):
    slug = model_slug(name)
    assert slug not in ("", ".", "..")
    assert not set(slug) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")


@pytest.mark.parametrize("name", ["org/_x", "_", "m" * 200, "../../Evil", "/a/B/", "Ünï", "..", "a b"])
def test_whatever_is_published_can_be_loaded(store, name):
    model = ModelId(name=name, fingerprint="f" * 16, dtype="float32", quantization="none", n_layers=4)
    folder = store.publish(make_card(model=model), weights(), 0.0)
    assert folder.resolve().is_relative_to(store.overlay.resolve())
    assert store.load(model_slug(name), "demo", "v1").path == folder


@pytest.mark.parametrize("file", ["probe.safetensors", "card.json"])
def test_a_link_is_refused(folder, tmp_path, file):
    (folder / file).rename(tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    with pytest.raises(ProbeInvalid, match="is a link"):
        read_folder(folder, shipped=False)


@pytest.mark.parametrize("file", ["probe.safetensors", "card.json"])
def test_a_file_that_is_missing_a_folder_or_huge_is_refused(folder, file):
    (folder / file).unlink()
    with pytest.raises(ProbeInvalid, match="can't be read"):
        read_folder(folder, shipped=False)
    with (folder / file).open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ProbeInvalid, match="larger than 256 MiB"):
        read_folder(folder, shipped=False)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(ProbeInvalid, match="can't be read"):
        read_folder(folder, shipped=False)


def test_a_probe_under_another_name_is_refused(store, folder):
    shutil.copytree(folder, folder.parent / "v2")
    shutil.copytree(folder, folder.parent.parent / "other/v1")
    for probe, version in (("demo", "v2"), ("other", "v1")):
        with pytest.raises(ProbeInvalid, match="the card says demo v1"):
            store.load(MODEL, probe, version)


# --- publishing and reading -----------------------------------------------------------------------------------------


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_publish_takes_the_next_free_version_and_changes_no_other(store, folder):
    before = contents(store.overlay)
    assert folder == store.overlay / MODEL / "demo/v1"
    assert store.publish(make_card(version="v77"), weights(0.5), 1.5).name == "v2"
    shutil.rmtree(folder)
    assert store.publish(make_card(), weights(), 0.0).name == "v3"  # a version that was there is never used again
    after = contents(store.overlay)
    assert {f"{MODEL}/demo/v{n}/{f}" for n in (2, 3) for f in ("card.json", "probe.safetensors")} == set(after)
    assert all(name not in after or after[name] == data for name, data in before.items())
    probe = store.load(MODEL, "demo", "v2")
    assert (probe.card.version, probe.bias, probe.weight[LAYER].tolist()) == ("v2", 1.5, [0.5] * D)


# --- several projections ----------------------------------------------------------------------------------------------


def heads_card(k=4, kind="attention", **changes):
    both = {"prompt": Aggregation(kind), "response": Aggregation(kind)}
    fields = {"projections": k, "aggregation": both, "canaries": (Canary(text="a canary", scores=(0.5,) * 2 * k),)}
    return make_card(**(fields | changes))


def test_the_base_of_a_retrained_probe_is_private(store):
    """Moments of few labelled rows may tell of one of them."""
    modes = []
    for fit in ({}, {"retrained": {"until": 1.0}}):
        folder = store.publish(make_card(fit=fit), weights(), 0.25, b"moments")
        modes.append({p.name: p.stat().st_mode & 0o077 for p in folder.iterdir()})
        assert (folder / BASE).read_bytes() == b"moments"
    assert modes[1][BASE] == 0 != modes[0][BASE] and modes[1]["card.json"] == modes[0]["card.json"] != 0


def test_several_projections_are_stored_and_read_as_they_are(store):
    weight, bias = {LAYER: torch.arange(4.0 * D).reshape(4, D)}, (0.0, 1.0, -2.0, 0.5)
    probe = read_folder(store.publish(heads_card(), weight, bias), shipped=False)
    assert (probe.card.projections, probe.bias) == (4, bias)
    assert torch.equal(probe.weight[LAYER], weight[LAYER])


def test_an_old_card_has_one_projection(folder):
    card = json.loads((folder / "card.json").read_text())
    assert card.pop("projections") == 1
    (folder / "card.json").write_text(json.dumps(card))
    assert sound(read_folder(folder, shipped=False)).card.projections == 1


@pytest.mark.parametrize("k", [2, 4, 6])
def test_another_number_of_projections_than_the_card_says_is_refused(store, k):
    folder = store.publish(heads_card(k), {LAYER: torch.ones(k, D)}, (0.0,) * k)
    rewrite(folder, projections=k + 2, canaries=[{"text": "x", "scores": [0.0] * (k + 2)}])
    with pytest.raises(ProbeInvalid, match="its card wants"):
        read_folder(folder, shipped=False)
    with pytest.raises(ProbeInvalid, match="its card wants"):
        store.publish(heads_card(k), {LAYER: torch.ones(k, D)}, (0.0,) * (k - 1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 3}, "'attention' can't be had from 3 projections"),
        ({"k": 3, "kind": "mean_last"}, "'mean_last' can't be had from 3 projections"),
        ({"kind": "ema"}, "'ema' can't be had from 4 projections"),
        ({"canaries": (Canary(text="x", scores=(0.0,) * 6),)}, "4 scores for each token"),
        (
            {"aggregation": {"prompt": Aggregation("attention"), "response": Aggregation("multimax")}},
            "different projections for values",
        ),
    ],
)
def test_a_card_whose_aggregation_does_not_fit_its_projections_is_refused(changes, named):
    with pytest.raises(ValidationError, match=named):
        heads_card(**changes)


def test_rules_know_the_columns_of_their_probes(store):
    for name, k in (("a", 1), ("b", 4), ("c", 1), ("d", 2)):
        card = heads_card(k, name=name) if k > 1 else make_card(name=name)
        store.publish(card, {LAYER: torch.ones(k, D)}, (0.0,) * k)
    live = load_live(served(), store, load_settings(store=store.overlay))
    columns = {r.probe: range(8)[r.columns] for r in live.rules["chat"]}
    assert columns == {"a": 0, "b": range(1, 5), "c": 5, "d": range(6, 8)} and len(live.bank) == 8


def test_versions_count_as_numbers_and_nothing_else_is_one(store, folder):
    for name in ("v10", "v9", "v1x", "v", "w3", ".new-abc", "v1234567"):
        (folder.parent / name).mkdir()
    (folder.parent / "v11").write_text("a file")
    assert list(store.versions(MODEL, "demo")) == ["v1", "v9", "v10"]


@pytest.mark.parametrize(
    ("card", "weight", "bias"),
    [
        (make_card(), weights(math.nan), 0.0),
        (make_card(), {LAYER: torch.full((D,), 1e39, dtype=torch.float64)}, 0.0),
        (make_card(), weights(), math.inf),
        (make_card(), {LAYER: torch.ones(D + 1)}, 0.0),
        (make_card(), {LAYER + 1: torch.ones(D)}, 0.0),
        (make_card(), {}, 0.0),
        (make_card().model_copy(update={"canaries": ()}), weights(), 0.0),
    ],
    ids=["nan", "too big for float32", "bias", "width", "layer", "no weights", "card"],
)
def test_a_bad_probe_leaves_nothing_behind(store, folder, card, weight, bias):
    before = contents(store.overlay)
    with pytest.raises(ProbeInvalid):
        store.publish(card, weight, bias)
    assert contents(store.overlay) == before
    assert os.listdir(folder.parent) == ["v1"]


class Late(Store):
    """A store that sees no versions: what a publisher knows when another one is a moment ahead."""

    def versions(self, model, probe):
        return {}


def test_a_publisher_that_comes_late_overwrites_nothing(store, folder):
    before = contents(store.overlay)
    with pytest.raises((OSError, MidstreamError)):
        Late(store.overlay, store.shipped).publish(make_card(), weights(9.0), 9.0)
    assert contents(store.overlay) == before
    assert os.listdir(folder.parent) == ["v1"]


def test_the_shipped_store_is_read_only(tmp_path):
    store = Store(None, shipped=tmp_path)
    with pytest.raises(ConfigInvalid, match="read-only; set MIDSTREAM_STORE"):
        store.publish(make_card(), weights(), 0.0)
    assert os.listdir(tmp_path) == []
    assert (store.live(MODEL), store.probes(MODEL), store.versions(MODEL, "demo")) == ({}, [], {})


def test_the_overlay_lies_over_the_shipped_store(tmp_path):
    shipped, overlay = tmp_path / "shipped", tmp_path / "overlay"
    Store(shipped, shipped=tmp_path / "none").publish(make_card(), weights(1.0), 1.0)
    store = Store(overlay, shipped=shipped)
    first = store.load(MODEL, "demo", "v1")
    assert (first.shipped, first.bias, store.live(MODEL)) == (True, 1.0, {"demo": "v1"})
    assert store.publish(make_card(), weights(2.0), 2.0) == overlay / MODEL / "demo/v2"
    assert store.live(MODEL) == {"demo": "v2"}
    (overlay / MODEL / "demo/v2").rename(overlay / MODEL / "demo/v1")
    rewrite(overlay / MODEL / "demo/v1", version="v1")
    over = store.load(MODEL, "demo", "v1")
    assert (over.shipped, over.bias) == (False, 2.0)


def test_an_overlay_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="is not a directory"):
        Store(tmp_path / "file")


def test_live_json_chooses_and_goes_back(store, folder):
    store.publish(make_card(), weights(), 0.0)
    assert store.live(MODEL) == {"demo": "v2"}
    (store.overlay / "live.json").write_text(json.dumps({f"{MODEL}/demo": "v1", "another/demo": "v9"}))
    assert store.live(MODEL) == {"demo": "v1"}


def test_a_probe_that_starts_idle_is_served_when_somebody_promotes_it(store, folder):
    extra = make_card().model_copy(update={"name": "extra", "starts": "idle"})
    store.publish(extra, weights(), 0.0)
    assert (store.live(MODEL), store.probes(MODEL)) == ({"demo": "v1"}, ["demo", "extra"])
    with pytest.raises(ConfigInvalid, match="no version of 'extra' is live"):
        shadow(store, MODEL, "extra", "v1")
    assert promote(store, MODEL, "extra", "v1") == Choice("extra", "v1", None, None)
    assert store.live(MODEL) == {"demo": "v1", "extra": "v1"}
    store.publish(make_card().model_copy(update={"name": "extra"}), weights(), 0.0)
    assert store.live(MODEL)["extra"] == "v1", "a newer one is not live by itself either"


@pytest.mark.parametrize("version", ["v2", "1", "", "../v1"])
def test_live_json_with_an_unknown_version(store, folder, version):
    (store.overlay / "live.json").write_text(json.dumps({f"{MODEL}/demo": version}))
    with pytest.raises(ConfigInvalid, match=r"live\.json names tiny/demo .* choose one of v1"):
        store.live(MODEL)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"tiny/demo": 1}', b"\xff", b"[" * 100_000])
def test_live_json_that_is_damaged(store, folder, text):
    (store.overlay / "live.json").write_bytes(text)
    with pytest.raises(ConfigInvalid, match=r"live\.json"):
        store.live(MODEL)


def test_cards_are_strict():
    with pytest.raises(ValidationError, match="frozen"):
        make_card().name = "other"
    with pytest.raises(ValidationError, match="surprise"):
        make_card(surprise=1)
