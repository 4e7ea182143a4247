"""The feature log at work in the embedded engine: who is kept, what is averaged, and that nobody notices."""

import math
import queue
import subprocess
import sys
import threading
from random import Random
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from monitor.api.features import eraser, feature_log
from monitor.api.sinks import Sinks
from monitor.config import load_settings
from monitor.engines.embedded.attention import use_packed_attention
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.reread import Rereading
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics
from monitor.traffic import TrafficLog, erase, erased_from, find_records
from monitor.traffic.features import (
    Chances,
    Events,
    FeatureLog,
    FeatureWriter,
    Origin,
    erase_features,
    read_features,
)
from monitor.traffic.features.sample import spans_of
from monitor.types import Action, Caller, GenerationRequest, Phase, Prompt, Sampling, Turn

from .conftest import LAYER, calibrated, publish
from .test_demo import Process
from .test_records import coverage, reading, record, until

ORIGIN = Origin("hub-commit:abc", "t", "p/1")
PROMPT = Prompt(tuple(range(10)), (Turn(1, 3), Turn(5, 10)), 0, "chat")


def hidden(model, ids, start, end, layer=LAYER):
    """transformers' own: the mean over [start, end) of what the block gives."""
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return states[layer + 1][0, start:end].double().mean(0).numpy()


def close_to(got, expected):
    """As near as float16 can be."""
    return np.allclose(got.astype(np.float64), expected, rtol=2e-3, atol=2e-3)


# --- which are kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Action.FLAG, Action.BLOCK])
def test_every_flag_and_block_is_kept(verdict):
    chances, chance = Chances(0.01, 1.0, 0.2), Random(1)
    kept = [chances.draw(record(verdict=verdict), chance) for _ in range(500)]
    assert {(k.q, k.reason) for k in kept} == {(1.0, "flagged")}
    assert 0 < sum(k.uniform for k in kept) < 20  # they are in the uniform slice no more often than others


@pytest.mark.parametrize(
    ("value", "threshold", "q"),
    [(1.0, 2.0, 0.35), (3.0, 2.0, 0.35), (0.9, 2.0, 0.05), (3.1, 2.0, 0.05), (1.0, None, 0.05), (None, 1.0, 0.05)],
)
def test_the_others_are_kept_with_the_probability_that_is_told(value, threshold, q):
    chances, chance, n = Chances(0.05, 1.0, 0.3), Random(7), 20_000
    one = record(readings=(reading(value=value, threshold=threshold),))
    kept = [k for k in (chances.draw(one, chance) for _ in range(n)) if k is not None]
    assert {k.q for k in kept} == {q}
    spread = 4 * math.sqrt(q * (1 - q) * n)
    assert abs(len(kept) - q * n) < spread
    uniform = [k for k in kept if k.uniform]
    assert abs(len(uniform) - 0.05 * n) < 4 * math.sqrt(0.05 * 0.95 * n)
    assert {k.reason for k in uniform} == {"uniform"} and {k.reason for k in kept if not k.uniform} <= {"near"}


def test_a_probability_is_never_above_one():
    assert Chances(0.8, 5.0, 0.9).draw(record(), Random(1)).q == 1.0


def test_weights_of_one_over_q_count_everybody_once():
    """Horvitz and Thompson: the sum of 1 / q estimates how many sequences there were."""
    chances, chance, total = Chances(0.05, 1.0, 0.3), Random(3), 0.0
    for i in range(20_000):
        verdict = Action.FLAG if i % 50 == 0 else Action.ALLOW
        kept = chances.draw(record(verdict=verdict, readings=(reading(value=float(i % 5)),)), chance)
        total += 0 if kept is None else 1 / kept.q
    assert abs(total - 20_000) < 1500


def test_what_is_averaged():
    one = record(coverage=coverage(prompt_tokens=10, prompt_scored=10, response_scored=4))
    assert spans_of(one, PROMPT) == {Phase.PROMPT: Turn(5, 10), Phase.RESPONSE: Turn(10, 14)}
    refused = record(coverage=coverage(prompt_tokens=10, prompt_scored=10, response_scored=0), finish="content_filter")
    assert spans_of(refused, PROMPT) == {Phase.PROMPT: Turn(5, 10)}


@pytest.mark.parametrize(
    "changes",
    [{"finish": "aborted"}, {"finish": "engine_error"}, {"coverage": coverage(unmonitored=1)}, {"route": "internal"}],
)
def test_what_is_not_whole_or_ours_is_not_kept(changes):
    assert spans_of(record(**changes), PROMPT) == {}


# --- waiting, reading, writing ----------------------------------------------------------------------------------------


class Slow:
    """A reader that answers when it is told to."""

    def __init__(self, value=1.0):
        self.layers, self.value, self.asked = (LAYER,), value, queue.Queue()

    def reread(self, ids, spans, layers, done):
        self.asked.put((ids, spans, layers, done))

    def answer(self, value=1.0):
        _, spans, layers, done = self.asked.get(timeout=20)
        done(None if value is None else np.full((len(spans), len(layers), 8), value, np.float32))


@pytest.fixture
def logged(tmp_path):
    """make(**how) -> a feature log over a real traffic log, with lists of what it told."""
    closed = []

    def make(size=4, rate=1.0, **how):
        told = SimpleNamespace(kept=[], dropped=[], seen=[], folder=tmp_path / "features")
        told.traffic = TrafficLog(tmp_path / "records.sqlite3", 1000, 1000, lambda n: None)
        events = Events(
            told.traffic.mark_features, told.kept.append, told.dropped.append, lambda *a: told.seen.append(a)
        )
        writer = FeatureWriter(told.folder, ORIGIN, events, 100, **how)
        told.log = FeatureLog(writer, Chances(rate, 1.0, 0.0), size, told.dropped.append, Random(1))
        closed.append(told)

        def offer(name, **changes):
            one = record(name, **({"coverage": coverage(prompt_tokens=10, prompt_scored=10)} | changes))
            told.traffic.put(one)
            told.log.offer(one, PROMPT, range(15))

        told.offer = offer
        return told

    yield make
    for told in closed:
        if not getattr(told, "over", False):
            told.log.close()
            told.traffic.close()


def finish(told):
    told.over = True
    told.log.close()
    told.traffic.close()


def test_a_full_queue_drops_and_counts_and_nobody_waits(logged, tmp_path):
    told, reader = logged(size=4), Slow()
    for i in range(10):
        told.offer(f"r{i}")  # nobody reads yet
    assert told.dropped == ["queue_full"] * 6 and told.log.depth == 4
    told.log.attach(reader)
    for value in (1.0, None, math.nan, 1e6):
        reader.answer(value)
    finish(told)
    assert sorted(told.dropped[6:]) == ["not_finite", "not_finite", "not_read"]
    got = read_features(told.folder)
    assert [(f.request_id, f.phase, f.n_tokens) for f in got] == [("r0", "prompt", 5), ("r0", "response", 4)]
    assert told.kept == ["uniform"]
    (kept,) = find_rows(tmp_path / "records.sqlite3", "r0")
    assert kept == (1.0, next(told.folder.glob("features-*")).name)
    assert find_rows(tmp_path / "records.sqlite3", "r9") == [(None, None)]


def find_rows(path, request_id):
    import sqlite3

    with sqlite3.connect(path) as database:
        return database.execute("SELECT q, feature FROM records WHERE request_id = ?", (request_id,)).fetchall()


def test_what_waits_when_the_server_ends_is_counted(logged):
    told = logged()
    told.log.attach(Slow())
    told.offer("r1")
    told.offer("r2")
    finish(told)
    assert told.dropped == ["not_read", "not_read"] and list(told.folder.glob("features-*")) == []


def test_without_its_record_a_feature_is_not_written(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.log.offer(record("nobody", coverage=coverage(prompt_tokens=10, prompt_scored=10)), PROMPT, range(15))
    reader.answer()
    finish(told)
    assert told.dropped == ["no_record"] and list(told.folder.glob("features-*")) == []


def test_tokens_that_are_missing_are_not_guessed(logged):
    told = logged()
    told.log.attach(Slow())
    told.log.offer(record(coverage=coverage(prompt_tokens=10, prompt_scored=10)), PROMPT, range(12))
    assert told.dropped == ["not_read"] and told.log.depth == 0


def test_another_process_erases_while_the_server_runs(logged, tmp_path):
    """Records first, then files: what the server has not written yet finds no record."""
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1")
    reader.answer()
    until(lambda: told.traffic.depth == 0)
    assert erased_from(tmp_path / "records.sqlite3", lambda engine: erase(engine, request_id="r1")) == 1
    assert erase_features(told.folder, request_id="r1") == 0
    finish(told)
    assert told.dropped == ["no_record"] and list(told.folder.glob("features-*")) == []


def test_a_disk_that_fails_costs_features_and_is_told(logged, capsys, monkeypatch):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    monkeypatch.setattr("monitor.traffic.features.writer.write_features", _no_space)
    told.offer("r1")
    reader.answer()
    finish(told)
    assert told.dropped == ["not_written"] and "no space" in capsys.readouterr().err


def _no_space(*_args):
    raise OSError(28, "no space left on device")


def test_erasing_reaches_what_waits_what_is_read_and_what_is_written(logged):
    told, reader = logged(flush_s=0.01), Slow()
    told.log.attach(reader)
    told.offer("r1", key="alice")
    reader.answer()
    until(lambda: told.kept == ["uniform"])
    told.offer("r2", key="alice")  # being read
    told.offer("r3", key="alice")  # waits
    told.offer("r4", key="bob")
    assert told.traffic.erase("alice") == 3
    assert told.log.erase("alice") == 2
    reader.answer()  # r2's
    reader.answer()
    until(lambda: len(told.kept) == 2)
    finish(told)
    assert {f.request_id for f in read_features(told.folder)} == {"r4"}
    assert told.dropped == []


def test_erased_while_it_waits_for_its_file(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1")
    told.offer("r1-1")
    reader.answer()
    reader.answer()
    assert told.log.erase(request_id="r1") == 0
    finish(told)
    assert list(told.folder.glob("features-*")) == []


def test_retention_is_the_logs(logged):
    told, reader = logged(flush_s=0.01, days=1.0, clock=lambda: 100_000.0), Slow()
    told.log.attach(reader)
    told.offer("old", created=1.0)
    reader.answer()
    until(lambda: told.kept == ["uniform"])
    finish(told)
    again = logged(days=1.0, clock=lambda: 100_000.0)  # at start, and every hour
    until(lambda: list(again.folder.glob("features-*")) == [])


def test_the_uniform_slice_is_seen_by_drift(logged):
    told, reader = logged(), Slow()
    told.log.attach(reader)
    told.offer("r1", verdict=Action.FLAG)
    reader.answer(2.0)
    finish(told)
    assert [(phase, layers, vectors.shape) for phase, layers, vectors in told.seen] == [
        (Phase.PROMPT, (LAYER,), (1, 8)),
        (Phase.RESPONSE, (LAYER,), (1, 8)),
    ]
    assert told.kept == ["flagged"]


# --- the embedded engine ----------------------------------------------------------------------------------------------


class Running:
    """The embedded engine as the server wires it, over the shared tiny model."""

    def __init__(self, model, probe, folder, **settings):
        calm = calibrated(1e6) if settings.pop("calm", True) else calibrated(-1e9)
        own = {"records": folder / "records.sqlite3", "features": folder / "features"} | settings
        self.live, self.settings = publish(model, [(probe, {"calibration": calm})], folder / "store", **own)
        self.model, self.metrics = model, Metrics()
        self.sinks = Sinks(self.settings, self.metrics)
        features = self.sinks.keep_features(self.settings, model.served())
        self.engine = EmbeddedEngine(
            model, self.live, self.settings, self.sinks, offer=None if features is None else features.offer
        )
        if features is not None:
            features.attach(self.engine.rereading)
        self.engine.start()

    def ask(self, prompt, name, n=1, **sampling):
        """(per choice: token ids, text, finish); blocks until the last."""
        deltas, answers = queue.Queue(), [[[], "", None] for _ in range(n)]
        how = {"max_tokens": 9, "temperature": 1.0, "seed": 5, "logprobs": 0} | sampling
        request = GenerationRequest(name, (prompt,), n, Sampling(**how), Caller("alice", "chat"))
        self.engine.submit(request, deltas.put)
        while any(finish is None for *_, finish in answers):
            delta = deltas.get(timeout=60)
            answer = answers[delta.index]
            answer[0] += [t.token_id for t in delta.tokens]
            answer[1] += delta.text
            answer[2] = delta.finish
        return answers

    def stop(self):
        until(lambda: self.sinks.features is None or self.sinks.features.depth == 0)
        self.engine.stop(0.0)
        self.sinks.close()

    @property
    def kept(self):
        return read_features(self.settings.features)


FLAG_ALL = {"modes": {"random": {"prompt": "flag", "response": "flag"}}, "calm": False}


@pytest.fixture
def running(tiny, random_probe, tmp_path):
    started = []

    def make(**settings):
        started.append(Running(tiny, random_probe, tmp_path, **settings))
        return started[-1]

    yield make
    for one in started:
        if one.engine.readiness() is None:
            one.stop()


def chat(model, text):
    return model.template.encode([{"role": "user", "content": text}])


def test_parity_with_transformers_for_prompts_and_answers(tiny, running):
    """Prompts longer than a pass of ours, three choices that share a prefill, neighbours in the batch."""
    one = running(log_features=True, **FLAG_ALL)
    prompts = {f"r{i}": chat(tiny, f"question {i} " * (1 + 12 * i)) for i in range(3)}
    answers = {name: one.ask(prompt, name, n=3) for name, prompt in prompts.items()}
    one.stop()
    got = one.kept
    assert len(got) == 3 * 3 * 2
    for feature in got:
        prompt, (ids, _, finish) = prompts[feature.request_id], answers[feature.request_id][feature.choice]
        n = len(prompt.token_ids)
        turn = prompt.turns[-1]
        span = (turn.start, turn.end) if feature.phase is Phase.PROMPT else (n, n + len(ids) - 1)
        assert finish == "length" and len(ids) == 9
        assert feature.n_tokens == span[1] - span[0]
        assert close_to(feature.vectors[0], hidden(tiny.module, [*prompt.token_ids, *ids], *span))
        assert (feature.q, feature.reason, feature.key, feature.layers) == (1.0, "flagged", "alice", (LAYER,))
        assert (feature.fingerprint, feature.template_hash) == (tiny.fingerprint, tiny.template.hash)
    assert one.metrics.registry.get_sample_value("midstream_features_kept_total", {"reason": "flagged"}) == 9
    for name in prompts:
        rows = find_rows(one.settings.records, name)
        assert [q for q, _ in rows] == [1.0] * 3 and {f for _, f in rows} <= {p.name for p in feature_names(one)}


def feature_names(one):
    return list(one.settings.features.glob("features-*"))


def test_what_training_pools_is_what_is_kept(tiny, running):
    from training.data import Row
    from training.harvest import Sample, harvest, make_plan

    one = running(log_features=True, feature_rate=1.0)
    text = "the same text " * 20
    one.ask(chat(tiny, text), "r1")
    one.stop()
    (prompt,) = [f for f in one.kept if f.phase is Phase.PROMPT]
    samples = [Sample.of(Row(text, 0, "a", "g"))]
    plan = make_plan(tiny, samples, [LAYER])
    features, _ = harvest(tiny, samples, one.settings.features.parent / "shards", plan).load("mean")
    assert close_to(prompt.vectors[0], features[0, 0])
    assert prompt.reason == "uniform"


def test_nothing_is_kept_when_it_is_off(tiny, running):
    one = running(**FLAG_ALL)
    one.ask(chat(tiny, "hello"), "r1")
    one.stop()
    assert one.sinks.features is None and not one.settings.features.exists()
    assert find_rows(one.settings.records, "r1") == [(None, None)]


def test_answers_and_records_are_the_same_with_it(tiny, random_probe, tmp_path):
    seen = []
    for on in (False, True):
        folder = tmp_path / str(on)
        one = Running(tiny, random_probe, folder, log_features=on, **FLAG_ALL)
        said = [one.ask(chat(tiny, f"question {i}"), f"r{i}", n=2) for i in range(4)]
        one.stop()
        records = [r for i in range(4) for r in find_records(one.settings.records, f"r{i}")]
        for r in records:
            for passing in ("created", "held_seconds"):
                r.pop(passing)
            for value in r["readings"]:
                value.pop("sample")
        counted = {
            s.name: s.value
            for m in one.metrics.registry.collect()
            for s in m.samples
            if s.name.startswith("midstream_tokens_scored_total") and s.labels["phase"] == "prompt"
        }
        seen.append((said, records, counted))
    assert seen[0] == seen[1]


def test_no_text_is_in_the_files(tiny, running):
    one = running(log_features=True, **FLAG_ALL)
    secret = "xylophone-4242 " * 8
    said = one.ask(chat(tiny, secret), "r1")
    one.stop()
    everything = b"".join(p.read_bytes() for p in feature_names(one))
    ids = np.array(chat(tiny, secret).token_ids)
    assert b"xylophone" not in everything and said[0][1].encode() not in everything
    assert not [t for t in (np.int32, np.int64, np.uint8) if ids.astype(t).tobytes() in everything]


def test_beside_others_it_gets_a_few_tokens_a_second(tiny):
    """A server that is never idle still keeps what it should."""
    use_packed_attention(tiny.module)
    prompt, came = chat(tiny, "a long one " * 12), []
    one = Rereading(tiny.module, lambda: (LAYER,), threading.Condition(), 512)
    assert len(prompt.token_ids) > 128 and not one.waits
    one.reread(prompt.token_ids, [prompt.turns[-1], Turn(1, 2)], one.layers, came.append)
    for _ in range(5):
        one.step(busy=True)
    assert one._reading.cache.length == 64
    one.step(busy=False)
    one.step(busy=False)
    assert len(came) == 1 and not one.waits
    for got, span in zip(came[0], (prompt.turns[-1], Turn(1, 2)), strict=True):
        assert np.allclose(got[0], hidden(tiny.module, prompt.token_ids, span.start, span.end), atol=1e-5)


def test_a_reading_that_fails_costs_nobody_else_anything(tiny, running, monkeypatch):
    def broken(_self, _tokens, _caches):
        raise RuntimeError("out of memory")

    one = running(log_features=True, feature_rate=1.0)
    monkeypatch.setattr("monitor.engines.embedded.reread.Streams.run", broken)
    one.ask(chat(tiny, "hello"), "r1")
    until(lambda: one.sinks.features.depth == 0)
    assert one.ask(chat(tiny, "hello"), "r2")[0][2] == "length"
    one.stop()
    assert one.metrics.registry.get_sample_value("midstream_features_dropped_total", {"cause": "not_read"}) == 2


def test_an_engine_that_stops_does_not_hang_on_what_it_should_read(tiny, running):
    one = running(log_features=True, feature_rate=1.0)
    one.ask(chat(tiny, "hello " * 100), "r1")
    one.engine.stop(0.0)
    one.sinks.close()
    lost = one.metrics.registry.get_sample_value("midstream_features_dropped_total", {"cause": "not_read"})
    assert lost + len({f.request_id for f in one.kept}) == 1


def test_erasing_takes_records_and_features(tiny, running):
    one = running(log_features=True, **FLAG_ALL)
    one.ask(chat(tiny, "hello"), "r1")
    until(lambda: one.sinks.features.depth == 0)
    assert eraser(one.settings, one.sinks.traffic, one.sinks.features)("alice", None) == 1
    one.stop()
    assert feature_names(one) == [] and find_records(one.settings.records, "r1") == []


def test_features_of_a_log_that_is_off_by_now_are_erased_too(tiny, random_probe, tmp_path):
    one = Running(tiny, random_probe, tmp_path, log_features=True, **FLAG_ALL)
    one.ask(chat(tiny, "hello"), "r1")
    one.stop()
    assert len(one.kept) == 2
    traffic = TrafficLog(one.settings.records, 10, 10, lambda n: None)
    assert eraser(one.settings, traffic, None)(None, "r1") == 1
    traffic.close()
    assert feature_names(one) == []


def test_without_pyarrow_the_server_does_not_start(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    settings = load_settings(log_features=True, features=tmp_path / "features", records=tmp_path / "r.sqlite3")
    with pytest.raises(ConfigInvalid, match=r"midstream\[parquet\]"):
        feature_log(settings, tiny.served(), SimpleNamespace(mark_features=None), Metrics())


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_server_keeps_and_the_command_erases(tiny, random_probe, tmp_path):
    publish(tiny, [(random_probe, {"calibration": calibrated(1e6)})], tmp_path / "store")
    config = tmp_path / "settings.yaml"
    paths = {name: tmp_path / name for name in ("store", "features", "records", "audit")}
    own = paths | {"model": tiny.module.config.name_or_path, "log_features": "true", "feature_rate": 1}
    config.write_text("".join(f"{name}: {value}\n" for name, value in own.items()))
    server = Process(tmp_path, "--config", str(config))
    try:
        body = {"model": tiny.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
        until(lambda: "\nmidstream_feature_queue_depth 0.0" in httpx.get(server.url + "/metrics", timeout=60).text)
    finally:
        server.stop()
    request_id = answer.headers["x-midstream-request-id"]
    kept = read_features(tmp_path / "features")
    assert [(f.request_id, f.phase, f.q, f.reason) for f in kept[:1]] == [(request_id, "prompt", 1.0, "uniform")]
    command = [sys.executable, "-m", "monitor.cli", "log", "erase", "--id", request_id, "--config", str(config)]
    erased = subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=120)
    assert erased.stdout == f"erased 1 records and {len(kept)} features\n", erased.stderr
    assert read_features(tmp_path / "features") == []


def test_behind_an_upstream_it_is_refused(tmp_path):
    from monitor.api.upstream.serve import serve

    settings = load_settings(upstream="http://127.0.0.1:1/v1", log_features=True, port=0, features=tmp_path)
    with pytest.raises(ConfigInvalid, match="the observer behind --upstream gives scores, never activations"):
        serve(settings)
