"""Ruling: what the probes make of one sequence. Finite rows in; a verdict, and the first token it forbids, out."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

from monitor.policy.rule import Rule, Second, ends, worst
from monitor.question import Missing, Question
from monitor.track import AnswerTracks, AnyTrack, PromptTrack, drawn, shown
from monitor.types import Action, Escalation, Phase, ProbeReading, Prompt, Scores, Turn, is_candidate


class Ruling:
    """One track for each probe and phase, and at most one open question to the second judge at a time.

    rules: one per probe and phase
    question: waits for the second judge's answer; until `resolve` nothing from its position on may go out
    stop_at: the first position that must never go out; None while there is none
    """

    def __init__(self, prompt: Prompt, rules: Sequence[Rule], second: Second) -> None:
        self.verdict = Action.ALLOW
        self.question: Question | None = None
        self.escalations: list[Escalation] = []
        self.stop_at: int | None = None
        self._prompt, self._n_prompt, self._second = prompt, len(prompt.token_ids), second
        self._asked = [PromptTrack(r.at(self._n_prompt)) for r in rules if r.phase is Phase.PROMPT]
        self._answer = AnswerTracks([r for r in rules if r.phase is Phase.RESPONSE], self._n_prompt)
        self._tracks: list[AnyTrack] = [*self._asked, *self._answer.tracks]
        self._next: list[tuple[AnyTrack, int]] = []  # need an answer that the open question won't give, and since when

    # --- rows in -----------------------------------------------------------------------------------------------------

    def judge_prompt(self, rows: Scores) -> None:
        """rows: (n_prompt, K), all of the prompt's"""
        for track in self._asked:
            if not track.broken:
                track.judge(self._prompt, rows)
                self._act(track, self._n_prompt)
        self._ask(self._n_prompt)

    def judge_token(self, position: int, scores: list[float]) -> None:
        """The next token of the answer. scores: its row"""
        news = self._answer.add(position, scores)
        if news:
            for track in news:
                self._act(track, position)
            self._ask(position)

    def lose(self, positions: Sequence[int]) -> None:
        """These rows are missing. A probe whose score is missing anywhere in its phase has no value there."""
        for track in self._tracks:
            self._break(track, positions)

    def lose_scores(self, first: int, finite: npt.NDArray[np.bool_]) -> None:
        """Some scores of these rows are not numbers. finite: (n, K); first: position of finite[0]"""
        for track in self._tracks:
            bad = np.flatnonzero(~track.has_all(finite)) + first
            self._break(track, bad.tolist())

    def _break(self, track: AnyTrack, positions: Sequence[int]) -> None:
        mine = [p for p in positions if (p < self._n_prompt) is (track.rule.phase is Phase.PROMPT)]
        if not mine:
            return
        track.stop()
        track.action = worst([track.action, Action.UNMONITORED])
        if not is_candidate(track.rule.probe):
            self.verdict = worst([self.verdict, Action.UNMONITORED])
        if ends(track.rule, Action.UNMONITORED):
            self._stop(max(mine[0], self._n_prompt))

    def _act(self, track: AnyTrack, position: int) -> None:
        self.verdict = worst([self.verdict, track.action])
        if ends(track.rule, track.action):
            self._stop(position)

    def _stop(self, position: int) -> None:
        if self.question is not None:  # what waits for an answer does not go out either
            position = min(position, self.question.position)
        self.stop_at = position if self.stop_at is None else min(self.stop_at, position)

    # --- the second judge --------------------------------------------------------------------------------------------

    def _ask(self, position: int) -> None:
        """Open a question for the tracks that have just come to need one; other probes answer at once. One that comes
        while another question is open waits for its turn: the second judge has not read so far."""
        known = [] if self.question is None else self.question.tracks
        known = known + [track for track, _ in self._next]
        self._next += [(t, position) for t in self._tracks if t.action is Action.ESCALATE and t not in known]
        if self.question is not None or self.stop_at is not None:
            return
        waiting = [(t, at) for t, at in self._next if t.action is Action.ESCALATE and not t.broken]
        self._next = []
        if not waiting:
            return
        first = min(at for _, at in waiting)
        self.question = Question(waiting[0][0].rule.phase, first, [t for t, at in waiting if at == first])
        self._next = [(t, at) for t, at in waiting if at != first]
        if self._second.probes:
            self.resolve(self.question.answer_of(self._tracks, self._second.probes), "failed")

    def resolve(self, second: float | None, missing: Missing) -> None:
        """The open question is answered. second: a logit, above 0 leans harmful; None: there is none, for `missing`"""
        question, self.question = self.question, None
        if question is None:
            return
        for track in question.tracks:
            if not track.broken:
                self.escalations.append(question.decide(track, self._second, second, missing))
                if ends(track.rule, track.action):
                    self._stop(question.position)
        self.verdict = worst([t.action for t in self._tracks if not is_candidate(t.rule.probe)])
        self._ask(question.position)

    # --- out ---------------------------------------------------------------------------------------------------------

    def shown(self, rows: Scores) -> Scores:
        """(n, P): one score of each token for each probe, in the order of the rules. rows: (n, K) of their columns"""
        return shown(self._tracks, rows)

    def of_each(self, rows: Scores) -> dict[str, Sequence[float]]:
        """By probe: its score of each token, to five places. rows: as `shown`"""
        return {t.rule.probe: [round(v, 5) for v in t.shown(rows).tolist()] for t in self._tracks}

    def readings(self, rows: Scores, chance: Random) -> tuple[ProbeReading, ...]:
        """rows: (n, K), all so far; chance: draws each phase's sample"""
        answer = Turn(self._n_prompt, self._n_prompt + self._answer.running.n)
        at = {Phase.PROMPT: drawn(self._prompt.turns, chance), Phase.RESPONSE: drawn([answer], chance)}
        return tuple(t.reading(rows, at[t.rule.phase]) for t in self._tracks)
