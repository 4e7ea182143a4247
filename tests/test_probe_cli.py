"""`midstream probe`: what is shown of a probe, which version is live, and what a hub may bring into the store."""

import fcntl
import hashlib
import json
import os
import sys
import threading

import pytest
import torch
import yaml

from monitor.audit import Audit
from monitor.cli import main
from monitor.errors import ConfigInvalid
from probes_store.card import DataFile, ModelId, Threshold
from probes_store.model_card import model_card
from probes_store.promote import promote, rollback
from probes_store.store import MAX_FILE_BYTES, Store

from .fake_hub import hub as hub
from .stored import LAYER, MODEL, D, contents, make_card, rewrite, weights

NAME = "org/Tiny"


@pytest.fixture
def store(tmp_path):
    """demo v1 and v2, v2 live for being the newest."""
    store = Store(tmp_path / "overlay", shipped=tmp_path / "shipped")
    store.publish(make_card(), weights(), 0.25)
    store.publish(make_card(), {LAYER: -weights()[LAYER]}, 0.5)
    return store


@pytest.fixture
def run(store, tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit code, stdout, stderr) of `midstream probe ...` on that store, in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MIDSTREAM_STORE", str(store.overlay))
    monkeypatch.setenv("MIDSTREAM_MODEL", NAME)
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return go


def told(result):
    code, out, err = result
    assert (code, err) == (0, ""), err
    return out


def refused(result, *says):
    code, out, err = result
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("midstream: ")]
    assert (code, out, len(lines)) == (2, "", 1) and "Traceback" not in err
    for part in says:
        assert part in lines[0]


# --- what is shown --------------------------------------------------------------------------------------------------


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


def header_of(text):
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


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


# --- promote and roll back ------------------------------------------------------------------------------------------


def test_promote_and_rollback(run, store):
    assert "v2 is kept" in told(run("probe", "promote", "demo", "v1"))
    assert store.live(MODEL) == {"demo": "v1"}
    assert json.loads(told(run("probe", "rollback", "demo", "--json"))) == {
        "probe": "demo",
        "live": "v2",
        "previous": "v1",
        "candidate": None,
    }
    assert store.live(MODEL) == {"demo": "v2"}
    told(run("probe", "rollback", "demo"))
    assert store.live(MODEL) == {"demo": "v1"}
    told(run("probe", "promote", "demo", "v1"))  # the one that is live: nothing to go back to is lost
    told(run("probe", "rollback", "demo"))
    assert store.live(MODEL) == {"demo": "v2"}


def test_what_live_json_says_of_others_stays(run, store):
    path = store.overlay / "live.json"
    path.write_text(json.dumps({"another/demo": "v9"}))
    told(run("probe", "promote", "demo", "v1"))
    assert json.loads(path.read_text()) == {
        "another/demo": "v9",
        f"{MODEL}/demo": "v1",
        f"{MODEL}/demo@previous": "v2",
    }
    assert sorted(p.name for p in store.overlay.iterdir()) == [".live.lock", "live.json", MODEL]


def test_a_version_that_does_not_hold_is_not_promoted(run, store):
    told(run("probe", "promote", "demo", "v2"))
    before = (store.overlay / "live.json").read_bytes()
    refused(run("probe", "promote", "demo", "v7"), "there is no probe tiny/demo v7")
    refused(run("probe", "promote", "../x", "v1"), "there is no probe")
    path = store.overlay / MODEL / "demo/v1/probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(run("probe", "promote", "demo", "v1"), "sha256", "restore it")
    assert (store.overlay / "live.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"fingerprint": "e" * 16}}, "model 'eeee"),
        ({"model": {"n_layers": 9}}, "number of layers 9"),
        ({"template_hash": "b" * 64}, "chat template"),
        ({"position_rule": "other/1"}, "position rule"),
    ],
)
def test_a_version_for_another_model_is_promoted_only_on_demand(run, store, changes, says):
    model = json.loads(make_card().model_dump_json())["model"]
    if "model" in changes:
        changes = {"model": model | changes["model"]}
    rewrite(store.overlay / MODEL / "demo/v1", **changes)
    refused(run("probe", "promote", "demo", "v1"), says, "--other-model")
    assert not (store.overlay / "live.json").exists()
    told(run("probe", "promote", "demo", "v1", "--other-model"))
    assert store.live(MODEL) == {"demo": "v1"}


def test_a_version_in_the_folder_of_another_model_is_not_promoted(run, store):
    model = json.loads(make_card().model_dump_json())["model"]
    rewrite(store.overlay / MODEL / "demo/v1", model=model | {"name": "org/Big"})
    refused(run("probe", "promote", "demo", "v1", "--other-model"), "its card is for 'org/Big'")


def test_promotion_leads_away_from_a_damaged_version_and_never_back(run, store):
    told(run("probe", "promote", "demo", "v2"))
    (store.overlay / MODEL / "demo/v2/probe.safetensors").write_bytes(b"")
    told(run("probe", "promote", "demo", "v1"))
    assert store.live(MODEL) == {"demo": "v1"}
    refused(run("probe", "rollback", "demo"), "sha256")
    assert store.live(MODEL) == {"demo": "v1"}


def test_live_json_that_names_a_lost_version_is_mended(run, store):
    (store.overlay / "live.json").write_text(json.dumps({f"{MODEL}/demo": "v9"}))
    told(run("probe", "promote", "demo", "v1"))
    assert store.live(MODEL) == {"demo": "v1"}


def test_nothing_to_go_back_to(run):
    refused(run("probe", "rollback", "demo"), "no earlier version", "midstream probe promote demo VERSION")


def test_two_at_once_do_not_lose_a_choice(run, store):
    store.overlay.joinpath(".live.lock").touch()
    with store.overlay.joinpath(".live.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(run("probe", "promote", "demo", "v1"), "another process is changing", "try again")
    assert store.live(MODEL) == {"demo": "v2"}


def test_a_reader_never_sees_half_a_choice(store):
    """Promotions and rollbacks without pause, while another thread reads: always one of the two, never an error."""
    promote(store, MODEL, "demo", "v1")
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(store.live(MODEL)["demo"])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        rollback(store, MODEL, "demo")
    done.set()
    reader.join(30)
    assert not reader.is_alive() and seen <= {"v1", "v2"} and seen


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "shipped", shipped=tmp_path / "none")
    store.publish(make_card(), weights(), 0.0)
    below_a_file = Store(tmp_path / "file" / "store", shipped=tmp_path / "shipped")
    with pytest.raises(ConfigInvalid, match="can't be written"):
        promote(below_a_file, MODEL, "demo", "v1")
    with pytest.raises(ConfigInvalid, match="read-only"):
        promote(Store(None, shipped=tmp_path / "shipped"), MODEL, "demo", "v1")


# --- the hub --------------------------------------------------------------------------------------------------------


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


def test_help_brings_no_torch():
    """Seconds that `midstream --help` need not wait for."""
    code = (
        "import sys, monitor.cli.probe, monitor.cli.lint; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_a_version_in_shadow_and_the_audit_rows_of_the_command(run, store, tmp_path):
    told(run("probe", "promote", "demo", "v1"))
    assert json.loads(told(run("probe", "shadow", "demo", "v2", "--json")))["candidate"] == "v2"
    assert store.live(MODEL) == {"demo": "v1"} and store.candidates(MODEL) == {"demo": "v2"}
    refused(run("probe", "shadow", "demo", "v1"), "is live")
    refused(run("probe", "shadow", "demo"), "--none")
    told(run("probe", "shadow", "demo", "--none"))
    assert store.candidates(MODEL) == {}
    audit = Audit(tmp_path / "state" / "midstream" / "audit.sqlite3")
    rows = [(r["actor"], r["path"], r["result"]) for r in audit.latest(10)[::-1]]
    audit.close()
    assert [r[:2] for r in rows] == [
        ("cli", f"{what}") for what in ("promote demo v1", "shadow demo v2", "shadow demo v1", "shadow demo none")
    ]
    assert [r[2].split(":")[0] for r in rows] == ["done", "done", "refused", "done"]
