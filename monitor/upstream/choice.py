"""One answer that is read along: its text in, how much of it was judged out, and a Record when it has ended."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from monitor.errors import MidstreamError
from monitor.observer.protocol import Observer, Stream, TooLong
from monitor.policy.rule import Policy
from monitor.question import Question
from monitor.sequence import Watch
from monitor.types import Caller, FinishReason, Opening, Phase, Prompt, Record, Scores
from monitor.upstream.words import Words

T = TypeVar("T")
_BETWEEN = "\n"
_ERRORS = (MidstreamError, TimeoutError, RuntimeError)  # RuntimeError: the runtime's own


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the observer may be behind an answer; beyond it the fail mode decides.

    tokens: that arrive while it reads what came before them; also the most of one read
    seconds: for one read; a prompt has as many times of it as it takes reads
    pause_s: without new text, after which what the tokenizer might still change is read as it is
    """

    tokens: int = 256
    seconds: float = 5.0
    pause_s: float = 0.25

    def bound_s(self, n_tokens: int) -> float:
        return self.seconds * max(1, -(-n_tokens // self.tokens))


class Judge(Protocol):
    """The second judge. Answers from the event loop, once."""

    def __call__(self, policy: str, ids: list[int], answered: Callable[[float | None], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What all choices of a request share. publish: told of each record; scored: of each read (seconds, tokens)"""

    id: str
    caller: Caller
    model: str
    observer: Observer
    lag: Lag
    ask: Judge
    publish: Callable[[Record], None]
    scored: Callable[[float, int], None]


class Choice:
    """released: characters that the client may have; changed: called when the second judge has answered
    stream: what reads it along; None until there is something to read, if it shares the scores of another's prompt

    Its texts are one sequence, in the order in which they arrive; texts of different channels are parted by a line end.
    """

    def __init__(self, setting: Setting, index: int, prompt: Prompt, policy: Policy) -> None:
        self.index, self.prompt, self.policy = index, prompt, policy
        self.watch = Watch(prompt, policy.rules[prompt.format], policy.second)
        self.words = Words(setting.observer.tokenizer)
        self.record: Record | None = None
        self.opening: Opening | None = None
        self.too_long = False
        self.stream: Stream | None = None
        self.changed: Callable[[], None] = lambda: None
        self._setting = setting
        self._lost = False  # the observer no longer reads along
        self._channel: str | None = None
        self._late = ""
        self._ids: list[int] = list(prompt.token_ids)
        self._asked: Question | None = None
        self._settled = asyncio.Event()

    @property
    def caller(self) -> Caller:
        return self._setting.caller

    @property
    def observer(self) -> Observer:
        """What reads it, to the end: another set of probes has another one."""
        return self._setting.observer

    @property
    def ended(self) -> bool:
        return self.record is not None

    @property
    def blocked(self) -> bool:
        return self.watch.finish == "content_filter"

    @property
    def cut(self) -> bool:
        """Whether a verdict has ended it: what lies beyond `released` never goes out."""
        return self.watch.finish in ("content_filter", "unmonitored")

    @property
    def released(self) -> int:
        watch = self.watch
        if watch.finish in ("stop", "length") or not (watch.holds or watch.finish):
            return self.words.length
        return self.words.covered(watch.released)

    # --- the prompt --------------------------------------------------------------------------------------------------

    async def read_prompt(self, scores: Scores | None) -> None:
        """Judge the prompt. scores: of the stream that has read it; None: there are none"""
        self._lost = scores is None
        self.watch.advance(0, self._missing(len(self.prompt.token_ids)) if scores is None else scores)
        await self._answered()
        self.opening = Opening(self.policy.terms, self.watch.readings(Phase.PROMPT))
        self._publish()

    # --- the answer --------------------------------------------------------------------------------------------------

    def add(self, text: str, channel: str, late: bool = False) -> int:
        """Take more text; returns where it begins. late: it came while the observer was reading what was before"""
        if self._channel not in (None, channel):
            self.words.add(_BETWEEN)
        self._channel = channel
        begin = self.words.length
        self.words.add(text)
        if late:
            self._late += text
        return begin

    async def read(self, finish: FinishReason | None = None, pause: bool = False) -> int:
        """Read and judge what is settled. finish: the answer has ended; pause: read what is not settled too

        returns: how many tokens the observer had to read
        """
        if self.ended:
            return 0
        ids = self.words.settle(final=pause or finish is not None)
        late, self._late = self._late, ""
        if len(late) > self._setting.lag.tokens and self._n_tokens(late) > self._setting.lag.tokens:
            self._lose("more text than the lag bound came while it was reading")
        await self.read_ids(ids, finish)
        return len(ids)

    async def read_ids(self, ids: Sequence[int], finish: FinishReason | None = None) -> None:
        """Read and judge these tokens, some at a time, until the first that ends the answer."""
        step = self._setting.lag.tokens
        for start in range(0, max(1, len(ids)), step):
            part = ids[start : start + step]
            rows = await self._rows(part)
            self._ids += part
            last = start + step >= len(ids)
            self.watch.advance(self.watch.n_prompt + self.watch.n_sampled, rows, len(part), finish if last else None)
            self._ask()
            if self.watch.finish is not None:
                break
        if finish is not None:
            await self._answered()
        self._publish()

    def end(self, finish: FinishReason) -> None:
        """It goes no further: the client has left, or the upstream has."""
        self.watch.end(finish)
        self._publish()

    def _n_tokens(self, text: str) -> int:
        return len(self._setting.observer.tokenizer(text, add_special_tokens=False)["input_ids"])

    # --- the observer ------------------------------------------------------------------------------------------------

    async def _rows(self, ids: Sequence[int]) -> Scores:
        if not ids:
            return self._missing(0)
        if self.stream is None and not self._lost:  # it shared the scores of its prompt
            self.stream = await self.tried(self._setting.observer.open(self.prompt.token_ids), self.watch.n_prompt)
        stream, began = self.stream, time.perf_counter()
        rows = None if stream is None else await self.tried(stream.read(ids), len(ids))
        if rows is None:
            return self._missing(len(ids))
        self._setting.scored(time.perf_counter() - began, len(ids))
        return rows

    async def tried(self, reading: Awaitable[T], n_tokens: int) -> T | None:
        """None if the observer fails or takes too long: there are no scores then, and the fail mode decides."""
        try:
            async with asyncio.timeout(seconds := self._setting.lag.bound_s(n_tokens)):
                return await reading
        except _ERRORS as error:
            self.too_long = isinstance(error, TooLong)
            self._lose(f"{type(error).__name__}: {error}" if str(error) else f"no score within {seconds:g} s")
            return None

    def _lose(self, why: str) -> None:
        if not self._lost:
            print(f"midstream: the observer does not read along any more: {why}", file=sys.stderr)
        self._lost = True
        self._close()

    def _close(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    def _missing(self, n: int) -> Scores:
        return np.full((n, len(self._setting.observer.columns)), np.nan, dtype=np.float32)

    # --- the second judge, and the end -------------------------------------------------------------------------------

    def _ask(self) -> None:
        """A question that is new goes to the second judge."""
        question = self.watch.question
        if question is None or question is self._asked:
            return
        self._asked = question
        self._settled.clear()

        def answered(second: float | None) -> None:
            if self.watch.question is question:
                self.watch.resolve(second)
                self._publish()
                self._ask()  # another probe may have waited for its turn
                self.changed()
            self._settled.set()

        self._setting.ask(self.policy.terms.policy, self._ids[: question.n_read], answered)

    async def _answered(self) -> None:
        """Wait for the second judge, who answers within a deadline."""
        self._ask()
        while self.watch.question is not None:
            self._settled.clear()  # an answer to an earlier question, which came too late, may have set it
            await self._settled.wait()
            self._ask()

    def _publish(self) -> None:
        if self.watch.finish is None or self.record is not None:
            return
        self._close()
        s = self._setting
        self.record = self.watch.record(s.id, self.index, s.model, s.caller, self.policy.terms.policy, "observer")
        s.publish(self.record)
