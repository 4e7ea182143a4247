"""A fake application behind our edge, on a real socket in a process of its own: what it holds and does can be measured.

As a program: `python -m tests.web SETTINGS_AS_JSON` prints its port and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def whole(body: Any, extra: bytes = b"") -> bytes:
    """A request's bytes. body: bytes, or what to write as JSON; extra: header lines"""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(raw) + raw


def answer(raw: socket.socket) -> bytes:
    """Everything until the server closes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := raw.recv(65536):
            said += piece
    return said


def status(said: bytes) -> int | None:
    return int(said.split(b" ", 2)[1]) if said else None


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    """The time-out only guards against hanging."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_more(answers: Sequence[Any], clients: int) -> None:
    """Twice as many more as there are clients: at least one of them was asked after this was called."""
    n = len(answers) + 2 * clients
    until(lambda: len(answers) >= n, 120)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Fake:
    """POST anything: {"calls": n, ..}, or events if the body asks: {"events": n, "bytes": each, "every_s": pause}."""

    def __init__(self, registry: Any) -> None:
        self.registry, self.calls, self.gone = registry, 0, 0
        self.connections: set[Any] = set()
        self.most_buffered = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["path"] == "/metrics":
            from prometheus_client import generate_latest

            await self._answer(send, generate_latest(self.registry))
        elif scope["path"] == "/health":
            await self._answer(send, json.dumps(self._measured()).encode())
        else:
            await self._work(scope, receive, send)

    def _measured(self) -> dict[str, int]:
        return {
            "calls": self.calls,
            "gone": self.gone,
            "most_buffered": self.most_buffered,
            "connections": len(self.connections),
        }

    async def _work(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        asked = json.loads((await receive())["body"] or b"{}")
        if not isinstance(asked, dict) or "events" not in asked:
            said = {"calls": self.calls, "key": scope["state"]["midstream_key"], "headers": len(scope["headers"])}
            await self._answer(send, json.dumps(said).encode() + b" " * int(asked.get("bytes", 0)))
            return
        leaving = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        event = b"data: " + b"x" * asked["bytes"] + b"\n\n"
        for _ in range(asked["events"]):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            buffered = (c.transport.get_write_buffer_size() for c in self.connections if not c.transport.is_closing())
            self.most_buffered = max(self.most_buffered, *buffered, 0)
            await asyncio.wait({leaving}, timeout=asked["every_s"])
            if leaving.done():
                self.gone += 1
                return
        leaving.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, send: Any, body: bytes) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> None:
    import uvicorn

    from monitor.api.edge import Edge
    from monitor.config import load_settings
    from monitor.metrics import Metrics

    metrics = Metrics()
    edge = Edge.of(load_settings(**json.loads(sys.argv[1])), metrics)
    fake = Fake(metrics.registry)
    server = uvicorn.Server(uvicorn.Config(edge.around(fake), **edge.server_options(), lifespan="off"))
    fake.connections = server.server_state.connections
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    async def run() -> None:
        asyncio.get_running_loop().add_reader(sys.stdin, lambda: setattr(server, "should_exit", True))
        await server.serve(sockets=[listener])

    print(listener.getsockname()[1], flush=True)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(run())


class Web:
    """The program, running."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MIDSTREAM_")}
        command = [sys.executable, "-m", "tests.web", json.dumps(settings)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        # A connection for each request; one client, because making one reads certificates for 50 ms.
        self._client = httpx.Client(
            base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self._client.close()
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def post(self, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> httpx.Response:
        return self._client.post(path, json=body, **kwargs)

    def measured(self) -> dict[str, int]:
        return dict(self._client.get("/health").json())

    def limited(self, limit: str) -> int:
        return self.count(f'midstream_limited_total{{limit="{limit}"}}')

    def count(self, series: str) -> int:
        found = re.search("^" + re.escape(series) + r" (\S+)$", self._client.get("/metrics").text, re.M)
        return 0 if found is None else int(float(found[1]))

    def memory(self, name: str = "VmRSS") -> float:
        """MiB. VmRSS is now, VmHWM the most since `forget_peak`"""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def web(**settings: Any) -> Iterator[Web]:
    running = Web(settings)
    try:
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def official(server: Web, key: str) -> Iterator[tuple[Any, Any]]:
    """The clients of OpenAI and of Anthropic."""
    import anthropic
    import openai

    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as api,
        anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as claude,
    ):
        yield api, claude


if __name__ == "__main__":
    main()
