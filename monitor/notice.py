"""Notices: a flag or a block as one JSON line on stdout, and as a POST to the operator's webhook."""

from __future__ import annotations

import http.client
import json
import queue
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal

from monitor.types import Action, Record

Result = Literal["sent", "failed", "dropped"]
Counted = Callable[[Result], None]
_TIMEOUT_S = 5.0
_FIRST_RETRY_S = 0.5


def notice(record: Record) -> dict[str, Any] | None:
    """What is told about a sequence that was flagged, blocked or unmonitored; None for the rest. Holds no text."""
    if record.verdict is Action.ALLOW:
        return None
    return {
        "event": f"midstream.{record.verdict}",
        "request_id": record.request_id,
        "choice": record.index,
        "time": record.created,
        "model": record.model,
        "route": record.route,
        "key": record.key,
        "policy": record.policy,
        "finish": record.finish,
        "released_tokens": record.released_tokens,
        "scored_by": record.scored_by,
        "unmonitored": record.coverage.unmonitored,
        "probes": [
            {
                "probe": r.probe,
                "version": r.version,
                "phase": r.phase,
                "mode": r.mode,
                "action": r.action,
                "value": None if r.value is None else round(r.value, 4),
                "threshold": None if r.threshold is None else round(r.threshold, 4),
                "crossed_at": r.crossed_at,
            }
            for r in record.readings
            if r.action is not Action.ALLOW or r.would_block
        ],
    }


class Outbox:
    """Events to a slow receiver: `put` never blocks, one thread sends, the queue is bounded.

    send: True if the event arrived; counted: called with `sent`, `failed` or `dropped` for every event
    """

    def __init__(self, queue_size: int, send: Callable[[Mapping[str, Any]], bool], counted: Counted) -> None:
        self._send, self._counted = send, counted
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._run, name="midstream-notices", daemon=True)
        self._thread.start()

    def put(self, event: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._counted("dropped")

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, for at most `timeout_s`."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            self._counted("sent" if self._send(event) else "failed")


def print_line(event: Mapping[str, Any]) -> bool:
    """One JSON line on stdout; False if nobody reads it any more."""
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError):  # a closed pipe, a closed file
        return False
    return True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would be followed by a GET without the notice, and count as sent."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Webhook:
    """POSTs notices from an Outbox; each is tried `attempts` times, waits doubling."""

    def __init__(self, url: str, queue_size: int, attempts: int, counted: Counted) -> None:
        self._url, self._attempts = url, attempts
        self._closing = threading.Event()
        self._outbox = Outbox(queue_size, self._deliver, counted)

    def put(self, event: Mapping[str, Any]) -> None:
        self._outbox.put(event)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, without waiting between retries, for at most `timeout_s`."""
        self._closing.set()
        self._outbox.close(timeout_s)

    def _deliver(self, event: Mapping[str, Any]) -> bool:
        headers = {"Content-Type": "application/json"}
        body = json.dumps(event).encode()
        request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310 - checked in settings
        for attempt in range(self._attempts):
            try:
                with _OPENER.open(request, timeout=_TIMEOUT_S):
                    return True
            except (OSError, http.client.HTTPException, ValueError) as error:  # HTTPError is an OSError
                code = getattr(error, "code", 503)
                if code < 500 and code != 429:
                    return False  # the receiver says no; saying it again won't help
            if attempt + 1 < self._attempts:
                self._closing.wait(_FIRST_RETRY_S * 2**attempt)
        return False
