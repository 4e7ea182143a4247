"""The admin port: a second uvicorn in the data server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from monitor.api.admin.app import KeyTable, Operations, create_admin
from monitor.api.admin.console import HOME
from monitor.api.connection import Bounds, bounded
from monitor.api.hangup import Say, reload_at_hangup
from monitor.config import Settings
from monitor.errors import ConfigInvalid

_MAX_CONNECTIONS = 64
_GRACE_S = 2


class _Second(uvicorn.Server):
    """uvicorn without signals, which are the data server's; `up` is set when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


def check_admin_key(settings: Settings, keys: KeyTable) -> None:
    """raises: ConfigInvalid if the admin key opens the data routes too"""
    if settings.admin_key is not None and (name := keys.find(settings.admin_key.encode())) is not None:
        raise ConfigInvalid(f"admin_key is the data key {name!r} too; give the admin port a key of its own")


@contextlib.asynccontextmanager
async def controlled(
    operations: Operations,
    settings: Settings,
    listener: socket.socket | None,
    counted: Callable[[str], None],
    limited: Callable[[str], None],
    say: Say,
) -> AsyncIterator[None]:
    """SIGHUP, the probes that live.json names and, with an admin key, the admin port, until the block is left.

    listener: bound, not yet listening
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, operations.aside.close)
        stack.enter_context(reload_at_hangup(operations, say))
        if operations.probes is not None:
            await stack.enter_async_context(beside(operations.probes.changes.follow()))
            await stack.enter_async_context(beside(operations.probes.keep_telling()))
            stack.push_async_callback(operations.probes.retrain.end)
        if settings.admin_key is None or listener is None:
            yield
            return
        key, host, idle_s = settings.admin_key, settings.admin_host, settings.admin_idle_s
        app = create_admin(operations, key, host, counted, idle_s=idle_s)
        async with second_port(app, listener, settings, limited):
            where, port = listener.getsockname()[:2]
            say(f"admin port on http://{where}:{port}/admin/status, console on http://{where}:{port}{HOME}")
            yield


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Work without an end, until the block is left."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def second_port(
    app: ASGIApp, listener: socket.socket, settings: Settings, limited: Callable[[str], None]
) -> AsyncIterator[None]:
    """Serve `app` on `listener` (bound, not yet listening) inside of the running loop, until the block is left.

    limited: told the name of each limit of a connection that ended one
    """
    bounds = Bounds(settings.receive_deadline_s, settings.write_deadline_s, settings.max_header_bytes, _MAX_CONNECTIONS)
    config = uvicorn.Config(
        app,
        http=bounded(bounds, limited),
        ws="none",
        lifespan="off",
        # On by default, and then X-Forwarded-For from loopback would be whose wrong keys are counted.
        proxy_headers=False,
        server_header=False,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Second(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    up = asyncio.create_task(server.up.wait())
    try:
        await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():  # else its error is raised below
            yield
    finally:
        up.cancel()
        server.should_exit = True
        await serving
