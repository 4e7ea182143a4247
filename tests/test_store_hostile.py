"""T23: a damaged, forged or misplaced probe never loads, and never raises anything but our errors."""

import hashlib
import json
import math
import random
import shutil
import struct
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.config import load_settings
from monitor.errors import ConfigInvalid, MidstreamError, ProbeInvalid, ProbeMismatch
from monitor.live import assemble, load_live
from probes_store.card import ModelId
from probes_store.store import MAX_FILE_BYTES, model_slug, read_folder

from .stored import (  # noqa: F401
    LAYER,
    MODEL,
    D,
    entry,
    folder,
    make_card,
    mutate,
    overwriting,
    refusal,
    rewrite,
    safetensors,
    served,
    sound,
    store,
    weights,
)

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
