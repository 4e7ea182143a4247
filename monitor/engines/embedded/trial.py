"""A trial: the canaries of a probe set that is not in service yet, scored in the steps that run anyway."""

from __future__ import annotations

import secrets
import threading
from dataclasses import replace

from monitor.engines.embedded.generation import Generation
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.sampling import Sampler
from monitor.engines.embedded.sets import ProbeSet
from monitor.engines.embedded.text import AnswerText
from monitor.errors import Overloaded
from monitor.live import LiveProbes, canary_prompts
from monitor.policy.rule import Policy
from monitor.types import Delta, GenerationRequest, Mode, Prompt, Record, Sampling


class Trial:
    """generations: to be fed; nobody hears of them, and no rule of theirs acts. live: as `probes` will serve it"""

    def __init__(self, model: LoadedModel, probes: ProbeSet, live: LiveProbes) -> None:
        self._model, self._live = model, live
        self._done = threading.Semaphore(0)
        rules = tuple(replace(r, mode=Mode.SHADOW, escalate=None) for r in live.rules["chat"])
        self._policy = Policy({"chat": rules})
        self.generations = [self._generation(probes, prompt) for prompt in canary_prompts(live, model.template)]

    def _generation(self, probes: ProbeSet, prompt: Prompt) -> Generation:
        request = GenerationRequest(f"canary-{secrets.token_hex(8)}", (prompt,), 1, Sampling(0), given=())
        sampler, text = Sampler(request.sampling, 0, str), AnswerText(self._model.tokenizer, ())
        return Generation(request, 0, prompt, probes, self._policy, sampler, text, self._deliver, _unpublished)

    def _deliver(self, delta: Delta) -> None:
        if delta.record is not None:
            self._done.release()

    def check(self, tolerance: float | None, timeout_s: float) -> float:
        """Wait for the scores; the largest difference, in logits. raises: ProbeMismatch if one is off, Overloaded"""
        if not all(self._done.acquire(timeout=timeout_s) for _ in self.generations):
            raise Overloaded(f"the canaries were not scored within {timeout_s:g} s; try again later")
        scores = {g.prompt.token_ids: g.watch.scores for g in self.generations}
        return self._live.check_canaries(self._model.template, lambda p: scores[p.token_ids], tolerance)


def _unpublished(record: Record) -> None:
    return None
