"""Around everything else: whose request the logs speak of, its span, and its line in the access log. Plain ASGI."""

from __future__ import annotations

import logging
import time
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.api.front import OPEN_PATHS, own_id
from monitor.api.spans import CONTEXT, Spans
from monitor.logs import REQUEST

_log = logging.getLogger("midstream.access")
_MAX_PATH = 200


class Access:
    """spans: None for none; log: whether there is an access log. OPEN_PATHS are in neither."""

    def __init__(self, app: ASGIApp, spans: Spans | None, log: bool) -> None:
        self.app = app
        self._spans, self._log = spans, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        began, status, error = time.perf_counter(), 0, None
        identity = own_id(scope)
        span = None if self._spans is None else self._spans.begin(identity, scope)
        # Not reset: uvicorn logs an exception in this same task, after it has left here.
        REQUEST.set((identity, "" if span is None else span.trace_id))
        if span is not None:  # what stands behind us, vLLM's own spans say, are its children
            kept = [(k, v) for k, v in scope["headers"] if k not in CONTEXT]
            scope = {**scope, "headers": kept + span.headers}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as raised:
            error = type(raised).__name__
            raise
        finally:
            if span is not None and self._spans is not None:
                self._spans.end(identity, status, error)
            if self._log:
                self._line(scope, status, time.perf_counter() - began)

    def _line(self, scope: Scope, status: int, seconds: float) -> None:
        """Without the query, and the path in characters that can't end a line or look like another field."""
        path = quote(scope["path"], safe="/")[:_MAX_PATH]
        fields = {"method": scope["method"], "path": path, "status": status, "duration_ms": round(seconds * 1000, 1)}
        _log.info("%s %s %d %.1f ms", *fields.values(), extra={"fields": fields})
