"""What stands between the network and the routes, alike for both engines: connections, keys, limits."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from monitor.api.access import Access
from monitor.api.body import BodyBounds
from monitor.api.connection import Bounds, allow_descriptors, bounded
from monitor.api.front import Front
from monitor.api.limits import Limits, Rate
from monitor.api.recorded import Recorded
from monitor.api.spans import Spans
from monitor.config import Settings
from monitor.keys import Keys
from monitor.metrics import Metrics
from monitor.traffic import TrafficLog

LIMITS = (
    "receive",
    "write",
    "headers",
    "connections",
    "body",
    "depth",
    "json",
    "messages",
    "concurrency",
    "rate",
    "offender",
    "record",
)


def never(key: str) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class Edge:
    """keys: reload them to change who may ask; offender: seconds for which a key is still refused, None if it is not;
    spans: to be told of every record, and closed; None without a collector; log: what the end of an answer waits for,
    there when the first request comes"""

    settings: Settings
    keys: Keys
    limited: Callable[[str], None]
    rejected: Callable[[int], None]
    rate: Rate | None
    offender: Callable[[str], float | None] = never
    spans: Spans | None = None
    log: Callable[[], TrafficLog] | None = None

    @classmethod
    def of(
        cls,
        settings: Settings,
        metrics: Metrics,
        offender: Callable[[str], float | None] = never,
        log: Callable[[], TrafficLog] | None = None,
    ) -> Edge:
        """raises: ConfigInvalid for a keys file or a rate that can't be read, or spans that can't be sent"""
        keys = Keys(settings.api_key, settings.keys)
        rate = None if settings.rate_per_key is None else Rate(settings.rate_per_key)
        if not keys.required and not is_loopback(settings.host):
            print(
                f"midstream: listening on {settings.host} without a key: everybody who reaches it may ask. "
                "Set MIDSTREAM_API_KEY, or make keys: midstream key create NAME --keys FILE",
                file=sys.stderr,
            )

        for name in LIMITS:
            metrics.limited.labels(name)  # rates start at 0

        def limited(limit: str) -> None:
            metrics.limited.labels(limit).inc()

        def rejected(status: int) -> None:
            metrics.rejected.labels(str(status)).inc()

        return cls(settings, keys, limited, rejected, rate, offender, Spans.of(settings), log)

    def around(self, app: ASGIApp) -> ASGIApp:
        s = self.settings
        inner = Limits(
            app if self.log is None else Recorded(app, self.log, self.limited, self.rejected),
            BodyBounds(s.max_json_depth, s.max_json_values, s.max_messages),
            max_body=s.max_body_bytes,
            max_concurrent=s.max_concurrent,
            rate=self.rate,
            limited=self.limited,
            rejected=self.rejected,
            offender=self.offender,
        )
        return Access(Front(inner, self.keys, self.rejected), self.spans, s.access_log)

    def server_options(self) -> dict[str, Any]:
        """Arguments of uvicorn.Config."""
        s = self.settings
        allow_descriptors(s.max_connections)
        bounds = Bounds(s.receive_deadline_s, s.write_deadline_s, s.max_header_bytes, s.max_connections)
        return {
            "http": bounded(bounds, self.limited),
            "ws": "none",  # a request to upgrade is answered like any other
            "timeout_keep_alive": 5,
            "log_level": "warning",
            "access_log": False,
        }


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
