"""The self-test of a started engine: it scores the canaries as their cards say, decode steps as it scores prompts, and
renders a conversation as the probes' thresholds were certified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMError

from monitor.engines.vllm.banks import Bank
from monitor.engines.vllm.scorer import VllmScorer
from monitor.errors import ProbeMismatch
from monitor.live import LiveProbes, canary_prompts
from monitor.types import Scores

if TYPE_CHECKING:
    from monitor.engines.vllm.launch import Plan

_TEXT = "The quick brown fox jumps over the lazy dog."
_CONVERSATION = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": _TEXT},
]
_DECODED = 4


async def check_canaries(scorer: VllmScorer, plan: Plan, live: LiveProbes, bank: Bank | None = None) -> float:
    """Through the whole engine: forward pass, scheduler, judge. bank: where the probes lie, None: they are in service

    raises: ProbeMismatch
    """
    template, scores = plan.model.template, dict[tuple[int, ...], Scores]()
    for prompt in canary_prompts(live, template):
        scores[prompt.token_ids] = await scorer.prefill(prompt, len(live.bank), bank)
    return live.check_canaries(template, lambda prompt: scores[prompt.token_ids], plan.settings.canary_tolerance)


async def check_decoding(scorer: VllmScorer, plan: Plan, live: LiveProbes) -> float:
    """Decode steps may run in CUDA graphs of their own, without the tap: a few tokens that are sampled must have the
    scores that they have in a prompt. Returns the largest difference, in logits.

    raises: ProbeMismatch
    """
    template, width = plan.model.template, len(live.bank)
    prompt = template.raw(_TEXT)
    ids, decoded = await scorer.decode(prompt, _DECODED, width)
    off = float("nan")
    if np.isfinite(decoded).all():
        prefilled = await scorer.prefill(template.raw(ids), width)
        off = float(np.abs(decoded - prefilled)[len(prompt.token_ids) :].max())
    allowed = plan.settings.canary_tolerance or min(p.card.canary_tolerance for p in live.probes)
    if not off <= allowed:  # also when it is NaN
        raise ProbeMismatch(
            f"tokens score otherwise when sampled than in a prompt: off by {off:.3g} logits, {allowed:g} is allowed; "
            "if --enforce-eager is a cure, the tap is missing from a CUDA graph: please report it (a dtype of less "
            "precision shifts scores a little: accept that with MIDSTREAM_CANARY_TOLERANCE)"
        )
    return off


async def check_rendering(engine: Any, plan: Plan) -> None:
    """vLLM's tokens of a conversation are those of the template that the probes belong to. raises: ProbeMismatch"""
    template, arguments = plan.model.template, plan.arguments
    if not template.has_chat:
        return
    asked = ChatCompletionRequest(messages=_CONVERSATION)
    how = asked.build_chat_params(None, arguments.chat_template_content_format)
    try:
        _, (rendered,) = await engine.renderer.render_chat_async([_CONVERSATION], how)
    except VLLMError as error:
        raise ProbeMismatch(f"vLLM can't render a conversation with its arguments: {error}") from error
    if tuple(rendered["prompt_token_ids"]) != template.encode(_CONVERSATION).token_ids:
        raise ProbeMismatch(
            "vLLM renders a conversation into other tokens than the chat template that the probes were certified with; "
            "leave out what changes its prompts (--chat-template-content-format, --hf-overrides, a plugin)"
        )
