"""A request of our own through vLLM's engine, on behalf of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams

from monitor.engines.vllm.call import CALL, Call


async def see_through(
    engine: Any,
    call: Call,
    ids: Sequence[int],
    max_tokens: int = 1,
    temperature: float = 0.0,
    *,
    salt: str | None = None,
    ignore_eos: bool = False,
    priority: int = 0,
) -> None:
    """To its end; what became of it is in the call. salt: keeps it from what is cached; priority: the smallest goes
    first, where the operator has chosen that policy. raises: what vLLM raises"""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, detokenize=False, ignore_eos=ignore_eos)
    request = {"prompt_token_ids": list(ids)} | ({} if salt is None else {"cache_salt": salt})
    token = CALL.set(call)
    try:
        async for _ in engine.generate(request, params, call.id, priority=priority):
            pass
    finally:
        CALL.reset(token)
