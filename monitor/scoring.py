"""One text scored as a prompt, without generating: `midstream score`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from monitor.config import Settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.live import counted
from monitor.metrics import Metrics
from monitor.sequence import Watch
from monitor.types import Action, Phase


@dataclass(frozen=True, slots=True)
class Row:
    probe: str
    version: str
    value: float
    probability: float
    threshold: float | None
    verdict: str
    token_scores: list[float | None]
    """None where a position does not count."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    tokens: list[str]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_text(settings: Settings, text: str) -> ScoredText:
    """raises: MidstreamError, as a server would when it starts"""
    from monitor.api.serve import load

    model, live = load(settings)
    engine = EmbeddedEngine(model, live, settings, Metrics())
    engine.check_canaries()
    prompt = model.template.encode([{"role": "user", "content": text}])
    scores = engine.prefill(prompt)
    watch = Watch(prompt, live.rules["chat"], live.default.second)
    watch.advance(0, scores)
    counts, shown = set(counted(prompt)), watch.shown(scores)
    rows = []
    for column, reading in enumerate(r for r in watch.readings() if r.phase is Phase.PROMPT):
        value = math.nan if reading.value is None else reading.value
        verdict = str(reading.action) + (" (would act)" if reading.would_block else "")
        if reading.action is Action.ESCALATE:
            verdict += " (second.url is not asked here)"
        values = [float(s) if i in counts else None for i, s in enumerate(shown[:, column])]
        rows.append(
            Row(
                reading.probe,
                reading.version,
                value,
                live.probes[column].card.probability(value),
                reading.threshold,
                verdict,
                values,
            )
        )
    return ScoredText([model.tokenizer.decode([t]) for t in prompt.token_ids], rows)
