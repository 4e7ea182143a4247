"""The hub: a probe that is pushed and pulled is the same, what comes is verified first, what is private stays so."""

import hashlib
import json

from probes_store.store import MAX_FILE_BYTES, Store

from .fake_hub import hub as hub
from .shelf import NAME, header_of, refused, run, store  # noqa: F401
from .stored import MODEL, contents, make_card, weights


def commit_in(text):
    return text.split("@")[1].strip()


def test_pushed_and_pulled_it_is_the_same_probe(run, store, hub, tmp_path):
    commit = commit_in(run("probe", "push", "demo@v1", "org/probes")[1])
    assert hub.repositories["model", "org/probes"]["private"] is True
    files = hub.files("org/probes", commit)
    assert set(files) == {"card.json", "probe.safetensors", "README.md"}
    assert header_of(files["README.md"].decode())[0]["base_model"] == NAME
    other = tmp_path / "other"
    code, out, _ = run("probe", "pull", f"org/probes@{commit}", "--store", other)
    assert code == 0 and "midstream probe promote demo v1" in out
    there, here = Store(other, store.shipped).load(MODEL, "demo", "v1"), store.load(MODEL, "demo", "v1")
    assert there.card.sha256 == here.card.sha256 and there.bias == here.bias
    assert there.card.fit["pulled"] == {"repository": "org/probes", "commit": commit, "version": "v1"}
    assert {k: v for k, v in there.card.fit.items() if k != "pulled"} == here.card.fit
    before = contents(other)
    run("probe", "pull", f"org/probes@{commit}", "--store", other)
    assert contents(other) == before  # not twice


def test_a_pulled_probe_has_seen_no_labels_of_this_place(run, store, hub, tmp_path):
    store.publish(make_card(fit={"retrained": {"until": 5e9}}), weights(3.0), 0.25)
    assert store.load(MODEL, "demo", "v3").card.seen_until == 5e9
    commit = commit_in(run("probe", "push", "demo@v3", "org/probes")[1])
    run("probe", "pull", f"org/probes@{commit}", "--store", tmp_path / "other")
    card = Store(tmp_path / "other", store.shipped).load(MODEL, "demo", "v1").card
    assert card.retrained["until"] == 5e9 and card.seen_until == 0.0


def test_a_pull_changes_nothing_that_is_live(run, store, hub, tmp_path):
    files = {
        name: (store.overlay / MODEL / "demo/v2" / name).read_bytes() for name in ("card.json", "probe.safetensors")
    }
    other = Store(tmp_path / "other", store.shipped)
    other.publish(make_card(), weights(7.0), 0.0)
    assert run("probe", "pull", f"org/probes@{hub.add('org/probes', files)}", "--store", other.overlay)[0] == 0
    assert list(other.versions(MODEL, "demo")) == ["v1", "v2"] and other.live(MODEL) == {"demo": "v1"}


def tampered(store, **changes):
    folder = store.overlay / MODEL / "demo/v1"
    files = {name: (folder / name).read_bytes() for name in ("card.json", "probe.safetensors")}
    return files | changes


def test_what_the_hub_gives_is_verified_first(run, store, hub, tmp_path):
    other, good = tmp_path / "other", tampered(store)
    flipped = bytearray(good["probe.safetensors"])
    flipped[-1] ^= 1
    card = json.loads(good["card.json"])
    pickled = b"\x80\x04cos\nsystem\n."
    vouched = json.dumps(card | {"sha256": hashlib.sha256(pickled).hexdigest()}).encode()
    for files, says in (
        (good | {"probe.safetensors": bytes(flipped)}, "sha256"),
        (good | {"probe.safetensors": pickled, "card.json": vouched}, "not a safetensors file"),
        (good | {"card.json": json.dumps(card | {"surprise": 1}).encode()}, "surprise"),
        (good | {"card.json": json.dumps(card | {"name": "../x"}).encode()}, "name"),
    ):
        refused(run("probe", "pull", f"org/bad@{hub.add('org/bad', files)}", "--store", other), says)
        assert not other.exists()


def test_nothing_but_the_two_files_is_fetched(run, store, hub, tmp_path):
    commit = hub.add("org/more", tampered(store, **{"pytorch_model.bin": b"\x80", "code.py": b"1/0"}))
    assert run("probe", "pull", f"org/more@{commit}", "--store", tmp_path / "other")[0] == 0
    assert {path.rsplit("/", 1)[1] for path in hub.served} == {"card.json", "probe.safetensors"}


def test_a_file_too_large_for_a_probe_is_not_fetched(run, store, hub, tmp_path):
    hub.sizes["probe.safetensors"] = MAX_FILE_BYTES + 1
    refused(run("probe", "pull", f"org/big@{hub.add('org/big', tampered(store))}"), "larger than 256 MiB")
    assert not [path for path in hub.served if path.startswith("GET") and path.endswith("probe.safetensors")]


def test_what_is_wrong_with_a_pull_is_said(run, store, hub, tmp_path, monkeypatch):
    commit = hub.add("org/probes", {"card.json": b"{}"})
    refused(run("probe", "pull", "org/probes@main"), "name the commit, 40 hexadecimal digits")
    refused(run("probe", "pull", "org/probes"), "name the commit")
    refused(run("probe", "pull", f"../x@{commit}"), "is no repository")
    refused(run("probe", "pull", f"org/none@{commit}"), "no such repository", "HF_TOKEN")
    refused(run("probe", "pull", f"org/probes@{'0' * 40}"), "no such commit")
    refused(run("probe", "pull", f"org/probes@{commit}"), "no such file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run("probe", "pull", f"org/probes@{commit}"), "can't be reached", "HF_HUB_OFFLINE")
    refused(run("probe", "push", "demo", "org/probes"), "HF_HUB_OFFLINE forbids")


def test_what_is_private_stays_private(run, store, hub, monkeypatch):
    hub.add("org/open", {"README.md": b"x"}, private=False)
    refused(run("probe", "push", "demo", "org/open"), "is public", "--public")
    assert len(hub.repositories["model", "org/open"]["commits"]) == 1
    commit = commit_in(run("probe", "push", "demo", "org/open", "--public")[1])
    assert "card.json" in hub.files("org/open", commit)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(run("probe", "push", "demo", "org/probes"), "org/probes")
    assert ("model", "org/probes") not in hub.repositories
