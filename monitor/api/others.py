"""The routes beside those that generate, alike for both engines: moderations and the gateway's guardrail."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from monitor.api.guardrail import guardrail_routes
from monitor.api.judging import Judging
from monitor.api.moderations import moderation_routes
from monitor.live import LiveProbes
from probes_store.card import Card


def other_routes(judging: Judging, live: Callable[[], LiveProbes]) -> list[APIRouter]:
    """live: the probes in service now"""

    def card(probe: str) -> Card:
        return next(p.card for p in live().probes if p.card.name == probe)

    return [
        moderation_routes(
            judging, lambda probe: card(probe).kind == "harm", lambda probe, _, value: card(probe).probability(value)
        ),
        guardrail_routes(judging),
    ]
