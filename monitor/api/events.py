"""A stream of server-sent events whose source is closed, whatever happens to its reader."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """lines: whole events, made of what `source` yields; closed: called once, when `source` has been closed"""

    def __init__(
        self,
        lines: AsyncIterator[bytes],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        closed: Callable[[], None],
    ) -> None:
        self._source, self._closed = source, closed
        ours = {"X-Accel-Buffering": "no"} | dict(headers)
        super().__init__(lines, headers=ours, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # starlette never closes what it streams; unshielded, an await here never ends after a disconnect.
            with anyio.CancelScope(shield=True):
                await self._source.aclose()
            self._closed()
