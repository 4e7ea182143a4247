"""A server whose engine is a script: real sockets, our routes, our edge and our log, and no model.

`python -m tests.scripted` serves in a process of its own, with settings from MIDSTREAM_* variables; prints its port.
"""

import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from monitor.api.app import create_app
from monitor.api.edge import Edge
from monitor.api.openai import Service
from monitor.config import load_settings
from monitor.errors import Overloaded
from monitor.metrics import Metrics
from monitor.traffic import Cipher, TrafficLog
from monitor.types import Delta, Opening, Prompt, Terms, Turn

from .test_records import record

STEP_S = 0.002


class FakeTemplate:
    def raw(self, text):
        ids = tuple(text.encode()) if isinstance(text, str) else tuple(text)
        return Prompt(ids, (Turn(0, len(ids)),), 0, "raw")

    def encode(self, messages):
        return self.raw("\n".join(m["content"] for m in messages))


class ScriptedEngine:
    """Answers `a`, `b`, `c`, ... a letter a step, max_tokens of them, to everybody at once."""

    model_name, max_model_len = "scripted", 100_000

    def __init__(self, observer, say=lambda n: chr(97 + n % 26)):
        self.submitted, self._observer, self._say = 0, observer, say
        self._active, self._gone, self._lock = [], set(), threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request, deliver):
        if self._stopped.is_set():
            raise Overloaded("the server is shutting down; try again later")
        with self._lock:
            self.submitted += 1
            self._active += [[request, i, 0, deliver] for i in range(len(request.prompts) * request.n)]

    def abort(self, request_id):
        with self._lock:
            self._gone.add(request_id)

    def readiness(self):
        return None

    def describe(self):
        return {"engine": "scripted", "active": len(self._active), "waiting": 0}

    def stop(self):
        self._stopped.set()
        self._thread.join(10)

    def _run(self):
        while not self._stopped.wait(STEP_S):
            with self._lock:
                active, gone = list(self._active), self._gone
                self._active, self._gone = [], set()
            left = [one for one in active if not self._step(one, one[0].id in gone)]
            with self._lock:
                self._active = left + self._active

    def _step(self, one, aborted):
        request, index, n, deliver = one
        opening = Opening(Terms(), ()) if n == 0 else None
        one[2] += 1
        finish = "aborted" if aborted else "length" if one[2] >= request.sampling.max_tokens else None
        if finish is None:
            deliver(Delta(index, self._say(n), (), 1, None, None, opening))
            return False
        own = record(request.id, index, finish=finish, key=request.caller.key, created=time.time())
        self._observer.record(own)  # first the record, then the last piece: as the real engines do
        deliver(Delta(index, self._say(n), (), 1, finish, own, opening))
        return True


class Scripted:
    """A server in this process. more: arguments of its TrafficLog"""

    def __init__(self, settings, say=lambda n: chr(97 + n % 26), **more):
        self.metrics, self.settings = Metrics(), settings
        self.log = TrafficLog(
            settings.log,
            settings.max_records,
            settings.record_queue,
            self.metrics.records_dropped.inc,
            days=settings.log_days,
            required=settings.log_required,
            wait_s=settings.log_wait_s,
            cipher=Cipher(settings.log_key) if settings.log_text else None,
            texts_dropped=self.metrics.texts_dropped.inc,
            **more,
        )
        self.engine = ScriptedEngine(self, say)
        self.edge = Edge.of(settings, self.metrics, log=lambda: self.log)
        service = Service(self.engine, FakeTemplate(), settings, frozenset({"scripted"}), 300)
        self.app = create_app(service, self.metrics, self.engine.readiness, self.edge)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, timeout_graceful_shutdown=2, **self.edge.server_options())
        )

    def record(self, one):
        self.metrics.record(one)
        self.log.put(one)

    def metric(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"midstream_{name}", labels) or 0.0

    def run(self):
        self.server.run(sockets=[self._listener])

    def close(self):
        self.engine.stop()
        self.log.close()
        self._listener.close()


@contextlib.contextmanager
def scripted(settings, **more):
    """Served in a thread; `client` asks it."""
    one = Scripted(settings, **more)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not one.server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=one.url, timeout=30) as one.client:
            yield one
    finally:
        one.server.should_exit = True
        thread.join(20)
        one.close()


if __name__ == "__main__":
    serving = Scripted(load_settings())
    print(serving.port, flush=True)
    serving.run()
    serving.close()
