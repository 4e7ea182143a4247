"""The embedded engine behind both ports, as `serve` starts them: a policy that blocks every prompt, and an operator."""

import contextlib
import socket
import threading

import httpx
import torch
import uvicorn

from monitor.api.app import create_app
from monitor.api.door import admin_door
from monitor.api.edge import Edge
from monitor.api.openai import Service
from monitor.api.serve import Server, embedded
from monitor.api.sinks import Sinks, announce
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.metrics import Metrics
from monitor.probe import ProbeWeights

from .admin_port import BEARER, DATA_KEY, HELLO, KEY
from .conftest import LAYER, calibrated, publish

HARMFUL = {"model": "tiny-llama", "messages": HELLO["messages"], "max_tokens": 2}


def policy(file, mode, threshold=0.0):
    file.write_text(f"name: {mode}s\nprobes:\n  hair: {{prompt: {{mode: {mode}, threshold: {threshold}}}}}\n")
    return file


def server_settings(model, folder, **settings):
    """(live, settings) of a server with both ports, whose policy blocks every prompt."""
    blocks = ProbeWeights("hair", {LAYER: torch.zeros(model.d_model)}, 5.0)
    return publish(
        model,
        [(blocks, {"calibration": calibrated(0.0)})],
        folder / "store",
        policy=policy(folder / "policy.yaml", "block"),
        api_key=DATA_KEY,
        admin_key=KEY,
        admin_port=0,
        records=folder / "records.sqlite3",
        audit=folder / "audit.sqlite3",
        **settings,
    )


class Both:
    """The embedded engine behind both ports, as `serve` starts them, in a thread."""

    def __init__(self, model, folder, **settings):
        live, self.settings = server_settings(model, folder, **settings)
        self.said, self._up = [], threading.Event()
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            self.metrics = metrics = Metrics()
            edge = Edge.of(self.settings, metrics, lambda key: sinks.offenders.refused_for(key))
            door = stack.enter_context(admin_door(edge))
            sinks = Sinks(self.settings, metrics)
            stack.callback(sinks.close)
            engine = EmbeddedEngine(model, live, self.settings, sinks)
            stack.callback(engine.stop, 0.0)
            announce(model.name, live, lambda: 0.0, sinks)
            service = Service(engine, model.template, self.settings, frozenset({model.name}), 300)
            app = create_app(service, metrics, engine.readiness, edge)
            config = uvicorn.Config(app, timeout_graceful_shutdown=5, **edge.server_options())
            serving = embedded(engine, model.served())
            self._server = Server(config, engine, door.beside(serving, sinks, self._say))
            engine.start()
            self.data = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
            self.admin_url = f"http://127.0.0.1:{door.listener.getsockname()[1]}/admin/"
            self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
            self._thread.start()
            assert self._up.wait(20)
            self._stack = stack.pop_all()

    def _say(self, line):
        self.said.append(line)
        self._up.set()

    def ask(self):
        headers = {"Authorization": f"Bearer {DATA_KEY}"}
        return httpx.post(self.data, json=HARMFUL, headers=headers, timeout=60)

    def admin(self, method, path, **kwargs):
        return httpx.request(method, self.admin_url + path, headers=BEARER, timeout=60, **kwargs)

    def stop(self):
        """As a signal does it."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._stack.close()
