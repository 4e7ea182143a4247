"""The admin application: what an operator may see and do, on a port of its own, behind its own key."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Path
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from monitor import __version__
from monitor.api.admin.aside import Aside
from monitor.api.admin.console import PATHS, console_routes
from monitor.api.admin.desk import Desk
from monitor.api.admin.guard import AdminGuard
from monitor.api.admin.keeping import keeping_routes
from monitor.api.admin.plain import dumped, json_response
from monitor.api.admin.probes import ProbeOperations, probe_routes
from monitor.api.admin.review import review_routes
from monitor.api.admin.session import Sessions, session_routes
from monitor.api.errors import ApiError, from_domain, unavailable, validation
from monitor.api.events import EventStream
from monitor.audit import Audit
from monitor.errors import ConfigInvalid, MidstreamError, Overloaded, RequestInvalid
from monitor.offenders import Offenders

MAX_TRACES = 4
"""Scored requests at once."""

KeyName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Policies(Protocol):
    def reload(self) -> str:
        """The name of the policy that is now in force. raises: ConfigInvalid, and the old one stays"""
        ...

    def describe(self) -> Mapping[str, Any]: ...


class KeyTable(Protocol):
    @property
    def names(self) -> Sequence[str]: ...

    def reload(self) -> int:
        """How many keys count now. raises: ConfigInvalid, and the old ones stay"""
        ...

    def find(self, given: bytes) -> str | None: ...


class Tracer(Protocol):
    def trace(
        self, request_id: str, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """{position, token, phase, scores: {probe: logit}} for each token as it is judged, then one {verdict, finish,
        readings}; closing it stops the work. raises: RequestInvalid, Overloaded"""
        ...


@dataclass(frozen=True, slots=True)
class Operations:
    """What the routes do. engine: what serves; records: of one request id, by choice; erase: the records of a key's
    name or of a request id, and how many there were; probes: versions and retraining; desk: what the console reviews.
    None: there are no such routes. aside: where what is slow is done; whoever serves closes it"""

    engine: Callable[[], Mapping[str, Any]]
    policies: Policies
    keys: KeyTable
    records: Callable[[str], list[dict[str, Any]]]
    audit: Audit
    offenders: Offenders
    tracer: Tracer
    erase: Callable[[str | None, str | None], int] | None = None
    probes: ProbeOperations | None = None
    desk: Desk | None = None
    aside: Aside = field(default_factory=Aside)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


class ScoresRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[_Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0


def create_admin(
    operations: Operations,
    key: str,
    host: str,
    counted: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    idle_s: float = 1800.0,
) -> ASGIApp:
    """key: the admin key; host: the address that the port is bound to; counted: told each request's outcome

    clock: seconds, of the minutes of wrong keys and of sessions; idle_s: after which an unused session ends
    """
    app = FastAPI(title="midstream admin", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    _reading(app, operations)
    _changing(app, operations)
    keeping_routes(app, operations.records, operations.audit, operations.erase, operations.aside)
    _scoring(app, operations.tracer)
    if operations.probes is not None:
        probe_routes(app, operations.probes)
    sessions = Sessions(idle_s, clock)
    session_routes(app, sessions)
    if operations.desk is not None:
        review_routes(app, operations.desk, operations.aside)
    console_routes(app)
    _errors(app)
    return AdminGuard(
        app,
        operations.audit,
        key=key,
        shared=lambda: operations.keys.find(key.encode()) is not None,
        host=host,
        counted=counted,
        sessions=sessions,
        aside=operations.aside,
        shell=PATHS,
        clock=clock,
    )


def _reading(app: FastAPI, operations: Operations) -> None:
    @app.get("/admin/status")
    async def status() -> Response:
        engine, policy = operations.engine(), operations.policies.describe()
        return json_response({"version": __version__, "engine": engine, "policy": policy})

    @app.get("/admin/policy")
    async def policy() -> Response:
        return json_response(operations.policies.describe())

    @app.get("/admin/keys")
    async def keys() -> Response:
        return json_response({"keys": list(operations.keys.names)})

    @app.get("/admin/offenders")
    async def offenders() -> Response:
        return json_response({"offenders": operations.offenders.describe()})


def _changing(app: FastAPI, operations: Operations) -> None:
    # Reloads stay on the event loop, as at SIGHUP: two of them never run at once.
    @app.post("/admin/policy/reload")
    async def reload_policy() -> Response:
        return json_response({"policy": operations.policies.reload()})

    @app.post("/admin/keys/reload")
    async def reload_keys() -> Response:
        operations.keys.reload()
        return json_response({"keys": list(operations.keys.names)})

    @app.post("/admin/offenders/{key}/clear")
    async def clear(key: KeyName) -> Response:
        if not operations.offenders.clear(key):
            raise ApiError(404, f"key {key!r} has no flags or blocks in the window", code="not_found")
        return json_response({"cleared": key})


def _scoring(app: FastAPI, tracer: Tracer) -> None:
    running: set[str] = set()

    @app.post("/admin/scores")
    async def scores(body: ScoresRequest) -> Response:
        if len(running) >= MAX_TRACES:
            raise ApiError(429, f"{MAX_TRACES} requests are being scored already; try again", code="queue_full")
        request_id = secrets.token_hex(16)
        messages = [m.model_dump() for m in body.messages]
        running.add(request_id)
        events = tracer.trace(request_id, messages, body.max_tokens, body.temperature)
        try:
            first = await anext(events)  # what can't be served is a status, not an event
        except BaseException:
            running.discard(request_id)
            raise
        headers = {"x-midstream-request-id": request_id}
        return EventStream(_lines(first, events), events, headers, lambda: running.discard(request_id))


async def _lines(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        yield b"data: " + dumped(first) + b"\n\n"
        async for event in rest:
            yield b"data: " + dumped(event) + b"\n\n"
    except (RequestInvalid, Overloaded) as error:
        yield b"data: " + dumped({"error": from_domain(error).error}) + b"\n\n"


def _errors(app: FastAPI) -> None:
    async def own(_: Request, error: Any) -> JSONResponse:
        answer: ApiError = error
        return answer.response()

    async def domain(_: Request, error: Any) -> JSONResponse:
        if isinstance(error, RequestInvalid | Overloaded):
            return from_domain(error).response()
        if isinstance(error, ConfigInvalid):  # a file that was not taken; what was in force still is
            return ApiError(422, str(error), code="refused").response()
        return unavailable(str(error)).response()

    async def invalid(_: Request, error: Any) -> JSONResponse:
        return validation(error.errors()).response()

    async def http(request: Request, error: Any) -> JSONResponse:
        status: int = error.status_code
        hint = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return ApiError(status, hint, code={404: "not_found", 405: "wrong_method"}.get(status)).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "internal error; the server's log says more", kind="server_error").response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(MidstreamError, domain)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
