"""Words at a pace: an upstream that says them, and clients that note when they arrive. Each a process of its own.

`python -m tests.paced` serves; its first line is its port. A request's `metadata` says how many words, how many seconds
apart, and where in the text to begin. Every chunk says when it was sent, on the clock that all processes share.
`python -m tests.paced '{"port": 8000, "streams": 200, "words": 48, "every_s": 0.5, "seconds": 120}'` asks again and
again from so many connections, and prints what each got.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from .fake_upstream import DONE, chat_chunk, head
from .web import ROOT, whole

TEXT = """Bread needs little: flour, water, salt and time. Mix them in the evening with a spoon and cover the bowl
with a cloth, so that the dough does not dry. In the morning it has doubled and smells of apples. Dust
the table, turn the dough out, fold its corners to the middle like a letter and let it rest while the
oven grows hot. A pot with a lid keeps the steam, and steam gives the crust its shine. Bake it for half
an hour with the lid and a quarter without. It is done when it sounds hollow under your knuckles. Wait
until it has cooled before you cut it, though nobody ever does. The second loaf is always better than
the first, because by then you know how your flour drinks and how warm your kitchen is. Write down what
you did, the weights and the hours, and change one thing at a time. Rye makes it darker, honey makes it
softer, seeds make it crunch. Old bread is good for soup, for dumplings, or for the ducks."""
WORDS = TEXT.split()
PAUSE_S = 0.5  # after a refusal


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        raw = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        size = int(raw.partition("content-length:")[2].split("\r\n")[0])
        how = {k: float(v) for k, v in json.loads(await reader.readexactly(size))["metadata"].items()}
        writer.write(head() + chat_chunk({"role": "assistant", "content": ""}))
        begun = time.monotonic()
        for i in range(int(how["words"])):
            await asyncio.sleep(begun + i * how["every_s"] - time.monotonic())
            writer.write(
                chat_chunk({"content": WORDS[(int(how["begin"]) + i) % len(WORDS)] + " "}, said=time.monotonic())
            )
            await writer.drain()
        writer.write(chat_chunk({}, finish="stop") + DONE)
        await writer.drain()
    writer.close()


async def serve() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def paced() -> Iterator[int]:
    """The upstream's port."""
    process = subprocess.Popen([sys.executable, "-m", "tests.paced"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


async def ask(port: int, words: int, every_s: float, begin: int) -> dict[str, Any]:
    """first_s: until the first word; late_s: of each word, since it was said; gaps_s: between words; ended: how"""
    how = {"words": str(words), "every_s": str(every_s), "begin": str(begin)}
    turn = {"role": "user", "content": f"How do I bake a loaf of bread? Number {begin}, please."}
    request = whole({"model": "far", "stream": True, "messages": [turn], "metadata": how}, b"Connection: close\r\n")
    got: dict[str, Any] = {"begin": begin, "text": "", "ended": "broken", "late_s": [], "gaps_s": [], "first_s": None}
    last = begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        got["status"] = int((await reader.readline()).split()[1])
        async for line in reader:
            now = time.monotonic()
            if line.startswith(b"x-midstream-request-id"):
                got["id"] = line.split()[1].decode()
            if not line.startswith(b"data: {"):
                continue
            data = json.loads(line[6:])
            if "error" in data:
                got["ended"] = data["error"]["code"]
                continue
            (choice,) = data["choices"]
            got["ended"] = choice["finish_reason"] or got["ended"]
            if choice["delta"].get("content"):
                got["text"] += choice["delta"]["content"]
                if got["first_s"] is None:
                    got["first_s"] = now - begun
                else:
                    got["gaps_s"].append(now - last)
                last = now
                if "said" in data:  # of a chunk that a verdict has cut nothing unknown goes out
                    got["late_s"].append(now - data["said"])
    except ConnectionError:
        got["ended"] = "reset"
    writer.close()
    return got


async def client(
    number: int, ends: float, start_s: float, port: int, words: int, every_s: float
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    await asyncio.sleep(start_s)
    while time.monotonic() < ends or not found:
        found.append(await ask(port, words, every_s, 7 * number + 31 * len(found)))
        if found[-1].get("status") != 200:
            await asyncio.sleep(PAUSE_S)
    return found


async def clients(port: int, streams: int, words: int, every_s: float, seconds: float, ramp_s: float = 0.0) -> Any:
    """ramp_s: over which they begin, one after another"""
    ends = time.monotonic() + seconds
    each = (client(i, ends, ramp_s * i / streams, port, words, every_s) for i in range(streams))
    return [one for found in await asyncio.gather(*each) for one in found]


def expected(one: dict[str, Any], words: int) -> str:
    """The whole text that was to come."""
    return "".join(WORDS[(one["begin"] + i) % len(WORDS)] + " " for i in range(words))


@contextlib.contextmanager
def listening(**how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Clients at work; see `heard`. how: as for `clients`"""
    command = [sys.executable, "-m", "tests.paced", json.dumps(how)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def heard(process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """What they got, when they have all ended."""
    said, _ = process.communicate()
    assert process.returncode == 0
    return list(json.loads(said))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asyncio.run(clients(**json.loads(sys.argv[1])))))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve())
