"""Live changes by an operator: promote, roll back, shadow, the shelf that is shown, and a training as a process."""

import functools
import json
import sys
import time

import pytest

from monitor.api.admin.retraining import LINES, MAX_LINE

from .conftest import LAYER, make_card
from .test_records import until
from .versions import MODEL, both, choose, live, probe, publish, reloads, rows  # noqa: F401


def test_promote_rollback_and_shadow_by_the_admin_port(both):
    promoted = both.admin("POST", "probes/hair/promote", json={"version": "v2"})
    assert (promoted.status_code, promoted.json()) == (200, {"probe": "hair", "live": "v2", "previous": "v1"})
    assert live(both) == {"hair": ("v2", "block")} and both.store.live(MODEL) == {"hair": "v2"}
    began = time.monotonic()
    back = both.admin("POST", "probes/hair/rollback", json={})
    print(f"\nroll-back: {1000 * (time.monotonic() - began):.0f} ms")
    assert back.json() == {"probe": "hair", "live": "v1", "previous": "v2"} and both.ask().status_code == 400
    tried = both.admin("POST", "probes/hair/shadow", json={"version": "v3"})
    assert tried.json() == {"probe": "hair", "candidate": "v3"}
    assert live(both) == {"hair": ("v1", "block"), "hair@v3": ("v3", "shadow")}
    gone = both.admin("POST", "probes/hair/shadow", json={"version": None})
    assert gone.json() == {"probe": "hair", "candidate": None} and live(both) == {"hair": ("v1", "block")}
    done = [(method, path, result) for actor, method, path, result in rows(both) if "probes/" in path]
    assert done == [
        ("POST", "/admin/probes/hair/promote", "200 promoted v2, v1 is kept"),
        ("POST", "/admin/probes/hair/rollback", "200 rolled back to v1, v2 is kept"),
        ("POST", "/admin/probes/hair/shadow", "200 shadow v3"),
        ("POST", "/admin/probes/hair/shadow", "200 shadow none, v3 is stopped"),
    ]
    assert (reloads(both, "loaded"), reloads(both, "refused")) == (4, 0)
    time.sleep(0.3)  # the file is as the server left it: nothing is loaded again
    assert reloads(both, "loaded") == 4


@pytest.mark.parametrize(
    ("what", "body", "says"),
    [
        ("promote", {"version": "v9"}, "there is no probe"),
        ("promote", {"version": "v4"}, "canary"),
        ("rollback", {}, "no earlier version"),
        ("shadow", {"version": "v1"}, "is live"),
        ("shadow", {"version": "v4"}, "canary"),
    ],
)
def test_what_is_refused_changes_neither_file_nor_service(both, tiny, what, body, says):
    canary = make_card(tiny, probe(tiny, 2.0)).canaries[0]
    publish(tiny, both.store, 2.0, canaries=(canary.model_copy(update={"scores": (9.0,) * len(canary.scores)}),))
    before = (both.store.overlay / "live.json").read_text()
    answer = both.admin("POST", f"probes/hair/{what}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "refused")
    assert says in answer.json()["error"]["message"]
    tried = {"promote": f"promote {body.get('version')}", "rollback": "roll back to the version before"}
    assert rows(both)[-1][3] == f"422 {tried.get(what, 'shadow ' + str(body.get('version')))}"
    assert (both.store.overlay / "live.json").read_text() == before and live(both) == {"hair": ("v1", "block")}


def test_who_has_seen_another_version_changes_nothing(both):
    """Two operators press `Roll back to v1`: the second one would bring the bad version back."""
    ask = functools.partial(both.admin, "POST")
    seen = {"to": "v1", "instead_of": "v2"}
    ask("probes/hair/promote", json={"version": "v2", "instead_of": "v1"})
    assert ask("probes/hair/rollback", json=seen).json() == {"probe": "hair", "live": "v1", "previous": "v2"}
    for what, body, says in (
        ("rollback", seen, "hair v2 is not live any more, v1 is"),
        ("rollback", {"to": "v1"}, "hair would go back to v2, not to v1"),
        ("promote", {"version": "v3", "instead_of": "v2"}, "hair v2 is not live any more, v1 is"),
        ("shadow", {"version": "v3", "instead_of": "v2"}, "hair v2 is not live any more, v1 is"),
    ):
        answer = ask(f"probes/hair/{what}", json=body)
        assert (answer.status_code, says in answer.json()["error"]["message"]) == (422, True), answer.text
        assert live(both) == {"hair": ("v1", "block")} and both.store.live(MODEL) == {"hair": "v1"}
    assert ask("probes/hair/rollback", json={}).json()["live"] == "v2"  # a script that says nothing goes back and forth


@pytest.mark.parametrize(
    ("what", "body"), [("promote", {}), ("promote", {"version": "../v1"}), ("shadow", {}), ("rollback", {"x": 1})]
)
def test_a_body_of_another_form_is_refused(both, what, body):
    assert both.admin("POST", f"probes/hair/{what}", json=body).status_code in (400, 422)


# --- the shelf --------------------------------------------------------------------------------------------------------


def test_the_shelf(both):
    both.admin("POST", "probes/hair/shadow", json={"version": "v3"})
    found = both.admin("GET", "probes").json()
    (hair,) = found["probes"]
    assert found["model"] == MODEL
    assert {k: hair[k] for k in ("name", "live", "previous", "candidate", "backlog")} == {
        "name": "hair", "live": "v1", "previous": None, "candidate": "v3", "backlog": 0,
    }  # fmt: skip
    assert hair["needed"] == 598
    assert (hair["serves"], hair["tries"], hair["missing"]) == ("v1", "v3", False)
    found = [(t["phase"], t["format"], t["stale"]) for t in hair["thresholds"]]
    assert found == [(phase, form, None) for form in ("chat", "raw") for phase in ("prompt", "response")], "few values"
    assert [(v["version"], v["live"], v["candidate"]) for v in hair["versions"]] == [
        ("v3", False, True), ("v2", False, False), ("v1", True, False),
    ]  # fmt: skip
    newest = hair["versions"][0]
    assert (newest["layers"], newest["kind"], newest["gate"], newest["labels"]) == ([LAYER], "harm", None, None)
    assert newest["metrics"] == {} and len(newest["sha256"]) == 64


def test_a_probe_that_starts_idle_is_on_the_shelf_and_can_be_promoted(both, tiny):
    publish(tiny, both.store, 1.0, name="beard", starts="idle")
    beard, hair = both.admin("GET", "probes").json()["probes"]
    assert [beard[k] for k in ("name", "live", "previous", "candidate", "serves", "missing")] == [
        "beard", None, None, None, None, False,
    ]  # fmt: skip
    assert [(v["version"], v["live"]) for v in beard["versions"]] == [("v1", False)] and hair["live"] == "v1"
    tried = both.admin("POST", "probes/beard/shadow", json={"version": "v1"})
    assert (tried.status_code, "no version of 'beard' is live" in tried.text) == (422, True)
    promoted = both.admin("POST", "probes/beard/promote", json={"version": "v1", "instead_of": None})
    assert promoted.json() == {"probe": "beard", "live": "v1", "previous": None}
    beard, _ = both.admin("GET", "probes").json()["probes"]
    assert (beard["live"], beard["serves"]) == ("v1", "v1") and "beard" in live(both)


@pytest.mark.parametrize("fault", ["refused", "missing"])
def test_the_shelf_tells_what_serves_beside_what_live_json_names(both, tiny, fault):
    """It opens whatever live.json names, so that one can roll back."""
    publish(tiny, both.store, 2.0, template_hash="f" * 64)
    named = "v4" if fault == "refused" else "v9"
    chosen = {"hair": named, "hair@previous": "v1", "hair@candidate": "v4"}
    choose(both, json.dumps({f"{MODEL}/{k}": v for k, v in chosen.items()}))
    until(lambda: reloads(both, "refused") == 1)
    (hair,) = both.admin("GET", "probes").json()["probes"]
    assert {k: hair[k] for k in ("live", "missing", "serves", "tries", "previous")} == {
        "live": named, "missing": fault == "missing", "serves": "v1", "tries": None, "previous": "v1",
    }  # fmt: skip
    assert [v["version"] for v in hair["versions"]] == ["v4", "v3", "v2", "v1"]
    wrong = both.admin("POST", "probes/hair/rollback", json={"to": "v3"})
    assert "hair would go back to v1, not to v3" in wrong.json()["error"]["message"], "not what is wrong with live.json"
    if fault == "missing":
        promoted = both.admin("POST", "probes/hair/promote", json={"version": "v2", "instead_of": named})
        assert promoted.json() == {"probe": "hair", "live": "v2", "previous": "v1"}
        named = "v2"
    back = both.admin("POST", "probes/hair/rollback", json={"to": "v1", "instead_of": named})
    assert back.status_code == 200 and both.store.live(MODEL) == {"hair": "v1"}
    (hair,) = both.admin("GET", "probes").json()["probes"]
    assert (hair["live"], hair["serves"], hair["missing"]) == ("v1", "v1", False)


# --- retraining as a process ------------------------------------------------------------------------------------------


def test_a_training_is_a_process_with_bounded_output_that_ends_with_the_server(tiny, tmp_path):
    import asyncio

    from monitor.api.admin.aside import Aside
    from monitor.api.admin.retraining import Retraining

    newest = ["v1"]
    script = (
        "import sys, time\n"
        f"[print(i, 'x' * {2 * MAX_LINE}) for i in range({2 * LINES})]\n"
        "sys.stderr.write('bar 1\\rbar 2\\rbar 3\\n')\n"
        "time.sleep(60 if 'long' in sys.argv else 0); sys.exit(12)\n"
    )

    async def run():
        training = Retraining(
            lambda name: newest[0], {}, Aside(), lambda: None, lambda name: [sys.executable, "-c", script, name]
        )
        assert training.describe()["state"] == "idle"
        assert (await training.start("hair"))["state"] == "running" and await training.start("hair") is None
        newest[0] = "v2"
        while training.describe()["state"] == "running":
            await asyncio.sleep(0.02)
        done = training.describe()
        assert (done["state"], done["exit_code"], done["candidate"], done["probe"]) == ("done", 12, "v2", "hair")
        assert len(done["lines"]) == LINES and max(map(len, done["lines"])) == MAX_LINE
        assert "bar 3" in done["lines"] and done["started"] <= done["ended"]
        await training.start("long")
        process = training._process
        await training.end()
        assert process.returncode is not None and training.describe()["state"] == "failed"
        assert training.describe()["candidate"] is None

    asyncio.run(run())
