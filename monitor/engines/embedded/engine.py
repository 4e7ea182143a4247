"""The engine: one thread, one loop of steps. A step feeds every active sequence, scores, judges and samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from monitor.config import Settings
from monitor.engines.embedded.admission import Admission
from monitor.engines.embedded.asking import Asking
from monitor.engines.embedded.attention import KVCache, Packed, use_packed_attention
from monitor.engines.embedded.generation import Generation, Group
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.reread import Rereading
from monitor.engines.embedded.schedule import Schedule
from monitor.engines.embedded.sets import Forward, Sets
from monitor.engines.embedded.trial import Trial
from monitor.errors import Overloaded
from monitor.live import LiveProbes
from monitor.reread import Offer
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
        self.steps = 0
        self._model = model
        self._settings = settings
        self._observer = observer
        self._died = died
        self._sets = Sets(live)
        self._pass = Forward(model, self._sets.current, settings.max_step_tokens + settings.max_sequences)
        self._admission = Admission(model, settings, observer, offer)
        self.max_model_len = self._admission.longest
        self._schedule = Schedule(settings)
        self._aborted: set[str] = set()
        self._beside: list[Generation] = []  # canaries: not behind others, a roll-back must not wait for a slot
        self._wake = threading.Condition()
        self._asking = Asking(self._wake, lambda ids: str(model.tokenizer.decode(ids)))
        self.rereading = Rereading(model.module, lambda: self.live.bank.layers, self._wake, settings.max_step_tokens)
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="midstream-engine", daemon=True)
        use_packed_attention(model.module)

    # --- any thread ---------------------------------------------------------------------------------------------

    @property
    def live(self) -> LiveProbes:
        """The probes in service. Set them: requests from now on are judged by the new ones, those at work end on the
        old. raises: Overloaded if requests still run on too many sets before"""
        return self._sets.current.live

    @live.setter
    def live(self, live: LiveProbes) -> None:
        with self._wake:
            self._sets.put(live, self._schedule.probes)

    def try_out(self, live: LiveProbes, timeout_s: float = 60.0) -> float:
        """Score the canaries of probes that are not in service yet; returns the largest difference, in logits, 0 for
        those of a set that was tried before. Waits, so not for the engine's thread, nor an event loop's.

        raises: ProbeMismatch if a canary is off, Overloaded
        """
        with self._wake:
            self._check_open()
            probes = self._sets.of(live, self._schedule.probes)
            if probes.verified:
                return 0.0
            trial = Trial(self._model, probes, live)
            self._beside += trial.generations
            self._wake.notify()
        off = trial.check(self._settings.canary_tolerance, timeout_s)
        probes.verified = True
        return off

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        groups = self._admission.groups(request, self._sets.current, deliver)
        with self._wake:
            self._check_open()
            if len(groups) > self._schedule.room:
                raise Overloaded(f"{len(self._schedule.waiting)} prompts are waiting already; try again later")
            self._schedule.waiting.extend(groups)
            self._wake.notify()

    def _check_open(self) -> None:
        if self._stopping or self._error is not None:
            raise Overloaded("the server is shutting down; try again later")

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
        self._asking.close()
        self._pass.keep([])

    def prefill(self, prompt: Prompt) -> Scores:
        """(n_tokens, K) scores of a prompt, through the same forward pass; before `start` only."""
        if self._thread.is_alive():
            raise RuntimeError("prefill runs on the caller's thread; the engine's own is running")
        cache, rows = KVCache(len(prompt.token_ids)), []
        for start in range(0, len(prompt.token_ids), self._settings.max_step_tokens):
            chunk = prompt.token_ids[start : start + self._settings.max_step_tokens]
            sets = [self._sets.current]
            rows.append(self._pass.run([list(chunk)], Packed([cache], [len(chunk)]), [], sets)[0][sets[0]])
        return np.concatenate(rows)

    def check_canaries(self) -> float:
        """Of the probes that it starts with, as `LiveProbes` does; before `start` only. raises: ProbeMismatch"""
        off = self.live.check_canaries(self._model.template, self.prefill, self._settings.canary_tolerance)
        self._sets.current.verified = True
        return off

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_aborted()
                self._take_answers()
                with self._wake:
                    self._schedule.admit()
                    self._schedule.active += self._beside
                    self._beside = []
                if self._schedule.active and not self._step():
                    self._pause()
                self.rereading.step(bool(self._schedule.active or self._schedule.waiting))
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        schedule = self._schedule
        with self._wake:
            while not (schedule.waiting or schedule.active or self._beside or self.rereading.waits or self._stopping):
                self._aborted.clear()  # nobody is here that they could name
                self._wake.wait()
            return bool(schedule.waiting or schedule.active or self._beside or not self._stopping)

    def _pause(self) -> None:
        """Every active sequence waits for the second judge, who answers within a deadline."""
        with self._wake:
            if not (self._asking.answered or self._aborted):
                self._wake.wait(_PAUSE_S)

    def _drop_aborted(self) -> None:
        with self._wake:
            gone, self._aborted = self._aborted, set()
            dropped = self._schedule.drop(gone) if gone else []
        for sequence in dropped:
            self._finish(sequence, "aborted")

    def _finish(self, sequence: Generation, reason: FinishReason) -> None:
        rows = np.empty((0, sequence.probes.k), dtype=np.float32)
        sequence.judge(sequence.cache.length, rows, 0, reason, self.model_name)

    def _step(self) -> bool:
        """False if there was nothing to feed."""
        batch = list(self._schedule.choose())
        if not batch:
            return False
        if self._pass.several:  # some of them may be through
            with self._wake:
                self._pass.keep(self._schedule.probes | {self._sets.current})
        packed = Packed([s.cache for s, _ in batch], [n for _, n in batch])
        tokens = [s.tokens[s.cache.length : s.cache.length + n] for s, n in batch]
        ends = np.cumsum(packed.n_new) - 1
        samples = [i for i, (s, n) in enumerate(batch) if s.samples_after(n)]
        sets = list(dict.fromkeys(s.probes for s, _ in batch))
        scores, logits = self._pass.run(tokens, packed, [int(ends[i]) for i in samples], sets)
        began = time.perf_counter()
        next_logits = dict(zip(samples, logits, strict=True))
        for i, (sequence, n) in enumerate(batch):
            first = sequence.cache.length - n
            rows = scores[sequence.probes][ends[i] + 1 - n : ends[i] + 1]
            self._advance(sequence, first, rows, next_logits.get(i))
        for sequence in self._schedule.active:
            self._asking.ask(sequence)
        self._schedule.active = [s for s in self._schedule.active if not s.ended]
        self._observer.scored(time.perf_counter() - began, packed.n_tokens)
        self.steps += 1
        return True

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

    def _take_answers(self) -> None:
        answers = self._asking.take()
        for sequence, _, second in answers:
            sequence.resolve(second, self.model_name)
            if sequence.ended:
                self._schedule.groups.pop(id(sequence), None)
            else:
                self._asking.ask(sequence)  # another probe may have waited for its turn
        if answers:
            self._schedule.active = [s for s in self._schedule.active if not s.ended]

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self._error = error
            left = self._schedule.clear() + self._beside
            self._beside = []
        try:
            for sequence in left:
                if not sequence.ended:
                    self._finish(sequence, "engine_error")
        finally:
            self._died(error)
