"""The admin port on a real socket over fake parts of a server, for tests."""

import asyncio
import http.client
import json
import socket
import threading
from collections import Counter

import pytest

from monitor.api.admin.app import Operations, create_admin
from monitor.api.admin.port import second_port
from monitor.audit import Audit
from monitor.config import load_settings
from monitor.metrics import Metrics
from monitor.offenders import Offenders

from .test_offenders import Clock

KEY, DATA_KEY = "the-admin-key-of-this-test", "a-data-key-of-this-test"
BEARER = {"Authorization": f"Bearer {KEY}"}
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
ID = "5195201b12261ffd95a249bdbca3e901"
ROUTES = [
    ("GET", "/admin/status"),
    ("GET", "/admin/policy"),
    ("POST", "/admin/policy/reload"),
    ("POST", "/admin/keys/reload"),
    ("GET", "/admin/keys"),
    ("GET", f"/admin/records/{ID}"),
    ("GET", "/admin/audit?limit=2"),
    ("GET", "/admin/offenders"),
    ("POST", "/admin/offenders/alice/clear"),
    ("POST", "/admin/scores"),
    ("GET", "/openapi.json"),
]
TOKEN = "&".join(f"{name}={KEY}" for name in ("token", "key", "api_key", "access_token", "admin_key", "authorization"))
ADDRESSES = ("X-Forwarded-For", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP")
FORGED = dict.fromkeys(ADDRESSES, "127.0.0.1") | {
    "Forwarded": "for=127.0.0.1;host=localhost",
    "X-Forwarded-Host": "localhost",
    "X-Original-URL": "/health",
}
PREFLIGHT = {
    "Origin": "https://evil.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}
OTHER_VERBS = ("PUT", "DELETE", "PATCH", "HEAD", "TRACE", "PROPFIND")


class Broken:
    """A part of the server, fake: says what was called, and fails when it is told to."""

    def __init__(self, calls):
        self.calls, self.error = calls, None

    def _called(self, what):
        self.calls.append(what)
        if self.error is not None:
            raise self.error


class FakePolicies(Broken):
    def reload(self):
        self._called("policy reload")
        return "strict"

    def describe(self):
        self._called("policy")
        return {"policy": "strict", "threshold": float("inf")}


class FakeKeys(Broken):
    def __init__(self, calls):
        super().__init__(calls)
        self.keys = {"alice": DATA_KEY}

    @property
    def names(self):
        self._called("keys")
        return tuple(self.keys)

    def reload(self):
        self._called("keys reload")
        return len(self.keys)

    def find(self, given):
        return next((name for name, key in self.keys.items() if key.encode() == given), None)


class FakeTracer(Broken):
    """Gives its first event at once and each later one when it is let; `closed`: the stream has been closed."""

    events = (
        {"position": 0, "token": "Hi", "phase": "prompt", "scores": {"demo": -1.5}},
        {"position": 1, "token": "\u2028\n", "phase": "response", "scores": {"demo": float("nan")}},
        {"verdict": "allow", "finish": "length", "readings": [{"probe": "demo", "value": None}]},
    )

    def __init__(self, calls):
        super().__init__(calls)
        self.let, self.closed, self.late = asyncio.Semaphore(100), threading.Event(), None

    async def trace(self, request_id, messages, max_tokens, temperature):
        self._called(("trace", messages, max_tokens, temperature))
        try:
            for event in self.events:
                yield event
                if self.late is not None:
                    raise self.late
                await self.let.acquire()
        finally:
            self.closed.set()


class AdminPort:
    """The admin port in a thread of its own, over fakes; `calls` is what reached them."""

    def __init__(self, folder, desk=None, probes=None, **settings):
        self.calls, self.clock, self.limited = [], Clock(), []
        self.audit = Audit(folder / "audit.sqlite3")
        self._outcomes = Counter()
        self.offenders = Offenders(Metrics().key_events, lambda event: None)
        self.policies, self.keys, self.tracer = (k(self.calls) for k in (FakePolicies, FakeKeys, FakeTracer))
        self.operations = Operations(
            self.engine,
            self.policies,
            self.keys,
            self.records,
            self.audit,
            self.offenders,
            self.tracer,
            probes=probes,
            desk=desk,
        )
        self.settings = load_settings(**settings)
        self.host = self.settings.admin_host
        self._listener = socket.create_server((self.host, 0))
        self.port = self._listener.getsockname()[1]
        self._up, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(20)

    def _count(self, outcome):
        self._outcomes[outcome] += 1

    def engine(self):
        self.calls.append("status")
        return {"engine": "fake"}

    def records(self, request_id):
        self.calls.append("records")
        return [{"request_id": request_id, "scores": [float("nan"), 1.5]}] if request_id == ID else []

    def _run(self):
        asyncio.run(self._main())

    async def _main(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = create_admin(self.operations, KEY, self.host, self._count, self.clock)
        async with second_port(app, self._listener, self.settings, self.limited.append):
            self._up.set()
            await self._end.wait()

    def stop(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()
        self.operations.aside.close()
        self.audit.close()

    def open(self, method, path, headers=BEARER, body=None, peer="127.0.0.1"):
        """The answer, unread."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20, source_address=(peer, 0))
        content = None if body is None else json.dumps(body) if isinstance(body, dict) else body
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, content, {"Connection": "close"} | kind | headers)
        return connection.getresponse()

    def ask(self, *args, **kwargs):
        """(status, JSON or None, headers)"""
        with self.open(*args, **kwargs) as answer:
            body = answer.read()
            kind = answer.headers.get_content_type()
            return answer.status, json.loads(body) if body and kind == "application/json" else body, answer.headers

    def status(self, *args, **kwargs):
        return self.ask(*args, **kwargs)[0]

    def let(self, n=1):
        """So many more events of the tracer."""
        for _ in range(n):
            self._loop.call_soon_threadsafe(self.tracer.let.release)

    def rows(self, limit=1000):
        return self.audit.latest(limit)[::-1]

    def outcomes(self, outcome):
        return self._outcomes[outcome]


@pytest.fixture
def port(tmp_path):
    one = AdminPort(tmp_path)
    yield one
    one.stop()


def events(answer):
    """Parsed as they come."""
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
