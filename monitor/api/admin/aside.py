"""Slow work of operators, in threads of its own: in the event loop's default pool every request is tokenised."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 4


class Aside:
    """As asyncio.to_thread, THREADS at once; what comes then waits for one of them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "midstream-admin")

    async def __call__(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        context = contextvars.copy_context()  # which request a log line belongs to
        call = functools.partial(context.run, act, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """What has not begun does not begin. Waits for what runs, some of which asks the event loop: not on that."""
        self._pool.shutdown(cancel_futures=True)
