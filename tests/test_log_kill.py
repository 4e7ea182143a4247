"""T16: kill -9 under streams. Whatever answer a client has to its last byte has its record in the log."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from monitor.traffic.database import opened
from monitor.traffic.tables import records

STREAMS = 50
BODY = b'{"model": "scripted", "prompt": "go", "max_tokens": %d, "stream": true}'


def start(where, required):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MIDSTREAM_")}
    name = "MIDSTREAM_RECORDS" if isinstance(where, Path) else "MIDSTREAM_LOG_URL"
    # However slow the machine is: an answer whose end waited in vain may lose its record where none is required.
    environment |= {name: str(where), "MIDSTREAM_LOG_REQUIRED": str(required), "MIDSTREAM_LOG_WAIT_S": "60"}
    return subprocess.Popen([sys.executable, "-m", "tests.scripted"], env=environment, stdout=subprocess.PIPE)


async def ask(port, n_tokens):
    """The request's id if its answer came to the last byte, else None."""
    body = BODY % n_tokens
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head + body)
        answer = await reader.read(-1)
    finally:
        writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    whole = head.startswith(b"HTTP/1.1 200") and rest.endswith(b"0\r\n\r\n") and b"[DONE]" in rest
    names = [line.partition(b": ")[2].decode() for line in head.split(b"\r\n") if line.startswith(b"x-midstream-requ")]
    return names[0] if whole else None


async def one_client(port, got, dice):
    while True:
        try:
            name = await ask(port, dice.randrange(1, 12))
        except OSError:  # the server is dead
            return
        if name is None:
            return
        got.append(name)


async def under_streams(port, process, dice):
    """Ids of the answers that came whole, until a kill at a random moment."""
    got = []
    clients = [asyncio.create_task(one_client(port, got, random.Random(dice.random()))) for _ in range(STREAMS)]
    while len(got) < STREAMS:  # everybody is at work
        assert not all(client.done() for client in clients), "no answer comes to its end"
        await asyncio.sleep(0.01)
    await asyncio.sleep(dice.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    await asyncio.gather(*clients)
    return got


def stored(where):
    """Whether the database is whole, and the ids in it."""
    fine = "ok"
    if isinstance(where, Path):
        with contextlib.closing(sqlite3.connect(where)) as database:
            (fine,) = database.execute("PRAGMA integrity_check").fetchone()
    with opened(where) as connection:
        return fine, set(connection.execute(select(records.c.request_id)).scalars())


def kill_again_and_again(where, rounds, required):
    """where: a file, or PostgreSQL's URL"""
    dice, delivered, ready = random.Random(16), 0, []
    for _ in range(rounds):
        began = time.monotonic()
        process = start(where, required)
        port = int(process.stdout.readline())
        ready.append(time.monotonic() - began)
        got = asyncio.run(under_streams(port, process, dice))
        assert process.wait(20) == -signal.SIGKILL
        process.stdout.close()
        fine, names = stored(where)
        assert fine == "ok"
        assert set(got) <= names, f"{len(set(got) - names)} of {len(got)} records are lost"
        delivered += len(got)
    print(f"{rounds} kills under {STREAMS} streams, required: {required}: 0 of {delivered} records lost, ", end="")
    print(f"ready again within {max(ready):.1f} s")


@pytest.mark.parametrize("required", [False, True])
def test_no_record_of_a_delivered_answer_is_lost(tmp_path, required):
    kill_again_and_again(tmp_path / "records.sqlite3", 2 + required, required)


@pytest.mark.attack
@pytest.mark.parametrize("required", [False, True])
def test_t16_fifty_kills(tmp_path, required):
    kill_again_and_again(tmp_path / "records.sqlite3", 25, required)
