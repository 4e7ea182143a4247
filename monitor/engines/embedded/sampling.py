"""Logits -> the next token, with the chances of the likeliest ones. OpenAI's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from monitor.types import Sampling, TokenLogprob

_GREEDY = 1e-5  # below it, dividing by the temperature overflows float32


class Sampler:
    """One sequence's sampling: its own random stream, so that a seed gives the same answer in any company."""

    def __init__(self, sampling: Sampling, choice: int, spell: Callable[[int], str]) -> None:
        self.sampling = sampling
        self._spell = spell
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + choice) % 2**63)
        self._counts: dict[int, int] = {}
        self._bias = self._tensors(sampling.logit_bias) if sampling.logit_bias else None

    @staticmethod
    def _tensors(values: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(values)), torch.tensor(list(values.values()), dtype=torch.float32)

    def __call__(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """logits: (vocabulary,) -> token id, and its log-probability before temperature if it was asked for"""
        s = self.sampling
        logits = logits.float().cpu()
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            penalties = {t: -s.presence_penalty - s.frequency_penalty * n for t, n in self._counts.items()}
            logits = logits.index_add(0, *self._tensors(penalties))
        greedy = s.temperature < _GREEDY
        token = int(logits.argmax()) if greedy else self._draw((logits - logits.max()) / s.temperature)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token, None if s.logprobs is None else self._logprob(token, logits, s.logprobs)

    def _draw(self, logits: Tensor) -> int:
        probabilities = logits.softmax(0)
        if self.sampling.top_p < 1:
            ordered, ids = probabilities.sort(descending=True)
            # The smallest set whose mass reaches top_p: a token stays if the mass before it has not reached it yet.
            beyond = ordered.cumsum(0) - ordered >= self.sampling.top_p
            beyond[0] = False  # a top_p that rounds to 0 still leaves the likeliest
            ordered = ordered.masked_fill(beyond, 0.0)
            return int(ids[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def _logprob(self, token: int, logits: Tensor, k: int) -> TokenLogprob:
        logprobs = logits.log_softmax(0)
        values, ids = logprobs.topk(k)
        top = tuple((i, self._spell(i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, self._spell(token), float(logprobs[token]), top)
