"""One choice being generated: its tokens, its cache, its Watch, and what of it the client may have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from monitor.engines.embedded.attention import KVCache
from monitor.engines.embedded.sampling import Sampler
from monitor.engines.embedded.sets import ProbeSet
from monitor.engines.embedded.text import AnswerText
from monitor.policy.rule import Policy
from monitor.question import Question
from monitor.reread import Offer
from monitor.sequence import Judged, Watch
from monitor.types import (
    Deliver,
    Delta,
    FinishReason,
    GenerationRequest,
    Opening,
    Phase,
    Prompt,
    Record,
    Scores,
    TokenLogprob,
)


class Generation:
    """cache.length counts the tokens fed so far; `tokens[cache.length:]` are still to be fed. probes: that score it"""

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        prompt: Prompt,
        probes: ProbeSet,
        policy: Policy,
        sampler: Sampler,
        text: AnswerText,
        deliver: Deliver,
        publish: Callable[[Record], None],
        offer: Offer | None = None,
    ) -> None:
        self.request, self.index, self.prompt, self.probes = request, index, prompt, probes
        self.policy, self.sampler, self.text = policy, sampler, text
        self.watch = Watch(prompt, policy.rules[prompt.format], policy.second)
        self.tokens: list[int] = [*prompt.token_ids, *(request.given or ())]
        self.cache = KVCache(self.reserved)
        self.last: FinishReason | None = None  # ended, but its last token is still to be scored (`score_last`)
        self._deliver, self._publish, self._offer = deliver, publish, offer
        self._logprobs: list[TokenLogprob | None] = []
        self._sent = self._shown = 0
        self._announced = False
        self.asked: Question | None = None  # the newest question that went to the second judge

    @property
    def reserved(self) -> int:
        return len(self.prompt.token_ids) + len(self.request.given or ()) + self.request.sampling.max_tokens

    @property
    def n_waiting(self) -> int:
        return len(self.tokens) - self.cache.length

    def samples_after(self, n: int) -> bool:
        """Whether the next token is sampled once n more are fed."""
        return n == self.n_waiting and self.last is None and self.request.given is None

    @property
    def ended(self) -> bool:
        return self.watch.finish is not None

    def sample(self, logits: Tensor, eos_ids: frozenset[int]) -> tuple[int, FinishReason | None]:
        """Take the next token from the logits of the newest position: how many were sampled, and a reason to end."""
        if bool(logits.isnan().any()):
            return 0, "engine_error"  # one prompt that overflows must not take the others down
        token, logprob = self.sampler(logits)
        self.tokens.append(token)
        self._logprobs.append(logprob)
        stopped = self.text.add(token)
        if stopped or token in eos_ids:
            return 1, "stop"
        return 1, "length" if len(self._logprobs) >= self.request.sampling.max_tokens else None

    def judge(self, first: int, rows: Scores, n_new: int, finish: FinishReason | None, model: str) -> None:
        """Hand a step to the Watch, and what it releases to the client."""
        if self.request.trace is not None and self.index == 0 and len(rows):
            self.request.trace(first, self.tokens[first : first + len(rows)], self.watch.shown(rows))
        if self.request.given is None:
            self._hand_out(self.watch.advance(first, rows, n_new, finish), model)
        elif finish is None:
            self._hand_out(self.watch.replay(first, rows, len(self.request.given)), model)
        else:
            self._hand_out(self.watch.advance(first, rows, 0, finish), model)

    def resolve(self, second: float | None, model: str) -> None:
        """The second judge's answer, to the Watch and on."""
        self._hand_out(self.watch.resolve(second), model)

    def _hand_out(self, judged: Judged, model: str) -> None:
        """What is released, to the client: the Record first, then the last text."""
        if not self.watch.prompt_judged and judged.finish is None:
            return
        text, tokens = "", list[TokenLogprob | None]()
        if self.request.given is None:
            text = self.text.release(judged.released, final=judged.finish is not None)
            # A token's logprob goes out with its text: not while that may be a stop string, never if it was cut.
            shown = self.text.shown(judged.released)
            tokens, self._shown = self._logprobs[self._shown : shown], shown
        n_tokens, self._sent = judged.released - self._sent, judged.released
        record = None
        if judged.finish is not None:
            name = self.policy.terms.policy
            record = self.watch.record(self.request.id, self.index, model, self.request.caller, name)
            self._publish(record)
            if self._offer is not None:
                self._offer(record, self.prompt, self.tokens)
            self.cache = KVCache(0)  # its memory goes now, not when the client lets go of the request
        if record is not None or text or n_tokens or not self._announced:
            opening = None if self._announced else Opening(self.policy.terms, self.watch.readings(Phase.PROMPT))
            self._announced = True
            logprobs = tuple(t for t in tokens if t is not None)
            self._deliver(Delta(self.index, text, logprobs, n_tokens, judged.finish, record, opening))


class Group:
    """The choices of one prompt. The first is prefilled; the others take a copy of its cache and its scores."""

    def __init__(self, choices: Sequence[Generation]) -> None:
        self.choices = choices
        self.leader = choices[0]
        self.request_id = self.leader.request.id
        self.prompt_rows: list[Scores] = []

    @property
    def reserved(self) -> int:
        return sum(c.reserved for c in self.choices)
