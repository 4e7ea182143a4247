"""The routes beside those that generate, alike for both engines: moderations and the gateway's guardrail."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from monitor.api.guardrail import guardrail_routes
from monitor.api.judging import Judging
from monitor.api.moderations import moderation_routes
from monitor.live import LiveProbes
from monitor.types import is_candidate
from probes_store.card import Card, sigmoid


def other_routes(judging: Judging, live: Callable[[], LiveProbes]) -> list[APIRouter]:
    """live: the probes in service now"""

    def card(probe: str, version: str | None = None) -> Card | None:
        """Of the version that scored; if that has left service since, of the one in its place."""
        named = [p.card for p in live().probes if p.name == probe]
        return next((c for c in named if c.version == version), named[0] if named else None)

    def is_harm(probe: str) -> bool:
        found = None if is_candidate(probe) else card(probe)
        return found is not None and found.kind == "harm"

    def probability(probe: str, version: str, value: float) -> float:
        found = card(probe, version)
        return sigmoid(value) if found is None else found.probability(value)

    return [moderation_routes(judging, is_harm, probability), guardrail_routes(judging)]
