"""Feature logs for tests: one over a real traffic log and a reader that waits, and one in the embedded engine."""

import queue
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from monitor.api.sinks import Sinks
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.metrics import Metrics
from monitor.traffic import TrafficLog
from monitor.traffic.features import Chances, Events, FeatureLog, FeatureWriter, Origin, read_features
from monitor.types import Caller, GenerationRequest, Prompt, Sampling, Turn

from .conftest import LAYER, calibrated, publish
from .test_records import coverage, record, until

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


def find_rows(path, request_id):
    import sqlite3

    with sqlite3.connect(path) as database:
        return database.execute("SELECT q, feature FROM records WHERE request_id = ?", (request_id,)).fetchall()


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


def feature_names(one):
    return list(one.settings.features.glob("features-*"))
