"""LocalObserver: many streams, one thread; bounds, cancelling, closing and failing steps harm nobody else."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from monitor.errors import MidstreamError, Overloaded, RequestInvalid
from monitor.live import ServedModel
from monitor.observer.build import Shape
from monitor.observer.protocol import Observer, TooLong
from monitor.observer.reader import Bounds, LocalObserver
from monitor.observer.session import SHORT
from monitor.observer.turns import Turns

SHAPE = Shape(n_blocks=1, kv_heads=1, head_dim=2, n_probes=2, vocabulary=1000, max_tokens=512)
BROKEN = 999
GUARD_S = 30


class ScriptedSession:
    """Scores are the token's id and its position. A step waits for `gate`; the id BROKEN makes it fail."""

    shape = SHAPE

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches = []

    def step(self, parts):
        self.batches.append([len(ids) for _, ids in parts])
        self.entered.release()
        assert self.gate.wait(GUARD_S)
        if any(BROKEN in ids for _, ids in parts):
            raise OSError("broken on purpose")
        found = []
        for cache, ids in parts:
            positions = np.arange(cache.length, cache.length + len(ids))
            found.append(np.stack([np.array(ids), positions], axis=1).astype(np.float32))
            cache.append(np.zeros((2, 1, len(ids), 1, 2), np.float32))
        return found


@contextlib.contextmanager
def reading(opening=(), **bounds):
    session = ScriptedSession()
    model = ServedModel("m", "f", "float32", 2, 1, template=None)
    observer = LocalObserver(session, model, None, [("p", "v1"), ("q", "v2")], Bounds(**bounds), opening)
    assert observer.readiness() is not None
    observer.start()
    try:
        yield observer, session
    finally:
        session.gate.set()
        observer.stop()


@pytest.fixture
def case():
    """Run a coroutine function with an observer: case(test, **bounds)."""

    def run(test, **bounds):
        with reading(**bounds) as (observer, session):
            asyncio.run(asyncio.wait_for(test(observer, session), GUARD_S))

    return run


async def entered(session):
    """Until a step has begun."""
    assert await asyncio.to_thread(session.entered.acquire, timeout=GUARD_S)


async def settled(observer):
    """Until nothing waits: what a thread that is told to free needs a moment for."""
    while observer.describe()["waiting"]:
        await asyncio.sleep(0.005)


def rows(ids, first=0):
    return np.stack([np.array(ids), np.arange(first, first + len(ids))], axis=1).astype(np.float32)


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
        await asyncio.sleep(0.05)
        session.gate.set()
        await stopped
        np.testing.assert_array_equal(await fed, rows([5], 1))  # its step had begun
        with pytest.raises(Overloaded, match="shutting down"):
            await waits
        with pytest.raises(Overloaded, match="shutting down"):
            await observer.open([1])
        assert observer.readiness() == "the observer does not run"

    case(test)


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
