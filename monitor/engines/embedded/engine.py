"""The engine: one thread, one loop of steps. A step feeds every active sequence, scores, judges and samples."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from monitor.config import Settings
from monitor.engines.embedded.attention import KVCache, Packed, use_packed_attention
from monitor.engines.embedded.generation import Generation, Group
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.sampling import Sampler
from monitor.engines.embedded.text import AnswerText
from monitor.live import LiveProbes
from monitor.sequence import Watch
from monitor.tap import Tap
from monitor.types import (
    Deliver,
    FinishReason,
    GenerationRequest,
    Observer,
    Overloaded,
    Prompt,
    RequestInvalid,
    Scores,
)


class EmbeddedEngine:
    """transformers in this process. `start` it, `submit` requests, `stop` it; `prefill` scores without generating.

    died: called once, from the engine's thread, when a step raises; the engine is then not ready for good
    """

    def __init__(
        self,
        model: LoadedModel,
        live: LiveProbes,
        settings: Settings,
        observer: Observer,
        died: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.model_name = model.name
        self.max_model_len = min(model.max_model_len, settings.max_model_len or model.max_model_len)
        self.live = live
        self.steps = 0
        self._model = model
        self._settings = settings
        self._observer = observer
        self._died = died
        self._tap = Tap(model.module, live.bank, settings.max_step_tokens + settings.max_sequences)
        self._waiting: deque[Group] = deque()
        self._active: list[Generation] = []
        self._groups: dict[int, Group] = {}  # id(leader) -> its group, until the prompt is prefilled
        self._aborted: set[str] = set()
        self._wake = threading.Condition()
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
            room = self._settings.max_queue + self._settings.max_sequences - len(self._active)
            if len(self._waiting) + len(groups) > room:
                raise Overloaded(f"{len(self._waiting)} prompts are waiting already; try again later")
            self._waiting.extend(groups)
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
        return {"engine": "embedded", "active": len(self._active), "waiting": len(self._waiting)}

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
                self._aborted.update(g.request_id for g in self._waiting)
                self._aborted.update(s.request.id for s in self._active)
                self._wake.notify()
            self._thread.join()
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
        prompt = request.prompts[prompt_index]
        spell = self._model.tokenizer.decode
        for i in range(request.n):
            yield Generation(
                request,
                prompt_index * request.n + i,
                prompt,
                Watch(prompt, self.live.rules[prompt.format]),
                Sampler(request.sampling, i, lambda token: spell([token])),
                AnswerText(self._model.tokenizer, request.sampling.stop),
                deliver,
                self._observer.record,
            )

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_aborted()
                self._admit()
                if self._active:
                    self._step()
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._stopping):
                self._aborted.clear()  # nobody is here that they could name
                self._wake.wait()
            return bool(self._waiting or self._active)

    def _drop_aborted(self) -> None:
        with self._wake:
            gone, self._aborted = self._aborted, set()
            queued = [g for g in self._waiting if g.request_id in gone]
            if queued:
                self._waiting = deque(g for g in self._waiting if g.request_id not in gone)
        if not gone:
            return
        dropped = [c for g in queued for c in g.choices]
        for sequence in self._active:
            if sequence.request.id in gone:
                group = self._groups.pop(id(sequence), None)
                dropped += group.choices if group is not None else [sequence]
        self._active = [s for s in self._active if s.request.id not in gone]
        for sequence in dropped:
            self._finish(sequence, "aborted")

    def _finish(self, sequence: Generation, reason: FinishReason) -> None:
        rows = np.empty((0, len(self.live.bank)), dtype=np.float32)
        sequence.judge(sequence.cache.length, rows, 0, reason, self.model_name)

    def _admit(self) -> None:
        with self._wake:
            while self._waiting:
                group = self._waiting[0]
                pending = sum(len(g.choices) - 1 for g in self._groups.values())
                reserved = sum(s.reserved for s in self._active) + sum(
                    g.reserved - g.leader.reserved for g in self._groups.values()
                )
                if len(self._active) + pending + len(group.choices) > self._settings.max_sequences:
                    return
                if reserved + group.reserved > self._settings.kv_tokens:
                    return
                self._waiting.popleft()
                self._groups[id(group.leader)] = group
                self._active.append(group.leader)

    def _step(self) -> None:
        batch = list(self._choose())
        packed = Packed([s.cache for s, _ in batch], [n for _, n in batch])
        tokens = [s.tokens[s.cache.length : s.cache.length + n] for s, n in batch]
        ends = np.cumsum(packed.n_new) - 1
        samples = [i for i, (s, n) in enumerate(batch) if n == s.n_waiting and s.last is None]
        rows, logits = self._forward(tokens, packed, [int(ends[i]) for i in samples])
        began = time.perf_counter()
        next_logits = dict(zip(samples, logits, strict=True))
        for i, (sequence, n) in enumerate(batch):
            first = sequence.cache.length - n
            self._advance(sequence, first, rows[ends[i] + 1 - n : ends[i] + 1], next_logits.get(i))
        self._active = [s for s in self._active if not s.ended]
        self._observer.scored(time.perf_counter() - began, packed.n_tokens)
        self.steps += 1

    def _choose(self) -> Iterator[tuple[Generation, int]]:
        """Each decoding sequence its one token; what is left of the step goes to prompts, oldest first."""
        room = self._settings.max_step_tokens
        ordered = sorted(self._active, key=lambda s: s.n_waiting > 1)
        for sequence in ordered:
            n = min(sequence.n_waiting, room) if sequence.n_waiting > 1 else 1
            if n <= 0:
                return
            room -= n
            yield sequence, n

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
        return self._tap.read(n), output.logits[0]

    def _advance(self, sequence: Generation, first: int, rows: Scores, logits: torch.Tensor | None) -> None:
        group = self._groups.get(id(sequence))
        if group is None:
            self._sample(sequence, first, rows, logits)
            return
        group.prompt_rows.append(rows)
        if logits is None:  # a chunk of the prompt
            sequence.judge(first, rows, 0, None, self.model_name)
            if sequence.ended:  # a missing row has ended it already
                del self._groups[id(sequence)]
                for twin in group.choices[1:]:
                    self._finish_like(twin, group)
            return
        del self._groups[id(sequence)]
        cache, everything = sequence.cache, np.concatenate(group.prompt_rows)
        for twin in group.choices[1:]:
            twin.cache = cache.fork()
            self._sample(twin, 0, everything, logits)
            if not twin.ended:
                self._active.append(twin)
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

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self._error = error
            left = [c for g in (*self._waiting, *self._groups.values()) for c in g.choices]
            left += [s for s in self._active if s not in left]
            self._waiting.clear()
            self._active, self._groups = [], {}
        try:
            for sequence in left:
                if not sequence.ended:
                    self._finish(sequence, "engine_error")
        finally:
            self._died(error)
