"""LocalObserver: streams of many conversations, read by one thread whose every step feeds whoever waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from monitor.errors import MidstreamError, Overloaded, RequestInvalid
from monitor.live import ServedModel
from monitor.observer.protocol import TooLong
from monitor.observer.room import Bounds, Room
from monitor.observer.session import Cache, Session
from monitor.observer.stream import Job, ObservedStream
from monitor.observer.turns import Turns
from monitor.types import Scores


class LocalObserver:
    """See `Observer`. `start` it, `open` streams, `stop` it.

    opening: tokens that most prompts begin with, read once and not again for each (24 of the 45 of a short question, in
    SmolLM2's template). They are the template's own, so that no answer's time tells what others have asked.
    """

    def __init__(
        self,
        session: Session,
        model: ServedModel,
        tokenizer: Any,
        columns: Sequence[tuple[str, str]],
        bounds: Bounds | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        bounds = bounds or Bounds()
        self.model, self.tokenizer, self.template, self.columns = model, tokenizer, model.template, tuple(columns)
        self.steps = 0
        self.max_tokens = min(session.shape.max_tokens, bounds.max_tokens or bounds.kv_tokens, bounds.kv_tokens)
        self._session, self._max_opening, self._opening = session, bounds.max_opening, tuple(opening)
        self._begun, self._begun_scores = Cache(session.shape), np.empty((0, len(self.columns)), np.float32)
        self._turns = Turns(bounds.max_step_tokens, bounds.kv_tokens // 2)
        self._room = Room(bounds)
        self._waiting: list[Job] = []
        self._fed: frozenset[ObservedStream] = frozenset()
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="midstream-observer", daemon=True)

    def start(self) -> None:
        if self._opening:
            (self._begun_scores,) = self._session.step([(self._begun, self._opening)])
        self._thread.start()

    def stop(self) -> None:
        """End the step that runs; whoever still waits gets Overloaded, and so does everybody from now on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def readiness(self) -> str | None:
        """None while it can read, else the reason in a sentence."""
        return None if self._thread.is_alive() and not self._stopping else "the observer does not run"

    def describe(self) -> dict[str, int | str]:
        with self._wake:
            return {
                "engine": "observer",
                "active": len(self._room.streams),
                "waiting": len(self._waiting),
                "tokens": self._room.tokens,
                "steps": self.steps,
            }

    # --- the event loop ---------------------------------------------------------------------------------------------

    async def open(self, token_ids: Sequence[int]) -> ObservedStream:
        """See `Observer`."""
        n = self._begun.length if self._begun.length < len(token_ids) else 0
        if tuple(token_ids[:n]) != self._opening[:n]:
            n = 0
        begun = self._begun.fork() if n else Cache(self._session.shape)
        stream = ObservedStream(self, begun, self._begun_scores[:n])
        self._check(stream, token_ids[n:])
        with self._wake:
            if sum(job.opening for job in self._waiting) >= self._max_opening:
                raise Overloaded(f"{self._max_opening} prompts are waiting already; try again later")
            self._room.enter(stream)
        try:
            scores = await self.read(stream, token_ids[n:], opening=True)
        except BaseException:
            stream.close()
            raise
        stream.scores = np.concatenate([stream.scores, scores])
        return stream

    async def read(self, stream: ObservedStream, token_ids: Sequence[int], opening: bool = False) -> Scores:
        """See `Stream.read`."""
        self._check(stream, token_ids)
        if not token_ids:
            return np.empty((0, len(self.columns)), np.float32)
        job = Job(stream, tuple(token_ids), asyncio.get_running_loop().create_future(), opening)
        with self._wake:
            self._admit(job)
            self._wake.notify()
        try:
            return await job.done
        except asyncio.CancelledError:
            stream.close()
            raise

    def fork(self, stream: ObservedStream) -> ObservedStream:
        """See `Stream.fork`."""
        with self._wake:
            self._check_idle(stream)
            twin = ObservedStream(self, stream.cache.fork(), stream.scores)
            self._room.enter(twin)
        return twin

    def _check(self, stream: ObservedStream, token_ids: Sequence[int]) -> None:
        n, vocabulary = stream.cache.length + len(token_ids), self._session.shape.vocabulary
        if n > self.max_tokens:
            raise TooLong(f"the conversation has {n} tokens, the observer reads at most {self.max_tokens}")
        # One id that is none would end the step of every stream that shares it.
        if not all(0 <= i < vocabulary for i in token_ids):
            raise RequestInvalid(f"a token id is not between 0 and {vocabulary - 1}")

    def _admit(self, job: Job) -> None:
        """Reserve its memory and let it wait. The lock is held."""
        self._check_idle(job.stream)
        self._room.reserve(job.stream, len(job.token_ids))
        job.stream.job = job
        self._waiting.append(job)

    def _check_idle(self, stream: ObservedStream) -> None:
        """raises: RuntimeError if a step may use it, Overloaded. The lock is held."""
        if self._stopping:
            raise Overloaded("the observer is shutting down; try again later")
        if stream.closed or stream.job is not None:
            raise RuntimeError("a stream is read once at a time, and not after it is closed")

    def close_stream(self, stream: ObservedStream) -> None:
        """See `Stream.close`."""
        with self._wake:
            if stream.closed:
                return
            stream.closed = True
            if stream.job is not None and stream not in self._fed:
                self._end(stream.job, MidstreamError("the stream was closed while it was read"))
            if stream not in self._fed:  # else the thread does it, after the step
                self._room.leave(stream)

    # --- the observer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                try:
                    found = self._session.step([(job.stream.cache, job.token_ids[j:k]) for job, j, k in batch])
                except Exception as error:  # of onnxruntime, which has no common class: only this batch has failed
                    self._failed(batch, error)
                else:
                    self._took(batch, found)
        finally:
            with self._wake:
                self._stopping = True
                for job in list(self._waiting):
                    self._end(job, Overloaded("the observer is shutting down; try again later"))

    def _next(self) -> list[tuple[Job, int, int]] | None:
        """Jobs, and which of their tokens; None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._waiting)
            if self._stopping:
                return None
            chosen = self._turns.choose(self._waiting)
            self._fed = frozenset(job.stream for job, _ in chosen)
            self.steps += 1
            return [(job, job.n_read, job.n_read + n) for job, n in chosen]

    def _took(self, batch: Sequence[tuple[Job, int, int]], found: Sequence[Scores]) -> None:
        with self._wake:
            self._fed = frozenset()
            for (job, _, end), rows in zip(batch, found, strict=True):
                job.rows.append(rows)
                job.n_read = end
                if job.stream.closed:
                    self._end(job, MidstreamError("the stream was closed while it was read"))
                    self._room.leave(job.stream)
                elif job.left == 0:
                    self._end(job, np.concatenate(job.rows))
                else:  # a long prompt goes behind the others after each part of it
                    self._waiting.remove(job)
                    self._waiting.append(job)

    def _failed(self, batch: Sequence[tuple[Job, int, int]], error: Exception) -> None:
        with self._wake:
            self._fed = frozenset()
            for job, _, _ in batch:
                job.stream.closed = True
                self._end(job, MidstreamError(f"the observer's step failed: {type(error).__name__}"))
                self._room.leave(job.stream)

    def _end(self, job: Job, result: Scores | MidstreamError) -> None:
        self._waiting.remove(job)
        job.stream.job = None
        job.end(result)
