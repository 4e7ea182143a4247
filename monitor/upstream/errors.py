"""What can go wrong with an upstream, each one line for the client that waits for its answer."""

from __future__ import annotations

from monitor.errors import MidstreamError


class UpstreamError(MidstreamError):
    """The root of an upstream's errors.

    UpstreamError
    ├── Unreachable   no answer began: not connected, hung up, no connection is free, or the circuit breaker refused it
    ├── Unsendable    a request that is no HTTP as it stands
    ├── TooSlow       a time-out passed
    ├── Unreadable    an answer that can't be judged: not the JSON or the events that the route promises
    └── Truncated     an answer that ended before it was whole
    """


class Unreachable(UpstreamError):
    """retry_after_s: seconds until it is tried again, None if that is not known"""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unsendable(UpstreamError):
    pass


class TooSlow(UpstreamError):
    pass


class Unreadable(UpstreamError):
    pass


class Truncated(UpstreamError):
    pass
