"""The circuit breaker (T15): when an upstream is left alone, and how it is found to be there again."""

import asyncio
import socket

import httpx
import pytest

from monitor.upstream.breaker import Breaker
from monitor.upstream.errors import Unreachable
from monitor.upstream.transport import Bounds, Upstream

from .fake_observer import Reply, proxying
from .fake_upstream import HANG, chat_whole, json_answer
from .web import until, whole

DOWN = json_answer({"error": {"message": "down"}}, 503)


def test_it_opens_after_failures_and_lets_one_try_after_each_pause():
    now = 0.0
    breaker = Breaker(2, 10.0, lambda: now)
    for _ in range(2):
        assert breaker.refuses() is None
        breaker.failed()
    assert (breaker.refuses(), breaker.state) == (10.0, "open")
    now = 10.0
    assert breaker.state == "half-open" and breaker.refuses() is None
    assert (breaker.refuses(), breaker.state) == (10.0, "open"), "one at a time"
    now = 19.5
    assert breaker.refuses() == 1.0
    now = 20.0
    assert breaker.state == "half-open" and breaker.refuses() is None, "of the first nothing was heard"
    now = 25.0
    breaker.failed()
    assert breaker.refuses() == 10.0
    now = 35.0
    assert breaker.refuses() is None
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.refuses() is None
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.refuses() is None, "not in a row"


def test_an_upstream_that_keeps_failing_is_left_alone(upstream):
    upstream.answer = lambda asked: DOWN
    with proxying(upstream.url, bounds=Bounds(retries=0, failures=2, pause_s=60)) as proxy:
        assert [proxy.chat().json()["error"]["message"] for _ in range(2)] == ["down"] * 2
        asked = len(upstream.asked)
        response = proxy.chat()
        assert response.status_code == 503 and 50 < int(response.headers["retry-after"]) <= 60
        assert len(upstream.asked) == asked
        assert httpx.get(proxy.url + "/ready").json()["upstream"] == "open"


def test_a_trial_that_takes_minutes_keeps_nobody_out(upstream):
    """An answer that is not streamed begins when it is whole; until then nothing is known of the upstream."""
    upstream.answer = lambda asked: DOWN
    with proxying(upstream.url, bounds=Bounds(retries=0, failures=1, pause_s=0.5)) as proxy:
        assert proxy.chat().status_code == 503
        until(lambda: proxy.upstream.state == "half-open")
        upstream.answer, asked = lambda asked: [HANG], len(upstream.asked)
        with socket.create_connection(("127.0.0.1", proxy.port)) as trial:
            trial.sendall(whole({"model": "far", "messages": [{"role": "user", "content": "go"}]}))
            until(lambda: len(upstream.asked) > asked)
            upstream.answer = lambda asked: json_answer(chat_whole("fine"))
            until(lambda: proxy.upstream.state == "half-open")
            assert Reply(proxy.chat()).texts == {0: "fine"}
            assert proxy.upstream.state == "closed" and upstream.asked[asked].left is None


def test_who_leaves_lets_no_other_one_try(upstream):
    """It was sent before the breaker opened, and a trial runs."""

    async def ask(far):
        async with far.send("POST", "/chat/completions", b"{}") as reply:
            return reply.status

    async def sent(far):
        upstream.answer, asked = lambda asked: [HANG], len(upstream.asked)
        task = asyncio.create_task(ask(far))
        while len(upstream.asked) == asked:
            await asyncio.sleep(0.01)
        return task

    now = 0.0

    async def run():
        nonlocal now
        far = Upstream(upstream.url, bounds=Bounds(retries=0))
        far._breaker = Breaker(1, 1.0, lambda: now)
        before = await sent(far)
        upstream.answer = lambda asked: DOWN
        assert await ask(far) == 503 and far.state == "open"
        now += 1.0
        assert far.state == "half-open"
        trial = await sent(far)
        before.cancel()
        await asyncio.wait([before])
        with pytest.raises(Unreachable, match="left alone"):
            await ask(far)
        trial.cancel()
        await asyncio.wait([trial])
        await far.close()

    asyncio.run(asyncio.wait_for(run(), 10))
