"""POST /v1/moderations: OpenAI's shape. One prefill per input, nothing is generated; the categories are harm probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from monitor.api.errors import ApiError, ended_badly, from_domain, unavailable
from monitor.api.judging import Judging, Session
from monitor.api.schema import Text
from monitor.errors import Overloaded, RequestInvalid
from monitor.types import Action, Phase, ProbeReading, Record

_ABOVE = (Action.FLAG, Action.ESCALATE, Action.BLOCK)

Harm = Callable[[str], bool]
Probability = Callable[[str, str, float], float]


class Part(BaseModel):
    """A text, or what can't be judged: `texts` says so by its type."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Text
    text: Text | None = None


class ModerationRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    input: Text | list[Text] | list[Part]
    model: Text | None = None
    """Any name is taken: clients send OpenAI's, and there is one model here."""

    def texts(self) -> list[str]:
        """The inputs, one result each. Parts together are one input, as with OpenAI.

        raises: ApiError 400 for a part that is not text
        """
        if isinstance(self.input, str):
            return [self.input]
        found, parts = [], []
        for item in self.input:
            if isinstance(item, str):
                found.append(item)
            elif item.type == "text" and item.text is not None:
                parts.append(item.text)
            else:
                raise ApiError(
                    400,
                    f"input holds a part of type {item.type[:32]!r}; only text can be judged, since the probes read a "
                    'text model: send {"type": "text", "text": ...}',
                    param="input",
                    code="unsupported_input",
                )
        return found + (["\n".join(parts)] if parts else [])


def moderation_routes(judging: Judging, is_harm: Harm, probability: Probability) -> APIRouter:
    """is_harm: whether the probe of a name is a category; probability: (probe, version, value) -> calibrated, 0 to 1"""
    routes = APIRouter(prefix="/v1")
    most = judging.settings.max_prompts

    @routes.post("/moderations")
    async def moderations(body: ModerationRequest, http: Request) -> dict[str, Any]:
        texts = body.texts()
        if not 0 < len(texts) <= most:
            raise ApiError(400, f"input has {len(texts)} entries; send 1 to {most}", param="input")
        session = Session(judging, http, "moderations")
        try:
            records = await session.judge([await session.turn(text) for text in texts])
        except RequestInvalid as error:
            raise ApiError(400, str(error), param="input") from error
        except Overloaded as error:
            raise from_domain(error) from error
        results = [_result(record, is_harm, probability) for record in records]
        return {"id": f"modr-{session.id}", "model": judging.model, "results": results}

    return routes


def _result(record: Record, is_harm: Harm, probability: Probability) -> dict[str, Any]:
    """raises: ApiError 503 where a score is missing: that is never "not flagged" """
    if error := ended_badly(record):
        raise error
    readings = [r for r in record.readings if r.phase is Phase.PROMPT and is_harm(r.probe)]
    if not readings:
        raise unavailable("no harm probe is in service, so nothing can be moderated; try again later")
    categories = {r.probe: r.action in _ABOVE or r.would_block for r in readings}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": {r.probe: probability(r.probe, r.version, _value(r)) for r in readings},
        "category_applied_input_types": {r.probe: ["text"] for r in readings},
    }


def _value(reading: ProbeReading) -> float:
    if reading.value is None or reading.action is Action.UNMONITORED:
        raise unavailable(f"probe {reading.probe} could not score an input, so nothing is said of it; try again later")
    return reading.value
