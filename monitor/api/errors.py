"""Errors in OpenAI's shape, each with a sentence that says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from starlette.responses import JSONResponse

from monitor.api.verdicts import verdict_headers
from monitor.errors import Overloaded, RequestInvalid
from monitor.types import Action, Phase, ProbeReading, Record, Terms

RETRY_AFTER_S = 5


class ApiError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers["Retry-After"] = str(RETRY_AFTER_S if retry_after_s is None else max(1, ceil(retry_after_s)))
        message = message.encode(errors="replace").decode()
        param = None if param is None else param.encode(errors="replace").decode()
        self.status = status
        self.error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code} | dict(
            extra or {}
        )

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


def from_domain(error: RequestInvalid | Overloaded) -> ApiError:
    if isinstance(error, RequestInvalid):
        return ApiError(400, str(error), param=error.param)
    if "shutting down" in str(error):
        return unavailable(str(error))
    return ApiError(429, str(error), kind="rate_limit_error", code="queue_full")


def unavailable(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    return ApiError(503, message, kind="server_error", code="unavailable", headers=headers)


def validation(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors as a sentence."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"field {where!r} is not supported; remove it", param=where, code="unknown_field")
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="bad_json"
        )
    return ApiError(400, f"field {where!r}: {first['msg']}", param=where, code="bad_value")


def blocked_readings(record: Record, phase: Phase) -> list[ProbeReading]:
    return [r for r in record.readings if r.phase is phase and r.action is Action.BLOCK]


class PromptBlocked(ApiError):
    """400 in Azure's shape: which probes, and of a list of prompts which one. terms.refusal, where the policy has one,
    is answered instead."""

    def __init__(self, record: Record, prompt_index: int, n_prompts: int, terms: Terms) -> None:
        which = "The prompt" if n_prompts == 1 else f"Prompt {prompt_index}"
        result = {r.probe: {"filtered": True, "detected": True} for r in blocked_readings(record, Phase.PROMPT)}
        self.terms = terms
        super().__init__(
            400,
            # LiteLLM knows a content policy's error by these words, not by its code.
            f"{which} was blocked by the safety monitor ({', '.join(result)}): the request was rejected as a result of "
            "the safety system. Change it and try again.",
            param="prompt",
            code="content_filter",
            extra={
                "innererror": {
                    "code": "ResponsibleAIPolicyViolation",
                    "prompt_index": prompt_index,
                    "content_filter_result": result,
                }
            },
            headers=verdict_headers(record.policy, [Action.BLOCK]),
        )


_WHY = {
    "unmonitored": "the safety monitor could not score this request, so it is not answered; try again later",
    "engine_error": "the engine failed while answering; try again later",
    "aborted": "the server is shutting down; try again later",
}


def ended_badly(record: Record) -> ApiError | None:
    """A sequence that may not be answered at all: no scores with a probe that fails closed, or no engine."""
    why = _WHY.get(record.finish)
    return None if why is None else unavailable(why, verdict_headers(record.policy, [record.verdict]))
