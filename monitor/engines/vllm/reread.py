"""Sequences read by vLLM for their residual stream: one request of ours each, averaged in the worker.

Such a request is prefilled under a cache salt of its own, so that every token has a forward pass; it is not judged, not
recorded, not counted by us, and no client can make one. vLLM's own metrics do count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from monitor.engines.vllm.call import Averages, Call
from monitor.engines.vllm.own import see_through
from monitor.reread import Pooled
from monitor.types import Turn

_LATER = 2**20  # of vLLM's priorities, where the operator has chosen that policy: the smallest goes first
REFUSED = (VLLMValidationError, GracefulHTTPError, EngineGenerateError, EngineDeadError)
"""Too long, its queue is full, this request has failed, or the engine has."""
_EVERY_S = 1.0
_LOOK_S = 0.05


async def averages(engine: Any, ids: Sequence[int], spans: Sequence[Turn], n_layers: int) -> Pooled | None:
    """(n_spans, n_layers, d_model) at every tapped layer, of which there are n_layers; None if vLLM can't read it."""
    wanted = Averages([[span.start, span.end] for span in spans])
    call = Call("internal", "raw", averages=wanted)
    if len(ids) >= engine.model_config.max_model_len:
        return None  # vLLM wants room for a token, though none is asked for
    try:
        await see_through(engine, call, ids, salt=secrets.token_hex(16), priority=_LATER)
    except REFUSED:
        return None
    if wanted.means is None:
        return None
    return np.frombuffer(wanted.means, np.float32).reshape(len(spans), n_layers, -1)


class VllmRereading:
    """See `Rereader`. One at a time: at once while nobody else is served, else one a second, which is all it may cost.

    layers: the tapped ones; active: sequences of others; made in the event loop of the engine
    """

    def __init__(self, engine: Any, layers: tuple[int, ...], active: Callable[[], int]) -> None:
        self.layers = layers
        self._engine, self._active = engine, active
        self._loop = asyncio.get_running_loop()
        self._not_before = 0.0
        self._task: asyncio.Task[None] | None = None

    def reread(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is read any more
            self._loop.call_soon_threadsafe(self._begin, ids, spans, layers, done)

    def _begin(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        self._task = self._loop.create_task(self._read(ids, spans, layers, done), name="midstream-reread")

    async def _read(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        while self._active() and self._loop.time() < self._not_before:  # noqa: ASYNC110 - others end without telling
            await asyncio.sleep(_LOOK_S)
        self._not_before = self._loop.time() + _EVERY_S
        means = None
        try:
            means = await averages(self._engine, ids, spans, len(self.layers))
        finally:  # without an answer nothing would be read any more
            done(None if means is None else means[:, [self.layers.index(layer) for layer in layers]])

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
