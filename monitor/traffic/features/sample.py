"""Which sequences are kept, with which probability; and what of one is averaged."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from monitor.traffic.features.files import Reason
from monitor.types import Action, Phase, Prompt, Record, Turn

_ENDS = ("stop", "length", "content_filter")


class Kept(NamedTuple):
    """q: the probability that it is kept; rate: of the slice that every sequence has the same chance of, 0: it is not
    in it"""

    q: float
    reason: Reason
    rate: float = 0.0

    @property
    def uniform(self) -> bool:
        return self.rate > 0


@dataclass(frozen=True, slots=True)
class Chances:
    """Every flagged or blocked sequence; of the others min(1, rate + band_rate x [near]).

    rate: of any sequence; near: a value within `band` logits of its threshold
    """

    rate: float
    band: float
    band_rate: float

    def draw(self, record: Record, chance: Random) -> Kept | None:
        drawn = chance.random()
        rate = self.rate if drawn < self.rate else 0.0
        if record.verdict in (Action.FLAG, Action.BLOCK):
            return Kept(1.0, "flagged", rate)
        q = min(1.0, self.rate + self.band_rate * self._near(record))
        if drawn >= q:
            return None
        return Kept(q, "uniform" if rate else "near", rate)

    def _near(self, record: Record) -> bool:
        return any(
            r.value is not None and r.threshold is not None and abs(r.value - r.threshold) <= self.band
            for r in record.readings
        )


def spans_of(record: Record, prompt: Prompt) -> dict[Phase, Turn]:
    """The positions that are averaged: the newest turn's, as in training, and the answer's that were scored.

    Empty for a sequence that did not end by itself or whose scores have a gap, and for a request of our own.
    """
    coverage = record.coverage
    if record.finish not in _ENDS or coverage.unmonitored or record.route == "internal":
        return {}
    spans = {}
    if prompt.turns and coverage.prompt_scored == coverage.prompt_tokens:
        spans[Phase.PROMPT] = prompt.turns[-1]
    if coverage.response_scored:
        start = len(prompt.token_ids)
        spans[Phase.RESPONSE] = Turn(start, start + coverage.response_scored)
    return spans
