"""Connections over real sockets: slow readers (T10), slow senders (T11), headers, pipelines, a client that leaves."""

import contextlib
import fcntl
import select
import selectors
import socket
import struct
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from .web import HEAD, answer, percentile, status, until, web, whole


@pytest.fixture(scope="module")
def quick():
    """Deadlines of a second or two."""
    with web(receive_deadline_s=1.0, write_deadline_s=1.5, max_connections=400) as server:
        yield server


# --- T10: slow readers


def tokens(server, n, every_s, gaps):
    """One normal client: reads n events and notes the time between them."""
    body = {"events": n, "bytes": 100, "every_s": every_s}
    with server.connect() as raw, raw.makefile("rb") as lines:
        raw.sendall(whole(body, b"Connection: close\r\n"))  # in one piece: its deadline is short
        last, seen = time.perf_counter(), 0
        for line in lines:
            if line.startswith(b"data: "):
                now = time.perf_counter()
                gaps.append(now - last)
                last, seen = now, seen + 1
    return seen


def normal_clients(server, clients, n, every_s):
    gaps = []
    with ThreadPoolExecutor(clients) as pool:
        seen = list(pool.map(lambda _: tokens(server, n, every_s, gaps), range(clients)))
    assert seen == [n] * clients
    return gaps


def unread(descriptor):
    """Bytes that have come and wait to be read."""
    return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0]


def t10(server, deadline_s, slow, normal, seconds, every_s=0.05):
    n = int(seconds / every_s)
    before, gone = server.limited("write"), server.measured()["gone"]
    alone = normal_clients(server, normal, int(min(seconds, 10) / every_s), every_s)
    memory = server.memory()
    poll, sent, closed, grown_at, stuck = select.poll(), {}, {}, {}, []
    for _ in range(slow):
        raw = server.connect()
        sent[raw.fileno()] = (raw, time.monotonic())
        raw.sendall(whole({"events": 100_000, "bytes": 16_000, "every_s": 0}))
        poll.register(raw, 0)  # only its end: a reset

    def watch():
        deadline = time.monotonic() + deadline_s + 60
        while len(closed) < slow and time.monotonic() < deadline:
            for descriptor in sent.keys() - closed.keys():
                waits = unread(descriptor)
                if waits > grown_at.get(descriptor, (0, 0.0))[0]:
                    grown_at[descriptor] = waits, time.monotonic()
            for descriptor, _ in poll.poll(200):
                poll.unregister(descriptor)
                closed[descriptor] = time.monotonic() - sent[descriptor][1]
                stuck.append(time.monotonic() - grown_at[descriptor][1])

    watching = threading.Thread(target=watch)
    watching.start()
    together = normal_clients(server, normal, n, every_s)
    watching.join()
    grown = server.memory() - memory
    held = server.measured()["most_buffered"]
    for raw, _ in sent.values():
        raw.close()
    assert len(closed) == slow
    assert server.limited("write") == before + slow
    assert min(closed.values()) >= deadline_s, "nobody is closed before the deadline"
    assert held <= 64 * 2**10 and grown <= 64
    until(lambda: server.measured()["gone"] == gone + slow)  # the application was told of each
    print(
        f"\nT10: {slow} slow readers closed after {min(closed.values()):.1f} to {max(closed.values()):.1f} s, "
        f"{min(stuck):.1f} to {max(stuck):.1f} s after the last byte that moved; "
        f"at most {held / 1024:.0f} KiB waited for one; memory +{grown:.1f} MiB; "
        f"{normal} normal clients' p99 per token {percentile(together, 0.99) * 1e3:.1f} ms, "
        f"alone {percentile(alone, 0.99) * 1e3:.1f} ms"
    )


def test_slow_readers_are_closed_and_cost_nobody_anything(quick):
    t10(quick, 1.5, slow=10, normal=10, seconds=3)


@pytest.mark.attack
def test_fifty_slow_readers_for_a_minute():
    with web() as server:
        t10(server, 30.0, slow=50, normal=50, seconds=60)


def test_a_whole_long_answer_waits_for_its_reader_in_pieces(quick):
    """Not a stream: 8 MiB at once, to a reader that pauses for less than the deadline, and to one that never reads."""
    with quick.connect() as raw:
        raw.sendall(whole({"bytes": 8 * 2**20}, b"Connection: close\r\n"))
        waits = -1
        while (now := unread(raw.fileno())) != waits or not now:  # until the server has to wait for us
            waits = now
            time.sleep(0.1)
        time.sleep(0.2)
        assert len(answer(raw)) > 8 * 2**20
    before = quick.limited("write")
    with quick.connect() as raw:
        raw.sendall(whole({"bytes": 8 * 2**20}, b"Connection: close\r\n"))
        poll = select.poll()
        poll.register(raw, 0)
        assert poll.poll(30_000), "it is closed although the application has long finished"
    assert quick.limited("write") == before + 1
    assert quick.measured()["most_buffered"] <= 64 * 2**10


def test_a_short_answer_to_nobody_does_not_hold_the_connection(quick):
    """The end of it fits into the buffers that would never be flushed: closing waits for them, within the deadline."""
    with quick.connect() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(whole({"bytes": 600_000}, b"Connection: close\r\n") * 1)
        until(lambda: quick.measured()["connections"] <= 1)


# --- T11: slow senders

SENDERS = {
    "silent": (b"", b""),
    "half header": (HEAD[:40], b""),
    "a byte now and then": (HEAD[:20], b"x"),
    "half body": (HEAD + b"Content-Length: 1000\r\n\r\n" + b"{" * 500, b""),
}


def t11(server, deadline_s, each, normal, every_s, body=None):
    """body: a normal request's"""
    before, calls = server.limited("receive"), server.measured()["calls"]
    chooser = selectors.DefaultSelector()
    opened = {}
    for first, again in SENDERS.values():
        for _ in range(each):
            began = time.monotonic()
            raw = server.connect()
            raw.sendall(first)
            raw.setblocking(False)
            opened[raw] = (began, again)
            chooser.register(raw, selectors.EVENT_READ)
    closed, statuses = [], []
    done = threading.Event()

    def attack():
        said = dict.fromkeys(opened, b"")
        sent_at = time.monotonic()
        while chooser.get_map() and time.monotonic() - sent_at < deadline_s + 60:
            for key, _ in chooser.select(0.1):
                raw = key.fileobj
                try:
                    piece = raw.recv(4096)
                except ConnectionError:
                    piece = b""
                said[raw] += piece
                if not piece:
                    closed.append(time.monotonic() - opened[raw][0])
                    statuses.append(status(said[raw]))
                    chooser.unregister(raw)
                    raw.close()
            if time.monotonic() - sent_at > every_s:
                sent_at = time.monotonic()
                for key in list(chooser.get_map().values()):
                    with contextlib.suppress(OSError):
                        key.fileobj.send(opened[key.fileobj][1])
        done.set()

    attacking = threading.Thread(target=attack)
    attacking.start()

    def one(_):
        start = time.perf_counter()
        with server.connect() as raw:
            raw.sendall(whole(body or {}, b"Connection: close\r\n"))  # in one piece: its deadline is short
            return status(answer(raw)), time.perf_counter() - start

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(normal)))
    attacking.join()
    assert done.is_set() and len(closed) == len(opened) == 4 * each
    assert [s for s, _ in results] == [200] * normal
    assert set(statuses) == {408}
    assert server.limited("receive") == before + 4 * each
    assert server.measured()["calls"] == calls + normal, "no half request reached the application"
    assert min(closed) >= deadline_s - 0.01, "but for the rounding of timers"
    print(
        f"\nT11: {len(closed)} slow senders closed after {min(closed):.1f} to {max(closed):.1f} s; {normal} normal "
        f"requests answered meanwhile, p99 {percentile([t for _, t in results], 0.99) * 1e3:.0f} ms"
    )


def test_slow_senders_are_closed_and_normal_requests_pass(quick):
    t11(quick, 1.0, each=75, normal=200, every_s=0.3)


@pytest.mark.attack
def test_three_hundred_slow_senders_at_the_default_deadline():
    with web() as server:
        t11(server, 10.0, each=75, normal=200, every_s=5)


# --- headers

BIG_HEADERS = {
    "64 KiB in one": HEAD + b"X-Big: " + b"a" * 65536 + b"\r\n\r\n",
    "5 MB in one": HEAD + b"X-Big: " + b"a" * 5_000_000 + b"\r\n\r\n",
    "a thousand small ones": HEAD + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 20) for i in range(1000)) + b"\r\n",
    "the path": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Big: " + b"a" * 200_000,
    "a chunk's extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * 200_000,
    "empty lines": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("name", BIG_HEADERS)
@pytest.mark.parametrize("piece", [None, 700])
def test_headers_beyond_the_bound_are_431_and_closed(quick, name, piece):
    before, calls = quick.limited("headers"), quick.measured()["calls"]
    data = BIG_HEADERS[name]
    with quick.connect() as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), piece or len(data)):
                raw.sendall(data[start : start + (piece or len(data))])
                if piece and select.select([raw], [], [], 0)[0]:
                    break
        assert status(answer(raw)) == 431
    assert quick.limited("headers") == before + 1 and quick.measured()["calls"] == calls


def test_headers_just_below_the_bound_pass_in_one_piece_or_in_many():
    data = whole({}, b"X-Big: " + b"a" * (16 * 1024 - len(HEAD) - 60) + b"\r\nConnection: close\r\n")
    with web() as server:
        for piece in (len(data), 1000, 11):
            with server.connect() as raw:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(data), piece):
                    raw.sendall(data[start : start + piece])
                assert status(answer(raw)) == 200


# --- keep-alive, pipelines, ends


def test_a_kept_connection_gets_its_deadline_anew(quick):
    with httpx.Client(base_url=quick.url) as client:
        for _ in range(4):
            assert client.post("/v1/chat/completions", json={"n": 1}).status_code == 200
            time.sleep(0.4)  # 1.6 s in all, more than the deadline


def test_half_of_a_second_request_does_not_end_the_first_ones_answer(quick):
    """12 events in 1.8 s, the deadline is 1 s: it is late only once the first is answered."""
    stream = whole({"events": 12, "bytes": 10, "every_s": 0.15})
    before = quick.limited("receive")
    with quick.connect() as raw:
        raw.sendall(stream + HEAD[:30])
        said = answer(raw)
    first, _, second = said.partition(b"0\r\n\r\n")
    assert first.count(b"data: ") == 12 and status(second) == 408
    assert quick.limited("receive") == before + 1


def test_pipelined_requests_are_answered_in_order_and_bounded(quick):
    with quick.connect() as raw:
        raw.sendall(whole({}) * 5 + whole({}, b"Connection: close\r\n"))
        said = answer(raw)
    calls = [int(part.split(b",")[0]) for part in said.split(b'"calls": ')[1:]]
    assert said.count(b"HTTP/1.1 200") == 6 and calls == list(range(calls[0], calls[0] + 6))
    calls = quick.measured()["calls"]
    with quick.connect() as raw:
        raw.sendall(whole({"events": 1000, "bytes": 10, "every_s": 0.1}) + whole({}) * 5000)
        answer(raw)
    until(lambda: quick.measured()["connections"] <= 1)
    assert quick.measured()["calls"] <= calls + 1


def test_a_client_that_leaves_is_noticed_also_behind_a_pipeline(quick):
    gone = quick.measured()["gone"]
    stream = whole({"events": 1000, "bytes": 10, "every_s": 0.1})
    for sent in (stream, stream + whole({}) * 2):
        with quick.connect() as raw:
            raw.sendall(sent)
            assert raw.recv(10)
    until(lambda: quick.measured()["gone"] == gone + 2)


def test_one_connection_too_many_is_closed_at_once():
    with web(max_connections=5) as server:
        held = []
        for _ in range(4):
            raw = server.connect()
            raw.sendall(whole({}))
            assert raw.recv(10)
            held.append(raw)
        kept = httpx.Client(base_url=server.url)  # the fifth
        assert kept.get("/health").json()["connections"] == 5
        for _ in range(3):
            with server.connect() as raw:
                assert answer(raw) == b""
        text = kept.get("/metrics").text
        assert 'midstream_limited_total{limit="connections"} 3.0' in text
        held.pop().close()
        until(lambda: kept.get("/health").json()["connections"] == 4)
        assert server.post({}).status_code == 200
        kept.close()
        for raw in held:
            raw.close()


def test_what_is_not_http_is_400_and_an_upgrade_is_not_taken(quick):
    with quick.connect() as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # TLS
        assert status(answer(raw)) == 400
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with quick.connect() as raw:
        raw.sendall(b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
        assert status(answer(raw)) == 200  # the fake's answer to any GET, not 101
