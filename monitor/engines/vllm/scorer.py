"""Texts of our own through vLLM's engine: the self-test, texts that are only judged, an operator's traced request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from monitor.engines.vllm.banks import Bank
from monitor.engines.vllm.call import Call, Given
from monitor.engines.vllm.own import see_through
from monitor.errors import Overloaded, RequestInvalid
from monitor.types import Caller, Prompt, Record, Scores, Trace


class VllmScorer:
    """engine: an AsyncLLM with a Judge; each method's request passes through it like any other"""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def prefill(self, prompt: Prompt, n_probes: int, bank: Bank | None = None) -> Scores:
        """(n_tokens, n_probes) scores of a prompt, computed and not from the cache, NaN where there is none; leaves no
        record. bank: the set, None: in service. raises: RequestInvalid for a prompt that vLLM can't take"""
        return (await self.decode(prompt, 0, n_probes, bank))[1]

    async def decode(
        self, prompt: Prompt, n: int, n_probes: int, bank: Bank | None = None
    ) -> tuple[tuple[int, ...], Scores]:
        """As `prefill`, of a prompt and n tokens sampled after it, greedily, whatever they are: all ids and scores"""
        ids = np.full(len(prompt.token_ids) + n, -1)
        scores = np.full((len(ids), n_probes), np.nan, np.float32)

        def take(first: int, these: Sequence[int], rows: Scores) -> None:
            at = slice(first, first + len(rows))
            ids[at], scores[at] = these, rows

        call = Call("self-test", prompt.format, trace=take, silent=True, bank=bank)
        await self.generate(call, prompt.token_ids, n + 1, salt=call.id, ignore_eos=True)
        return tuple(ids.tolist()), scores

    async def judge(self, request_id: str, prompt: Prompt, answer: tuple[int, ...], caller: Caller) -> Record:
        """See `Scorer`."""
        call = Call(caller.route, prompt.format, caller.model, caller.key, id=request_id, given=Given(prompt, answer))
        return await self.generate(call, prompt.token_ids + answer, 1)

    async def follow(
        self, request_id: str, prompt: Prompt, max_tokens: int, temperature: float, caller: Caller, trace: Trace
    ) -> Record:
        """Answer a prompt for nobody but `trace`; cancelling it stops the work. raises: as `judge`"""
        call = Call(caller.route, prompt.format, caller.model, caller.key, id=request_id, trace=trace)
        return await self.generate(call, prompt.token_ids, max_tokens, temperature)

    async def generate(
        self,
        call: Call,
        ids: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        *,
        salt: str | None = None,
        ignore_eos: bool = False,
    ) -> Record:
        """The call's request, to its end. salt: keeps it from what is cached. raises: RequestInvalid, Overloaded"""
        room = self._engine.model_config.max_model_len
        if len(ids) + max_tokens > room:
            raise RequestInvalid(
                f"{len(ids)} tokens + {max_tokens} do not fit into the model's {room}; shorten the text"
            )
        try:
            await see_through(self._engine, call, ids, max_tokens, temperature, salt=salt, ignore_eos=ignore_eos)
        except VLLMValidationError as error:
            raise RequestInvalid(str(error)) from error
        except EngineDeadError as error:
            raise Overloaded("the engine has died, the server is shutting down; try again later") from error
        except (GracefulHTTPError, EngineGenerateError) as error:  # its queue is full, or this request has failed
            raise Overloaded("vLLM takes no more requests now; try again later") from error
        return call.records[0]
