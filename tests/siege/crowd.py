"""A crowd of clients: T8, 500 at once with hostile names, and T9, streams that are cut at random."""

import asyncio
import random
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

from ..attacks import IDS
from ..contract import CHAT, Server, address, asked, endless, expected, forced, prompt_reading, request, user
from .sending import ms, sampled

_OUR_ID = re.compile(rb"\r\nx-midstream-request-id: ([0-9a-f]{32})\r\n", re.IGNORECASE)


class Identities:
    """T8."""

    def test_500_at_once_with_hostile_ids_and_none_is_crossed(self, starred):
        """Every request has a prompt, and so a score, of its own; what its client calls it is somebody else's name."""
        n = 500
        texts = [f"request {i} " + chr(97 + i % 26) * (i % 37) for i in range(n)]
        taken = starred.ask(CHAT, {"max_tokens": 2}).id.encode()
        names = [*IDS, taken]
        before = len(starred.sink.records)

        async def one(i: int) -> bytes:
            reader, writer = await asyncio.open_connection(*address(starred))
            header = b"X-Request-Id: " + names[i % len(names)]
            writer.write(
                request(starred, CHAT, asked(CHAT, texts[i]) | {"max_tokens": 2}, header, b"Connection: close")
            )
            raw = await reader.read()
            writer.close()
            await writer.wait_closed()
            return raw

        async def everything() -> list[bytes]:
            return await asyncio.wait_for(asyncio.gather(*map(one, range(n))), 300)

        answers = asyncio.run(everything())
        found = [_OUR_ID.findall(raw) for raw in answers]
        assert all(len(ids) == 1 for ids in found), [
            a[:300] for a, ids in zip(answers, found, strict=True) if len(ids) != 1
        ]
        ids = [one_id.decode() for (one_id,) in found]
        assert len(set(ids)) == n and taken.decode() not in ids
        crossed, values = 0, set()
        for text, own, raw in zip(texts, ids, answers, strict=True):
            want, (record,) = expected(starred, user(text)), starred.records(own)
            reading, reference = prompt_reading(record), prompt_reading(want)
            values.add(round(reference.value, 3))
            crossed += abs(reading.value - reference.value) > 1e-3 or record.counted != want.counted
            assert int(raw.split(b" ", 2)[1]) == (400 if reference.action == "block" else 200), raw[:300]
        assert starred.idle() and len(starred.sink.records) == before + n
        print(f"T8: {n} at once, {len(values)} different scores, {crossed} crossed")
        assert crossed == 0 and len(values) > n / 5


class Disconnects:
    """T9."""

    @sampled(8)
    def test_a_cut_stream_is_aborted_and_recorded(self, starred, every):
        """200 streams cut at random tokens, half with FIN and half with RST."""
        chance = random.Random(9)
        cuts = [(chance.randrange(1, 60), i % 2 == 1) for i in range(200 // every)]
        before = len(starred.sink.records)
        with ThreadPoolExecutor(8) as pool:
            left = list(pool.map(lambda c: cut(starred, *c), cuts))
        records = [starred.records(own)[0] for own, _ in left]
        assert [r.finish for r in records] == ["aborted"] * len(cuts)
        assert all(r.coverage.response_tokens < 900 and r.coverage.unmonitored == 0 for r in records)
        assert starred.idle() and len(starred.sink.records) == before + len(cuts)
        began = time.monotonic()
        assert starred.ask(CHAT, {"max_tokens": 3} | forced(starred, 9)).finishes == {0: ["length"]}
        after = time.monotonic() - began
        latencies = [starred.sink.at[own] - at for own, at in left]
        print(f"T9: {len(cuts)} streams cut, {len(records)} aborts, {ms(latencies)}; next request {after * 1e3:.0f} ms")


def cut(server: Server, events: int, reset: bool) -> tuple[str, float]:
    """Read so many events of a long stream, then leave. (its id, when it was left)"""
    body = asked(CHAT) | endless(server) | {"stream": True, "max_tokens": 900}
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(request(server, CHAT, body))
        seen = b""
        while seen.count(b"data: ") < events:
            part = connection.recv(65536)
            assert part, seen
            seen += part
        at = time.monotonic()
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                continue  # closing with bytes unread would be an RST: read until the server closes its side
    found = _OUR_ID.search(seen)
    assert found is not None, seen
    return found[1].decode(), at
