"""The policy: a probe's value in a phase -> a verdict. Pure; no I/O, no clock, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from monitor.aggregate import Aggregation
from monitor.types import SEVERITY, Action, Format, Mode, Phase, Terms

FailMode = Literal["open", "closed"]
_DOES = {Mode.SHADOW: Action.ALLOW, Mode.FLAG: Action.FLAG, Mode.BLOCK: Action.BLOCK}


@dataclass(frozen=True, slots=True)
class Rule:
    """What one probe does in one phase.

    column, n_columns: the probe's columns in the score rows: the first, and how many
    threshold: crossed strictly above; None if the phase has no calibration (then the mode is shadow)
    on_history: what a harmful turn before the newest one does, in the prompt phase
    escalate: from above this value up to the threshold a second judge is asked; None: it never is
    min_tokens, consecutive: an answer crosses from its min_tokens-th token on, where its running value is above for
    so many tokens in a row
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
    escalate: float | None = None
    min_tokens: int = 1
    consecutive: int = 1
    n_columns: int = 1
    by_length: tuple[tuple[int, float], ...] = ()
    """(tokens, threshold) of a prompt of up to so many, ascending, in place of `threshold`; the last one of longer
    ones too."""

    def __post_init__(self) -> None:
        self.aggregation.check(self.n_columns)
        if self.mode is not Mode.SHADOW and self.threshold is None:
            raise ValueError(f"probe {self.probe!r} has no calibration for {self.phase}; only shadow is possible")
        lowest = min((t for _, t in self.by_length), default=self.threshold)
        if self.escalate is not None and not (self.mode is Mode.BLOCK and self.escalate < (lowest or 0.0)):
            raise ValueError(
                f"probe {self.probe!r}, {self.phase}: escalate {self.escalate:g} must lie below the threshold "
                f"({lowest}) of a probe that blocks"
            )

    def at(self, n_prompt: int) -> Rule:
        """What judges a prompt of so many tokens."""
        if not self.by_length:
            return self
        last = self.by_length[-1][1]
        threshold = next((t for up_to, t in self.by_length if n_prompt <= up_to), last)
        return replace(self, threshold=threshold, by_length=())

    @property
    def columns(self) -> int | slice:
        """What `rows[:, columns]` takes: (n,) of one projection, (n, k) of several."""
        return self.column if self.n_columns == 1 else slice(self.column, self.column + self.n_columns)


@dataclass(frozen=True, slots=True)
class Second:
    """The second judge of an escalated sequence.

    probes: other probes of this set, the highest of whose values it is; empty: `Asker` asks an endpoint
    weight: of the second's logit in the combined one (Constitutional Classifiers++: 0.55 and 0.45)
    recheck_tokens: an answer that was cleared is not asked about again before so many more tokens
    max_held: tokens that may wait for it; more, and the rule's fail mode decides
    """

    probes: tuple[str, ...] = ()
    weight: float = 0.45
    recheck_tokens: int = 64
    max_held: int = 256

    def combined(self, value: float, second: float) -> float:
        return (1 - self.weight) * value + self.weight * second


@dataclass(frozen=True, slots=True)
class Policy:
    """What one caller's sequences are judged by."""

    rules: Mapping[Format, tuple[Rule, ...]]
    terms: Terms = field(default_factory=Terms)
    second: Second = field(default_factory=Second)


def crossed(rule: Rule, value: float | None) -> bool:
    """False for a missing or non-finite value: `outcome` tells those apart from a low one."""
    return value is not None and math.isfinite(value) and rule.threshold is not None and value > rule.threshold


def uncertain(rule: Rule, value: float | None) -> bool:
    """Whether the value lies in the band that a second judge decides."""
    return value is not None and rule.escalate is not None and value > rule.escalate and not crossed(rule, value)


def outcome(rule: Rule, value: float | None, newest: float | None = None) -> Action:
    """The verdict of one probe.

    value: the statistic of the phase; newest: in the prompt phase, the newest turn's value. A value that crosses
    while the newest turn's does not stems from the history, and `on_history` bounds what it may do.
    """
    if value is None or not math.isfinite(value):
        return Action.UNMONITORED
    mode = rule.mode
    history_only = rule.phase is Phase.PROMPT and not crossed(rule, newest)
    if history_only:
        mode = min(mode, rule.on_history, key=list(Mode).index)
    does = _DOES[mode] if crossed(rule, value) else Action.ALLOW
    if does is Action.BLOCK:
        return does
    if history_only:  # what only an earlier turn makes uncertain is not asked about where history may not block
        asked = uncertain(rule, newest) or (mode is Mode.BLOCK and uncertain(rule, value))
    else:
        asked = uncertain(rule, value)
    return Action.ESCALATE if asked else does


def ends(rule: Rule, action: Action) -> bool:
    """Whether the verdict of this rule ends the sequence: a block, or a missing score that fails closed."""
    return action is Action.BLOCK or (
        action is Action.UNMONITORED and rule.mode is Mode.BLOCK and rule.fail_mode == "closed"
    )


def worst(actions: list[Action]) -> Action:
    return max(actions, key=SEVERITY.__getitem__, default=Action.ALLOW)
