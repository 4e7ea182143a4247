"""Forks of a stream: they have read the same and go on by themselves, and the memory of each is counted."""

import asyncio

import numpy as np
import pytest

from monitor.errors import Overloaded
from monitor.observer.session import Cache

from .fake_session import SHAPE, entered, rows
from .fake_session import case as case


def test_forks_go_on_by_themselves(case):
    async def test(observer, session):
        stream = await observer.open([5, 6, 7])
        twins = [stream.fork(), stream.fork()]
        found = await asyncio.gather(stream.read([1]), twins[0].read([2, 3]), twins[1].read([4] * 70))
        for got, ids in zip(found, ([1], [2, 3], [4] * 70), strict=True):
            np.testing.assert_array_equal(got, rows(ids, 3))
        for twin in twins:
            np.testing.assert_array_equal(twin.scores, rows([5, 6, 7]))
        later = twins[0].fork()
        stream.close()
        np.testing.assert_array_equal(await twins[0].read([8]), rows([8], 5))
        np.testing.assert_array_equal(await later.read([9]), rows([9], 5))
        assert sum(map(sum, session.batches)) == 3 + 1 + 2 + 70 + 1 + 1, "what they share was read once"
        for twin in (*twins, later):
            twin.close()
        assert observer.describe() | {"steps": 0} == {
            "engine": "observer", "active": 0, "waiting": 0, "tokens": 0, "steps": 0,
        }  # fmt: skip

    case(test)


def test_the_memory_of_a_fork_is_its_own_and_comes_back(case):
    async def test(observer, session):
        stream = await observer.open([1] * 65)
        assert observer.describe()["tokens"] == 128
        twin = stream.fork()
        assert observer.describe()["tokens"] == 256
        with pytest.raises(Overloaded, match="holds 256 tokens"):
            stream.fork()
        assert observer.describe()["active"] == 2 and observer.describe()["tokens"] == 256
        await asyncio.gather(stream.read([2] * 63), twin.read([3] * 63))  # their pages have room for them
        with pytest.raises(Overloaded, match="holds 256 tokens"):
            await twin.read([3])
        stream.close()
        assert observer.describe()["tokens"] == 128
        np.testing.assert_array_equal(await twin.read([3]), rows([3], 128))
        assert observer.describe()["tokens"] == 192
        twin.close()
        twin.close()
        assert observer.describe()["tokens"] == observer.describe()["active"] == 0

    case(test, kv_tokens=256)


def test_forks_count_as_streams(case):
    async def test(observer, session):
        stream = await observer.open([1])
        stream.fork()
        with pytest.raises(Overloaded, match="2 conversations"):
            stream.fork()
        assert observer.describe()["tokens"] == 128

    case(test, max_streams=2)


def test_a_stream_that_reads_or_is_closed_has_no_forks(case):
    async def test(observer, session):
        stream = await observer.open([1])
        session.gate.clear()
        reading = asyncio.create_task(stream.read([2]))
        for _ in range(2):
            await entered(session)
        with pytest.raises(RuntimeError, match="once at a time"):
            stream.fork()
        session.gate.set()
        await reading
        twin = stream.fork()
        stream.close()
        with pytest.raises(RuntimeError, match="not after it is closed"):
            stream.fork()
        await asyncio.to_thread(observer.stop)
        with pytest.raises(Overloaded, match="shutting down"):
            twin.fork()

    case(test)


def filled(value, n):
    return np.full((2, SHAPE.n_blocks, n, SHAPE.kv_heads, SHAPE.head_dim), value, np.float32)


def values(cache):
    return [float(v) for v in cache.data[0, 0, 0, : cache.length, 0]]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_cache_writes_into_what_another_has_read(first):
    """The page has room: whoever goes on first would write where the others do."""
    mine = Cache(SHAPE)
    mine.append(filled(1, 3))
    caches = [mine, mine.fork(), mine.fork()]
    assert all(np.shares_memory(mine.data, cache.data) for cache in caches), "a fork copies nothing"
    order = caches[first:] + caches[:first]
    for i, cache in enumerate(order):
        cache.append(filled(10 + i, 2))
    for i, cache in enumerate(order):
        cache.append(filled(20 + i, 1))
        assert values(cache) == [1, 1, 1, 10 + i, 10 + i, 20 + i]
        assert not any(np.shares_memory(cache.data, other.data) for other in caches if other is not cache)
    order[0].clear()
    assert values(order[1]) == [1, 1, 1, 11, 11, 21]


def test_what_every_prompt_begins_with_is_nobodys_to_write(case):
    async def test(observer, session):
        first = await observer.open([1, 2, 3, 4])
        twin, second = first.fork(), await observer.open([1, 2, 3, 5])
        for stream, ids in ((twin, [6]), (first, [7, 8]), (second, [9])):
            np.testing.assert_array_equal(await stream.read(ids), rows(ids, 4))
        begun = observer._begun.data
        assert not any(np.shares_memory(begun, stream.cache.data) for stream in (first, twin, second))

    case(test, opening=[1, 2, 3])
