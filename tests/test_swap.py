"""Live changes (T23): live.json is followed without a restart; what does not verify is refused; nobody notices."""

import functools
import json
import sys
import threading
import time

import pytest
import torch

from monitor.api.admin.retraining import LINES, MAX_LINE
from monitor.audit import Audit
from monitor.engines.embedded.sets import MOST_SETS
from monitor.errors import Overloaded, ProbeMismatch
from monitor.live import load_candidates, load_live
from monitor.probe import ProbeWeights
from monitor.traffic import find_records
from probes_store import promote as promoting
from probes_store.store import Store

from .conftest import LAYER, calibrated, make_card
from .test_records import until
from .test_second_port import Both

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


# --- live.json ------------------------------------------------------------------------------------------------------


def test_a_change_by_another_process_is_noticed_audited_and_counted(both):
    assert both.ask().status_code == 400 and live(both) == {"hair": ("v1", "block")}
    promoting.promote(both.store, MODEL, "hair", "v2")
    until(lambda: reloads(both, "loaded") == 1)
    assert both.ask().status_code == 200 and live(both) == {"hair": ("v2", "block")}
    assert both.said[-1] == "probes in service: hair v2"
    promoting.rollback(both.store, MODEL, "hair")
    until(lambda: reloads(both, "loaded") == 2)
    assert both.ask().status_code == 400
    reloaded = [row for row in rows(both) if row[1] == "RELOAD"]
    assert reloaded == [
        ("store", "RELOAD", "probes: hair v2", "loaded"),
        ("store", "RELOAD", "probes: hair v1", "loaded"),
    ]


@pytest.mark.parametrize("fault", ["weights", "canary", "template", "live.json"])
def test_a_set_that_does_not_verify_is_refused_and_the_old_one_stays(both, tiny, fault):
    if fault == "template":
        publish(tiny, both.store, 2.0, template_hash="f" * 64)
    elif fault == "canary":
        canary = make_card(tiny, probe(tiny, 2.0)).canaries[0]
        wrong = canary.model_copy(update={"scores": tuple(s + 0.5 for s in canary.scores)})
        publish(tiny, both.store, 2.0, canaries=(wrong,))
    else:
        publish(tiny, both.store, 2.0)
    if fault == "weights":
        path = both.store.overlay / MODEL / "hair" / "v4" / "probe.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    text = json.dumps({f"{MODEL}/hair": "v4"})
    choose(both, text[:-1] if fault == "live.json" else text)
    until(lambda: reloads(both, "refused") == 1)
    assert live(both) == {"hair": ("v1", "block")} and both.ask().status_code == 400
    assert both.said[-1].startswith("probes: refused, the old ones stay: ")
    assert reloads(both, "loaded") == 0
    choose(both, json.dumps({f"{MODEL}/hair": "v2"}))  # and it goes on from there
    until(lambda: reloads(both, "loaded") == 1)
    assert reloads(both, "refused") == 1 and both.ask().status_code == 200


# --- an operator ----------------------------------------------------------------------------------------------------


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
        ("POST", "/admin/probes/hair/shadow", "200 shadow none"),
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


# --- candidates -----------------------------------------------------------------------------------------------------


def test_a_candidate_is_read_counted_and_recorded_and_does_nothing(both):
    both.admin("POST", "probes/hair/promote", json={"version": "v2"})
    both.admin("POST", "probes/hair/shadow", json={"version": "v1"})
    answer = both.ask()
    assert answer.status_code == 200 and answer.headers["x-midstream-decision"] == "allow"
    until(lambda: find_records(both.settings.log, answer.headers["x-midstream-request-id"]))
    (record,) = find_records(both.settings.log, answer.headers["x-midstream-request-id"])
    found = {(r["probe"], r["phase"]): r for r in record["readings"]}
    assert found["hair", "prompt"]["value"] == -5 and found["hair", "prompt"]["version"] == "v2"
    tried = found["hair@v1", "prompt"]
    assert (tried["value"], tried["version"], tried["mode"], tried["would_block"]) == (5, "v1", "shadow", True)
    assert record["verdict"] == "allow" and set(record["token_scores"]) == {"hair", "hair@v1"}

    def sample(name, **labels):
        return both.metrics.registry.get_sample_value(f"midstream_{name}", labels)

    assert sample("would_block_total", model=MODEL, probe="hair@v1", phase="prompt") == 1
    assert sample("request_score_count", probe="hair@v1", phase="prompt") == 1
    both.admin("POST", "probes/hair/shadow", json={"version": "v3"})
    assert sample("request_score_count", probe="hair@v1", phase="prompt") is None  # one candidate's series at a time
    assert sample("request_score_count", probe="hair", phase="prompt") == 1


def test_a_candidate_that_can_not_serve_is_left_out_and_told_of(both, tiny):
    publish(tiny, both.store, 2.0, template_hash="f" * 64)
    chosen = {f"{MODEL}/hair": "v2", f"{MODEL}/hair@candidate": "v4"}
    (both.store.overlay / "live.json").write_text(json.dumps(chosen))
    until(lambda: (reloads(both, "loaded"), reloads(both, "refused")) == (1, 1))
    assert live(both) == {"hair": ("v2", "block")} and "candidate hair v4 is left out" in both.said[-1]


def test_a_policy_can_not_name_a_candidate(both):
    both.admin("POST", "probes/hair/shadow", json={"version": "v3"})
    both.settings.policy.write_text("name: blocks\nprobes:\n  hair@v3: {prompt: {mode: block}}\n")
    refused = both.admin("POST", "policy/reload")
    assert refused.status_code == 422 and "of this model hair" in refused.json()["error"]["message"]


# --- under load -----------------------------------------------------------------------------------------------------


def test_30_changes_under_load_fail_no_request_and_each_record_names_one_version(both):
    both.settings.policy.write_text("name: blocks\nprobes:\n  hair: {prompt: {mode: flag, threshold: 0}}\n")
    assert both.admin("POST", "policy/reload").status_code == 200
    done, answers, lock = threading.Event(), [], threading.Lock()

    def client():
        while not done.is_set():
            answer = both.ask()
            with lock:
                answers.append((answer.status_code, answer.headers.get("x-midstream-request-id")))

    clients = [threading.Thread(target=client) for _ in range(6)]
    for one in clients:
        one.start()
    seconds = []
    for i in range(30):
        began = time.monotonic()
        what, body = ("rollback", {}) if i % 3 == 2 else ("promote", {"version": f"v{i % 3 + 2}"})
        assert both.admin("POST", f"probes/hair/{what}", json=body).status_code == 200
        seconds.append(time.monotonic() - began)
        time.sleep(0.02)
    done.set()
    for one in clients:
        one.join()
    value = {"v1": 5, "v2": -5, "v3": 1}
    assert {status for status, _ in answers} == {200}
    seen = []
    for _, request_id in answers:
        until(lambda request_id=request_id: find_records(both.settings.log, request_id))
        (record,) = find_records(both.settings.log, request_id)
        versions = {r["version"] for r in record["readings"]}
        assert len(versions) == 1 and record["coverage"]["unmonitored"] == 0
        assert record["readings"][0]["value"] == value[versions.pop()]
        seen.append(record["readings"][0]["version"])
    worst = max(seconds[2::3])
    print(
        f"\n30 changes under {len(answers)} requests, 0 failed; versions {sorted(set(seen))}; roll-back {worst:.3f} s"
    )
    assert len(set(seen)) > 1


def test_sets_are_bounded_and_those_that_nobody_runs_on_go(tiny, tmp_path):
    from monitor.config import load_settings
    from monitor.engines.embedded.sets import Sets

    store, settings = Store(tmp_path, shipped=tmp_path / "none"), load_settings(store=tmp_path)
    for bias in range(MOST_SETS + 1):
        publish(tiny, store, float(bias))
    lives = [load_live(tiny.served(), store, settings, chosen={f"{MODEL}/hair": f"v{i + 1}"}) for i in range(5)]
    sets = Sets(lives[0])
    running = [sets.current]
    for live in lives[1:MOST_SETS]:
        sets.put(live, running)
        running.append(sets.current)
    with pytest.raises(Overloaded, match=f"run on {MOST_SETS} sets"):
        sets.put(lives[-1], running)
    assert sets.current is running[-1]
    assert sets.of(lives[1], running) is running[1]  # a roll-back finds the set that is still held
    sets.put(lives[-1], running[1:])
    assert running[0] not in sets.held and sets.before is running[-1]


def test_a_sequence_ends_on_the_set_it_began_with(tiny, tmp_path):
    from monitor.config import load_settings
    from monitor.engines.embedded.engine import EmbeddedEngine
    from monitor.types import Caller, GenerationRequest, Sampling

    from .conftest import Sink
    from .test_engine import chat

    store, sink = Store(tmp_path / "store", shipped=tmp_path / "none"), Sink()
    settings = load_settings(store=tmp_path / "store")
    for bias in range(MOST_SETS + 2):
        publish(tiny, store, float(bias))
    sets = [
        load_live(tiny.served(), store, settings, chosen={f"{MODEL}/hair": f"v{i + 1}"}) for i in range(MOST_SETS + 2)
    ]
    engine = EmbeddedEngine(tiny, sets[0], settings, sink)
    engine.start()
    try:
        for i in range(MOST_SETS):
            if i:
                engine.try_out(sets[i])
                engine.live = sets[i]
            request = GenerationRequest(str(i), (chat(tiny, "hello"),), 1, Sampling(900), Caller())
            engine.submit(request, lambda delta: None)
        for i in range(MOST_SETS):
            engine.abort(str(i))
        for record in sink.wait(MOST_SETS):
            i = int(record.request_id)
            assert {r.version for r in record.readings} == {f"v{i + 1}"}
            assert {s for scores in record.token_scores.values() for s in scores} <= {float(i)}
        until(lambda: engine.describe()["active"] == 0)
        engine.try_out(sets[-1])  # those that nobody runs on have gone
        canary = sets[-2].probes[0].card.canaries[0].model_copy(update={"scores": (9.0,)})
        wrong = sets[-2].probes[0].card.model_copy(update={"canaries": (canary,)})
        from dataclasses import replace

        with pytest.raises(ProbeMismatch, match="canary"):
            engine.try_out(replace(sets[-2], probes=(replace(sets[-2].probes[0], card=wrong),)))
        assert engine.live is sets[MOST_SETS - 1]
    finally:
        engine.stop(0.0)


def test_candidates_of_the_store(tiny, tmp_path):
    store = Store(tmp_path, shipped=tmp_path / "none")
    publish(tiny, store, 1.0), publish(tiny, store, 2.0)
    assert store.live(MODEL) == {"hair": "v2"} and store.candidates(MODEL) == {}
    promoting.shadow(store, MODEL, "hair", "v1")
    assert (store.live(MODEL), store.candidates(MODEL)) == ({"hair": "v2"}, {"hair": "v1"})
    ((one,), refused) = load_candidates(tiny.served(), store)
    assert (one.name, one.candidate, refused) == ("hair@v1", True, [])
    choice = promoting.promote(store, MODEL, "hair", "v1")
    assert (choice.live, choice.previous, choice.candidate) == ("v1", "v2", None) and store.candidates(MODEL) == {}


# --- retraining as a process ----------------------------------------------------------------------------------------


def test_a_training_is_a_process_with_bounded_output_that_ends_with_the_server(tiny, tmp_path):
    import asyncio

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
            lambda name: newest[0], {}, lambda: None, lambda name: [sys.executable, "-c", script, name]
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
