"""The review console: the page and its files, which hold no data. Read once, and served from memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

HOME = "/admin/console"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Path -> bytes and media type."""
    found = {}
    for file in files(__name__).iterdir():
        kind = _TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            found[f"{HOME}/{file.name}"] = file.read_bytes(), kind
    found[HOME] = found[f"{HOME}/"] = found.pop(f"{HOME}/index.html")
    return found


_FILES = _read()
PATHS = frozenset(_FILES)
"""That are answered without a key."""


def console_routes(app: FastAPI) -> None:
    for path, (content, kind) in _FILES.items():
        app.add_api_route(path, _file(content, kind), methods=["GET", "HEAD"], include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=kind)

    return file
