"""T15 with an observer that fails, hangs or falls behind: without scores the fail mode decides."""

import asyncio
import threading

import pytest

from monitor.errors import MidstreamError, Overloaded
from monitor.observer.protocol import TooLong
from monitor.types import Action, Mode
from monitor.upstream.choice import Lag

from .cuts import bodies
from .fake_observer import STREAM, FakeObserver, Reply, proxying, rules
from .fake_upstream import chat_stream, chat_whole, head, json_answer

SAY = "one two three four five six seven"


def fails(kind):
    """An observer that fails from the third read on; the prompt's is the first."""
    observer, count = FakeObserver(), iter(range(10_000))

    def fault(ids):
        if next(count) < 2:
            return None
        if kind == "hangs":
            return asyncio.Event().wait()
        raise kind("no")

    observer.fault = fault
    return observer


@pytest.mark.parametrize("kind", ["hangs", MidstreamError, Overloaded, TooLong, RuntimeError], ids=str)
@pytest.mark.parametrize("fail_mode", ["open", "closed"])
@STREAM
def test_without_scores_the_fail_mode_decides(upstream, kind, fail_mode, stream):
    frames = chat_stream(SAY, size=4)
    slow = [head(), *(x for frame in frames for x in (frame, 0.02))]
    upstream.answer = lambda asked: slow if stream else json_answer(chat_whole(SAY))
    lag = Lag(tokens=8, seconds=0.3, pause_s=0.05)
    with proxying(upstream.url, observer=fails(kind), own_rules=rules(fail_mode=fail_mode), lag=lag) as proxy:
        response = proxy.chat(stream=stream)
        (record,) = proxy.records(response)
        assert record.verdict is Action.UNMONITORED and record.coverage.unmonitored > 0
        if fail_mode == "open":
            assert Reply(response).texts == {0: SAY} and record.finish == "stop"
            assert record.released_tokens == len(SAY)
            assert proxy.sink.metrics.registry.get_sample_value("midstream_fail_open_total") == 1
        else:
            assert record.finish == "unmonitored" and record.released_tokens < len(SAY)
            if stream:
                *chunks, last = bodies(response)
                assert last["error"]["code"] == "unavailable" and "[DONE]" not in chunks
                text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
                assert len(text) == record.released_tokens and SAY.startswith(text)
            else:
                assert response.status_code == 503 and response.headers["retry-after"] and "one" not in response.text
        assert proxy.idle()


@pytest.mark.parametrize("fail_mode", ["open", "closed"])
def test_more_text_than_the_lag_bound_while_it_reads_is_decided_by_the_fail_mode(upstream, fail_mode):
    """The first read waits until all of the answer has come."""
    observer, sent = FakeObserver(), threading.Event()
    count = iter(range(10_000))

    async def until_all_came():
        await asyncio.to_thread(sent.wait, 10)
        await asyncio.sleep(0.2)

    observer.fault = lambda ids: until_all_came() if next(count) == 1 else None
    frames = chat_stream("words " * 40, size=2)

    def answer(asked):
        yield head()
        yield from frames[:20]
        yield 0.3
        yield from frames[20:]
        sent.set()

    upstream.answer = answer
    lag = Lag(tokens=32, seconds=10, pause_s=0.05)
    with proxying(upstream.url, observer=observer, own_rules=rules(fail_mode=fail_mode), lag=lag) as proxy:
        response = proxy.chat(stream=True)
        (record,) = proxy.records(response)
        assert record.verdict is Action.UNMONITORED
        assert record.finish == ("stop" if fail_mode == "open" else "unmonitored")
        assert ("[DONE]" in response.text) is (fail_mode == "open")


def test_one_piece_larger_than_the_lag_bound_is_no_lag(upstream):
    upstream.answer = lambda asked: [head(), *chat_stream("words " * 40, size=1000)]
    with proxying(upstream.url, lag=Lag(tokens=16, pause_s=0.05)) as proxy:
        response = proxy.chat(stream=True)
        assert Reply(response).texts == {0: "words " * 40}
        assert proxy.records(response)[0].verdict is Action.ALLOW


@pytest.mark.parametrize(("slow_s", "answered"), [(0.005, True), (0.05, False)])
@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
def test_a_prompt_has_the_time_of_all_its_reads(upstream, path, slow_s, answered):
    """More than a hundred tokens are seven reads of 16 and more: four seconds. It takes half of one, or five."""
    observer = FakeObserver()
    observer.fault = lambda ids: asyncio.sleep(slow_s * len(ids))
    upstream.answer = lambda asked: json_answer(chat_whole("fine"))
    text = "words " * 16
    with proxying(upstream.url, observer=observer, lag=Lag(tokens=16, seconds=0.5)) as proxy:
        response = proxy.post(
            path, {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"input": text}
        )
        assert (response.status_code == 200) is answered, response.text
        assert answered or "retry-after" in response.headers


@pytest.mark.parametrize(("fail_mode", "status"), [("open", 200), ("closed", 400)])
def test_a_prompt_that_is_too_long_for_the_observer(upstream, fail_mode, status):
    observer = FakeObserver()

    def fault(ids):
        raise TooLong("too long", "messages")

    observer.fault = fault
    upstream.answer = lambda asked: json_answer(chat_whole("fine"))
    with proxying(upstream.url, observer=observer, own_rules=rules(fail_mode=fail_mode)) as proxy:
        asked = len(upstream.asked)
        response = proxy.chat()
        assert response.status_code == status and len(upstream.asked) - asked == (status == 200)
        assert status == 200 or response.json()["error"]["code"] == "context_length_exceeded"
        assert proxy.records(response)[0].coverage.prompt_scored == 0


def test_a_policy_that_only_flags_waits_for_nothing(upstream):
    """The observer never answers, and still everything goes out."""
    observer = fails("hangs")
    upstream.answer = lambda asked: [head(), *chat_stream(SAY, size=4)]
    lag = Lag(tokens=8, seconds=0.5, pause_s=0.05)
    with proxying(upstream.url, observer=observer, own_rules=rules(Mode.FLAG, "open"), lag=lag) as proxy:
        response = proxy.chat(stream=True)
        assert response.content == b"".join(chat_stream(SAY, size=4))
        assert proxy.records(response)[0].coverage.unmonitored > 0
