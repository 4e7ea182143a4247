"""What a request may ask: oversize and malformed bodies (T12), overload (T13), rates, and the shape of each refusal."""

import contextlib
import json
import random
import select
import time

import anthropic
import httpx
import openai
import pytest

from monitor.api.body import BodyBounds, Refused
from monitor.api.edge import LIMITS, Edge, is_loopback
from monitor.api.limits import Limits, Rate
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics

from .conftest import calibrated
from .load import load
from .web import HEAD, official, percentile, status, until, web, whole

MB2 = 2 * 2**20
CHAT = {"model": "tiny-llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
EOS_OFF = {"logit_bias": {"256": -100}}
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def fake():
    with web() as server:
        yield server


@pytest.fixture
def engine(tiny, random_probe, serve):
    """The embedded engine; its edge is the same."""
    return serve(
        tiny,
        [(random_probe, {"calibration": calibrated(1e6)})],
        modes={"random": {"prompt": "block", "response": "block"}},
    )


# --- T12: what is refused, and with what


def chunks(body, size=65536):
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def chat(**fields):
    return json.dumps(CHAT | fields).encode()


def bomb():
    import gzip

    return gzip.compress(b" " * 50_000_000 + b"{}")


LONG = b'{"model": "tiny-llama", "x": "' + b"a" * MB2 + b'"}'
SHAPES = {
    "64 KiB of headers": (HEAD + b"X: " + b"a" * 65536 + b"\r\n\r\n", 431, "headers"),
    "5 MB of headers": (HEAD + b"X: " + b"a" * 5_000_000 + b"\r\n\r\n", 431, "headers"),
    "2 MB + 1": (whole(LONG[:MB2] + b"}"), 413, "body"),
    "2 MB + 1 in chunks": (chunks(LONG[:MB2] + b"}"), 413, "body"),
    "2 MB + 1, never sent": (HEAD + b"Content-Length: %d\r\n\r\n" % (MB2 + 1), 413, "body"),
    "endless chunks": (None, 413, "body"),
    "10,000 deep": (whole(b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), 400, "depth"),
    "10,000 deep, objects": (whole(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), 400, "depth"),
    "65 deep": (whole(b"[" * 65 + b"]" * 65), 400, "depth"),
    "2 million brackets": (whole(b"[" * MB2), 400, "json"),
    "a million messages": (whole(b'{"messages": [' + b"1," * 1_000_000 + b"1]}"), 400, "json"),
    "1,001 messages": (whole(chat(messages=CHAT["messages"] * 1001)), 400, "messages"),
    "1,001 in conversations": (whole(chat(messages=[CHAT["messages"] * 77] * 13)), 400, "messages"),
    "1,001 inputs": (whole(chat(input=["x"] * 1001)), 400, "messages"),
    "NaN": (whole(b'{"temperature": NaN}'), 400, "json"),
    "Infinity": (whole(b'{"temperature": Infinity}'), 400, "json"),
    "-Infinity": (whole(b'{"a": [-Infinity]}'), 400, "json"),
    "1e999": (whole(b'{"temperature": 1e999}'), 400, "json"),
    "1e+0999": (whole(b'{"temperature": 1E+0999}'), 400, "json"),
    "210 digits and e99": (whole(b'{"temperature": ' + b"9" * 210 + b"e99}"), 400, "json"),
    "310 digits and a point": (whole(b'{"temperature": ' + b"9" * 310 + b".5}"), 400, "json"),
    "a number of 5,000 digits": (whole(b'{"seed": ' + b"9" * 5000 + b"}"), 400, "json"),
    "half a pair, escaped": (whole(b'{"a": "\\ud800"}'), 400, "json"),
    "half a pair in a name": (whole(b'{"\\uDfff": 1}'), 400, "json"),
    "pairs in the wrong order": (whole(b'["\\ude00\\ud83d"]'), 400, "json"),
    "half a pair in raw bytes": (whole(b'{"a": "\xed\xa0\x80"}'), 400, "json"),
    "UTF-16": (whole(chat().decode().encode("utf-16")), 400, "json"),
    "a byte order mark": (whole(b"\xef\xbb\xbf" + chat()), 400, "json"),
    "overlong UTF-8": (whole(b'{"a": "\xc0\xaf"}'), 400, "json"),
    "no JSON": (whole(b"hello"), 400, "json"),
    "two bodies": (whole(chat() + chat()), 400, "json"),
    "a comment": (whole(b'{"a": 1} // x'), 400, "json"),
    "a bare NUL": (whole(b'{"a": "\x00"}'), 400, "json"),
    "gzip bomb": (whole(bomb(), b"Content-Encoding: gzip\r\n"), 415, "body"),
    "deflate after identity": (whole(chat(), b"Content-Encoding: identity\r\nContent-Encoding: br\r\n"), 415, "body"),
}


def send_shape(port_of, data):
    """(status, seconds from the last byte that mattered to the answer)"""
    with port_of() as raw, contextlib.suppress(ConnectionError):
        if data is None:
            raw.sendall(CHUNKED)
            piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(100_000):
                start = time.perf_counter()
                raw.sendall(piece)
                if select.select([raw], [], [], 0)[0]:
                    break
        else:
            start = time.perf_counter()
            with contextlib.suppress(ConnectionError):
                raw.sendall(data)
        said = raw.recv(65536)
        return status(said), time.perf_counter() - start
    raise AssertionError("reset before an answer")


def test_each_oversize_or_malformed_shape_is_refused_before_the_application(fake):
    fake.post(CHAT)
    calls, times = fake.measured()["calls"], {}
    fake.forget_peak()
    memory = fake.memory()
    for name, (data, wanted, limit) in SHAPES.items():
        before = fake.limited(limit)
        got, times[name] = send_shape(fake.connect, data)
        assert got == wanted, name
        assert fake.limited(limit) == before + 1, name
    grown = fake.memory("VmHWM") - memory
    assert fake.measured()["calls"] == calls
    assert grown <= 32
    slowest = sorted(times, key=times.get)[-3:]
    print(f"\nT12: {len(SHAPES)} shapes refused; peak memory +{grown:.1f} MiB; slowest: ", end="")
    print(", ".join(f"{name} {times[name] * 1e3:.0f} ms" for name in slowest))


def test_an_endless_body_is_not_read_for_ever(fake):
    """It has its 413, and goes on sending: what is thrown away has a bound too."""
    with fake.connect() as raw, pytest.raises(ConnectionError):
        raw.sendall(CHUNKED)
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        for _ in range(1000):
            raw.sendall(piece)


def fuzzed(n, seed=0):
    """Bodies that are no JSON in UTF-8, each one mutation or more away from one that is."""
    chance = random.Random(seed)
    valid = chat(stop=["a", "\u2028"], logit_bias={"5": 1.5}, stream=True, user='\U0001f600 \\ " /')
    found = []
    while len(found) < n:
        body = bytearray(valid)
        for _ in range(chance.randint(1, 4)):
            at, kind = chance.randrange(len(body)), chance.randrange(5)
            if kind == 0:
                del body[at:]
                body += chance.choice([b"", b"\x00", b"\xff", b"{"])
            elif kind == 1:
                body[at] = chance.randrange(256)
            elif kind == 2:
                body[at:at] = chance.choice([b'"', b"\\", b"]", b"NaN", b"\xed\xa0\x80", b"\\ud800", b",,", b"\x1f"])
            elif kind == 3:
                del body[at : at + chance.randint(1, 9)]
            else:
                body[at:at] = bytes(body[at : at + 30])
            if not body:
                break
        if body and not is_json(bytes(body)):
            found.append(bytes(body))
    return found


def is_json(body):
    try:
        json.dumps(json.loads(body.decode()), ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def test_500_fuzzed_bodies_are_refused_and_nothing_is_generated(engine):
    times, statuses = [], set()
    with httpx.Client(base_url=engine.url) as client:
        for body in fuzzed(500):
            start = time.perf_counter()
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            times.append(time.perf_counter() - start)
            statuses.add(response.status_code)
            assert response.json()["error"]["message"]
    assert statuses == {400}
    assert engine.sink.records == [] and engine.engine.steps == 0
    assert engine.metric("midstream_limited_total", limit="json") == 500
    assert engine.metric("midstream_rejected_total", status="400") == 500
    print(f"\nT12: 500 fuzzed bodies: 500 x 400, p99 {percentile(times, 0.99) * 1e3:.1f} ms, no step of the engine")


def test_the_same_shapes_never_reach_the_embedded_engine(engine):
    import socket

    for name, (data, wanted, _) in SHAPES.items():
        got, _ = send_shape(lambda: socket.create_connection(("127.0.0.1", engine.port), timeout=60), data)
        assert got == wanted, name
    assert engine.sink.records == [] and engine.engine.steps == 0
    assert engine.post("/v1/chat/completions", CHAT).status_code == 200


def test_what_is_allowed_passes():
    bounds = BodyBounds(64, 200_000, 1000)
    for body in (
        b"[" * 64 + b"]" * 64,
        b'"' + b"[" * 2_000_000 + b'"',
        b'"' + b'\\"[' * 600_000 + b'"',
        b'{"a": "' + b"\\\\" * 900_000 + b'"}',
        b'["\\ud83d\\ude00", "\\\\ud800", 1e308, -0.0, 1E-999]',
        json.dumps({"messages": [{"role": "user", "content": "[{,:"}] * 1000}).encode(),
        json.dumps([1] * 99_000).encode(),
        json.dumps("\u2028\U0001f600", ensure_ascii=False).encode(),
    ):
        bounds.check(body)


def test_brackets_in_texts_do_not_hide_or_add_depth():
    bounds = BodyBounds(8, 1000, 10)
    bounds.check(json.dumps({"a": "[[[[[[[[[[[[{{{{{{", "b": '\\"[[[[[[[[[[\\\\"', "[[[[[[[[[": 1}).encode())
    for body in (
        b'["\\\\", ' + b"[" * 8 + b"]" * 9,
        b'["\\"]]]]]]]]", ' + b"[" * 8 + b"]" * 9,
        b'["]]]]]]]]]]]", ' + b"[" * 8 + b"]" * 9,
    ):
        with pytest.raises(Refused) as caught:
            bounds.check(body)
        assert caught.value.limit == "depth"


WORST = {
    "brackets": b"[" * MB2,
    "objects": b'{"a":' * (MB2 // 5),
    "empty lists": b"[" + b"[]," * (MB2 // 3) + b"1]",
    "empty strings": b"[" + b'"",' * (MB2 // 3) + b"1]",
    "escapes": b'"' + b"\\u0041" * (MB2 // 6 - 1) + b'"',
    "pairs": b'"' + b"\\ud83d\\ude00" * (MB2 // 12 - 1) + b'"',
    "backslashes": b'"' + b"\\\\" * (MB2 // 2 - 1) + b'"',
    "quotes": b'"' + b'\\"' * (MB2 // 2 - 1) + b'"',
    "whole numbers": b"[" + b"1," * 199_990 + b"1]",
    "long numbers": b"[" + (b"9" * 4200 + b",") * 490 + b"1]",
    "floats": b"[" + b"1.5e1," * 190_000 + b"1]",
    "large floats": b"[" + b"1.5e300," * 190_000 + b"1]",
    "digits": b'"' + (b"9" * 199 + b",") * (MB2 // 200 - 1) + b'"',
    "exponents": b'"' + b"e00" * (MB2 // 3 - 1) + b'"',
    "small objects": b"[" + b'{"a":1},' * 60_000 + b"1]",
}


def test_the_worst_bodies_hold_the_event_loop_for_a_moment_only():
    bounds, times = BodyBounds(64, 200_000, 1000), {}
    for name, body in WORST.items():
        start = time.perf_counter()
        with contextlib.suppress(Refused):
            bounds.check(body)
        times[name] = (time.perf_counter() - start) * 1e3
    print("\nT12: judging 2 MiB, ms: " + ", ".join(f"{name} {t:.0f}" for name, t in times.items()))


# --- T13: overload


def overloaded(server, limit, clients, seconds):
    """Streams of `clients` clients that ask again and again, of which `limit` are let in at once."""

    def streams(clients, **how):
        return load(port=server.port, body=CHAT | {"stream": True, "max_tokens": 24} | EOS_OFF, clients=clients, **how)

    def p99_ms(found):
        return percentile([gap for one in found if one["status"] == 200 for gap in one["gaps_s"]], 0.99) * 1e3

    alone, full = streams(1, rounds=5), streams(limit, rounds=1)
    assert {one["status"] for one in alone + full} == {200}
    assert server.idle()
    n_before = len(server.sink.records)
    found = streams(clients, seconds=seconds)
    start = time.perf_counter()
    assert server.post("/v1/chat/completions", CHAT).status_code == 200
    normal_s = time.perf_counter() - start
    refused = [one for one in found if one["status"] != 200]
    accepted = {one["headers"]["x-midstream-request-id"] for one in found if one["status"] == 200}
    records = server.sink.wait(n_before + len(accepted) + 1)[n_before:]
    assert refused and accepted
    assert {(one["status"], int(one["headers"]["retry-after"]) > 0) for one in refused} == {(429, True)}
    assert accepted <= {r.request_id for r in records} and len(records) == len(accepted) + 1
    seen = [r.coverage for r in records]  # an answer of one token has none that was fed
    assert [c for c in seen if c.unmonitored or (c.response_tokens > 1 and not c.response_scored)] == []
    limited = server.metric("midstream_limited_total", limit="concurrency")
    assert limited == server.metric("midstream_rejected_total", status="429") == len(refused)
    print(
        f"\nT13: limit {limit}, {clients} clients, {seconds} s: {len(accepted)} answered, {len(refused)} refused, "
        f"refusals p99 {percentile([one['answered_s'] for one in refused], 0.99) * 1e3:.0f} ms; per token p99 "
        f"{p99_ms(found):.0f} ms, {p99_ms(full):.0f} ms at the limit without overload, {p99_ms(alone):.0f} ms alone; "
        f"normal again after {normal_s:.2f} s"
    )


def overload_server(tiny, random_probe, serve, limit):
    return serve(
        tiny,
        [(random_probe, {"calibration": calibrated(1e6)})],
        modes={"random": {"prompt": "block", "response": "block"}},
        max_concurrent=limit,
        max_sequences=limit,
        max_queue=limit,
    )


def test_three_times_the_capacity_is_refused_and_nothing_goes_unjudged(tiny, random_probe, serve):
    overloaded(overload_server(tiny, random_probe, serve, 8), 8, 24, 4)


@pytest.mark.attack
def test_three_times_128_for_a_minute(tiny, random_probe, serve):
    overloaded(overload_server(tiny, random_probe, serve, 128), 128, 384, 60)


# --- rates, offenders, shapes


def test_a_rate_for_each_key(tmp_path):
    from monitor.keys import create_key

    file = tmp_path / "keys.yaml"
    one, two = create_key(file, "one"), create_key(file, "two")
    # A day: the limit slides, so a slow machine that crosses a minute's end would find room for one more.
    with web(keys=str(file), rate_per_key="5/day") as server:
        got = [server.post({}, headers={"Authorization": f"Bearer {one}"}) for _ in range(8)]
        assert [r.status_code for r in got] == [200] * 5 + [429] * 3
        assert all(1 <= int(r.headers["retry-after"]) <= 86400 for r in got[5:])
        assert got[-1].json()["error"]["code"] == "rate_limited"
        assert server.post({}, headers={"Authorization": f"Bearer {two}"}).status_code == 200
        assert [httpx.get(server.url + "/health").status_code for _ in range(10)] == [200] * 10
        assert server.limited("rate") == 3 and server.count('midstream_rejected_total{status="429"}') == 3
        with official(server, one) as (api, claude):
            with pytest.raises(openai.RateLimitError):
                api.models.list()
            with pytest.raises(anthropic.RateLimitError) as caught:
                claude.post("/v1/messages", cast_to=object, body={})
        assert caught.value.body["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("text", ["", "many", "600", "5/fortnight", "5/second; 600/minute"])
def test_a_rate_that_is_none_is_refused_at_the_start(text):
    with pytest.raises(ConfigInvalid, match="600/minute"):
        Rate(text)


def test_concurrency_counts_who_is_being_answered_and_not_who_sends():
    with web(max_concurrent=2) as server:
        sending = [server.connect() for _ in range(5)]
        for raw in sending:
            raw.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")  # holds no place
        streams = [server.connect() for _ in range(2)]
        for raw in streams:
            raw.sendall(whole({"events": 10_000, "bytes": 10, "every_s": 0.05}))
            assert status(raw.recv(100)) == 200
        refused = server.post({})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "overloaded"
        assert server.post({}, "/v1/messages").json()["type"] == "error"
        assert httpx.get(server.url + "/metrics").status_code == 200
        for raw in streams + sending:
            raw.close()
        until(lambda: server.measured()["gone"] == 2)
        assert server.post({}).status_code == 200


async def call(app, key="", body=b"{}", path="/v1/models"):
    """(status, headers) of one request to the middleware."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "state": {"midstream_key": key}}
    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def test_a_repeat_offender_is_told_how_long():
    import asyncio

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    counts = []
    app = Limits(
        inner,
        BodyBounds(64, 1000, 10),
        max_body=1000,
        max_concurrent=1,
        rate=None,
        limited=counts.append,
        rejected=counts.append,
        offender={"bad": 41.2}.get,
    )
    assert asyncio.run(call(app, "good"))[0] == 200
    code, headers = asyncio.run(call(app, "bad"))
    assert (code, headers[b"retry-after"]) == (429, b"42") and counts == ["offender", 429]


def test_messages_get_anthropics_shape(fake):
    for data, wanted, kind in (
        (b"{", 400, "invalid_request_error"),
        (b'"' + b"a" * MB2 + b'"', 413, "request_too_large"),
    ):
        response = httpx.post(fake.url + "/v1/messages", content=data)
        said = response.json()
        assert response.status_code == wanted and said["type"] == "error" and said["error"]["type"] == kind
        openais = httpx.post(fake.url + "/v1/chat/completions", content=data).json()["error"]
        assert set(openais) == {"message", "type", "param", "code"} and openais["message"] == said["error"]["message"]


def test_every_limit_exists_before_its_first_event():
    metrics = Metrics()
    Edge.of(load_settings(), metrics).limited("json")
    values = {name: metrics.registry.get_sample_value("midstream_limited_total", {"limit": name}) for name in LIMITS}
    assert values == {name: float(name == "json") for name in LIMITS} and len(LIMITS) == 12


def test_a_server_for_others_without_a_key_says_so(capsys):
    for host, key, said in (
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", "correct-horse", False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("example.com", None, True),
    ):
        Edge.of(load_settings(host=host, api_key=key), Metrics())
        assert ("without a key" in capsys.readouterr().err) is said
    assert is_loopback("127.8.8.8") and not is_loopback("10.0.0.1")
