"""A scripted upstream on a real socket: what it was asked is kept, and what it answers is bytes, pauses and faults."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

RESET, HANG = "reset", "hang"
"""Steps of an answer beside bytes and seconds: end by RST; say nothing more until the other side leaves."""


@dataclass
class Asked:
    """One request that came. left: when its connection was closed by the other side, on the monotonic clock"""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    left: float | None = None
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def json(self):
        return json.loads(self.body)


class FakeUpstream:
    """answer(asked) gives the steps of an answer; set it before a request comes. The connection then ends."""

    def __init__(self):
        self.asked = []
        self.connections = 0
        self.answer = lambda asked: json_answer({"error": {"message": "no script"}}, 500)
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._stop = asyncio.Event()
        self._working = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._loop.close()

    async def _serve(self):
        server = await asyncio.start_server(self._connection, sock=self._listener)
        await self._stop.wait()
        server.close()
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(self._working)

    async def _connection(self, reader, writer):
        self.connections += 1
        task = asyncio.current_task()
        self._working.add(task)
        try:
            asked = await self._read(reader)
            if asked is None:
                return
            answer = self.answer  # before anybody who waits for `asked` gives the next one
            self.asked.append(asked)
            leaving = asyncio.ensure_future(self._leaving(reader, asked))
            try:
                await self._play(answer(asked), writer, leaving)
            except ConnectionError:  # a write has found out before the reading did
                self._left(asked)
                raise
            finally:
                leaving.cancel()
        except (asyncio.CancelledError, ConnectionError):
            writer.transport.abort()
        finally:
            self._working.discard(task)
            writer.close()

    async def _read(self, reader):
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            method, path, _ = first.split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            return Asked(method, path, headers, body)
        return None

    async def _leaving(self, reader, asked):
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        self._left(asked)

    def _left(self, asked):
        asked.left = asked.left or time.monotonic()
        asked.closed.set()

    async def _play(self, steps, writer, leaving):
        for step in steps:
            if step == RESET:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return
            if step == HANG:
                await leaving
                return
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            else:
                await asyncio.wait({leaving}, timeout=step)
            if leaving.done():
                return


def head(status=200, kind="text/event-stream", **headers):
    lines = {"Content-Type": kind, "Connection": "close"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n"


def json_answer(content, status=200, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [head(status, "application/json", Content_Length=str(len(body)), **headers) + body]


def chunked(*pieces):
    """The pieces of a body whose end is marked, so that a cut can be told from it."""
    start = head().replace(b"Connection: close", b"Connection: close\r\nTransfer-Encoding: chunked")
    return [start, *(p if not isinstance(p, bytes) else b"%x\r\n" % len(p) + p + b"\r\n" for p in pieces), b"0\r\n\r\n"]


def event(data):
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


DONE = event(b"[DONE]")


def chat_chunk(delta, index=0, finish=None, **more):
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    own = {"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 7, "model": "far"}
    return event(own | {"choices": [choice]} | more)


def text_chunk(text, index=0, finish=None):
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    return event({"id": "cmpl-up", "object": "text_completion", "created": 7, "model": "far", "choices": [choice]})


def chat_stream(text, finish="stop", size=1):
    """The chunks of an answer, `size` characters each."""
    parts = [{"content": text[i : i + size]} for i in range(0, len(text), size)]
    role = chat_chunk({"role": "assistant", "content": ""})
    return [role, *(chat_chunk(d) for d in parts), chat_chunk({}, finish=finish), DONE]


def chat_whole(*messages, finish="stop", usage=None, **more):
    """A whole answer. messages: contents, or messages of their own"""
    own = [m if isinstance(m, dict) else {"role": "assistant", "content": m} for m in messages]
    choices = [{"index": i, "message": m, "logprobs": None, "finish_reason": finish} for i, m in enumerate(own)]
    body = {"id": "chatcmpl-up", "object": "chat.completion", "created": 7, "model": "far", "choices": choices}
    return body | {"usage": usage or {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}} | more
