"""Live changes under load (T23): no request fails, each ends on the set it began with, and sets are bounded."""

import threading
import time

import pytest

from monitor.engines.embedded.sets import MOST_SETS
from monitor.errors import Overloaded, ProbeMismatch
from monitor.live import load_live
from monitor.traffic import find_records
from probes_store.store import Store

from .test_records import until
from .versions import MODEL, both, publish  # noqa: F401


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


def test_canaries_of_a_set_are_scored_once_also_of_the_first_and_of_one_just_tried(tiny, tmp_path):
    from monitor.config import load_settings
    from monitor.engines.embedded.engine import EmbeddedEngine

    from .conftest import Sink

    store, settings = Store(tmp_path, shipped=tmp_path / "none"), load_settings(store=tmp_path)
    publish(tiny, store, 1.0), publish(tiny, store, 2.0)
    first, second = (load_live(tiny.served(), store, settings, chosen={f"{MODEL}/hair": v}) for v in ("v1", "v2"))
    engine = EmbeddedEngine(tiny, first, settings, Sink())
    assert engine.check_canaries() < 1e-3
    engine.start()
    try:
        engine.try_out(second)
        engine.live = second
        assert engine._sets.current.verified and engine._sets.before.verified
    finally:
        engine.stop(0.0)


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
