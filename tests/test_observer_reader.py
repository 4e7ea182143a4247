"""LocalObserver: many streams, one thread; who cancels, closes, fails or is told to stop harms nobody else."""

import asyncio

import numpy as np
import pytest

from monitor.errors import MidstreamError, Overloaded, RequestInvalid
from monitor.observer.protocol import Observer, TooLong

from .fake_session import BROKEN, entered, rows
from .fake_session import case as case


async def settled(observer):
    """Until nothing waits: what a thread that is told to free needs a moment for."""
    while observer.describe()["waiting"]:
        await asyncio.sleep(0.005)


def test_a_stream_reads_on_where_it_was(case):
    async def test(observer: Observer, session):
        stream = await observer.open([5, 6, 7])
        np.testing.assert_array_equal(stream.scores, rows([5, 6, 7]))
        np.testing.assert_array_equal(await stream.read([8]), rows([8], 3))
        assert (await stream.read([])).shape == (0, 2)
        np.testing.assert_array_equal(await stream.read((9, 10)), rows([9, 10], 4))
        assert observer.columns == (("p", "v1"), ("q", "v2"))
        empty = await observer.open([])
        assert empty.scores.shape == (0, 2)
        stream.close()
        stream.close()
        empty.close()
        assert observer.describe() | {"steps": 0} == {
            "engine": "observer", "active": 0, "waiting": 0, "tokens": 0, "steps": 0,
        }  # fmt: skip

    case(test)


def test_what_every_prompt_begins_with_is_read_once(case):
    async def test(observer, session):
        for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3], [1, 2, 4, 5], [7]):
            stream = await observer.open(ids)
            np.testing.assert_array_equal(stream.scores, rows(ids))
            np.testing.assert_array_equal(await stream.read([9]), rows([9], len(ids)))
        with pytest.raises(TooLong, match="has 513 tokens"):
            await observer.open([1, 2, 3] * 171)
        with pytest.raises(RequestInvalid, match="between 0 and 999"):
            await observer.open([1, 2, 3, 1000])
        assert observer.describe()["tokens"] == 5 * 64
        assert session.batches == [[3], [2], [1], [1], [1], [3], [1], [4], [1], [1], [1]]

    case(test, opening=[1, 2, 3])


def test_a_long_prompt_is_read_in_bounded_parts_and_answers_pass_it(case):
    async def test(observer, session):
        answer = await observer.open([1])
        session.gate.clear()
        prompt = asyncio.create_task(observer.open(range(100)))
        await entered(session)  # the answer's own prompt
        await entered(session)
        word = asyncio.create_task(answer.read([2]))
        await asyncio.sleep(0)
        session.gate.set()
        np.testing.assert_array_equal(await word, rows([2], 1))
        np.testing.assert_array_equal((await prompt).scores, rows(range(100)))
        assert session.batches == [[1], [16], [1], [16], [16], [16], [16], [16], [4]]

    case(test, max_step_tokens=16)


def test_whoever_waits_shares_a_step(case):
    async def test(observer, session):
        streams = [await observer.open([i]) for i in range(20)]
        session.gate.clear()
        first = asyncio.create_task(streams[0].read([100]))
        for _ in range(21):
            await entered(session)
        others = [asyncio.create_task(s.read([100 + i] * (i % 3 + 1))) for i, s in enumerate(streams) if i]
        await asyncio.sleep(0)
        session.gate.set()
        found = await asyncio.gather(first, *others)
        for i, got in enumerate(found):
            np.testing.assert_array_equal(got, rows([100 + i] * (i % 3 + 1 if i else 1), 1))
        assert len(session.batches[-1]) == 19

    case(test)


def test_a_cancelled_read_closes_its_stream_and_no_other(case):
    async def test(observer, session):
        mine, theirs = await observer.open([1]), await observer.open([2])
        session.gate.clear()
        gone = asyncio.create_task(mine.read([3]))
        for _ in range(3):
            await entered(session)
        stays = asyncio.create_task(theirs.read([4]))
        waits = asyncio.create_task(observer.open(range(50)))
        await asyncio.sleep(0)
        gone.cancel()  # while its step runs
        waits.cancel()  # before its first step
        await asyncio.wait([gone, waits])
        assert gone.cancelled() and waits.cancelled()
        session.gate.set()
        np.testing.assert_array_equal(await stays, rows([4], 1))
        await settled(observer)
        assert observer.describe()["active"] == 1
        with pytest.raises(RuntimeError, match="not after it is closed"):
            await mine.read([5])

    case(test)


def test_closing_while_a_step_runs(case):
    async def test(observer, session):
        stream = await observer.open([1])
        session.gate.clear()
        word = asyncio.create_task(stream.read([2]))
        await entered(session)
        await entered(session)
        stream.close()
        assert observer.describe()["tokens"] == 64  # the step still writes there
        session.gate.set()
        with pytest.raises(MidstreamError, match="closed while"):
            await word
        assert observer.describe()["tokens"] == 0
        np.testing.assert_array_equal((await observer.open([7])).scores, rows([7]))

    case(test)


def test_closing_before_the_step(case):
    async def test(observer, session):
        streams = [await observer.open([i]) for i in range(2)]
        session.gate.clear()
        first = asyncio.create_task(streams[0].read([2]))
        for _ in range(3):
            await entered(session)
        second = asyncio.create_task(streams[1].read([3]))
        await asyncio.sleep(0)
        streams[1].close()
        with pytest.raises(MidstreamError, match="closed while"):
            await second  # at once, not after the step
        session.gate.set()
        await first
        assert session.batches == [[1], [1], [1]]

    case(test)


def test_a_step_that_fails_ends_its_streams_only(case):
    async def test(observer, session):
        bad, good = await observer.open([1]), await observer.open([2])
        with pytest.raises(MidstreamError, match="step failed: OSError"):
            await bad.read([BROKEN])
        with pytest.raises(MidstreamError, match="step failed: OSError"):
            await observer.open([BROKEN])
        np.testing.assert_array_equal(await good.read([3]), rows([3], 1))
        assert observer.readiness() is None
        assert observer.describe()["active"] == 1

    case(test)


def test_one_read_at_a_time(case):
    async def test(observer, session):
        stream = await observer.open([1])
        session.gate.clear()
        first = asyncio.create_task(stream.read([2]))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="once at a time"):
            await stream.read([3])
        session.gate.set()
        np.testing.assert_array_equal(await first, rows([2], 1))

    case(test)


def test_stopping_tells_whoever_waits(case):
    async def test(observer, session):
        streams = [await observer.open([i]) for i in range(2)]
        session.gate.clear()
        fed = asyncio.create_task(streams[0].read([5]))
        for _ in range(3):
            await entered(session)
        waits = asyncio.create_task(streams[1].read([6]))
        await asyncio.sleep(0)
        stopped = asyncio.create_task(asyncio.to_thread(observer.stop))
        while observer.readiness() is None:
            await asyncio.sleep(0.005)
        session.gate.set()
        await stopped
        np.testing.assert_array_equal(await fed, rows([5], 1))  # its step had begun
        with pytest.raises(Overloaded, match="shutting down"):
            await waits
        with pytest.raises(Overloaded, match="shutting down"):
            await observer.open([1])
        assert observer.readiness() == "the observer does not run"

    case(test)
