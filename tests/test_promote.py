"""Promotion: which version is live, in shadow or gone back to; none that does not hold, and no half a choice."""

import fcntl
import json
import threading

import pytest

from monitor.audit import Audit
from monitor.errors import ConfigInvalid
from probes_store.promote import promote, rollback
from probes_store.store import Store

from .shelf import refused, run, store, told  # noqa: F401
from .stored import MODEL, make_card, rewrite, weights


def test_promote_and_rollback(run, store):
    assert "v2 is kept" in told(run("probe", "promote", "demo", "v1"))
    assert store.live(MODEL) == {"demo": "v1"}
    assert json.loads(told(run("probe", "rollback", "demo", "--json"))) == {
        "probe": "demo",
        "live": "v2",
        "previous": "v1",
        "candidate": None,
        "stopped": None,
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
