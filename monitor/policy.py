"""The policy: a probe's value in a phase -> a verdict. Pure; no I/O, no clock, no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from monitor.aggregate import Aggregation
from monitor.types import SEVERITY, Action, Mode, Phase

FailMode = Literal["open", "closed"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one probe does in one phase.

    column: the probe's column in the score rows
    threshold: crossed strictly above; None if the phase has no calibration (then the mode is shadow)
    on_history: what a harmful turn before the newest one does, in the prompt phase
    """

    probe: str
    version: str
    column: int
    phase: Phase
    mode: Mode
    threshold: float | None
    aggregation: Aggregation
    fail_mode: FailMode
    on_history: Mode = Mode.FLAG

    def __post_init__(self) -> None:
        if self.mode is not Mode.SHADOW and self.threshold is None:
            raise ValueError(f"probe {self.probe!r} has no calibration for {self.phase}; only shadow is possible")


def crossed(rule: Rule, value: float | None) -> bool:
    """False for a missing or non-finite value: `outcome` tells those apart from a low one."""
    return value is not None and math.isfinite(value) and rule.threshold is not None and value > rule.threshold


def outcome(rule: Rule, value: float | None, newest: float | None = None) -> Action:
    """The verdict of one probe.

    value: the statistic of the phase; newest: in the prompt phase, the newest turn's value. A value that crosses
    while the newest turn's does not stems from the history, and `on_history` bounds what it may do.
    """
    if value is None or not math.isfinite(value):
        return Action.UNMONITORED
    if not crossed(rule, value):
        return Action.ALLOW
    mode = rule.mode
    if rule.phase is Phase.PROMPT and not crossed(rule, newest):
        mode = min(mode, rule.on_history, key=list(Mode).index)
    return {Mode.SHADOW: Action.ALLOW, Mode.FLAG: Action.FLAG, Mode.BLOCK: Action.BLOCK}[mode]


def ends(rule: Rule, action: Action) -> bool:
    """Whether the verdict of this rule ends the sequence: a block, or a missing score that fails closed."""
    return action is Action.BLOCK or (
        action is Action.UNMONITORED and rule.mode is Mode.BLOCK and rule.fail_mode == "closed"
    )


def worst(actions: list[Action]) -> Action:
    return max(actions, key=SEVERITY.__getitem__, default=Action.ALLOW)
