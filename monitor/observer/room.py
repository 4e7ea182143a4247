"""The room that an observer has: how many streams are open, and how much of its memory each holds."""

from __future__ import annotations

from dataclasses import dataclass

from monitor.config import Settings
from monitor.errors import Overloaded
from monitor.observer.session import pages
from monitor.observer.stream import ObservedStream

_STEP_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Bounds:
    """max_streams: open at once; max_opening: of them with a prompt that is not read yet; kv_tokens: that all streams
    hold together (batches hold up to as much again); max_tokens: of one stream, None: as many as the model reads;
    max_step_tokens: fed in a step, of all streams"""

    max_streams: int = 256
    max_opening: int = 64
    kv_tokens: int = 65_536
    max_tokens: int | None = None
    max_step_tokens: int = _STEP_TOKENS

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        # An answer may wait for a step of prompts, so a step is kept shorter than an engine's.
        step = min(settings.max_step_tokens, _STEP_TOKENS)
        return cls(settings.max_concurrent, settings.max_queue, settings.kv_tokens, settings.max_model_len, step)


class Room:
    """streams: that are in it; tokens: that they hold, in whole pages

    Not thread safe: whoever calls holds the observer's lock.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.streams: set[ObservedStream] = set()
        self.tokens = 0
        self._bounds = bounds

    def enter(self, stream: ObservedStream) -> None:
        """With what it has read already. raises: Overloaded"""
        if len(self.streams) >= self._bounds.max_streams:
            raise Overloaded(f"{len(self.streams)} conversations are read already; try again later")
        self.reserve(stream, 0)
        self.streams.add(stream)

    def reserve(self, stream: ObservedStream, n_more: int) -> None:
        """For tokens that come behind what it has read. raises: Overloaded, and nothing has changed"""
        more = pages(stream.cache.length + n_more) - stream.reserved
        if self.tokens + more > self._bounds.kv_tokens:
            raise Overloaded(f"the observer holds {self.tokens} tokens already; try again later")
        self.tokens += more
        stream.reserved += more

    def leave(self, stream: ObservedStream) -> None:
        """Any number of times."""
        self.streams.discard(stream)
        self.tokens -= stream.reserved
        stream.reserved = 0
        stream.cache.clear()
