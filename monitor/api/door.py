"""What a server opens before its model is loaded: its sockets, and the admin port with its audit log."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from monitor.api.admin.control import Serving, operations
from monitor.api.admin.port import check_admin_key, controlled
from monitor.api.edge import Edge
from monitor.api.features import eraser
from monitor.api.hangup import Say
from monitor.api.sinks import Sinks
from monitor.audit import Audit
from monitor.errors import ConfigInvalid

_BACKLOG = 2048
"""uvicorn's."""


def open_socket(host: str, port: int, instead: str = "--port or --host") -> socket.socket:
    """Bind before the model is loaded: a taken port is known in a moment. raises: ConfigInvalid"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigInvalid(f"can't listen on {host}:{port}: {error.strerror}; choose another {instead}") from error
    return listener


def listening(bound: socket.socket) -> tuple[str, int]:
    """Who reads `ready` may connect: until the server takes them, connections wait. Returns host and port."""
    bound.listen(_BACKLOG)
    host, port = bound.getsockname()[:2]
    return host, port


@dataclass(frozen=True, slots=True)
class Door:
    """What the admin port needs before the model is loaded. listener: bound; None without an admin key"""

    edge: Edge
    listener: socket.socket | None
    audit: Audit

    def beside(self, serving: Serving, sinks: Sinks, say: Say) -> contextlib.AbstractAsyncContextManager[None]:
        """The admin port and SIGHUP, to be entered in the event loop of the data server."""
        settings, metrics = self.edge.settings, sinks.metrics
        erase = eraser(settings, sinks.traffic, sinks.features)
        what = operations(
            serving,
            settings,
            self.edge.keys,
            self.audit,
            sinks.offenders,
            metrics,
            erase,
            say=say,
            feed=sinks.feed,
            features=sinks.features,
        )

        def counted(outcome: str) -> None:
            metrics.admin_requests.labels(outcome).inc()

        return controlled(what, settings, self.listener, counted, self.edge.limited, say)


@contextlib.contextmanager
def admin_door(edge: Edge) -> Iterator[Door]:
    """raises: ConfigInvalid for an admin key that is a data key, a taken port, an audit log that can't be written"""
    settings = edge.settings
    check_admin_key(settings, edge.keys)
    with contextlib.ExitStack() as stack:
        listener = None
        if settings.admin_key is not None:
            where = settings.admin_host, settings.admin_port
            listener = stack.enter_context(open_socket(*where, "MIDSTREAM_ADMIN_PORT or MIDSTREAM_ADMIN_HOST"))
        yield Door(edge, listener, stack.enter_context(contextlib.closing(Audit(settings.audit))))


def plainly(console: Console) -> Say:
    """Lines as they are: what comes out of a file may look like markup."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
