"""A scripted session, and a LocalObserver that reads with it: scores that can be told, steps that wait or fail."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from monitor.live import ServedModel
from monitor.observer.build import Shape
from monitor.observer.reader import LocalObserver
from monitor.observer.room import Bounds

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


def rows(ids, first=0):
    return np.stack([np.array(ids), np.arange(first, first + len(ids))], axis=1).astype(np.float32)
