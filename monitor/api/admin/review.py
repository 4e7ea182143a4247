"""The console's routes: the queue by page, one request, labels, the logit lens, and traffic as it goes by."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from monitor.api.admin.aside import Aside
from monitor.api.admin.desk import Desk, Page
from monitor.api.admin.feed import seen
from monitor.api.admin.outcome import did
from monitor.api.admin.plain import dumped, json_response
from monitor.api.admin.session import Operator, operator_of
from monitor.api.errors import ApiError
from monitor.api.events import EventStream
from monitor.traffic import Filter, Label
from monitor.traffic.labelling import MAX_NAME
from monitor.traffic.review import NoSuchRecord
from monitor.types import Action, Phase

MAX_WATCHERS = 16
MAX_CHOICE = 10**6
_TICK_S = 0.25
_QUIET_S = 15.0
_AT_FIRST = 100
_NUMBER = re.compile(r"[0-9]{1,15}")
_Event = tuple[int, dict[str, Any]]
"""How many records there were with it, from where one can go on, and what it says."""
RequestId = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,128}$")]
_Text = Annotated[str, Query(max_length=128)]


class LabelRequest(BaseModel):
    """by: who says so; a session signs with its own name"""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: RequestId
    choice: Annotated[int, Field(ge=0, le=MAX_CHOICE)] | None = None
    label: Annotated[Label, Field(strict=False)]
    by: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None


class LensRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: RequestId
    choice: Annotated[int, Field(ge=0, le=MAX_CHOICE)] = 0


def review_routes(app: FastAPI, desk: Desk, aside: Aside) -> None:
    _reading(app, desk, aside)
    _labelling(app, desk, aside)
    _watching(app, desk)


def _reading(app: FastAPI, desk: Desk, aside: Aside) -> None:
    @app.get("/admin/queue")
    async def queue(
        order: Literal["value", "threshold"] = "value",
        probe: _Text | None = None,
        phase: Phase | None = None,
        verdict: Annotated[list[Action] | None, Query(max_length=len(Action))] = None,
        key: _Text | None = None,
        since: float | None = None,
        until: float | None = None,
        labelled: Literal["no", "yes", "any"] = "no",
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        around: float | None = None,
        after: Annotated[str | None, Query(max_length=128)] = None,
    ) -> Response:
        chosen = {} if verdict is None else {"verdicts": frozenset(verdict)}
        done = {"no": False, "yes": True, "any": None}[labelled]
        which = Filter(probe, phase, key=key, since=since, until=until, labelled=done, **chosen)
        page: Page
        if order == "value":
            page = await aside(desk.queue, which, limit, _place(after))
        else:
            page = await aside(desk.nearest, which, limit, around, _place(after))
        told = {"entries": page.entries, "next": None if page.next is None else _cursor(page.next)}
        return json_response(told | {"around": page.around})

    @app.get("/admin/queue/counts")
    async def counts() -> Response:
        return json_response(await aside(desk.counts))

    @app.get("/admin/requests/{request_id}")
    async def one(
        request_id: Annotated[str, Path(pattern=r"^[0-9A-Za-z_-]{1,128}$")],
        choice: Annotated[int | None, Query(ge=0, le=MAX_CHOICE)] = None,
    ) -> Response:
        try:
            # Its JSON too: the event loop is the one that the data routes' tokens go through.
            return await aside(lambda: json_response(desk.request(request_id, choice)))
        except NoSuchRecord as error:
            raise ApiError(404, str(error), code="not_found") from None

    @app.post("/admin/lens")
    async def lens(request: Request, body: LensRequest) -> Response:
        did(request, f"lens of {body.id}/{body.choice}")
        if desk.lens is None:
            message = "this server runs no logit lens: it needs kept text and the embedded engine"
            raise ApiError(404, message, code="not_found")
        turns = await aside(desk.conversation, body.id, body.choice)
        return json_response(await desk.lens.look(turns))


def _labelling(app: FastAPI, desk: Desk, aside: Aside) -> None:
    @app.post("/admin/labels")
    async def label(request: Request, body: LabelRequest) -> Response:
        name = operator_of(request).name
        if name is not None and body.by not in (None, name):
            raise ApiError(400, f"you are signed in as {name!r}; leave `by` out", param="by", code="bad_value")
        by = name or body.by or "admin"
        did(request, f"label {body.id} {body.label}")
        try:
            done = await aside(desk.label, body.id, body.choice, body.label, by)
            was = f", was {done['before']}" if done["before"] else ""
            did(request, f"labelled {done['id']}/{done['choice']} {body.label}{was}" + ("" if name else f" by {by}"))
            return json_response(done)
        except NoSuchRecord as error:
            raise ApiError(404, str(error), code="not_found") from None


def _watching(app: FastAPI, desk: Desk) -> None:
    watching: set[object] = set()

    @app.get("/admin/live")
    async def live(request: Request) -> Response:
        if len(watching) >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} watch already; close one", code="queue_full")
        one = object()
        watching.add(one)
        source = _events(desk, operator_of(request), request.headers.get("last-event-id", ""))
        return EventStream(_lines(source), source, {}, lambda: watching.discard(one))


async def _events(desk: Desk, operator: Operator, last: str) -> AsyncGenerator[_Event | None, None]:
    """Records as they come; None now and then when none do, so that a peer that is gone is found out.

    last: the number that it has seen last, of who comes back. Ends with the session. Who can't follow is told how
    many records went by; what went by before anybody looked is `old`.
    """
    began, quiet = desk.feed.since(0)[0], 0.0
    n = max(0, began - _AT_FIRST)
    if _NUMBER.fullmatch(last):  # of a server that ran before, it may be higher than ours
        n = began = int(last) if int(last) <= began else 0
    yield n, {"began": n}
    while operator.alive():
        total, found = desk.feed.since(n)
        if (first := total - len(found)) > n:
            yield first, {"missed": first - n}
        for number, record in enumerate(found, first + 1):
            yield number, seen(record) | {"old": number <= began}
        n, quiet = total, 0.0 if found else quiet + _TICK_S
        if quiet >= _QUIET_S:
            quiet = 0.0
            yield None
        await asyncio.sleep(_TICK_S)
    yield n, {"ended": "the session has ended; sign in again"}


async def _lines(events: AsyncIterator[_Event | None]) -> AsyncIterator[bytes]:
    async for event in events:
        yield b": quiet\n\n" if event is None else b"id: %d\ndata: %s\n\n" % (event[0], dumped(event[1]))


def _cursor(place: tuple[float, int]) -> str:
    return json.dumps(place, separators=(",", ":"))


def _place(cursor: str | None) -> tuple[float, int] | None:
    """What `_cursor` was given. raises: ApiError"""
    if cursor is None:
        return None
    try:
        rank, record = json.loads(cursor)
        place = float(rank), int(record)
    except (TypeError, ValueError, OverflowError, RecursionError):
        place = math.nan, 0
    if not (math.isfinite(place[0]) and abs(place[1]) < 2**62):
        raise ApiError(400, "`after` is not a cursor of this queue; take `next` of the page before", param="after")
    return place
