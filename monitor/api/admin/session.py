"""Sessions of the console at the admin port: a cookie in place of the key, and proof that our own page sends it."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from monitor.api.errors import ApiError
from monitor.traffic.labelling import MAX_NAME

COOKIE = "midstream_session"
CONSOLE_HEADER = "x-midstream-console"
"""Only a page of our own origin can send it: another one would have to be let by CORS, of which there is none."""
NOBODY = "console"
"""Who has signed in without a name."""
MAX_SESSIONS = 32
LIFE_S = 12 * 3600.0
"""Then even one that is used has to sign in again."""
_READS = ("GET", "HEAD")
Found = Literal["admitted", "no_session", "cross_site"]


@dataclass(frozen=True, slots=True)
class Operator:
    """Who asks. name: of the session, None: the key itself; alive: whether the session still is"""

    name: str | None
    alive: Callable[[], bool]

    @property
    def actor(self) -> str:
        """As the audit log has it. A name can't be taken for another kind of actor."""
        return "admin" if self.name is None else f"admin:{self.name}"


THE_KEY = Operator(None, lambda: True)


@dataclass(slots=True)
class _Session:
    name: str
    began: float
    seen: float


class Sessions:
    """Held in memory, by the cookie's SHA-256: a restart ends them all. Only for the event loop.

    idle_s: seconds without a request after which one ends; clock: seconds
    """

    def __init__(self, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.idle_s, self._clock = idle_s, clock
        self._open: dict[bytes, _Session] = {}

    def open(self, name: str) -> str:
        """A new one's cookie. Where there are too many, the one that was used least recently ends."""
        token, now = secrets.token_urlsafe(32), self._clock()
        self._open = {digest: one for digest, one in self._open.items() if self._lives(one)}
        while len(self._open) >= MAX_SESSIONS:
            del self._open[min(self._open, key=lambda digest: self._open[digest].seen)]
        self._open[_digest(token)] = _Session(name, now, now)
        return token

    def find(self, token: str, used: bool = True) -> str | None:
        """Its name; None if it has ended. used: its idle time begins anew"""
        one = self._open.get(_digest(token))
        if one is None or not self._lives(one):
            self.close(token)
            return None
        if used:
            one.seen = self._clock()
        return one.name

    def close(self, token: str) -> None:
        self._open.pop(_digest(token), None)

    def _lives(self, one: _Session) -> bool:
        now = self._clock()
        return now - one.seen < self.idle_s and now - one.began < LIFE_S

    def __len__(self) -> int:
        return len(self._open)


def judge_session(scope: Scope, sessions: Sessions) -> tuple[Found, ApiError | None, Operator]:
    """A request without a key, by its cookie. What changes something must come from our own page."""
    token = cookie_of(scope)
    name = None if token is None else sessions.find(token)
    if token is None or name is None:
        message = "the session has ended; sign in again"
        return "no_session", ApiError(401, message, code="no_session"), THE_KEY
    if not _is_ours(scope):
        message = "this request does not come from the console's own page; send the admin key instead"
        return "cross_site", ApiError(403, message, code="cross_site"), THE_KEY
    return "admitted", None, Operator(name, lambda: sessions.find(token, used=False) is not None)


def cookie_of(scope: Scope) -> str | None:
    """The session's cookie; None without one, or with several: then two readers might take different ones."""
    pairs = [
        pair.strip().partition("=")
        for key, value in scope["headers"]
        if key == b"cookie"
        for pair in value.decode("latin-1").split(";")
    ]
    found = [value for name, _, value in pairs if name == COOKIE]
    return found[0] if len(found) == 1 else None


def _is_ours(scope: Scope) -> bool:
    """A browser says where a request comes from in Sec-Fetch-Site and, where it changes something, in Origin."""
    headers = {}
    for key, value in scope["headers"]:
        if key in headers:
            headers[key] = b""  # said twice is not said
        headers.setdefault(key, value)
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if scope["method"] in _READS:
        return site in (None, b"same-origin", b"none")  # another port of this host is the same site, but not ours
    if site is None and origin is None:
        return False
    same = origin is None or urlsplit(origin.decode("latin-1")).netloc == headers.get(b"host", b"").decode("latin-1")
    return same and site in (None, b"same-origin") and headers.get(CONSOLE_HEADER.encode()) == b"1"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


class SessionRequest(BaseModel):
    """name: how the labels of the session are signed"""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None


def operator_of(request: Request) -> Operator:
    found: Operator = request.scope["midstream.operator"]
    return found


def session_routes(app: FastAPI, sessions: Sessions) -> None:
    """Signing in and out. The guard has judged the key, or the cookie, before."""

    @app.post("/admin/session")
    async def sign_in(request: Request, body: SessionRequest) -> Response:
        if operator_of(request).name is not None:
            raise ApiError(400, "sign in with the admin key, not with a session", code="bad_value")
        name = (body.name or "").strip() or NOBODY
        if not name.isprintable():
            raise ApiError(400, "the name has characters that can't be printed", param="name", code="bad_value")
        response = _told(name, sessions)
        # The browser's own word for how it got here: behind TLS of a proxy we see plain HTTP.
        secure = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
        response.set_cookie(COOKIE, sessions.open(name), path="/admin", secure=secure, httponly=True, samesite="strict")
        return response

    @app.get("/admin/session")
    async def who(request: Request) -> Response:
        return _told(operator_of(request).name, sessions)

    @app.delete("/admin/session")
    async def sign_out(request: Request) -> Response:
        token = cookie_of(request.scope)
        if operator_of(request).name is not None and token is not None:
            sessions.close(token)
        response = _told(None, sessions)
        response.delete_cookie(COOKIE, path="/admin", httponly=True, samesite="strict")
        return response


def _told(name: str | None, sessions: Sessions) -> Response:
    return JSONResponse({"name": name, "idle_s": sessions.idle_s})
