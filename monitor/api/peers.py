"""How often each peer did something in its running minute. Bounded, whoever comes."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

_MINUTE_S = 60.0


class PerMinute:
    """A peer's minute begins with the first event after the one before is over. Not thread-safe.

    size: peers known at once; the one whose minute began first is forgotten first; clock: seconds
    """

    def __init__(self, size: int = 1024, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = size, clock
        self._minutes: OrderedDict[str, tuple[float, int]] = OrderedDict()  # in the order of their beginning

    def count(self, peer: str) -> int:
        """One more event; returns how many that makes in the minute."""
        now = self._clock()
        began, n = self._minutes.get(peer, (now, 0))
        if now - began >= _MINUTE_S:
            del self._minutes[peer]
            began, n = now, 0
        self._minutes[peer] = (began, n + 1)
        while len(self._minutes) > self._size:
            self._minutes.popitem(last=False)
        return n + 1

    def so_far(self, peer: str) -> tuple[int, float]:
        """(events in the minute, seconds until it is over)"""
        began, n = self._minutes.get(peer, (0.0, 0))
        left = began + _MINUTE_S - self._clock()
        return (n, left) if n and left > 0 else (0, 0.0)

    def __len__(self) -> int:
        return len(self._minutes)


def peer_name(client: tuple[str, int] | None) -> str:
    """Whom a connection counts for: an IPv4 address, or the /64 that one customer of a network has of IPv6."""
    try:
        address = ipaddress.ip_address((client or ("", 0))[0].partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False)) if not address.is_loopback else "::1"
        address = address.ipv4_mapped
    return str(address)
