"""What a route did, in a few words that its audit row keeps behind the status."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope

_PLACE = "midstream.outcome"


def room_for_outcome(scope: Scope) -> list[str]:
    """Where the routes of this request put theirs."""
    said: list[str] = []
    scope[_PLACE] = said
    return said


def did(request: Request, words: str) -> None:
    """Names, versions, ids and numbers: no text of a client, no secret. Said again, the last words count; said before
    the act, they also say what was refused."""
    request.scope[_PLACE][:] = [words]
