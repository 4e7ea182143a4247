"""Slow work of operators: in threads of its own, few of them, which end with the admin port."""

import asyncio
import contextvars
import threading
import time

import pytest

from monitor.api.admin.aside import THREADS, Aside

from .admin_port import BEARER, port  # noqa: F401

NOTED = contextvars.ContextVar("noted")


def test_an_operator_does_not_wait_for_the_pool_that_tokenises(port):
    gate = threading.Event()
    for _ in range(100):
        port._loop.call_soon_threadsafe(port._loop.run_in_executor, None, gate.wait)
    try:
        assert port.status("GET", "/admin/audit", BEARER) == 200
    finally:
        gate.set()


def test_few_at_once_each_as_who_asked():
    aside, running, seen = Aside(), [], []

    def slow(n):
        running.append(n)
        seen.append((len(running), NOTED.get(), threading.current_thread().name))
        time.sleep(0.02)
        running.remove(n)
        return n

    async def ask(n):
        NOTED.set(n)
        return await aside(slow, n)

    async def all_of_them():
        return await asyncio.gather(*(ask(n) for n in range(3 * THREADS)))

    assert asyncio.run(all_of_them()) == list(range(3 * THREADS))
    aside.close()
    assert max(n for n, _, _ in seen) <= THREADS and sorted(noted for _, noted, _ in seen) == list(range(3 * THREADS))
    assert all(name.startswith("midstream-admin") for _, _, name in seen)


def test_what_is_closed_begins_nothing_more():
    aside, gate, begun = Aside(), threading.Event(), []

    def work(n):
        begun.append(n)
        gate.wait(20)

    async def run():
        asked = [asyncio.create_task(aside(work, n)) for n in range(THREADS + 1)]
        while len(begun) < THREADS:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(asyncio.to_thread(aside.close))
        (first,), _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert first.cancelled() and not closing.done()
        gate.set()
        await closing
        assert sum(task.cancelled() for task in asked) == 1
        with pytest.raises(RuntimeError):
            await aside(work, 9)

    asyncio.run(run())
    assert len(begun) == THREADS


def test_its_threads_end_with_the_server(tiny, tmp_path):
    from .both_ports import Both

    def threads():
        return {t for t in threading.enumerate() if t.name.startswith("midstream-admin")}

    before = threads()
    both = Both(tiny, tmp_path)
    assert both.admin("GET", "audit").status_code == 200
    own = threads() - before
    both.stop()
    assert own
    assert not any(thread.is_alive() for thread in own)
