"""One request's judged output, from the engine's thread into this event loop, cut off when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request

from monitor.api.errors import ApiError, PromptBlocked, blocked_readings, ended_badly, from_domain
from monitor.api.verdicts import answer_annotation, known, prompt_annotation, verdict_headers
from monitor.errors import Overloaded, RequestInvalid
from monitor.types import Delta, Engine, GenerationRequest, Opening, Phase, Record, Terms


class Answer:
    """Deltas of all choices, in the order they were judged.

    The queue is bounded by the request: at most one Delta per token, so n x max_tokens of them.
    """

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self.request = request
        self.n_choices = len(request.prompts) * request.n
        self.released = 0
        self.terms = Terms()
        self.records: dict[int, Record] = {}
        self.openings: dict[int, Opening] = {}  # by choice: the verdict on its prompt
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._early: list[Delta] = []

    def _deliver(self, delta: Delta) -> None:
        # At shutdown the loop may be closed: nobody is left to read, and the record has been written already.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)

    async def judge_prompts(self, http: Request) -> None:
        """Submit, and wait until every prompt has its first verdict: before that nothing is answered, not even 200.

        raises: ApiError; the whole request is then aborted
        """
        try:
            self._engine.submit(self.request, self._deliver)
        except (RequestInvalid, Overloaded) as error:
            raise from_domain(error) from error
        async with self.guarded(http):
            waiting = set(range(self.n_choices))
            while waiting:
                delta = await self._queue.get()
                if delta.opening is not None:
                    self.terms = delta.opening.terms
                    self.openings[delta.index] = delta.opening
                self._check_prompt(delta)
                self._early.append(delta)
                waiting.discard(delta.index)

    def _check_prompt(self, delta: Delta) -> None:
        if delta.record is None:
            return
        if blocked_readings(delta.record, Phase.PROMPT):
            raise PromptBlocked(delta.record, delta.index // self.request.n, len(self.request.prompts), self.terms)
        if error := ended_badly(delta.record):
            raise error

    @property
    def headers(self) -> dict[str, str]:
        return verdict_headers(self.terms.policy, known(self.openings, self.records))

    @property
    def annotations(self) -> dict[str, Any]:
        return prompt_annotation(self.terms, self.openings, self.request.n)

    def annotation(self, index: int) -> dict[str, Any]:
        """Of a choice that has ended."""
        return answer_annotation(self.terms, self.records[index])

    async def deltas(self) -> AsyncIterator[Delta]:
        """Every Delta until all choices have ended. raises: ApiError where a choice may not be answered at all"""
        left = self.n_choices
        while left:
            delta = self._early.pop(0) if self._early else await self._queue.get()
            if delta.record is not None:
                left -= 1
                self.records[delta.index] = delta.record
                if error := ended_badly(delta.record):
                    raise error
            self.released += delta.n_tokens
            yield delta

    def abort(self) -> None:
        """Synchronous: after a disconnect no await in a `finally` completes."""
        self._engine.abort(self.request.id)

    @asynccontextmanager
    async def guarded(self, http: Request) -> AsyncIterator[None]:
        """Abort the request if the client leaves inside this block, or if it raises."""

        async def leave() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                continue
            self.abort()

        watcher = asyncio.create_task(leave())
        try:
            yield
        except BaseException:
            self.abort()
            raise
        finally:
            watcher.cancel()


def as_event_error(error: ApiError) -> dict[str, object]:
    return {"error": error.error}
