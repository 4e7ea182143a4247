"""An observer's bounds: tokens, streams, prompts that wait, memory, and how much is one step or one batch."""

import asyncio

import numpy as np
import pytest

from monitor.errors import Overloaded, RequestInvalid
from monitor.observer.protocol import TooLong
from monitor.observer.session import SHORT
from monitor.observer.turns import Turns

from .fake_session import case as case
from .fake_session import entered, rows


def test_ids_that_are_no_tokens_are_refused_before_they_reach_a_batch(case):
    async def test(observer, session):
        stream = await observer.open([1])
        for wrong in (-1, 1000):
            with pytest.raises(RequestInvalid, match="between 0 and 999"):
                await stream.read([3, wrong])
        np.testing.assert_array_equal(await stream.read([3]), rows([3], 1))

    case(test)


def test_too_long(case):
    async def test(observer, session):
        with pytest.raises(TooLong, match="has 101 tokens, the observer reads at most 100"):
            await observer.open(range(101))
        stream = await observer.open(range(99))
        with pytest.raises(TooLong, match="has 101 tokens"):
            await stream.read([1, 2])
        assert (await stream.read([1])).shape == (1, 2)

    case(test, max_tokens=100)


def test_the_model_bounds_a_stream_too(case):
    async def test(observer, session):
        with pytest.raises(TooLong, match="at most 512"):
            await observer.open([1] * 513)

    case(test)


def test_bounds_on_streams_and_prompts_that_wait(case):
    async def test(observer, session):
        session.gate.clear()
        opening = [asyncio.create_task(observer.open([1])) for _ in range(2)]
        await entered(session)
        with pytest.raises(Overloaded, match="2 prompts are waiting"):
            await observer.open([1])
        session.gate.set()
        streams = list(await asyncio.gather(*opening))
        streams.append(await observer.open([1]))
        with pytest.raises(Overloaded, match="3 conversations"):
            await observer.open([1])
        streams[0].close()
        await observer.open([1])

    case(test, max_streams=3, max_opening=2)


def test_memory_is_bounded_and_comes_back(case):
    async def test(observer, session):
        first, second = await observer.open([1] * 64), await observer.open([1] * 60)
        assert observer.describe()["tokens"] == 128
        with pytest.raises(Overloaded, match="holds 128 tokens"):
            await observer.open([1])
        with pytest.raises(Overloaded, match="holds 128 tokens"):
            await first.read([1])
        assert (await second.read([1] * 4)).shape == (4, 2)
        second.close()
        assert (await first.read([1])).shape == (1, 2)  # refused before, and not harmed by it
        assert second.cache.data.size == 0
        assert observer.describe()["tokens"] == 128

    case(test, kv_tokens=128)


class Wants:
    def __init__(self, left, length=0):
        self.left, self.length = left, length


def test_turns():
    turns = Turns(max_step_tokens=64, max_batch_tokens=1024)
    answers, prompts = [Wants(1, 100) for _ in range(5)], [Wants(200), Wants(20), Wants(SHORT + 1)]
    waiting = [*prompts, *answers]
    assert turns.choose(waiting) == [(prompts[0], 64)]  # 64 tokens are a whole step
    assert turns.choose(waiting) == [(a, 1) for a in answers]
    assert turns.choose(waiting) == [(prompts[0], 64)]
    assert turns.choose(prompts[1:]) == [(prompts[1], 20), (prompts[2], SHORT + 1)]
    assert turns.choose(answers[:1]) == [(answers[0], 1)]
    assert turns.choose([]) == []


def test_a_batch_is_bounded_and_wastes_at_most_half():
    turns = Turns(max_step_tokens=64, max_batch_tokens=1024)
    short, long = [Wants(1, 10) for _ in range(20)], Wants(1, 900)
    assert len(turns.choose(short)) == 16  # 16 x 64 tokens of cache
    assert turns.choose([long, *short]) == [(long, 1)]
    assert turns.choose([*short[:4], long]) == [(s, 1) for s in short[:4]]
    assert len(turns.choose([Wants(40), Wants(9), Wants(9)])) == 2  # three rows of 40 for 58 tokens: too many
