"""In front of every admin route: the host, the key or a session, the wrong keys of a minute, and the audit row."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from typing import Literal

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.api.admin.aside import Aside
from monitor.api.admin.outcome import room_for_outcome
from monitor.api.admin.session import COOKIE, THE_KEY, Operator, Sessions, judge_session
from monitor.api.errors import ApiError
from monitor.api.peers import PerMinute, peer_name
from monitor.audit import Audit, AuditFailed

WRONG_PER_MINUTE = 5
"""Wrong keys of one peer; after one more it is not listened to until its minute is over."""
ROWS_PER_MINUTE = 5
ALL_ROWS_PER_MINUTE = 300
"""Refused requests that are written, of one peer and of all: a flood may not fill the disk. The rest is counted."""
MAX_BODY_BYTES = 2**20
Outcome = Literal[
    "admitted",
    "shell",
    "host",
    "no_key",
    "wrong_key",
    "shared_key",
    "throttled",
    "no_session",
    "cross_site",
    "audit_failed",
]
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_OUR_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", _POLICY),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class AdminGuard:
    """Plain ASGI. key: the admin key; shared: whether it opens the data routes too (then it opens nothing here)

    host: the address that the port is bound to; counted: called once for every request; clock: seconds
    sessions: of browsers that have shown the key; shell: paths of files that hold no data, which anybody may read
    aside: where the audit log is written
    """

    def __init__(
        self,
        app: ASGIApp,
        audit: Audit,
        *,
        key: str,
        shared: Callable[[], bool],
        host: str,
        counted: Callable[[Outcome], None],
        sessions: Sessions,
        aside: Aside,
        shell: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._audit, self._key, self._shared, self._counted = app, audit, key, shared, counted
        self._sessions, self._aside, self._shell = sessions, aside, shell
        self._digest = _digest(key.encode())
        self._host = host.lower()
        self._wrong = PerMinute(clock=clock)
        self._rows = PerMinute(clock=clock)
        self._all_rows = PerMinute(1, clock)
        self._unwritten = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        peer = peer_name(scope.get("client"))
        why, refusal, operator = self._judge(scope, peer)
        if why == "shell":  # not an action, and a row for whoever asks could fill the disk
            self._counted(why)
            await self._app(scope, receive, _with_headers(send))
            return
        try:
            if refusal is None:
                row = await self._write(operator.actor, peer, scope, None)
            elif self._rows.count(peer) > ROWS_PER_MINUTE or self._all_rows.count("") > ALL_ROWS_PER_MINUTE:
                self._unwritten += 1
            else:
                await self._write("unknown", peer, scope, why)
        except AuditFailed:
            why, refusal = "audit_failed", refusal or _no_audit("nothing was done")
        self._counted(why)
        if refusal is not None:
            await refusal.response()(scope, receive, _with_headers(send))
        else:
            own = {**scope, "midstream.operator": operator}
            await self._app(own, _bounded(receive), self._recorded(row, own, receive, _with_headers(send)))

    def _judge(self, scope: Scope, peer: str) -> tuple[Outcome, ApiError | None, Operator]:
        if not self._known_host(scope):
            message = "send the Host header of the admin port's own address"
            return "host", ApiError(421, message, code="wrong_host"), THE_KEY
        if scope["path"] in self._shell and scope["method"] in ("GET", "HEAD"):
            return "shell", None, THE_KEY
        has_key = any(name == b"authorization" for name, _ in scope["headers"])
        if has_key or not _has_cookie(scope):
            return *self._judge_key(scope, peer), THE_KEY
        if self._shared():
            return *_shared_key(), THE_KEY
        return judge_session(scope, self._sessions)

    def _judge_key(self, scope: Scope, peer: str) -> tuple[Outcome, ApiError | None]:
        wrong, left_s = self._wrong.so_far(peer)
        if wrong > WRONG_PER_MINUTE:
            return "throttled", _throttled(left_s)
        given = _header(scope, b"authorization")
        if given is None or given[:7].lower() != b"bearer ":
            return "no_key", _no_key("the admin key is missing; send `Authorization: Bearer ADMIN_KEY`")
        if not hmac.compare_digest(_digest(given[7:]), self._digest):
            if self._wrong.count(peer) > WRONG_PER_MINUTE:
                return "wrong_key", _throttled(self._wrong.so_far(peer)[1])
            return "wrong_key", _no_key("this is not the admin key; a key of the data routes does not count here")
        if self._shared():
            return _shared_key()
        return "admitted", None

    def _known_host(self, scope: Scope) -> bool:
        """A page that has its own name point to this address (DNS rebinding) sends its own name."""
        given = _header(scope, b"host")
        name = _host_name((given or b"").decode("latin-1").lower())
        if name in ("localhost", self._host):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or str(address) == (scope.get("server") or ("",))[0]

    async def _write(self, actor: str, peer: str, scope: Scope, refused: str | None) -> int:
        unwritten, self._unwritten = self._unwritten, 0
        path = scope["path"].replace(self._key, "[key]")
        try:
            return await self._aside(self._audit.write, actor, peer, scope["method"], path, refused, unwritten)
        except AuditFailed:
            self._unwritten += unwritten + (refused is not None)
            raise

    def _recorded(self, row: int, scope: Scope, receive: Receive, send: Send) -> Send:
        """How it ended is written before it is answered; if it can't be, that is the answer."""
        failed, said = False, room_for_outcome(scope)

        async def recorded(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                try:
                    result = " ".join([str(message["status"]), *said]).replace(self._key, "[key]")
                    await self._aside(self._audit.ended, row, result)
                except AuditFailed:
                    failed = True
                    self._counted("audit_failed")
                    await _no_audit("it was done, how it ended is not on record").response()(scope, receive, send)
            if not failed:
                await send(message)

        return recorded


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less")
        return message

    return counted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of equal length, so that comparing says nothing about the key's


def _header(scope: Scope, name: bytes) -> bytes | None:
    """None if it is missing, or there more than once: then two readers might take different ones."""
    found: list[bytes] = [v for k, v in scope["headers"] if k == name]
    return found[0] if len(found) == 1 else None


def _host_name(host: str) -> str:
    """Without the port: a tunnel to us has another one."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        return name if bracket and (not port or port[0] == ":") else ""
    return host.partition(":")[0]


def _no_key(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_admin_key", headers={"WWW-Authenticate": "Bearer"})


def _shared_key() -> tuple[Outcome, ApiError]:
    return "shared_key", _no_key("this key opens the data routes too; give the admin port a key of its own")


def _has_cookie(scope: Scope) -> bool:
    return any(key == b"cookie" and COOKIE.encode() in value for key, value in scope["headers"])


def _throttled(left_s: float) -> ApiError:
    message = f"more than {WRONG_PER_MINUTE} wrong keys within a minute; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="too_many_wrong_keys", retry_after_s=left_s)


def _no_audit(what: str) -> ApiError:
    message = f"the audit log can't be written, {what}; repair the file that MIDSTREAM_AUDIT names"
    return ApiError(503, message, kind="server_error", code="audit_failed")


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_OUR_HEADERS]
        await send(message)

    return with_headers
