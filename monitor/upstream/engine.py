"""The observer as an engine: opens the choices of a request, counts what is active, and answers texts of our own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monitor.errors import MidstreamError, Overloaded, RequestInvalid
from monitor.live import LiveProbes
from monitor.observer.protocol import Observer, Stream
from monitor.policy.second import Asker
from monitor.types import Caller, Prompt, Record, Trace
from monitor.types import Observer as Sink
from monitor.upstream.breaker import State
from monitor.upstream.choice import Choice, Lag, Setting


class ObserverEngine:
    """Lives in one event loop. sink: told of every record; upstream: the state of its circuit breaker"""

    def __init__(
        self,
        observer: Observer,
        live: LiveProbes,
        sink: Sink,
        lag: Lag | None = None,
        upstream: Callable[[], State] = lambda: "closed",
    ) -> None:
        self.observer, self.live, self.lag = observer, live, lag or Lag()
        self.model_name = observer.model.name
        self._sink, self._upstream = sink, upstream
        self._asker = Asker()
        self._active: dict[str, list[Choice]] = {}
        self._stopping = False

    def setting(self, request_id: str, caller: Caller) -> Setting:
        return Setting(
            request_id,
            caller,
            caller.model or self.model_name,
            self.observer,
            self.lag,
            self._ask,
            self._sink.record,
            self._sink.scored,
        )

    async def open(self, request_id: str, prompts: Sequence[Prompt], n: int, caller: Caller) -> list[Choice]:
        """Read and judge the prompts; choice i of prompt p has index p * n + i.

        raises: Overloaded when it is stopping
        """
        if self._stopping:
            raise Overloaded("the server is shutting down; try again later")
        policy, setting = self.live.choose(caller), self.setting(request_id, caller)
        choices = [Choice(setting, i, prompts[i // n], policy) for i in range(len(prompts) * n)]
        self._active[request_id] = choices
        try:
            await asyncio.gather(*(self._read(choices[p * n : p * n + n]) for p in range(len(prompts))))
        except BaseException:
            self.close(request_id)
            raise
        return choices

    async def _read(self, twins: Sequence[Choice]) -> None:
        """One prompt, read once: its scores serve all of its choices, and a fork of its stream goes on with each."""
        leader = twins[0]
        ids = leader.prompt.token_ids
        stream = leader.stream = await leader.tried(leader.observer.open(ids), len(ids))
        scores = None if stream is None else stream.scores
        if stream is not None:  # forked at once, before the leader goes on or ends; a choice that ends closes its own
            for twin in twins[1:]:
                twin.stream = _forked(stream)
        for choice in twins:
            choice.too_long = leader.too_long
            await choice.read_prompt(scores)

    def close(self, request_id: str) -> None:
        """The request is over: what of it has not ended is aborted. Synchronous, for a `finally`."""
        for choice in self._active.pop(request_id, ()):
            choice.end("aborted")

    def describe(self) -> Mapping[str, Any]:
        active = sum(not c.ended for choices in list(self._active.values()) for c in choices)
        return {"engine": "observer", "observer": self.model_name, "active": active, "upstream": self._upstream()}

    def readiness(self) -> str | None:
        return "the server is shutting down" if self._stopping else None

    def drain(self) -> None:
        """Not ready from now on: refuse new requests, let the others finish."""
        self._stopping = True

    def stop(self) -> None:
        self.drain()
        self._asker.close()

    def _ask(self, policy: str, ids: list[int], answered: Callable[[float | None], None]) -> None:
        how, loop = self.live.second(policy), asyncio.get_running_loop()
        if how is None:  # the policy was replaced by one without a second judge
            loop.call_soon(answered, None)
            return
        spell = self.observer.tokenizer.decode
        self._asker.ask(how, lambda: str(spell(ids)), lambda z: _tell(loop, answered, z))


def _forked(stream: Stream) -> Stream | None:
    """None if there is no room: then the choice reads its prompt again, when it has something to read."""
    try:
        return stream.fork()
    except Overloaded:
        return None


def _tell(loop: asyncio.AbstractEventLoop, answered: Callable[[float | None], None], z: float | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(answered, z)


class ObserverScorer:
    """See `Scorer`: a given answer is read like an upstream's."""

    def __init__(self, engine: ObserverEngine) -> None:
        self._engine = engine

    async def judge(self, request_id: str, prompt: Prompt, answer: tuple[int, ...], caller: Caller) -> Record:
        engine = self._engine
        setting = engine.setting(request_id, caller)
        choice = Choice(setting, 0, prompt, engine.live.choose(caller))
        began, stream = time.perf_counter(), None
        try:
            try:
                async with asyncio.timeout(engine.lag.bound_s(len(prompt.token_ids))):
                    stream = choice.stream = await setting.observer.open(prompt.token_ids)
            except TimeoutError as error:
                raise Overloaded("the observer is busy; try again later") from error
            setting.scored(time.perf_counter() - began, len(prompt.token_ids))
            await choice.read_prompt(stream.scores)
            if not choice.ended:
                await choice.read_ids(answer, "stop")
        except (RequestInvalid, Overloaded):
            raise
        except MidstreamError as error:  # a step failed: to the caller it is as good as busy
            raise Overloaded(str(error)) from error
        finally:
            if stream is not None:
                choice.end("aborted")
        if choice.record is None:
            raise AssertionError("a finished sequence has a record")
        return choice.record

    async def follow(
        self, request_id: str, prompt: Prompt, max_tokens: int, temperature: float, caller: Caller, trace: Trace
    ) -> Record:
        raise RequestInvalid("the answers are the upstream's: there is none to trace; use the embedded engine or vLLM")
