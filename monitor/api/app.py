"""The FastAPI application: routes, the key, errors in one shape, health and metrics."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor import __version__
from monitor.api.errors import ApiError, validation
from monitor.api.openai import Service, openai_routes
from monitor.metrics import Metrics

ID_HEADER = b"x-midstream-request-id"
_MAX_ECHO = 128


def create_app(service: Service, metrics: Metrics, ready: Callable[[], str | None]) -> ASGIApp:
    """ready: None when the server is, else why not."""
    app = FastAPI(title="midstream", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(openai_routes(service))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/ready")
    async def readiness() -> Response:
        reason = ready()
        metrics.ready.set(reason is None)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"} | dict(service.engine.describe()))

    @app.get("/metrics")
    async def exposition() -> Response:
        metrics.ready.set(ready() is None)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def refuse(error: ApiError) -> JSONResponse:
        metrics.rejected.labels(str(error.status)).inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(validation(error.errors()))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # A bug of ours; starlette logs its traceback. The client gets the shape it can read, and no details.
        return refuse(ApiError(500, "internal error; the server's log says more", kind="server_error"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        hint = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return refuse(ApiError(error.status_code, hint, code="not_found" if error.status_code == 404 else None))

    return Front(app, service.settings.api_key, service.settings.max_body_bytes)


class Front:
    """In front of every route: the key for /v1, and the client's own request id echoed. Plain ASGI: streams pass."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self.app = app
        self._max_body = max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        send = _identified(scope, send)
        if not self._admitted(scope["path"], headers):
            error = ApiError(401, "wrong or missing API key; send `Authorization: Bearer KEY`", code="invalid_api_key")
            await error.response()(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            await self._too_large().response()(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), _echo(headers.get(b"x-request-id"), send))

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body} bytes; send less", code="body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what arrives: a chunked body announces no length."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise HTTPException(413, str(self._too_large()))
            return message

        return counted

    def _admitted(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in ("/health", "/ready", "/metrics"):
            return True
        given = headers.get(b"authorization", b"")
        return given[:7].lower() == b"bearer " and secrets.compare_digest(given[7:], self._key)


def own_id(scope: Scope) -> str:
    """Our random id of a request: the key of its records. One is made where nobody has."""
    state = scope.setdefault("state", {})
    identity: str = state.setdefault("midstream_id", secrets.token_hex(16))
    return identity


def _identified(scope: Scope, send: Send) -> Send:
    """Our id on every answer, whoever gives it."""
    identity = own_id(scope).encode()

    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start" and ID_HEADER not in dict(message["headers"]):
            message["headers"] = [*message["headers"], (ID_HEADER, identity)]
        await send(message)

    return with_id


def _echo(client_id: bytes | None, send: Send) -> Send:
    if (
        client_id is None
        or len(client_id) > _MAX_ECHO
        or not client_id.isascii()
        or not client_id.decode().isprintable()
    ):
        return send

    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", client_id)]
        await send(message)

    return with_id
