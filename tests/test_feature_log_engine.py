"""The feature log at work in the embedded engine: what is kept equals transformers, and nobody notices."""

import threading

import numpy as np

from monitor.engines.embedded.attention import use_packed_attention
from monitor.engines.embedded.reread import Rereading
from monitor.traffic import find_records
from monitor.types import Phase, Turn

from .conftest import LAYER
from .feature_log import FLAG_ALL, Running, chat, close_to, feature_names, find_rows, hidden, running  # noqa: F401
from .test_records import until


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
