"""Texts of our own through the embedded engine: texts that are only judged, and an operator's traced request."""

from __future__ import annotations

import asyncio
import contextlib

from monitor.types import Caller, Delta, Engine, GenerationRequest, Prompt, Record, Sampling, Trace


class EmbeddedScorer:
    """See `Scorer`. Each method's request is judged and recorded like any other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def judge(self, request_id: str, prompt: Prompt, answer: tuple[int, ...], caller: Caller) -> Record:
        nothing = Sampling(0)
        return await self._run(GenerationRequest(request_id, (prompt,), 1, nothing, caller, given=answer))

    async def follow(
        self, request_id: str, prompt: Prompt, max_tokens: int, temperature: float, caller: Caller, trace: Trace
    ) -> Record:
        sampling = Sampling(max_tokens, temperature)
        return await self._run(GenerationRequest(request_id, (prompt,), 1, sampling, caller, trace=trace))

    async def _run(self, request: GenerationRequest) -> Record:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Record] = loop.create_future()

        def end(record: Record) -> None:
            if not ended.done():
                ended.set_result(record)

        def deliver(delta: Delta) -> None:
            if delta.record is not None:
                with contextlib.suppress(RuntimeError):  # at shutdown the loop may be closed: nobody waits
                    loop.call_soon_threadsafe(end, delta.record)

        self._engine.submit(request, deliver)
        try:
            return await ended
        except asyncio.CancelledError:
            self._engine.abort(request.id)
            raise
