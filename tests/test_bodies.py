"""Bodies: oversize and malformed ones are refused before they reach the application or an engine (T12)."""

import contextlib
import json
import time

import httpx
import pytest

from monitor.api.body import BodyBounds, Refused

from .conftest import calibrated
from .shapes import CHAT, CHUNKED, MB2, SHAPES, fuzzed, send_shape
from .web import percentile, web


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
