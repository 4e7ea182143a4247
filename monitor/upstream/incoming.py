"""An upstream's stream, read ahead into a bounded buffer, so that one sees how far the observer is behind."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

from monitor.upstream.errors import UpstreamError
from monitor.upstream.sse import DONE, Frames, parse

_AHEAD = 2**20


class Arrived(NamedTuple):
    """at: on the event loop's clock"""

    frame: bytes
    at: float


class Incoming:
    """Reads in a task of its own from `start` to `stop`; `take` gives what has come. Reads no further than 1 MiB ahead.

    max_bytes: of one frame; ended: nothing follows; failure: why, if it is not a normal end
    """

    def __init__(self, pieces: AsyncIterator[bytes], max_bytes: int) -> None:
        self.ended = False
        self.failure: UpstreamError | None = None
        self._pieces, self._frames = pieces, Frames(max_bytes)
        self._arrived: deque[Arrived] = deque()
        self._ahead = 0
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._read())

    async def stop(self) -> None:
        """Returns when it reads no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def wake(self) -> None:
        """`take` returns, also without frames."""
        self._news.set()

    @property
    def over(self) -> bool:
        """Nothing is left to take, and nothing more comes."""
        return self.ended and not self._arrived

    async def take(self, timeout_s: float | None) -> list[Arrived]:
        """Every frame that has come; none if nothing came within `timeout_s` or `wake` was called, or at the end."""
        if not self._arrived and not self.ended:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return []
        self._news.clear()
        found = list(self._arrived)
        self._arrived.clear()
        self._ahead = 0
        self._room.set()
        return found

    async def _read(self) -> None:
        try:
            async for piece in self._pieces:
                self._put(self._frames.feed(piece))
                while self._ahead > _AHEAD:
                    self._room.clear()
                    await self._room.wait()
            # Half a frame is none; but some end their last one with the connection.
            if parse(self._frames.end()).is_done:
                self._put([DONE])
        except UpstreamError as error:
            self.failure = error
        finally:
            self.ended = True
            self._news.set()

    def _put(self, frames: list[bytes]) -> None:
        now = time.monotonic()
        for frame in frames:
            self._arrived.append(Arrived(frame, now))
            self._ahead += len(frame)
        if frames:
            self._news.set()
