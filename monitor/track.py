"""What becomes of a probe in one phase of one sequence: its value, where it crossed, what the policy says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from monitor.aggregate import Running, aggregate, token_scores
from monitor.policy.rule import Rule, crossed, outcome
from monitor.types import Action, Mode, ProbeReading, Prompt, Scores, Turn

CHANCE = Random()  # noqa: S311 - for samples in a histogram
_NONE = -math.inf  # no value yet: every finite one is higher


class Peak(NamedTuple):
    """The highest token score of a phase, the first of several; -inf at None: there is none."""

    score: float = _NONE
    position: int | None = None


class _Track:
    """broken: a score was missing or not finite"""

    __slots__ = ("action", "broken", "crossed_at", "rule")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.crossed_at: int | None = None
        self.action = Action.ALLOW
        self.broken = False

    def _reading(self, value: float, newest: float, peak: Peak, rows: Scores, drawn: int | None) -> ProbeReading:
        """value, newest: logits, -inf for none; drawn: the position of the reading's sample"""
        rule, known = self.rule, not self.broken and value != _NONE
        return ProbeReading(
            probe=rule.probe,
            version=rule.version,
            phase=rule.phase,
            mode=rule.mode,
            threshold=rule.threshold,
            value=value if known else None,
            newest=newest if known and newest != _NONE else None,
            peak_position=peak.position,
            peak_score=None if peak.position is None else peak.score,
            crossed_at=self.crossed_at,
            action=self.action,
            would_block=rule.mode is not Mode.BLOCK and not self.broken and self.crossed_at is not None,
            sample=float(self.shown(rows[drawn : drawn + 1])[0]) if known and drawn is not None else None,
        )

    def shown(self, rows: Scores) -> Scores:
        """(n,): this probe's score of each token. rows: (n, K) of all probes"""
        return token_scores(self.rule.aggregation, rows[:, self.rule.columns])

    def has_all(self, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(n,): whether no score of this probe is missing. finite: (n, K)"""
        rule = self.rule
        return np.asarray(finite[:, rule.column : rule.column + rule.n_columns].all(axis=1))


class PromptTrack(_Track):
    """value: the statistic of the prompt, newest: of its newest turn; logits, -inf before they are known"""

    __slots__ = ("_peak", "newest", "value")

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.value = self.newest = _NONE
        self._peak = Peak()

    def judge(self, prompt: Prompt, rows: Scores) -> Action:
        """rows: (n_prompt, K), finite in this probe's columns. The value is the maximum over the turns."""
        rule, shown = self.rule, self.shown(rows)
        for index, turn in enumerate(prompt.turns):
            span = slice(turn.start, turn.end)
            if len(shown[span]) == 0:
                continue
            value = aggregate(rule.aggregation, rows[span, rule.columns])
            self._peak = max(self._peak, _peak(shown[span], turn.start), key=lambda peak: peak.score)
            if value > self.value:
                self.value = value
                self.crossed_at = turn.end - 1 if crossed(rule, value) else None
            if index >= prompt.newest and value > self.newest:
                self.newest = value
        self.action = outcome(rule, _known(self.value), _known(self.newest))
        return self.action

    @property
    def in_doubt(self) -> float:
        """What a second judge is asked about, and what other probes' questions hear: where history may not block, the
        newest turn's value, or one refused turn would speak in every later question."""
        return self.value if self.rule.on_history is Mode.BLOCK else self.newest

    def stop(self) -> None:
        """Without all of its scores the prompt has no value."""
        self.broken = True

    def clear(self, position: int, quiet: int) -> None:
        """The second judge found nothing: what is left is what the history alone does."""
        self.action = Action.FLAG if self.crossed_at is not None and self.rule.on_history is Mode.FLAG else Action.ALLOW

    def reading(self, rows: Scores, drawn: int | None) -> ProbeReading:
        """rows: (n, K) of the sequence; drawn: the position of the sample, None for none"""
        return self._reading(self.value, self.newest, self._peak, rows, drawn)


class AnswerTrack(_Track):
    """A probe's verdict on the answer. Its running value is among those of all probes, in `AnswerTracks`, and it is
    asked only about tokens where that is above the limit."""

    __slots__ = ("_above", "_high", "_index", "_n_prompt", "_n_seen", "_quiet_until", "_running", "_within", "in_doubt")

    def __init__(self, rule: Rule, n_prompt: int, running: Running, index: int) -> None:
        super().__init__(rule)
        self._running, self._index, self._n_prompt = running, index, n_prompt
        self._high = math.inf if rule.threshold is None else rule.threshold
        running.limits[index] = self._high if rule.escalate is None else rule.escalate
        self.in_doubt = (
            _NONE  # the running value that a second judge is asked about; not the highest, which may be exempt
        )
        self._above = self._within = 0  # tokens in a row above the threshold, above the limit
        self._quiet_until = 0
        self._n_seen: int | None = None  # rows before it broke

    @property
    def value(self) -> float:
        return self._running.highest[self._index]

    def over(self, position: int) -> bool:
        """The running value is above the limit. True if `action` has become something new."""
        value, rule = self._running.values[self._index], self.rule
        self._within += 1
        self._above = self._above + 1 if value > self._high else 0
        if position < self._n_prompt + rule.min_tokens - 1:
            return False
        if self._above >= rule.consecutive:
            self._running.limits[self._index] = math.inf  # told once
            self.crossed_at = position
            self.action = outcome(rule, value)
            return True
        if rule.escalate is None or self._within < rule.consecutive or position < self._quiet_until:
            return False
        self._quiet_until = position + 2**62  # not again while it is being asked about
        self.in_doubt = value
        self.action = Action.ESCALATE
        return True

    def under(self) -> None:
        """The running value is no longer above the limit."""
        self._above = self._within = 0

    def stop(self) -> None:
        """From here on it has no value."""
        if not self.broken:
            self.broken, self._n_seen = True, self._running.n
            self._running.drop(self._index)

    def clear(self, position: int, quiet: int) -> None:
        """The second judge found nothing; `quiet` tokens later it may be asked again."""
        self.action = Action.ALLOW
        self._quiet_until = position + quiet

    def reading(self, rows: Scores, drawn: int | None) -> ProbeReading:
        """rows: (n, K) of the sequence; drawn: the position of the sample, None for none"""
        seen = self._running.n if self._n_seen is None else self._n_seen
        scores = self.shown(rows[self._n_prompt : self._n_prompt + seen])
        newest = self._running.values[self._index] if seen else _NONE
        return self._reading(self.value, newest, _peak(scores, self._n_prompt), rows, drawn)


class AnswerTracks:
    """All probes of one answer, token by token: a track is asked only where its running value is above its limit."""

    __slots__ = ("_within", "running", "tracks")

    def __init__(self, rules: Sequence[Rule], n_prompt: int) -> None:
        self.running = Running([(r.aggregation, r.column, r.n_columns) for r in rules])
        self.tracks = [AnswerTrack(r, n_prompt, self.running, i) for i, r in enumerate(rules)]
        self._within: list[AnswerTrack] = []  # above their limits at the token before

    def add(self, position: int, scores: Sequence[float]) -> list[AnswerTrack]:
        """Take one more row in. Returns the tracks whose action has become something new."""
        above = self.running.add(scores)
        if not above and not self._within:
            return self._within
        tracks = [self.tracks[i] for i in above]
        for track in self._within:
            if track not in tracks:
                track.under()
        self._within = tracks
        return [track for track in tracks if track.over(position)]


AnyTrack = PromptTrack | AnswerTrack


def shown(tracks: Sequence[AnyTrack], rows: Scores) -> Scores:
    """(n, P): one score of each token for each probe, in the order of the tracks. rows: (n, K) of all their columns"""
    # Of one projection a probe, which is the usual case, the rows are it.
    if all(t.rule.n_columns == 1 for t in tracks):
        return rows
    probes: dict[str, AnyTrack] = {}
    for track in tracks:
        probes.setdefault(track.rule.probe, track)
    return np.stack([t.shown(rows) for t in probes.values()], axis=1)


def drawn(spans: Sequence[Turn], chance: Random) -> int | None:
    """A position of these, each as likely as another; None if they hold none."""
    lengths = [span.end - span.start for span in spans]
    if not any(lengths):
        return None
    (span,) = chance.choices(spans, lengths)
    return chance.randrange(span.start, span.end)


def _peak(scores: Scores, first: int) -> Peak:
    """first: position of scores[0]"""
    if len(scores) == 0:
        return Peak()
    highest = int(scores.argmax())
    return Peak(float(scores[highest]), first + highest)


def _known(value: float) -> float | None:
    return None if value == _NONE else value
