"""The engine: one thread, one loop of steps. A step feeds every active sequence, scores, judges and samples."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from monitor.config import Settings
from monitor.engines.embedded.attention import KVCache, Packed, use_packed_attention
from monitor.engines.embedded.generation import Generation, Group
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.reread import Rereading
from monitor.engines.embedded.sampling import Sampler
from monitor.engines.embedded.schedule import Schedule
from monitor.engines.embedded.text import AnswerText
from monitor.errors import Overloaded, RequestInvalid
from monitor.live import LiveProbes
from monitor.policy.second import Asker
from monitor.question import Question
from monitor.reread import Offer
from monitor.tap import Tap
from monitor.types import Deliver, FinishReason, GenerationRequest, Observer, Prompt, Scores

_PAUSE_S = 0.05


class EmbeddedEngine:
    """transformers in this process. `start` it, `submit` requests, `stop` it; `prefill` scores without generating.

    died: called once, from the engine's thread, when a step raises; the engine is then not ready for good
    offer: told of each finished sequence after its record was published; `rereading` reads it again
    """

    def __init__(
        self,
        model: LoadedModel,
        live: LiveProbes,
        settings: Settings,
        observer: Observer,
        died: Callable[[BaseException], None] = lambda error: None,
        offer: Offer | None = None,
    ) -> None:
        self.model_name = model.name
        self.max_model_len = min(model.max_model_len, settings.max_model_len or model.max_model_len)
        self.live = live
        self.steps = 0
        self._model = model
        self._settings = settings
        self._observer = observer
        self._died, self._offer = died, offer
        self._tap = Tap(model.module, live.bank, settings.max_step_tokens + settings.max_sequences)
        self._schedule = Schedule(settings)
        self._aborted: set[str] = set()
        self._answers: list[tuple[Generation, Question, float | None]] = []  # of the second judge
        self._asker = Asker()
        self._wake = threading.Condition()
        self.rereading = Rereading(model.module, lambda: self.live.bank.layers, self._wake, settings.max_step_tokens)
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="midstream-engine", daemon=True)
        self._special = frozenset(model.tokenizer.all_special_ids)
        use_packed_attention(model.module)

    # --- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        if request.n > self._settings.max_sequences:
            raise RequestInvalid(f"n is {request.n}; send at most {self._settings.max_sequences}", "n")
        groups = [Group(list(self._choices(request, p, deliver))) for p in range(len(request.prompts))]
        for group in groups:
            if group.reserved > self._settings.kv_tokens:
                raise RequestInvalid(
                    f"n x (prompt + max_tokens) is {group.reserved} tokens, this server holds "
                    f"{self._settings.kv_tokens}; ask for a smaller max_tokens or n",
                    "max_tokens",
                )
        with self._wake:
            if self._stopping or self._error is not None:
                raise Overloaded("the server is shutting down; try again later")
            if len(groups) > self._schedule.room:
                raise Overloaded(f"{len(self._schedule.waiting)} prompts are waiting already; try again later")
            self._schedule.waiting.extend(groups)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._aborted.add(request_id)
            self._wake.notify()

    def readiness(self) -> str | None:
        if self._error is not None:
            return f"the engine has died: {type(self._error).__name__}"
        return "the server is shutting down" if self._stopping else None

    def describe(self) -> Mapping[str, Any]:
        return {"engine": "embedded", "active": len(self._schedule.active), "waiting": len(self._schedule.waiting)}

    def drain(self) -> None:
        """Not ready from now on: refuse new requests, let the others finish."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def stop(self, timeout_s: float) -> None:
        """Drain, cut what is still active after `timeout_s`, and return when idle."""
        deadline = time.monotonic() + timeout_s
        self.drain()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
            with self._wake:
                self._aborted |= self._schedule.request_ids
                self._wake.notify()
            self._thread.join()
        self._asker.close()
        self._tap.detach()

    def prefill(self, prompt: Prompt) -> Scores:
        """(n_tokens, K) scores of a prompt, through the same forward pass; before `start` only."""
        if self._thread.is_alive():
            raise RuntimeError("prefill runs on the caller's thread; the engine's own is running")
        cache, rows = KVCache(len(prompt.token_ids)), []
        for start in range(0, len(prompt.token_ids), self._settings.max_step_tokens):
            chunk = prompt.token_ids[start : start + self._settings.max_step_tokens]
            rows.append(self._forward([list(chunk)], Packed([cache], [len(chunk)]), [])[0])
        return np.concatenate(rows)

    def _choices(self, request: GenerationRequest, prompt_index: int, deliver: Deliver) -> Iterator[Generation]:
        prompt, policy = request.prompts[prompt_index], self.live.choose(request.caller)
        spell = self._model.tokenizer.decode
        for i in range(request.n):
            yield Generation(
                request,
                prompt_index * request.n + i,
                prompt,
                policy,
                Sampler(request.sampling, i, lambda token: spell([token])),
                AnswerText(self._model.tokenizer, request.sampling.stop),
                deliver,
                self._observer.record,
                self._offer,
            )

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_aborted()
                self._take_answers()
                with self._wake:
                    self._schedule.admit()
                if self._schedule.active and not self._step():
                    self._pause()
                self.rereading.step(bool(self._schedule.active or self._schedule.waiting))
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        schedule = self._schedule
        with self._wake:
            while not (schedule.waiting or schedule.active or self.rereading.waits or self._stopping):
                self._aborted.clear()  # nobody is here that they could name
                self._wake.wait()
            return bool(schedule.waiting or schedule.active or not self._stopping)

    def _pause(self) -> None:
        """Every active sequence waits for the second judge, who answers within a deadline."""
        with self._wake:
            if not (self._answers or self._aborted):
                self._wake.wait(_PAUSE_S)

    def _drop_aborted(self) -> None:
        with self._wake:
            gone, self._aborted = self._aborted, set()
            dropped = self._schedule.drop(gone) if gone else []
        for sequence in dropped:
            self._finish(sequence, "aborted")

    def _finish(self, sequence: Generation, reason: FinishReason) -> None:
        rows = np.empty((0, len(self.live.bank)), dtype=np.float32)
        sequence.judge(sequence.cache.length, rows, 0, reason, self.model_name)

    def _step(self) -> bool:
        """False if there was nothing to feed."""
        batch = list(self._schedule.choose())
        if not batch:
            return False
        packed = Packed([s.cache for s, _ in batch], [n for _, n in batch])
        tokens = [s.tokens[s.cache.length : s.cache.length + n] for s, n in batch]
        ends = np.cumsum(packed.n_new) - 1
        samples = [i for i, (s, n) in enumerate(batch) if s.samples_after(n)]
        rows, logits = self._forward(tokens, packed, [int(ends[i]) for i in samples])
        began = time.perf_counter()
        next_logits = dict(zip(samples, logits, strict=True))
        for i, (sequence, n) in enumerate(batch):
            first = sequence.cache.length - n
            self._advance(sequence, first, rows[ends[i] + 1 - n : ends[i] + 1], next_logits.get(i))
        for sequence in self._schedule.active:
            self._ask(sequence)
        self._schedule.active = [s for s in self._schedule.active if not s.ended]
        self._observer.scored(time.perf_counter() - began, packed.n_tokens)
        self.steps += 1
        return True

    def _forward(self, tokens: list[list[int]], packed: Packed, sample_at: list[int]) -> tuple[Scores, torch.Tensor]:
        device = self.live.bank.weight.device
        n = packed.n_tokens
        self._tap.begin(n)
        with torch.inference_mode():
            output = self._model.module(
                input_ids=torch.tensor([[t for part in tokens for t in part]], device=device),
                position_ids=torch.tensor([packed.positions()], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(sample_at, dtype=torch.long, device=device),
                packed=packed,
            )
        packed.advance()
        return self._scores(n), output.logits[0]

    def _scores(self, n: int) -> Scores:
        """A tap that breaks leaves no scores, and the fail mode decides; it must not end everybody's answer."""
        try:
            return self._tap.read(n)
        except RuntimeError as error:  # torch's kind
            print(f"midstream: the tap failed, {n} tokens have no score: {error}", file=sys.stderr)
            return np.full((n, len(self.live.bank)), np.nan, dtype=np.float32)

    def _advance(self, sequence: Generation, first: int, rows: Scores, logits: torch.Tensor | None) -> None:
        group = self._schedule.groups.get(id(sequence))
        if group is None:
            self._sample(sequence, first, rows, logits)
            return
        group.prompt_rows.append(rows)
        if logits is None:  # a chunk of the prompt
            sequence.judge(first, rows, 0, None, self.model_name)
            if sequence.ended:  # a missing row has ended it already
                del self._schedule.groups[id(sequence)]
                for twin in group.choices[1:]:
                    self._finish_like(twin, group)
            return
        del self._schedule.groups[id(sequence)]
        cache, everything = sequence.cache, np.concatenate(group.prompt_rows)
        for twin in group.choices[1:]:
            twin.cache = cache.fork()
            self._sample(twin, 0, everything, logits)
            if not twin.ended:
                self._schedule.active.append(twin)
        self._sample(sequence, first, rows, logits)

    def _finish_like(self, twin: Generation, group: Group) -> None:
        twin.judge(0, np.concatenate(group.prompt_rows), 0, None, self.model_name)

    def _sample(self, sequence: Generation, first: int, rows: Scores, logits: torch.Tensor | None) -> None:
        finish, n_new = sequence.last, 0
        if logits is not None:
            n_new, finish = sequence.sample(logits, self._model.eos_ids)
            if finish in ("stop", "length") and self._settings.score_last:
                sequence.last, finish = finish, None
        sequence.judge(first, rows, n_new, finish, self.model_name)

    def _ask(self, sequence: Generation) -> None:
        """Hand a question that is new to the second judge's threads."""
        question = sequence.watch.question
        if question is None or question is sequence.asked:
            return
        sequence.asked = question
        how = self.live.second(sequence.policy.terms.policy)
        if how is None:  # the policy was replaced by one without a second judge
            self._answered(sequence, question, None)
            return
        read = sequence.tokens[: question.n_read]
        spell = self._model.tokenizer.decode
        self._asker.ask(how, lambda: str(spell(read)), lambda z: self._answered(sequence, question, z))

    def _answered(self, sequence: Generation, question: Question, second: float | None) -> None:
        with self._wake:
            self._answers.append((sequence, question, second))
            self._wake.notify()

    def _take_answers(self) -> None:
        with self._wake:
            answers, self._answers = self._answers, []
        for sequence, question, second in answers:
            if sequence.watch.question is question:
                sequence.resolve(second, self.model_name)
            if sequence.ended:
                self._schedule.groups.pop(id(sequence), None)
        if answers:
            self._schedule.active = [s for s in self._schedule.active if not s.ended]

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self._error = error
            left = self._schedule.clear()
        try:
            for sequence in left:
                if not sequence.ended:
                    self._finish(sequence, "engine_error")
        finally:
            self._died(error)
