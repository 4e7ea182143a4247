"""How much may be asked: overload (T13), rates, places at once, offenders; and what each refusal says."""

import anthropic
import httpx
import openai
import pytest

from monitor.api.body import BodyBounds
from monitor.api.edge import LIMITS, Edge, is_loopback
from monitor.api.limits import Limits, Rate
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.metrics import Metrics

from .conftest import calibrated
from .overload import overloaded
from .web import HEAD, official, status, until, web, whole

# --- T13: overload


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


def test_more_prompts_than_ever_find_room_are_refused_for_good(tiny, random_probe, serve):
    """Not with 429: who tries again would do so for ever."""
    server = serve(tiny, [(random_probe, {})], max_sequences=2, max_queue=1)
    most, more = (server.post("/v1/completions", {"prompt": ["once"] * n, "max_tokens": 1}) for n in (3, 4))
    assert (most.status_code, more.status_code) == (200, 400), most.text
    assert "send 1 to 3" in more.json()["error"]["message"]


# --- rates, places, offenders


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


@pytest.mark.parametrize("text", ["", "many", "600", "5/fortnight", "5/second; 600/minute", "0/minute"])
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
