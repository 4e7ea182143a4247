"""Live changes (T23): live.json is followed without a restart; what does not verify is refused; a candidate tries."""

import json

import pytest

from monitor.live import load_candidates
from monitor.traffic import find_records
from probes_store import promote as promoting
from probes_store.store import Store

from .conftest import make_card
from .test_records import until
from .versions import MODEL, both, choose, live, probe, publish, reloads, rows  # noqa: F401

# --- live.json --------------------------------------------------------------------------------------------------------


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


# --- candidates -------------------------------------------------------------------------------------------------------


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
    choose(both, json.dumps(chosen))
    until(lambda: (reloads(both, "loaded"), reloads(both, "refused")) == (1, 1))
    assert live(both) == {"hair": ("v2", "block")} and "candidate hair v4 is left out" in both.said[-1]


def test_a_policy_can_not_name_a_candidate(both):
    both.admin("POST", "probes/hair/shadow", json={"version": "v3"})
    both.settings.policy.write_text("name: blocks\nprobes:\n  hair@v3: {prompt: {mode: block}}\n")
    refused = both.admin("POST", "policy/reload")
    assert refused.status_code == 422 and "of this model hair" in refused.json()["error"]["message"]


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
