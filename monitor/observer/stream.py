"""One conversation that a LocalObserver reads along, and the tokens that it waits to have read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from monitor.errors import MidstreamError
from monitor.observer.session import Cache
from monitor.types import Scores


class Reading(Protocol):
    """The observer that a stream is of."""

    async def read(self, stream: ObservedStream, token_ids: Sequence[int]) -> Scores: ...

    def fork(self, stream: ObservedStream) -> ObservedStream: ...

    def close_stream(self, stream: ObservedStream) -> None: ...


class ObservedStream:
    """See `Stream`. scores: of what the cache holds already"""

    def __init__(self, observer: Reading, cache: Cache, scores: Scores) -> None:
        self.cache, self.scores = cache, scores
        self.reserved = 0
        """Tokens of the observer's memory that are this stream's."""
        self.closed = False
        self.job: Job | None = None
        self._observer = observer

    async def read(self, token_ids: Sequence[int]) -> Scores:
        return await self._observer.read(self, token_ids)

    def fork(self) -> ObservedStream:
        return self._observer.fork(self)

    def close(self) -> None:
        self._observer.close_stream(self)


@dataclass(eq=False, slots=True)
class Job:
    """Tokens that a stream waits to have read."""

    stream: ObservedStream
    token_ids: tuple[int, ...]
    done: asyncio.Future[Scores]
    opening: bool
    rows: list[Scores] = field(default_factory=list)
    n_read: int = 0

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.n_read

    @property
    def length(self) -> int:
        return self.stream.cache.length

    def end(self, result: Scores | MidstreamError) -> None:
        """From any thread."""

        def tell() -> None:
            if self.done.done():
                return
            if isinstance(result, MidstreamError):
                self.done.set_exception(result)
            else:
                self.done.set_result(result)

        with contextlib.suppress(RuntimeError):  # at shutdown the loop may be closed: nobody waits
            self.done.get_loop().call_soon_threadsafe(tell)
