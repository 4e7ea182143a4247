"""The store: versions, publishing, the overlay, several projections, and which version is live."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from monitor.aggregate import Aggregation
from monitor.config import load_settings
from monitor.errors import ConfigInvalid, ProbeInvalid
from monitor.live import load_live
from probes_store.card import Canary
from probes_store.promote import Choice, promote, shadow
from probes_store.store import BASE, Store, read_folder

from .stored import LAYER, MODEL, D, contents, folder, make_card, rewrite, served, sound, store, weights  # noqa: F401

# --- publishing and reading -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [((15,), "15"), ((13, 17), "13,17"), ((3, 4, 5), "3-5"), ((11, 13, 15, 17, 19), "11-19/2"), ((1, 2, 4), "1,2,4")],
)
def test_a_table_shows_layers_in_short(layers, blocks):
    assert make_card(layers=layers).blocks == blocks


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
        ({"k": 2, "kind": "ema"}, "2 projections need an aggregation that reads them"),
        ({"canaries": (Canary(text="x", scores=(0.0,) * 6),)}, "4 scores for each token"),
        (
            {"aggregation": {"prompt": Aggregation("attention"), "response": Aggregation("multimax")}},
            "different projections for values",
        ),
        ({"k": 2, "raw_prompt": Aggregation("mean")}, "need an aggregation that reads them"),
        ({"raw_prompt": Aggregation("mean_last")}, "'mean_last' can't be had from 4 projections"),
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


def test_a_publisher_that_comes_late_overwrites_nothing_and_takes_the_next_number(store, folder):
    before = contents(store.overlay)
    store.publish(make_card(), weights(2.0), 2.0)
    assert Late(store.overlay, store.shipped).publish(make_card(), weights(9.0), 9.0).name == "v3"
    after = contents(store.overlay)
    assert {name: after[name] for name in before} == before
    assert sorted(os.listdir(folder.parent)) == ["v1", "v2", "v3"]
    probe = store.load(MODEL, "demo", "v3")  # whose card says so
    assert (probe.card.version, probe.bias) == ("v3", 9.0)


def test_what_is_published_is_on_the_disk(store, monkeypatch):
    """Each file before the folder has its name, and the name before anybody can write it into live.json."""
    synced, sync = [], os.fsync

    def noted(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((path, path.stat().st_size if path.is_file() else sorted(os.listdir(path))))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    folder = store.publish(make_card(), weights(), 0.25, b"moments")
    files = {p.name: size for p, size in synced if isinstance(size, int)}
    assert files == {p.name: p.stat().st_size for p in folder.iterdir()}
    folders = [(p.name[:4], names) for p, names in synced if not isinstance(names, int)]
    assert folders[:2] == [(".new", sorted(files)), ("demo", ["v1"])]
    assert {p for p, _ in synced} >= {folder.parent, folder.parent.parent, store.overlay}


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
