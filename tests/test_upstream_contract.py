"""The HTTP contract through the proxy: in front of an unwatched server, with an observer that is the same model."""

import contextlib
import copy
import dataclasses

import httpx
import numpy as np
import pytest

from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.probe import ProbeWeights
from monitor.types import Prompt

from .conftest import LAYER, calibrated, publish, serving
from .fake_observer import ProxyServer

pytest.register_assert_rewrite("tests.contract")

from .contract import (  # noqa: E402
    BOTH,
    CHAT,
    STREAM,
    TEXT,
    Answers,
    Blocks,
    Conversations,
    Departures,
    Housekeeping,
    Ids,
    Server,
    asked,
    forced,
    zero_probe,
)


class WholeStream:
    """Reads everything again for each piece: slow, and right by definition."""

    def __init__(self, observer, ids):
        self._observer, self._ids = observer, list(ids)
        self.scores, self.closed = observer.rows(self._ids), False

    async def read(self, token_ids):
        self._ids += token_ids
        return self._observer.rows(self._ids)[len(self._ids) - len(token_ids) :]

    def fork(self):
        twin = copy.copy(self)
        twin._ids = list(self._ids)
        self._observer.streams.append(twin)
        return twin

    def close(self):
        self.closed = True


class WholeObserver:
    """transformers' own forward pass, in a copy: the upstream's thread uses the model itself."""

    def __init__(self, model, live):
        self._model, self._bank = dataclasses.replace(model, module=copy.deepcopy(model.module)), live.bank
        self.model, self.tokenizer, self.template = model.served(), model.tokenizer, model.template
        self.streams = []
        self.columns = tuple((p.card.name, p.card.version) for p in live.probes)

    def rows(self, ids):
        ((_, streams),) = residual_streams(self._model, [Prompt(tuple(ids), (), 0, "raw")], self._bank.layers)
        return np.asarray(score_streams(self._bank, streams), dtype=np.float32)

    async def open(self, token_ids):
        self.streams.append(WholeStream(self, token_ids))
        return self.streams[-1]


@pytest.fixture(scope="module")
def far(quiet, random_probe, tmp_path_factory):
    """The upstream: it blocks nothing."""
    with serving(quiet, [(random_probe, {})], tmp_path_factory.mktemp("far")) as server:
        yield server


@pytest.fixture
def start(quiet, far, tmp_path):
    with contextlib.ExitStack() as running:

        def started(probe, threshold):
            modes = {probe.name: {"prompt": "block", "response": "block"}}
            given = [(probe, {"calibration": calibrated(threshold)})]
            live, _ = publish(quiet, given, tmp_path / probe.name, modes=modes)
            proxy = ProxyServer(far.url + "/v1", observer=WholeObserver(quiet, live), live=live)
            proxy.start()
            running.callback(proxy.stop)
            return Server(proxy.url, quiet, live, proxy.sink, lambda: proxy.idle() and far.idle(), behind=far.sink)

        yield started


@pytest.fixture
def calm(start, random_probe):
    return start(random_probe, 1e6)


@pytest.fixture
def trigger(start, quiet):
    return start(ProbeWeights("trigger", zero_probe(quiet, LAYER), 1.0), 0.0)


@pytest.fixture
def starred(start, star_probe):
    return start(*star_probe)


class TestProxy(Answers, Ids, Blocks, Conversations, Departures, Housekeeping):
    @BOTH
    @STREAM
    def test_an_answer_of_one_token_is_final_and_unscored(self, calm, path, stream):
        """It is not: the observer reads every token before it goes out."""
        reply = calm.ask(path, forced(calm, 5) | {"max_tokens": 1, "stream": stream})
        assert (reply.texts, reply.finishes) == ({0: "a"}, {0: ["length"]})
        coverage = calm.records(reply.id)[0].coverage
        assert (coverage.response_tokens, coverage.response_scored, coverage.final_unscored) == (1, 1, 0)

    def test_a_prompt_of_token_ids(self, calm):
        """They are the upstream's: the observer may have others."""
        assert calm.post(TEXT, {"prompt": [70, 71, 72], "max_tokens": 2}).status_code == 400

    @BOTH
    def test_errors_have_an_id_too(self, calm, path):
        for body in ({"model": "gpt-4"}, {"max_tokens": -1}, {"messages": [], "prompt": []}, {"n": 999}):
            response = calm.post(path, asked(path) | body)
            assert 400 <= response.status_code < 500, response.text
            assert response.headers["x-midstream-request-id"], body

    @BOTH
    @STREAM
    def test_an_unknown_model_is_not_found(self, calm, path, stream):
        assert calm.post(path, asked(path) | {"model": "gpt-4", "stream": stream}).status_code == 404

    def test_other_methods_and_paths_do_nothing(self, calm):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            assert httpx.request(method, calm.url + CHAT).status_code == 405
