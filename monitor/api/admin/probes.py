"""The admin routes of probes: what there is, promote, roll back, try in shadow, and retrain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from monitor.api.admin.aside import Aside
from monitor.api.admin.outcome import did
from monitor.api.admin.plain import json_response
from monitor.api.errors import ApiError
from monitor.errors import MidstreamError, Overloaded
from probes_store.promote import Choice

TELL_S = 30.0
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^v[0-9]{1,6}$")]


class Changes(Protocol):
    """See `Swap`. Each raises a MidstreamError where it can't be done, and then nothing has changed."""

    async def follow(self) -> None: ...

    async def promote(self, probe: str, version: str, fewer: bool = False, instead_of: str | None = None) -> Choice: ...

    async def rollback(self, probe: str, to: str | None = None, instead_of: str | None = None) -> Choice: ...

    async def shadow(self, probe: str, version: str | None, instead_of: str | None = None) -> Choice: ...


class Retrainer(Protocol):
    """See `Retraining`."""

    async def start(self, probe: str) -> Mapping[str, Any] | None: ...

    def describe(self) -> Mapping[str, Any]: ...

    async def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ProbeOperations:
    """shelf: what the store holds, as the route tells it; tell: to the metrics, now and then (both read files)"""

    changes: Changes
    shelf: Callable[[], Mapping[str, Any]]
    retrain: Retrainer
    tell: Callable[[], None] = lambda: None
    aside: Aside = field(default_factory=Aside)

    async def keep_telling(self) -> None:
        """Until it is cancelled."""
        while True:
            with contextlib.suppress(MidstreamError):  # a damaged live.json is told of where it is followed
                await self.aside(self.tell)
            await asyncio.sleep(TELL_S)


class _Seen(BaseModel):
    """instead_of: the live version that the operator has seen; where another one is live by now, nothing is changed"""

    model_config = ConfigDict(extra="forbid", strict=True)

    instead_of: Version | None = None


class PromoteRequest(_Seen):
    version: Version
    fewer_phases: bool = False
    """It may only shadow what it is not calibrated for and the one before is."""


class RollbackRequest(_Seen):
    """to: the version to go back to; None: whichever it is"""

    to: Version | None = None


class ShadowRequest(_Seen):
    version: Version | None


class RetrainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    probe: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


def probe_routes(app: FastAPI, operations: ProbeOperations) -> None:
    changes, retrain = operations.changes, operations.retrain

    @app.get("/admin/probes")
    async def probes() -> Response:
        return await operations.aside(lambda: json_response(operations.shelf()))

    @app.post("/admin/probes/{name}/promote")
    async def promote(request: Request, name: Name, body: PromoteRequest) -> Response:
        did(request, f"promote {body.version}")
        return _live(
            request, "promoted", await _done(changes.promote(name, body.version, body.fewer_phases, body.instead_of))
        )

    @app.post("/admin/probes/{name}/rollback")
    async def rollback(request: Request, name: Name, body: RollbackRequest) -> Response:
        did(request, f"roll back to {body.to or 'the version before'}")
        return _live(request, "rolled back to", await _done(changes.rollback(name, body.to, body.instead_of)))

    @app.post("/admin/probes/{name}/shadow")
    async def shadow(request: Request, name: Name, body: ShadowRequest) -> Response:
        did(request, f"shadow {body.version or 'none'}")
        choice = await _done(changes.shadow(name, body.version, body.instead_of))
        if choice.stopped is not None:
            did(request, f"shadow {body.version or 'none'}, {choice.stopped} is stopped")
        return JSONResponse({"probe": choice.probe, "candidate": choice.candidate})

    @app.post("/admin/retrain")
    async def retrained(request: Request, body: RetrainRequest) -> Response:
        did(request, f"retrain {body.probe}")
        started = await retrain.start(body.probe)
        if started is None:
            raise ApiError(409, "a training runs already; wait for its end: GET /admin/retrain", code="running")
        return JSONResponse(dict(started), 202)

    @app.get("/admin/retrain")
    async def state() -> Response:
        return JSONResponse(dict(retrain.describe()))


def _live(request: Request, verb: str, choice: Choice) -> Response:
    did(request, f"{verb} {choice.live}" + (f", {choice.previous} is kept" if choice.previous else ""))
    return JSONResponse({"probe": choice.probe, "live": choice.live, "previous": choice.previous})


async def _done(act: Awaitable[Choice]) -> Choice:
    """raises: ApiError 422 for what the store or the engine refuses"""
    try:
        return await act
    except Overloaded:
        raise
    except MidstreamError as error:  # no such version, damaged, of another model
        raise ApiError(422, str(error), code="refused") from error
