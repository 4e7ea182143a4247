"""The admin routes of what is kept: records by id, pages of the audit log, and erasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from monitor.api.admin.aside import Aside
from monitor.api.admin.outcome import did
from monitor.api.admin.plain import dumped, json_response
from monitor.api.errors import ApiError
from monitor.audit import Audit
from monitor.traffic.labelling import request_key

RequestId = Annotated[str, Path(pattern=r"^[0-9A-Za-z_-]{1,128}$")]
Records = Callable[[str], list[dict[str, Any]]]
"""The records of one request id, by choice."""
Erase = Callable[[str | None, str | None], int]
"""The records of a key's name or of a request id, and how many there were."""


class EraseRequest(BaseModel):
    """Whose records: of an API key's name ("": without a key), or of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(max_length=64)] | None = None
    id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,128}$")] | None = None


def keeping_routes(app: FastAPI, records: Records, audit: Audit, erase: Erase | None, aside: Aside) -> None:
    """erase: None: there is no such route"""

    @app.get("/admin/records/{request_id}")
    async def of_request(request_id: RequestId) -> Response:
        content = await aside(lambda: _by_ones(records(request_id)))
        if content is None:
            raise ApiError(404, f"there is no record of {request_id!r} (any more)", code="not_found")
        return Response(content, media_type="application/json")

    @app.get("/admin/audit")
    async def rows(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=1, lt=2**62)] = None,
        reads: bool = True,
    ) -> Response:
        """before: a row's id, for the page behind it; reads: with the rows of who has only looked"""
        return json_response({"rows": await aside(audit.latest, limit, before, reads)})

    if erase is not None:
        _erasing(app, erase, aside)


def _by_ones(found: list[dict[str, Any]]) -> bytes | None:
    """Their JSON, made off the event loop and record by record: within one call of it no other thread runs."""
    return b'{"records": [' + b", ".join(map(dumped, found)) + b"]}" if found else None


def _erasing(app: FastAPI, erase: Erase, aside: Aside) -> None:
    @app.post("/admin/erase")
    async def erased(request: Request, body: EraseRequest) -> Response:
        if (body.key is None) == (body.id is None):
            raise ApiError(400, "say whose records: one of key and id", code="bad_value")
        number = None if body.id is None else request_key(body.id)
        whose = f"request {number}" if body.key is None else f"key {body.key!r}"
        did(request, f"{whose}: erase")
        n = await aside(erase, body.key, number)
        did(request, f"{whose}: {n} erased")
        return json_response({"erased": n})
