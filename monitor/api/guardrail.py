"""POST /beta/litellm_basic_guardrail_api: LiteLLM's Generic Guardrail API, so that a gateway asks the probes.

What the gateway's own model reads or writes is judged as if the model here had read or written it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from monitor.api.errors import ApiError, ended_badly, unavailable
from monitor.api.judging import Job, Judging, Session, readable
from monitor.errors import Overloaded, RequestInvalid
from monitor.template import Message
from monitor.types import Action, Record, is_candidate

_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
_EMPTY_TURN = ({"role": "user", "content": ""},)


class GuardrailRequest(BaseModel):
    """Fields that are not here (key and team of the gateway's user, its headers, ...) are ignored: none of them may
    choose how strictly is judged."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input_type: Literal["request", "response"]
    texts: list[str] | None = None
    structured_messages: list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    images: list[Any] | None = None


@dataclass(slots=True)
class Conversation:
    """Structured messages as roles and texts. pieces: every text in them; unread: parts of another kind

    What a tool returned reads as a user's turn; a tool call as text that the assistant wrote.
    """

    messages: list[Message] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    unread: int = 0

    def add(self, message: dict[str, Any]) -> None:
        parts = _listed(message.get("content"))
        texts = _texts(parts)
        self.unread += sum(not _texts(part) for part in parts)
        calls = [*_listed(message.get("tool_calls")), *_listed(message.get("function_call"))]
        texts += _called(calls)
        role = _ROLES.get(str(message.get("role")), "user")
        self.messages.append({"role": role, "content": readable("\n".join(texts), "structured_messages")})
        self.pieces += texts


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(content: object) -> list[str]:
    """Of a message's content: text, or parts with a text or with a content of their own."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [text for part in content for text in _texts(part)]
    return _texts(content.get("text", content.get("content"))) if isinstance(content, dict) else []


def _called(calls: Iterable[Any]) -> list[str]:
    """The arguments of tool calls, as the model wrote them; all of a call whose shape is another than OpenAI's."""
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        found.append(arguments if isinstance(arguments, str) else json.dumps(call))
    return found


def guardrail_routes(judging: Judging) -> APIRouter:
    routes = APIRouter()
    most = judging.settings.max_prompts

    @routes.post("/beta/litellm_basic_guardrail_api")
    async def guardrail(body: GuardrailRequest, http: Request) -> dict[str, Any]:
        conversation = Conversation()
        for message in body.structured_messages or []:
            conversation.add(message)
        texts = [readable(text, "texts") for text in body.texts or []]
        texts += [readable(text, "tool_calls") for text in _called(body.tool_calls or [])]
        session = Session(judging, http, "guardrail")
        judge = _judge_request if body.input_type == "request" else _judge_response
        try:
            judged_as, records = await judge(session, conversation, texts, most)
        except RequestInvalid as error:
            raise ApiError(400, str(error), param="texts") from error
        except Overloaded as error:
            # Not 429: of all statuses the gateway's own fail mode knows only 502, 503 and 504.
            raise unavailable(str(error)) from error
        return _answer(session.id, body, judged_as, records, conversation.unread)

    return routes


async def _judge_request(
    session: Session, conversation: Conversation, texts: Sequence[str], most: int
) -> tuple[str, list[Record]]:
    """The conversation as one prompt, and what stands outside of it as turns of their own; without a conversation, or
    with one that the model can't read, every text as a user's turn."""
    if conversation.pieces:
        read = set(conversation.pieces)
        others = [text for text in texts if text not in read]
        try:
            whole = Job(await session.encode(conversation.messages))
            return "conversation", await session.judge([whole, *await _turns(session, others, most)])
        except RequestInvalid:  # the template refuses it, or it is too long: its texts may still fit one by one
            texts = [*conversation.pieces, *texts]
    return "texts", await session.judge(await _turns(session, texts, most))


async def _turns(session: Session, texts: Sequence[str], most: int) -> list[Job]:
    return [await session.turn(text) for text in _bounded(texts, most)]


async def _judge_response(
    session: Session, conversation: Conversation, texts: Sequence[str], most: int
) -> tuple[str, list[Record]]:
    """Every text as an answer to the conversation; to an empty turn if the gateway sends none or it does not fit."""
    answers = _bounded([text for text in texts if text], most)
    if conversation.pieces:
        with contextlib.suppress(RequestInvalid):  # refused or too long: without it the answers may still fit
            return "answers", await _after(session, conversation.messages, answers)
    return "answers without their prompt", await _after(session, _EMPTY_TURN, answers)


async def _after(session: Session, messages: Sequence[Message], answers: Sequence[str]) -> list[Record]:
    prompt = await session.encode(messages)
    return await session.judge([await session.answer(prompt, text) for text in answers])


def _bounded(texts: Sequence[str], most: int) -> list[str]:
    """Each text once. raises: ApiError 400 for too many: some unjudged would be a hole"""
    once = list(dict.fromkeys(texts))
    if len(once) > most:
        raise ApiError(400, f"{len(once)} texts to judge one by one; send at most {most}", param="texts")
    return once


def _answer(
    identity: str, body: GuardrailRequest, judged_as: str, records: Sequence[Record], unread: int
) -> dict[str, Any]:
    """raises: ApiError 503 where a score is missing and the policy fails closed"""
    blocked = {r.probe: None for record in records for r in record.readings if r.action is Action.BLOCK}
    if not blocked and (error := next(filter(None, map(ended_badly, records)), None)):
        raise error
    findings = {
        (r.probe, r.phase, r.action): None
        for record in records
        for r in record.readings
        if r.action is not Action.ALLOW and not is_candidate(r.probe)
    }
    # The probes read a text model: it sees no image, and no probe is calibrated on definitions of tools.
    skipped = {"images": len(body.images or []), "parts": unread, "tools": len(body.tools or [])}
    ours = {
        "request_id": identity,
        "judged_as": judged_as,
        "findings": [{"probe": probe, "phase": phase, "action": action} for probe, phase, action in findings],
        "not_judged": {what: count for what, count in skipped.items() if count},
    }
    if not blocked:
        return {"action": "NONE", "midstream": ours}
    what = "prompt" if body.input_type == "request" else "answer"
    reason = f"The {what} was blocked by the safety monitor ({', '.join(blocked)})."
    return {"action": "BLOCKED", "blocked_reason": reason, "midstream": ours}
