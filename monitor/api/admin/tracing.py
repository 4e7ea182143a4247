"""An operator's own request, token by token: what `POST /admin/scores` streams."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from monitor.api.admin.aside import Aside
from monitor.template import ChatTemplate
from monitor.types import Caller, Phase, Record, Scorer, Scores


class Tracing:
    """See `Tracer`. probes: names of the columns that are served now; model: the served name"""

    def __init__(
        self, scorer: Scorer, template: ChatTemplate, probes: Callable[[], Sequence[str]], model: str, aside: Aside
    ) -> None:
        self._aside = aside
        self._scorer, self._template, self._probes, self._model = scorer, template, probes, model

    async def trace(
        self, request_id: str, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """raises: RequestInvalid, Overloaded"""
        prompt = await self._aside(self._template.encode, messages)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        probes, spell, n_prompt = tuple(self._probes()), self._template.tokenizer.decode, len(prompt.token_ids)

        def take(first: int, ids: Sequence[int], rows: Scores) -> None:
            if rows.shape[1] != len(probes):  # others have been promoted in between
                return
            for position, (token, row) in enumerate(zip(ids, rows.tolist(), strict=True), first):
                phase = Phase.PROMPT if position < n_prompt else Phase.RESPONSE
                scores = {name: round(score, 5) for name, score in zip(probes, row, strict=True)}
                event = {"position": position, "token": spell([token]), "phase": phase, "scores": scores}
                with contextlib.suppress(RuntimeError):  # at shutdown the loop may be closed: nobody looks any more
                    loop.call_soon_threadsafe(events.put_nowait, event)

        caller = Caller(route="internal", model=self._model)
        work = asyncio.create_task(
            self._scorer.follow(request_id, prompt, max_tokens, temperature, caller, take), name="midstream-trace"
        )
        # In turn with the rows, which come through the loop too.
        work.add_done_callback(lambda _: loop.call_soon(events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield summary(await work)
        finally:
            work.cancel()


def summary(record: Record) -> dict[str, Any]:
    """The last event."""
    readings = [dataclasses.asdict(r) for r in record.readings]
    return {"verdict": record.verdict, "finish": record.finish, "policy": record.policy, "readings": readings}
