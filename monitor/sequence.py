"""Watch: one generated sequence. Scores and token counts in; what may be released, and at the end a Record, out.

Synchronous and without I/O: an engine calls `advance` once per step, before it looks at its own reasons to end.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.aggregate import Running
from monitor.policy import Rule, crossed, ends, outcome, worst
from monitor.types import (
    Action,
    Coverage,
    FinishReason,
    Mode,
    Phase,
    ProbeReading,
    Prompt,
    Record,
    Scores,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """released: how many tokens of the answer the client may have by now; finish: set when the sequence ends"""

    released: int
    finish: FinishReason | None


class _Track:
    """One probe in one phase: its running values, the worst turn and whether a score was missing.

    limit: what the running value of an answer must exceed to be news
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.limit = math.inf if rule.threshold is None else rule.threshold
        self.value: float | None = None
        self.newest: float | None = None
        self.peak_position: int | None = None
        self.peak_score: float | None = None
        self.crossed_at: int | None = None
        self.action = Action.ALLOW
        self.broken = False  # a score was missing or not finite

    def note_peak(self, running: Running) -> None:
        if self.peak_score is None or running.peak_score > self.peak_score:
            self.peak_score, self.peak_position = running.peak_score, running.peak_position

    def follow(self, running: Running) -> None:
        """Take over what the running value of an answer has become."""
        self.value, self.newest = running.peak, running.value
        if running.peak is not None:
            self.note_peak(running)

    def reading(self) -> ProbeReading:
        rule = self.rule
        return ProbeReading(
            probe=rule.probe,
            version=rule.version,
            phase=rule.phase,
            mode=rule.mode,
            threshold=rule.threshold,
            value=None if self.broken else self.value,
            newest=None if self.broken else self.newest,
            peak_position=self.peak_position,
            peak_score=self.peak_score,
            crossed_at=self.crossed_at,
            action=self.action,
            would_block=rule.mode is not Mode.BLOCK and not self.broken and crossed(rule, self.value),
        )


class Watch:
    """Judges one sequence. Position p is judged when its row, and every row before it, has been seen.

    rules: one per probe and phase; a sequence holds its newest token back exactly when a rule is in block mode
    """

    def __init__(self, prompt: Prompt, rules: Sequence[Rule]) -> None:
        self.prompt = prompt
        self.n_prompt = len(prompt.token_ids)
        self.holds = any(r.mode is Mode.BLOCK for r in rules)
        self.n_sampled = 0
        self.n_scored = 0  # rows seen, without gaps, from position 0 on
        self.verdict = Action.ALLOW
        self.finish: FinishReason | None = None
        self.released = 0
        self.max_held = 0
        self._prompt = [_Track(r) for r in rules if r.phase is Phase.PROMPT]
        self._response = [_Track(r) for r in rules if r.phase is Phase.RESPONSE]
        self._tracks = self._prompt + self._response
        self._running = [(t, Running(t.rule.aggregation, self.n_prompt), t.rule.column) for t in self._response]
        self._rows: list[Scores] = []
        self._causes: Counter[str] = Counter()
        self._n_bad = self._n_bad_prompt = 0
        self._stop_at: int | None = None  # first response position that must not be released
        self._prompt_done = False
        self.created = time.time()

    @property
    def prompt_judged(self) -> bool:
        return self._prompt_done

    def advance(self, first: int, rows: Scores, n_new: int = 0, finish: FinishReason | None = None) -> Judged:
        """One step of the engine: rows of the tokens it fed, then the tokens it sampled, then its reason to end.

        first: position of rows[0]; rows: (n, K) float32 logits, positions seen before are ignored
        n_new: tokens sampled in this step; finish: the engine's own reason to end with them
        returns: released counts response tokens from the start; after a `finish` call nothing more
        """
        if self.finish is not None:
            return Judged(self.released, self.finish)
        self._take(first, rows)
        self.n_sampled += n_new
        if n_new or finish in ("stop", "length"):
            # Only the newest sampled token may lack a score: every token before it was fed to sample it. The last one
            # is never fed, and goes out under the verdict before it.
            self._gap(max(self.n_prompt, self.n_prompt + self.n_sampled - 1), "missing_rows")
        if self._stop_at is not None:
            self._release(self._stop_at - self.n_prompt)
            self.finish = "content_filter" if self.verdict is Action.BLOCK else "unmonitored"
        elif finish is not None:
            if finish in ("stop", "length"):
                self._release(self.n_sampled)
            self.finish = finish
        elif self._prompt_done:
            self._release(min(self.n_scored - self.n_prompt, self.n_sampled) if self.holds else self.n_sampled)
            self.max_held = max(self.max_held, self.n_sampled - self.released)
        return Judged(self.released, self.finish)

    def end(self, finish: FinishReason) -> None:
        """The sequence ended on what was released already: the engine found a stop string in it, or gave it up."""
        if self.finish is None:
            self.finish = finish

    @property
    def scores(self) -> Scores:
        """(n_scored, K) float32: every row so far, NaN where one was missing."""
        return np.concatenate(self._rows) if self._rows else np.empty((0, 0), dtype=np.float32)

    def _release(self, count: int) -> None:
        self.released = max(self.released, count)

    def _take(self, first: int, rows: Scores) -> None:
        if len(rows) == 0:
            return
        if first > self.n_scored:
            self._gap(first, "gap")
        skip = self.n_scored - first  # replayed positions
        if skip >= len(rows):
            return
        first, rows = first + skip, rows[skip:]
        self._rows.append(rows)
        self.n_scored = first + len(rows)
        # One row a step is the usual case, and a sum of Python floats the quickest look at it.
        if not (math.isfinite(sum(rows[0].tolist())) if len(rows) == 1 else np.isfinite(rows).all()):
            self._take_broken(first, np.isfinite(rows))
        if not self._prompt_done and self.n_scored >= self.n_prompt:
            self._judge_prompt()
        if self.n_scored > self.n_prompt:
            self._judge_response(max(first, self.n_prompt), rows[max(0, self.n_prompt - first) :])

    def _take_broken(self, first: int, finite: npt.NDArray[np.bool_]) -> None:
        self._miss([first + int(i) for i in np.flatnonzero(~finite.all(axis=1))], "not_finite")
        for track in self._tracks:
            bad = np.flatnonzero(~finite[:, track.rule.column]) + first
            self._break(track, bad.tolist())

    def _gap(self, until: int, cause: str) -> None:
        """Positions from n_scored up to `until` will never have a score."""
        start = self.n_scored
        if until <= start:
            return
        positions = list(range(start, until))
        self._miss(positions, cause)
        width = 1 + max((t.rule.column for t in self._tracks), default=0)
        self._rows.append(np.full((until - start, width), np.nan, dtype=np.float32))
        self.n_scored = until
        for track in self._tracks:
            self._break(track, positions)
        if not self._prompt_done and until >= self.n_prompt:
            self._judge_prompt()

    def _miss(self, positions: list[int], cause: str) -> None:
        self._causes[cause] += len(positions)
        self._n_bad_prompt += sum(1 for p in positions if p < self.n_prompt)
        self._n_bad += len(positions)

    def _break(self, track: _Track, positions: list[int]) -> None:
        """A probe whose score is missing anywhere in its phase has no value there."""
        is_prompt = track.rule.phase is Phase.PROMPT
        mine = [p for p in positions if (p < self.n_prompt) is is_prompt]
        if not mine:
            return
        track.broken = True
        for other, running, _ in self._running:
            if other is track:
                track.follow(running)
        self._running = [r for r in self._running if r[0] is not track]
        track.action = worst([track.action, Action.UNMONITORED])
        self.verdict = worst([self.verdict, Action.UNMONITORED])
        if ends(track.rule, Action.UNMONITORED):
            self._stop(max(mine[0], self.n_prompt))

    def _stop(self, position: int) -> None:
        self._stop_at = position if self._stop_at is None else min(self._stop_at, position)

    def _judge_prompt(self) -> None:
        self._prompt_done = True
        rows = np.concatenate(self._rows) if len(self._rows) > 1 else self._rows[0]
        for track in self._prompt:
            if not track.broken:
                self._judge_turns(track, rows[: self.n_prompt, track.rule.column])

    def _judge_turns(self, track: _Track, scores: Scores) -> None:
        rule = track.rule
        for index, turn in enumerate(self.prompt.turns):
            running = Running(rule.aggregation, turn.start)
            for position, score in enumerate(scores[turn.start : turn.end].tolist(), turn.start):
                running.add(position, score)
            value = running.value
            if value is None:
                continue
            track.note_peak(running)
            if track.value is None or value > track.value:
                track.value = value
                track.crossed_at = turn.end - 1 if crossed(rule, value) else None
            if index >= self.prompt.newest and (track.newest is None or value > track.newest):
                track.newest = value
        track.action = outcome(rule, track.value, track.newest)
        self.verdict = worst([self.verdict, track.action])
        if ends(rule, track.action):
            self._stop(self.n_prompt)

    def _judge_response(self, first: int, rows: Scores) -> None:
        """Up to the row that ends the sequence: what comes after it is never released."""
        for position, scores in enumerate(rows.tolist(), first):
            for track, running, column in self._running:
                value = running.add(position, scores[column])
                if value is not None and value > track.limit:
                    self._cross(track, position, value)
            if self._stop_at is not None:
                return

    def _cross(self, track: _Track, position: int, value: float) -> None:
        track.limit = math.inf  # told once
        track.crossed_at = position
        track.action = outcome(track.rule, value)
        self.verdict = worst([self.verdict, track.action])
        if ends(track.rule, track.action):
            self._stop(position)

    @property
    def coverage(self) -> Coverage:
        total = self.n_prompt + self.n_sampled
        seen = min(self.n_scored, total)
        unseen = total - seen
        final = 1 if self.n_sampled and unseen else 0
        return Coverage(
            prompt_tokens=self.n_prompt,
            response_tokens=self.n_sampled,
            prompt_scored=min(seen, self.n_prompt) - self._n_bad_prompt,
            response_scored=max(0, seen - self.n_prompt) - (self._n_bad - self._n_bad_prompt),
            final_unscored=final,
            unmonitored=self._n_bad,
            not_computed=unseen - final,
            causes=dict(self._causes),
        )

    def readings(self) -> tuple[ProbeReading, ...]:
        for track, running, _ in self._running:
            track.follow(running)
        return tuple(t.reading() for t in self._tracks)

    def record(self, request_id: str, index: int, model: str, route: str) -> Record:
        """The finished sequence. Token scores are kept where some probe crossed its threshold or broke."""
        scores: dict[str, Sequence[float]] = {}
        readings = self.readings()
        if self._rows and (self.verdict is not Action.ALLOW or any(r.would_block for r in readings)):
            rows = np.concatenate(self._rows)
            for track in self._tracks:
                scores[track.rule.probe] = [round(v, 5) for v in rows[:, track.rule.column].tolist()]
        return Record(
            request_id=request_id,
            index=index,
            created=self.created,
            model=model,
            route=route,
            format=self.prompt.format,
            verdict=self.verdict,
            finish=self.finish or "aborted",
            released_tokens=self.released,
            held_tokens=self.max_held,
            coverage=self.coverage,
            readings=readings,
            counted=tuple((t.start, t.end) for t in self.prompt.turns),
            token_scores=scores,
        )
