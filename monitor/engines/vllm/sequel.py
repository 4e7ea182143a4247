"""A sequel: one sequence on its way out of vLLM's engine, with its Watch and what of it is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine import FinishReason as Finish

from monitor.engines.vllm.banks import Bank
from monitor.engines.vllm.call import Call
from monitor.engines.vllm.held import Held
from monitor.engines.vllm.support import KEY, N_BANKS
from monitor.question import Question
from monitor.sequence import Watch
from monitor.types import Action, FinishReason, Mode, Opening, Phase, Prompt, Record, Scores

BLOCKED = "midstream:blocked"  # compared by identity: a client's stop string that reads the same is another object
_REASONS: dict[Any, FinishReason] = {
    Finish.STOP: "stop",
    Finish.REPETITION: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "aborted",
    Finish.ERROR: "engine_error",
}


class Sequel:
    """id: vLLM's own for the sequence; index: its choice in the call; model: the name that records carry

    tokens: prompt and answer, as the second judge reads them; asked: the newest question that went to it
    """

    def __init__(self, call: Call, bank: Bank, prompt: Prompt, index: int, request_id: str, model: str) -> None:
        self.call, self.bank, self.index, self.id = call, bank, index, request_id
        self._model = model
        self._k = len(bank.live.bank)
        self._plain = False  # its prompt has its verdict, and nothing but the answer's next tokens is expected
        policy = bank.live.choose(call.caller)
        self.terms = policy.terms
        rules = policy.rules[prompt.format]
        if call.silent:  # the self-test compares scores, whatever a policy makes of them
            rules = tuple(replace(rule, mode=Mode.SHADOW, escalate=None) for rule in rules)
        self.watch = Watch(prompt, rules, policy.second)
        given = () if call.given is None else call.given.answer
        self.tokens: list[int] = [*prompt.token_ids, *given]
        self.asked: Question | None = None
        self._held = Held()
        self._ending: tuple[Any, Any] | None = None  # vLLM's reasons, while the Watch still waits for an answer

    def take(self, output: Any, width: int) -> bool:
        """Judge one output, and rewrite it to what may be released. False if nothing of it may go on yet.

        width: columns of a bank in the rows that the output carries
        """
        params = output.kv_transfer_params
        segments: Sequence[tuple[int, bytes]] = params.pop(KEY, ()) if params else ()
        if params is not None and not params:
            output.kv_transfer_params = None
        if self._plain and len(segments) == 1 and output.finish_reason is None and self.call.failed is None:
            first, raw = segments[0]
            return self._step(output, first, self._rows(raw, width))
        finish = None if output.finish_reason is None else _REASONS[output.finish_reason]
        rows = [(first, self._rows(raw, width)) for first, raw in segments]
        if self.call.given is None:
            self._advance(rows, output.new_token_ids, finish)
        else:
            self._replay(rows, finish)
            output.new_token_ids, output.new_logprobs = [], None
        if self.call.failed is not None and self.watch.finish is None:
            self.watch.end("aborted")  # another sequence of the call may not be answered: neither is this one
        return self._settle(output, finish)

    def _step(self, output: Any, first: int, rows: Scores) -> bool:
        """Nearly every output of an answer, without what the others need: each call is made for every token."""
        watch, tokens = self.watch, output.new_token_ids
        self.tokens += tokens
        watch.advance(first, rows, len(tokens))
        if watch.finish is not None:
            return self._settle(output, None)
        return self._held.exchange(output, watch.released, False)

    def resolve(self, second: float | None) -> tuple[Any, bool]:
        """The second judge has answered: an output of what that releases, and whether it may go on."""
        self.watch.resolve(second)
        output = EngineCoreOutput(request_id=self.id, new_token_ids=[])
        ending, self._ending = self._ending, None
        finish = None
        if ending is not None:
            output.finish_reason, output.stop_reason = ending
            finish = _REASONS[output.finish_reason]
        return output, self._settle(output, finish)

    @property
    def record(self) -> Record:
        call = self.call
        return self.watch.record(call.id, self.index, self._model, call.caller, self.terms.policy)

    def _rows(self, raw: bytes, width: int) -> Scores:
        """raw: (n, N_BANKS, width) float32; returns (n, K) of this bank, in one call of numpy's"""
        size = 4 * N_BANKS * width
        return np.ndarray((len(raw) // size, self._k), np.float32, raw, 4 * self.bank.index * width, (size, 4))

    def _advance(self, rows: list[tuple[int, Scores]], tokens: list[int], finish: FinishReason | None) -> None:
        *earlier, (first, last) = rows or [(self.watch.n_scored, np.empty((0, self._k), np.float32))]
        for at, part in earlier:
            self.watch.advance(at, part)
        if self.call.trace is not None and self.index == 0:
            for at, part in rows:
                # The self-test compares every projection; people see one score a probe.
                shown = part if self.call.silent else self.watch.shown(part)
                self.call.trace(at, self.tokens[at : at + len(part)], shown)
        self.tokens += tokens
        self.watch.advance(first, last, len(tokens), finish)

    def _replay(self, rows: list[tuple[int, Scores]], finish: FinishReason | None) -> None:
        n_answer = len(self.tokens) - self.watch.n_prompt
        for first, part in rows:
            self.watch.replay(first, part, n_answer)
        if finish is not None and self.watch.n_scored < len(self.tokens):  # ended before everything was read
            nothing = np.empty((0, self._k), np.float32)
            self.watch.advance(len(self.tokens), nothing, n_answer - self.watch.n_sampled, finish)

    def _settle(self, output: Any, finish: FinishReason | None) -> bool:
        """finish: the engine's own reason to end, with this output"""
        watch, call = self.watch, self.call
        if self.index not in call.openings and (watch.prompt_judged or watch.finish):
            call.openings[self.index] = Opening(self.terms, watch.readings(Phase.PROMPT))
            self._plain = call.given is None and call.trace is None
        if finish is not None and watch.finish is None:
            self._ending = (output.finish_reason, output.stop_reason)
            output.finish_reason = output.stop_reason = None
        released = watch.released if call.given is None else 0
        ready = self._held.exchange(output, released, watch.finish is not None)
        if watch.finish is not None and watch.finish != finish:
            self._stop(output)
        return ready

    def _stop(self, output: Any) -> None:
        """The Watch has ended it, not the engine."""
        finish, call = self.watch.finish, self.call
        output.finish_reason, output.stop_reason = Finish.ABORT, BLOCKED
        if call.given is not None:
            return
        if finish == "content_filter":
            call.blocked[self.index] = self.watch.released
        blocks_prompt = any(r.action is Action.BLOCK for r in call.openings[self.index].readings)
        if call.failed is None and (finish == "unmonitored" or blocks_prompt):
            call.failed = self.record
