"""A question to the second judge, and what its answer does to the tracks that asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from monitor.policy.rule import Second
from monitor.track import AnyTrack, PromptTrack
from monitor.types import Action, Escalation, Phase

Missing = Literal["failed", "overflow"]


@dataclass(frozen=True, slots=True)
class Question:
    """What the second judge is asked: whether the sequence may go on. position: the first that waits for it"""

    phase: Phase
    position: int
    tracks: list[AnyTrack]

    @property
    def n_read(self) -> int:
        """Tokens of prompt and answer that it is about."""
        return self.position if self.phase is Phase.PROMPT else self.position + 1

    def answer_of(self, tracks: Sequence[AnyTrack], probes: tuple[str, ...]) -> float | None:
        """What other probes of the sequence say in its phase: the highest of their values, None if one is missing."""
        found = [t for t in tracks if t.rule.probe in probes and t.rule.phase is self.phase and not t.broken]
        said = [t.in_doubt if isinstance(t, PromptTrack) else t.value for t in found]
        values = [value for value in said if math.isfinite(value)]
        return max(values) if len(values) == len(probes) else None

    def decide(self, track: AnyTrack, how: Second, second: float | None, missing: Missing) -> Escalation:
        """Set the track's verdict. second: the answer's logit; None: there is none, because of `missing`"""
        rule = track.rule
        harmful = second is not None and how.combined(track.in_doubt, second) > (rule.threshold or 0.0)
        if harmful:
            track.action, track.crossed_at = Action.BLOCK, self.position
        elif second is None and rule.fail_mode == "closed":
            track.action = Action.UNMONITORED
        else:
            track.clear(self.position, how.recheck_tokens)
        result: Literal["block", "clear", "failed", "overflow"] = missing
        if second is not None:
            result = "block" if harmful else "clear"
        return Escalation(rule.probe, rule.phase, self.position, track.in_doubt, second, result)
