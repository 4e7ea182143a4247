"""Watch: one generated sequence. Scores and token counts in; what may be released, and at the end a Record, out.

Synchronous and without I/O: an engine calls `advance` once per step, before it looks at its own reasons to end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from monitor.coverage import Ledger
from monitor.policy.rule import Rule, Second, ends, worst
from monitor.question import Missing, Question
from monitor.track import AnswerTrack, AnyTrack, PromptTrack
from monitor.types import (
    Action,
    Caller,
    Coverage,
    Escalation,
    FinishReason,
    Mode,
    Phase,
    ProbeReading,
    Prompt,
    Record,
    Scores,
)


class Judged(NamedTuple):
    """released: how many tokens of the answer the client may have by now; finish: set when the sequence ends"""

    released: int
    finish: FinishReason | None


class Watch:
    """Judges one sequence. Position p is judged when its row, and every row before it, has been seen.

    rules: one per probe and phase; a sequence holds its newest token back exactly when a rule is in block mode
    question: waits for the second judge's answer; until `resolve` nothing from its position on is released
    """

    def __init__(self, prompt: Prompt, rules: Sequence[Rule], second: Second | None = None) -> None:
        self.prompt = prompt
        self.n_prompt = len(prompt.token_ids)
        self.holds = any(r.mode is Mode.BLOCK for r in rules)
        self.n_sampled = 0
        self.verdict = Action.ALLOW
        self.finish: FinishReason | None = None
        self.released = 0
        self.max_held = 0
        self.question: Question | None = None
        self.escalations: list[Escalation] = []
        self.created = time.time()
        self._second = second or Second()
        self._prompt = [PromptTrack(r) for r in rules if r.phase is Phase.PROMPT]
        self._response = [AnswerTrack(r, self.n_prompt) for r in rules if r.phase is Phase.RESPONSE]
        self._tracks: list[AnyTrack] = [*self._prompt, *self._response]
        self._steps = [(t.add, t.rule.column, t) for t in self._response]
        self._width = 1 + max((r.column for r in rules), default=0)
        self._ledger = Ledger(self.n_prompt, self._width)
        self._stop_at: int | None = None  # first response position that must not be released
        self._ending: FinishReason | None = None  # the engine's reason to end, while a question is open
        self._prompt_done = False

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
        if len(rows) and rows.shape[1] >= self._width:
            self._take(first, rows)
        elif len(rows):  # a probe of ours is no more in what the engine scores
            self._gap(first + len(rows), "missing_probe")
        self.n_sampled += n_new
        if n_new or finish in ("stop", "length"):
            # Only the newest sampled token may lack a score: every token before it was fed to sample it. The last one
            # is never fed, and goes out under the verdict before it.
            self._gap(self.n_prompt + max(0, self.n_sampled - 1), "missing_rows")
        self._ending = self._ending or finish
        if self.question is not None and self.n_sampled - self.released > self._second.max_held:
            self._resolve(None, "overflow")
        return self._settle()

    def replay(self, first: int, rows: Scores, n_answer: int) -> Judged:
        """`advance` for an answer of n_answer tokens that is given, as if each had been sampled when its turn came."""
        until = first + len(rows) - self.n_prompt
        sampled = min(n_answer, max(0, until + 1))
        return self.advance(first, rows, max(0, sampled - self.n_sampled), "stop" if until >= n_answer else None)

    def resolve(self, second: float | None) -> Judged:
        """The second judge has answered. second: its logit, above 0 leans harmful; None: it failed or came too late"""
        if self.finish is None:
            self._resolve(second, "failed")
            return self._settle()
        return Judged(self.released, self.finish)

    def end(self, finish: FinishReason) -> None:
        """The sequence ended on what was released already: the engine found a stop string in it, or gave it up."""
        if self.finish is None:
            self.finish, self.question = finish, None

    def _settle(self) -> Judged:
        question, ending = self.question, self._ending
        if self._stop_at is not None:
            self._release(self._stop_at - self.n_prompt)
            self.question = None
            self.finish = "content_filter" if self.verdict is Action.BLOCK else "unmonitored"
        elif ending is not None and (question is None or ending not in ("stop", "length")):
            if ending in ("stop", "length"):
                self._release(self.n_sampled)
            self.finish, self.question = ending, None
        elif self._prompt_done:
            judged, scored = self.n_sampled, self._ledger.n_scored - self.n_prompt
            if self.holds and scored < judged:
                judged = scored
            self._release(judged if question is None else min(judged, question.position - self.n_prompt))
            held = self.n_sampled - self.released
            if held > self.max_held:
                self.max_held = held
        return Judged(self.released, self.finish)

    def _release(self, count: int) -> None:
        if count > self.released:
            self.released = count

    # --- rows in -----------------------------------------------------------------------------------------------------

    def _take(self, first: int, rows: Scores) -> None:
        if first > self.n_scored:
            self._gap(first, "gap")
        first, rows = self._ledger.add(first, rows)
        if len(rows) == 0:
            return
        # One row a step is the usual case, and a sum of Python floats the quickest look at it.
        values = rows.tolist() if len(rows) == 1 else None
        if not (np.isfinite(rows).all() if values is None else math.isfinite(sum(values[0]))):
            self._take_broken(first, np.isfinite(rows))
        if not self._prompt_done and self.n_scored >= self.n_prompt:
            self._judge_prompt()
        if first >= self.n_prompt:
            self._judge_answer(first, values or rows.tolist())
        elif self.n_scored > self.n_prompt:
            self._judge_answer(self.n_prompt, rows[self.n_prompt - first :].tolist())

    def _take_broken(self, first: int, finite: npt.NDArray[np.bool_]) -> None:
        self._ledger.miss([first + int(i) for i in np.flatnonzero(~finite.all(axis=1))], "not_finite")
        for track in self._tracks:
            bad = np.flatnonzero(~finite[:, track.rule.column]) + first
            self._break(track, bad.tolist())

    def _gap(self, until: int, cause: str) -> None:
        if until <= self.n_scored:
            return
        positions = self._ledger.gap(until, cause)
        for track in self._tracks:
            self._break(track, positions)
        if not self._prompt_done and until >= self.n_prompt:
            self._judge_prompt()

    def _break(self, track: AnyTrack, positions: list[int]) -> None:
        """A probe whose score is missing anywhere in its phase has no value there."""
        is_prompt = track.rule.phase is Phase.PROMPT
        mine = [p for p in positions if (p < self.n_prompt) is is_prompt]
        if not mine:
            return
        track.broken = True
        self._steps = [step for step in self._steps if step[2] is not track]
        track.action = worst([track.action, Action.UNMONITORED])
        self.verdict = worst([self.verdict, Action.UNMONITORED])
        if ends(track.rule, Action.UNMONITORED):
            self._stop(max(mine[0], self.n_prompt))

    def _stop(self, position: int) -> None:
        if self.question is not None:  # what waits for an answer does not go out either
            position = min(position, self.question.position)
        self._stop_at = position if self._stop_at is None else min(self._stop_at, position)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge_prompt(self) -> None:
        self._prompt_done = True
        rows = self._ledger.rows
        for track in self._prompt:
            if not track.broken:
                track.judge(self.prompt, rows[: self.n_prompt, track.rule.column])
                self._act(track, self.n_prompt)
        self._ask(self.n_prompt)

    def _judge_answer(self, first: int, rows: list[list[float]]) -> None:
        """Up to the row that ends the sequence: what comes after it is never released."""
        for position, scores in enumerate(rows, first):
            news = [track for add, column, track in self._steps if add(position, scores[column])]
            if news:
                for track in news:
                    self._act(track, position)
                self._ask(position)
            if self._stop_at is not None:
                return

    def _act(self, track: AnyTrack, position: int) -> None:
        self.verdict = worst([self.verdict, track.action])
        if ends(track.rule, track.action):
            self._stop(position)

    def _ask(self, position: int) -> None:
        """Open a question for the tracks that have just come to need one; other probes answer at once."""
        asking = [t for t in self._tracks if t.action is Action.ESCALATE]
        if not asking or self._stop_at is not None:
            return
        if self.question is None:
            self.question = Question(asking[0].rule.phase, position, asking)
        else:
            self.question.tracks[:] = asking
        if self._second.probes:
            self._resolve(self._of_probes(self.question.phase), "failed")

    def _of_probes(self, phase: Phase) -> float | None:
        found = [t for t in self._tracks if t.rule.probe in self._second.probes and t.rule.phase is phase]
        values = [t.value for t in found if not t.broken and math.isfinite(t.value)]
        return max(values) if len(values) == len(self._second.probes) else None

    def _resolve(self, second: float | None, missing: Missing) -> None:
        question, self.question = self.question, None
        if question is None:
            return
        for track in question.tracks:
            if not track.broken:
                self.escalations.append(question.decide(track, self._second, second, missing))
                if ends(track.rule, track.action):
                    self._stop(question.position)
        self.verdict = worst([t.action for t in self._tracks])

    # --- out ---------------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Scores:
        """(n_scored, K) float32: every row so far, NaN where one was missing."""
        return self._ledger.rows

    @property
    def coverage(self) -> Coverage:
        return self._ledger.coverage(self.n_sampled)

    def readings(self, phase: Phase | None = None) -> tuple[ProbeReading, ...]:
        return tuple(t.reading() for t in self._tracks if phase is None or t.rule.phase is phase)

    def record(self, request_id: str, index: int, model: str, caller: Caller, policy: str = "default") -> Record:
        """The finished sequence. Token scores are kept where some probe crossed its threshold or broke."""
        scores: dict[str, Sequence[float]] = {}
        readings = self.readings()
        rows = self._ledger.rows
        if len(rows) and (self.escalations or self.verdict is not Action.ALLOW or any(r.would_block for r in readings)):
            for track in self._tracks:
                scores[track.rule.probe] = [round(v, 5) for v in rows[:, track.rule.column].tolist()]
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
            escalations=tuple(self.escalations),
        )
