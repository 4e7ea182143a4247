"""An observer that scores by token (that of `*` is harmful, no other is), and a proxy with it on a real socket."""

import asyncio
import contextlib
import threading

import httpx
import numpy as np
import pytest
import torch
import uvicorn

from monitor.aggregate import Aggregation
from monitor.api.edge import Edge
from monitor.api.judging import Judging
from monitor.api.others import other_routes
from monitor.api.upstream.app import create_app
from monitor.api.upstream.routes import Proxy
from monitor.config import load_settings
from monitor.errors import Overloaded
from monitor.live import LiveProbes, ServedModel
from monitor.policy.rule import Policy, Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import ChatTemplate
from monitor.types import Mode, Phase
from monitor.upstream.choice import Lag
from monitor.upstream.engine import ObserverEngine, ObserverScorer
from monitor.upstream.transport import Bounds, Upstream

pytest.register_assert_rewrite("tests.contract")

from .conftest import Sink, tiny_tokenizer  # noqa: E402
from .contract import STREAM, Reply  # noqa: E402, F401  (imported from here, its assertions are rewritten)
from .web import until  # noqa: E402

# One for all, never collected with a socket open: a warning about that is an error here.
HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
HARMFUL, HARMLESS = 5.0, -5.0


class FakeStream:
    def __init__(self, observer, ids):
        self.scores, self._observer = observer.rows(ids), observer
        self.read_ids, self.closed = [], False

    async def read(self, token_ids):
        assert not self.closed and len(token_ids) <= self._observer.most
        await self._observer.work(token_ids)
        self.read_ids += token_ids
        return self._observer.rows(token_ids)

    def fork(self):
        assert not self.closed
        if not self._observer.has_room:
            raise Overloaded("no room for a fork")
        twin = FakeStream(self._observer, [])
        twin.scores, twin.read_ids = self.scores, list(self.read_ids)
        self._observer.streams.append(twin)
        return twin

    def close(self):
        self.closed = True


class FakeObserver:
    """fault: called with the token ids of every read, may raise or give an awaitable
    streams: every one, opened or forked; opened: how many prompts were read; has_room: for forks
    """

    columns = (("star", "v1"),)

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.template = ChatTemplate(self.tokenizer)
        self.model = ServedModel("tiny-observer", "0", "float32", 4, 4, self.template)
        (self.star,) = self.tokenizer("*", add_special_tokens=False)["input_ids"]
        self.streams, self.most = [], 256
        self.opened, self.has_room = 0, True
        self.fault = lambda ids: None

    def rows(self, ids):
        return np.array([[HARMFUL if i == self.star else HARMLESS] for i in ids], dtype=np.float32).reshape(-1, 1)

    async def work(self, ids):
        pause = self.fault(ids)
        if pause is not None:
            await pause

    async def open(self, token_ids):
        await self.work(token_ids)
        self.opened += 1
        self.streams.append(FakeStream(self, list(token_ids)))
        return self.streams[-1]


def rules(mode=Mode.BLOCK, fail_mode="closed", **more):
    both = (Rule("star", "v1", 0, p, mode, 0.0, Aggregation("max"), fail_mode, **more) for p in Phase)
    own = tuple(both)
    return {"chat": own, "raw": own}


class ProxyServer:
    """The proxy in this process, in front of an upstream."""

    def __init__(
        self, url, observer=None, own_rules=None, key=None, bounds=None, lag=None, terms=None, live=None, **settings
    ):
        chosen = load_settings(**settings)
        self.sink, self.observer = Sink(), observer or FakeObserver()
        bank = ProbeBank([ProbeWeights("star", {1: torch.zeros(4)}, 0.0)], 4)
        live = live or LiveProbes.under_rules(bank, own_rules or rules())
        if terms is not None:
            live = LiveProbes(live.probes, bank, {"default": Policy(live.rules, terms)}, live.file)
        self.upstream = Upstream(url, key, bounds or Bounds(retries=0))
        self.engine = ObserverEngine(
            self.observer, live, self.sink, lag or Lag(pause_s=0.05), lambda: self.upstream.state
        )
        judging = Judging(ObserverScorer(self.engine), self.observer.template, chosen, "far")
        proxy = Proxy(self.engine, self.upstream, chosen, judging)
        edge = Edge.of(chosen, self.sink.metrics)
        app = create_app(proxy, self.sink.metrics, edge, other_routes(judging, lambda: live))
        options = edge.server_options() | {"log_level": "error"}
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, timeout_graceful_shutdown=5, **options))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        await self._server.serve()
        await self.upstream.close()
        self.engine.stop()

    def start(self):
        self._thread.start()
        until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, path, body, **kwargs):
        sent = {"content": body} if isinstance(body, bytes) else {"json": {"model": "far"} | body}
        headers = {"Content-Type": "application/json"} | kwargs.pop("headers", {})
        return HTTP.post(self.url + "/v1" + path, headers=headers, **sent, **kwargs)

    def chat(self, text="go on", **more):
        return self.post("/chat/completions", {"messages": [{"role": "user", "content": text}]} | more)

    def records(self, response, n=1):
        """The request's records; each token of them is in exactly one place."""
        identity = response.headers["x-midstream-request-id"]
        until(lambda: len(self.sink.of(identity)) >= n)
        found = self.sink.of(identity)
        assert [r.index for r in found] == list(range(n))
        for record in found:
            c = record.coverage
            places = (c.prompt_scored, c.response_scored, c.unmonitored, c.final_unscored, c.not_computed)
            assert min(places) >= 0 and sum(places) == c.prompt_tokens + c.response_tokens
            assert c.final_unscored == 0, "everything is read before it goes out"
        return found

    def cut_before(self, p, response, stream):
        """An answer of "a", and of the `*` at position p (from 1 on) and all that follows nothing went out."""
        reply = Reply(response)
        assert (reply.texts, reply.finishes) == ({0: "a" * (p - 1)}, {0: ["content_filter"]})
        assert "*" not in reply.raw and reply.done is stream
        (record,) = self.records(response)
        assert (record.finish, record.released_tokens) == ("content_filter", p - 1)
        return reply

    def idle(self):
        until(lambda: self.engine.describe()["active"] == 0 and all(s.closed for s in self.observer.streams))
        return True


@contextlib.contextmanager
def proxying(url, **given):
    server = ProxyServer(url, **given)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def proxy(upstream):
    with proxying(upstream.url, key="operators-own-key") as server:
        yield server
