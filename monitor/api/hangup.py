"""SIGHUP: the policy and the keys are read again, as by an admin call; also if it came while the model was loaded."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from monitor.api.admin.app import Operations
from monitor.audit import Audit, AuditFailed
from monitor.errors import MidstreamError

Say = Callable[[str], None]
_early = threading.Event()


def remember_hangups() -> None:
    """From now on SIGHUP does not end the process; `reload_at_hangup` makes good for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda number, frame: _early.set())


@contextlib.contextmanager
def reload_at_hangup(operations: Operations, say: Say) -> Iterator[None]:
    """SIGHUP reads the policy and the keys again. Outside of the main thread there are no signals: nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    reloading: set[asyncio.Task[None]] = set()

    def hangup() -> None:
        task = loop.create_task(reload_all(operations, say))
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, hangup)
    if _early.is_set():
        _early.clear()
        hangup()
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        remember_hangups()  # one that comes while the server stops does not end it halfway


async def reload_all(operations: Operations, say: Say) -> None:
    """Policy and keys, each an audit row by actor `signal`; a file that is refused changes nothing, and whatever
    becomes of the one, the other is read."""

    def keys() -> str:
        return f"{operations.keys.reload()} keys"

    for what, act in (("policy", operations.policies.reload), ("keys", keys)):
        say(f"SIGHUP: {what}: {await _audited(operations.audit, what, act)}")


async def _audited(audit: Audit, what: str, act: Callable[[], str]) -> str:
    try:
        row = await asyncio.to_thread(audit.write, "signal", "", "SIGHUP", what)
        try:
            result = act()
        except MidstreamError as error:
            result = f"refused, the old one stays: {error}"
        except Exception as error:  # a fault of ours: the next file is read all the same
            result = f"failed: {type(error).__name__}: {error}"
        await asyncio.to_thread(audit.ended, row, result)
    except AuditFailed as error:
        return str(error)
    return result
