"""In front of every route: our request id, the caller's key, and the client's own request id echoed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from itertools import islice

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.api.errors import ApiError
from monitor.keys import Keys

ID_HEADER = b"x-midstream-request-id"
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Need no key, and are answered however busy the server is."""
_SECRET = (b"authorization", b"x-api-key", b"proxy-authorization", b"cookie")
_MAX_ECHO = 128
_PIECE = 32 * 2**10


class Front:
    """Plain ASGI: streams pass. rejected: told the status of each refusal"""

    def __init__(self, app: ASGIApp, keys: Keys, rejected: Callable[[int], None]) -> None:
        self.app = app
        self._keys, self._rejected = keys, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # no route of ours is a WebSocket, and none may appear unguarded
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _identified(scope, _in_pieces(send))
        headers = scope["headers"]
        name = "" if scope["path"] in OPEN_PATHS else self._admitted(headers)
        if name is None:
            message = "wrong or missing API key; send `Authorization: Bearer KEY`"
            error = ApiError(
                401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="midstream"'}
            )
            self._rejected(401)
            await shaped(error, scope["path"])(scope, receive, send)
            return
        scope["state"]["midstream_key"] = name
        client_id = dict(headers).get(b"x-request-id")
        # Whatever logs headers further in finds no key there.
        inner = {**scope, "headers": [(k, v) for k, v in headers if k not in _SECRET]}
        await self.app(inner, receive, _echo(client_id, send))

    def _admitted(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        """The name of the key, "" if none is needed, None: go away."""
        if not self._keys.required:
            return ""
        # Two, one for each client: a thousand given keys against a thousand known ones would take half a second.
        found = (self._keys.find(key) for key in islice(_given(headers), 2))
        return next((name for name in found if name is not None), None)


def _given(headers: list[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()
        elif name == b"x-api-key":  # Anthropic's client
            yield value


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def shaped(error: ApiError, path: str) -> JSONResponse:
    """The error as the client library of the route reads it."""
    if path != "/v1/messages" and not path.startswith("/v1/messages/"):
        return error.response()
    kind = _ANTHROPIC.get(error.status, "api_error")
    content = {"type": "error", "error": {"type": kind, "message": error.error["message"]}}
    return JSONResponse(content, error.status, error.headers)


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


def _in_pieces(send: Send) -> Send:
    """A long answer bit by bit: the server's buffer of a connection then holds one piece and not all of it."""

    async def in_pieces(message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= _PIECE:
            await send(message)
            return
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            more = start + _PIECE < len(body) or message.get("more_body", False)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    return in_pieces


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
