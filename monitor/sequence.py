"""Watch: one generated sequence. Scores and token counts in; what may be released, and at the end a Record, out.

Synchronous and without I/O: an engine calls `advance` once per step, before it looks at its own reasons to end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from monitor.coverage import Ledger, Waits
from monitor.policy.rule import Rule, Second
from monitor.question import Question
from monitor.ruling import Ruling
from monitor.track import CHANCE
from monitor.types import (
    Action,
    Caller,
    Cause,
    Coverage,
    FinishReason,
    Mode,
    Phase,
    ProbeReading,
    Prompt,
    Record,
    ScoredBy,
    Scores,
    is_candidate,
)


class Judged(NamedTuple):
    """released: how many tokens of the answer the client may have by now; finish: set when the sequence ends"""

    released: int
    finish: FinishReason | None


class Watch:
    """Judges one sequence. Position p is judged when its row, and every row before it, has been seen.

    rules: one per probe and phase; a sequence holds its newest token back exactly when a rule is in block mode
    clock: seconds, of how long tokens wait; chance: draws the samples of its readings
    """

    def __init__(
        self,
        prompt: Prompt,
        rules: Sequence[Rule],
        second: Second | None = None,
        clock: Callable[[], float] = time.perf_counter,
        chance: Random = CHANCE,
    ) -> None:
        self.prompt = prompt
        self.n_prompt = len(prompt.token_ids)
        self.holds = any(r.mode is Mode.BLOCK for r in rules)
        self.n_sampled = 0
        self.finish: FinishReason | None = None
        self.released = 0
        self.max_held = 0
        self.created = time.time()
        self._second = second or Second()
        self._ruling = Ruling(prompt, rules, self._second)
        self._width = max((r.column + r.n_columns for r in rules), default=1)
        self._rules = rules
        self._ledger = Ledger(self.n_prompt, self._width)
        self._waits, self._clock, self._chance = Waits(), clock, chance
        self._ending: FinishReason | None = None  # the engine's reason to end, while a question is open
        self._prompt_done = self._given = False

    @property
    def verdict(self) -> Action:
        return self._ruling.verdict

    @property
    def question(self) -> Question | None:
        """Waits for the second judge's answer; until `resolve` nothing from its position on is released."""
        return self._ruling.question

    @property
    def prompt_judged(self) -> bool:
        return self._prompt_done and (self.question is None or self.question.phase is Phase.RESPONSE)

    @property
    def n_scored(self) -> int:
        return self._ledger.n_scored

    def advance(self, first: int, rows: Scores, n_new: int = 0, finish: FinishReason | None = None) -> Judged:
        """One step of the engine: rows of the tokens it fed, then the tokens it sampled, then its reason to end.

        first: position of rows[0]; rows: (n, K) float32 logits, positions seen before are ignored
        n_new: tokens sampled in this step; finish: the engine's own reason to end with them
        returns: released counts response tokens from the start; after a `finish` call nothing more
        """
        if self.finish is not None:
            return Judged(self.released, self.finish)
        n_rows = len(rows)
        if n_rows and rows.shape[1] >= self._width:
            self._take(first, rows)
        elif n_rows:  # a probe of ours is no more in what the engine scores
            self._gap(first + n_rows, "missing_probe")
        self.n_sampled += n_new
        if n_new or finish in ("stop", "length"):
            # Only the newest sampled token may lack a score: every token before it was fed to sample it. The last one
            # is never fed, and goes out under the verdict before it.
            fed = self.n_prompt + (self.n_sampled - 1 if self.n_sampled else 0)
            if fed > self._ledger.n_scored:
                self._gap(fed, "missing_rows")
        self._ending = self._ending or finish
        if self._overflows():
            self._ruling.resolve(None, "overflow")
        return self._settle(n_new)

    def _overflows(self) -> bool:
        """More tokens wait for the second judge than may. Of an answer that is given none does: nobody waits for it."""
        question = self._ruling.question
        if question is None or self._given or self._ruling.stop_at is not None:
            return False
        return self.n_sampled - max(self.released, question.position - self.n_prompt) > self._second.max_held

    def replay(self, first: int, rows: Scores, n_answer: int) -> Judged:
        """`advance` for an answer of n_answer tokens that is given, as if each had been sampled when its turn came."""
        self._given = True
        until = first + len(rows) - self.n_prompt
        sampled = min(n_answer, max(0, until + 1))
        return self.advance(first, rows, max(0, sampled - self.n_sampled), "stop" if until >= n_answer else None)

    def resolve(self, second: float | None) -> Judged:
        """The second judge has answered. second: its logit, above 0 leans harmful; None: it failed or came too late"""
        if self.finish is None:
            self._ruling.resolve(second, "failed")
            return self._settle()
        return Judged(self.released, self.finish)

    def end(self, finish: FinishReason) -> None:
        """The sequence ended on what was released already: the engine found a stop string in it, or gave it up."""
        if self.finish is None:
            self.finish, self._ruling.question = finish, None

    def _settle(self, n_new: int = 0) -> Judged:
        ruling, ending = self._ruling, self._ending
        question = ruling.question
        if ruling.stop_at is not None:
            self._release(ruling.stop_at - self.n_prompt)
            ruling.question = None
            self.finish = "content_filter" if ruling.verdict is Action.BLOCK else "unmonitored"
        elif ending is not None and (question is None or ending not in ("stop", "length")):
            if ending in ("stop", "length"):
                self._release(self.n_sampled)
            self.finish, ruling.question = ending, None
        elif self._prompt_done:
            judged, scored = self.n_sampled, self._ledger.n_scored - self.n_prompt
            if self.holds and scored < judged:
                judged = scored
            self._release(judged if question is None else min(judged, question.position - self.n_prompt))
            held = self.n_sampled - self.released
            if held > self.max_held:
                self.max_held = held
        if self.holds:  # or else each goes out in the step that sampled it
            self._waits.step(self._clock(), n_new, self.n_sampled - self.released)
        return Judged(self.released, self.finish)

    def _release(self, count: int) -> None:
        self.released = count if count > self.released else self.released

    # --- rows in -----------------------------------------------------------------------------------------------------

    def _take(self, first: int, rows: Scores) -> None:
        ledger = self._ledger
        if first > ledger.n_scored:
            self._gap(first, "gap")
        first, rows = ledger.add(first, rows)
        if len(rows) == 1 and self._prompt_done:
            # One row a step is the usual case, and a sum of Python floats the quickest look at it.
            (scores,) = rows.tolist()
            if math.isfinite(sum(scores)):
                self._ruling.judge_token(first, scores)
                return
        if len(rows):
            self._take_all(first, rows)

    def _take_all(self, first: int, rows: Scores) -> None:
        ruling, finite = self._ruling, np.isfinite(rows)
        whole = np.asarray(finite.all(axis=1))
        if not whole.all():
            # A version on trial is no reason to call a token unmonitored: its own reading says what it lacks.
            own = [r for r in self._rules if not is_candidate(r.probe)]
            columns = [c for r in own or self._rules for c in range(r.column, r.column + r.n_columns)]
            missed = np.flatnonzero(~(finite[:, columns] if columns else finite).all(axis=1))
            self._ledger.miss([first + int(i) for i in missed], "not_finite")
            ruling.lose_scores(first, finite[: max(0, self.n_prompt - first)])
        if not self._prompt_done and self.n_scored >= self.n_prompt:
            self._judge_prompt()
        answer = max(first, self.n_prompt)
        for position, scores in enumerate(rows[answer - first :].tolist(), answer):
            if not whole[position - first]:  # in its turn: what comes before it is judged by every probe
                ruling.lose_scores(position, finite[position - first : position - first + 1])
            ruling.judge_token(position, scores)
            if ruling.stop_at is not None:  # what comes after the row that ends the sequence is never released
                return

    def _gap(self, until: int, cause: Cause) -> None:
        if until <= self.n_scored:
            return
        self._ruling.lose(self._ledger.gap(until, cause))
        if not self._prompt_done and until >= self.n_prompt:
            self._judge_prompt()

    def _judge_prompt(self) -> None:
        self._prompt_done = True
        self._ruling.judge_prompt(self._ledger.rows[: self.n_prompt])

    # --- out ---------------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Scores:
        """(n_scored, K) float32: every row so far, NaN where one was missing."""
        return self._ledger.rows

    def shown(self, rows: Scores) -> Scores:
        """(n, P): one score of each token for each probe, in the order of the rules. rows: (n, K) of their columns"""
        return self._ruling.shown(rows)

    @property
    def coverage(self) -> Coverage:
        return self._ledger.coverage(self.n_sampled)

    def readings(self, phase: Phase | None = None) -> tuple[ProbeReading, ...]:
        found = self._ruling.readings(self._ledger.rows, self._chance)
        return found if phase is None else tuple(r for r in found if r.phase is phase)

    def record(
        self,
        request_id: str,
        index: int,
        model: str,
        caller: Caller,
        policy: str = "default",
        scored_by: ScoredBy = "engine",
    ) -> Record:
        """The finished sequence. Token scores are kept where some probe crossed its threshold or broke."""
        scores: dict[str, Sequence[float]] = {}
        readings, rows, escalations = self.readings(), self._ledger.rows, tuple(self._ruling.escalations)
        if len(rows) and (escalations or self.verdict is not Action.ALLOW or any(r.would_block for r in readings)):
            scores = self._ruling.of_each(rows)
        return Record(
            request_id=request_id,
            index=index,
            created=self.created,
            model=model,
            route=caller.route,
            format=self.prompt.format,
            verdict=self.verdict,
            finish=self.finish or "aborted",
            released_tokens=self.released,
            held_tokens=self.max_held,
            coverage=self.coverage,
            readings=readings,
            counted=tuple((t.start, t.end) for t in self.prompt.turns),
            token_scores=scores,
            key=caller.key,
            policy=policy,
            escalations=escalations,
            held_seconds=self._waits.longest,
            scored_by=scored_by,
        )
