"""One probe in one phase of one sequence: its value, where it crossed, what the policy says of it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from monitor.aggregate import aggregate, fold
from monitor.policy.rule import Rule, crossed, outcome
from monitor.types import Action, Mode, ProbeReading, Prompt

_NONE = -math.inf  # no value yet: every finite one is higher


class Track:
    """value: the statistic of the phase; newest: of the newest turn, or the running value of an answer; top: the
    highest token score, at peak_position. All logits, -inf before the first.

    broken: a score was missing or not finite
    """

    __slots__ = ("action", "broken", "crossed_at", "newest", "peak_position", "rule", "top", "value")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.value = self.newest = self.top = _NONE
        self.peak_position: int | None = None
        self.crossed_at: int | None = None
        self.action = Action.ALLOW
        self.broken = False

    def reading(self) -> ProbeReading:
        rule = self.rule
        return ProbeReading(
            probe=rule.probe,
            version=rule.version,
            phase=rule.phase,
            mode=rule.mode,
            threshold=rule.threshold,
            value=None if self.broken else _known(self.value),
            newest=None if self.broken else _known(self.newest),
            peak_position=self.peak_position,
            peak_score=_known(self.top),
            crossed_at=self.crossed_at,
            action=self.action,
            would_block=rule.mode is not Mode.BLOCK and not self.broken and self.crossed_at is not None,
        )


class PromptTrack(Track):
    __slots__ = ()

    def judge(self, prompt: Prompt, scores: npt.NDArray[np.float32]) -> Action:
        """scores: (n_prompt,) finite logits of this probe. The value is the maximum over the turns."""
        rule = self.rule
        for index, turn in enumerate(prompt.turns):
            span = scores[turn.start : turn.end]
            if len(span) == 0:
                continue
            value = aggregate(rule.aggregation, span)
            peak = int(span.argmax())
            if span[peak] > self.top:
                self.top, self.peak_position = float(span[peak]), turn.start + peak
            if value > self.value:
                self.value = value
                self.crossed_at = turn.end - 1 if crossed(rule, value) else None
            if index >= prompt.newest and value > self.newest:
                self.newest = value
        self.action = outcome(rule, _known(self.value), _known(self.newest))
        return self.action

    def clear(self, position: int, quiet: int) -> None:
        """The second judge found nothing: what is left is what the history alone does."""
        self.action = Action.FLAG if self.crossed_at is not None and self.rule.on_history is Mode.FLAG else Action.ALLOW


class AnswerTrack(Track):
    """Token by token: `add` runs for every token of every probe."""

    __slots__ = ("_above", "_fold", "_high", "_limit", "_low", "_quiet_until", "_start", "_within")

    def __init__(self, rule: Rule, n_prompt: int) -> None:
        super().__init__(rule)
        self._fold = fold(rule.aggregation)
        self._high = math.inf if rule.threshold is None else rule.threshold
        self._low = self._high if rule.escalate is None else rule.escalate
        self._limit = self._low  # nothing to look at up to here
        self._start = n_prompt + rule.min_tokens - 1
        self._above = self._within = 0  # tokens in a row above the threshold, above the band's lower end
        self._quiet_until = 0

    def add(self, position: int, score: float) -> bool:
        """Take one more token in. True if `action` has become something new."""
        self.newest = value = self._fold(score)
        if score > self.top:
            self.top, self.peak_position = score, position
        if value > self.value:
            self.value = value
        if value > self._limit:
            return self._over(position, value)
        if self._within:
            self._above = self._within = 0
        return False

    def _over(self, position: int, value: float) -> bool:
        self._within += 1
        self._above = self._above + 1 if value > self._high else 0
        if position < self._start:
            return False
        if self._above >= self.rule.consecutive:
            self._limit = math.inf  # told once
            self.crossed_at = position
            self.action = outcome(self.rule, value)
            return True
        if self.rule.escalate is None or self._within < self.rule.consecutive or position < self._quiet_until:
            return False
        self._quiet_until = position + 2**62  # not again while it is being asked about
        self.action = Action.ESCALATE
        return True

    def clear(self, position: int, quiet: int) -> None:
        """The second judge found nothing; `quiet` tokens later it may be asked again."""
        self.action = Action.ALLOW
        self._quiet_until = position + quiet


AnyTrack = PromptTrack | AnswerTrack


def _known(value: float) -> float | None:
    return None if value == _NONE else value
