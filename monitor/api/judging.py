"""Whole texts to the Scorer, for the routes that judge without generating: bounded, in order, ended with the client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from monitor.api.errors import ApiError
from monitor.config import Settings
from monitor.template import ChatTemplate, Message
from monitor.types import Caller, Prompt, Record, Scorer

T = TypeVar("T")
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Judging:
    """What the routes need. model: its own name"""

    scorer: Scorer
    template: ChatTemplate
    settings: Settings
    model: str


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the Scorer. answer: token ids, empty to judge the prompt alone"""

    prompt: Prompt
    answer: tuple[int, ...] = ()


class Session:
    """The calls of one HTTP request. The first has the request's own id, the next ones `ID-1`, `ID-2`, ...

    model: that the client asks for, where it may choose; else the one that judges
    """

    def __init__(self, judging: Judging, http: Request, route: str, model: str | None = None) -> None:
        self.id: str = http.state.midstream_id
        self._judging, self._http = judging, http
        self.caller = Caller(getattr(http.state, "midstream_key", ""), route, model or judging.model)
        self._ids = _ids(self.id)

    async def encode(self, messages: Sequence[Message]) -> Prompt:
        """raises: RequestInvalid if the template refuses these messages"""
        return await asyncio.to_thread(self._judging.template.encode, messages)

    async def turn(self, text: str) -> Job:
        """The text as a user's whole conversation."""
        return Job(await self.encode([{"role": "user", "content": text}]))

    async def answer(self, prompt: Prompt, text: str) -> Job:
        """The text as the model's answer to the prompt."""
        tokenizer = self._judging.template.tokenizer
        encoded = await asyncio.to_thread(tokenizer, text, add_special_tokens=False)
        return Job(prompt, tuple(encoded["input_ids"]))

    async def judge(self, jobs: Sequence[Job]) -> list[Record]:
        """Their records, in the order of the jobs.

        raises: RequestInvalid or Overloaded of the first that fails, the others are then stopped; ApiError 499 if the
        client leaves
        """
        return await unless_gone(self._http, self._all(jobs))

    async def _all(self, jobs: Sequence[Job]) -> list[Record]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(job: Job, identity: str) -> Record:
            async with gate:
                return await self._judging.scorer.judge(identity, job.prompt, job.answer, self.caller)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(job, next(self._ids))) for job in jobs]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]


async def unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; ended, with all it has open, if the client leaves before. raises: ApiError 499 then"""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            continue

    working, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has left")
    finally:
        leaving.cancel()
        working.cancel()


def _ids(own: str) -> Iterator[str]:
    yield own
    for number in itertools.count(1):
        yield f"{own}-{number}"


def readable(text: str, field: str) -> str:
    """The text. raises: ApiError 400 for half a surrogate pair, which no tokenizer takes"""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{field} holds half a surrogate pair; send valid Unicode", param=field) from None
    return text
