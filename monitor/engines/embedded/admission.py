"""Admission: what a request becomes in the engine, one group of choices a prompt, or why it can't be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from monitor.config import Settings
from monitor.engines.embedded.generation import Generation, Group
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.sampling import Sampler
from monitor.engines.embedded.sets import ProbeSet
from monitor.engines.embedded.text import AnswerText
from monitor.errors import RequestInvalid
from monitor.reread import Offer
from monitor.types import Deliver, GenerationRequest, Observer


@dataclass(frozen=True, slots=True)
class Admission:
    """offer: told of each finished sequence after its record was published"""

    model: LoadedModel
    settings: Settings
    observer: Observer
    offer: Offer | None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer."""
        return min(self.model.max_model_len, self.settings.max_model_len or self.model.max_model_len)

    def groups(self, request: GenerationRequest, probes: ProbeSet, deliver: Deliver) -> list[Group]:
        """raises: RequestInvalid if this server could never hold it"""
        if request.n > self.settings.max_sequences:
            raise RequestInvalid(f"n is {request.n}; send at most {self.settings.max_sequences}", "n")
        groups = [Group(list(self._choices(request, p, probes, deliver))) for p in range(len(request.prompts))]
        for group in groups:
            if group.leader.reserved > self.longest:
                raise RequestInvalid(
                    f"{group.leader.reserved} tokens do not fit into the model's {self.longest}; shorten it"
                )
            if group.reserved > self.settings.kv_tokens:
                raise RequestInvalid(
                    f"n x (prompt + max_tokens) is {group.reserved} tokens, this server holds "
                    f"{self.settings.kv_tokens}; ask for a smaller max_tokens or n",
                    "max_tokens",
                )
        return groups

    def _choices(
        self, request: GenerationRequest, prompt_index: int, probes: ProbeSet, deliver: Deliver
    ) -> Iterator[Generation]:
        prompt, policy = request.prompts[prompt_index], probes.live.choose(request.caller)
        spell = self.model.tokenizer.decode
        for i in range(request.n):
            yield Generation(
                request,
                prompt_index * request.n + i,
                prompt,
                probes,
                policy,
                Sampler(request.sampling, i, lambda token: spell([token])),
                AnswerText(self.model.tokenizer, request.sampling.stop),
                deliver,
                self.observer.record,
                self.offer,
            )
