"""Clients that ask again and again, in a process of their own: hundreds of threads here would slow the server down.

As a program: `python -m tests.load '{"port": 8000, "clients": 8, "body": {..}, "seconds": 4}'`, or `rounds` instead of
`seconds`, prints what they got: [{"status", "headers", "answered_s", "gaps_s"}].
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from .web import ROOT, whole

PAUSE_S = 0.2  # after a refusal; Retry-After asks for more


async def ask(port: int, request: bytes) -> dict[str, Any]:
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    last = time.perf_counter()
    got: dict[str, Any] = {"status": status, "headers": headers, "answered_s": last - start, "gaps_s": []}
    event = b""
    async for line in reader:
        if line.startswith(b"data: "):
            event, now = line, time.perf_counter()
            got["gaps_s"].append(now - last)
            last = now
    writer.close()
    assert status != 200 or event == b"data: [DONE]\n"
    return got


async def client(port: int, request: bytes, rounds: int | None, seconds: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ends = time.monotonic() + seconds
    while len(found) != rounds and time.monotonic() < ends:
        found.append(await ask(port, request))
        if found[-1]["status"] != 200:
            await asyncio.sleep(PAUSE_S)
    return found


async def clients(port: int, clients: int, body: Any, rounds: int | None = None, seconds: float = 600.0) -> Any:
    request = whole(body, b"Connection: close\r\n")
    found = await asyncio.gather(*(client(port, request, rounds, seconds) for _ in range(clients)))
    return [one for each in found for one in each]


def load(**how: Any) -> list[dict[str, Any]]:
    """What the clients got, all of them. how: see the head of this file"""
    command = [sys.executable, "-m", "tests.load", json.dumps(how)]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=280, check=True).stdout
    return list(json.loads(said))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(clients(**json.loads(sys.argv[1])))))
