"""Training as a process of its own, started by an operator: its state, its newest lines; it ends with the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from monitor.api.admin.aside import Aside
from monitor.config import PREFIX, Settings
from monitor.errors import MidstreamError

LINES, MAX_LINE = 50, 500
"""Newest lines that are kept, and characters of each."""
_CHUNK = 4096
_GRACE_S = 5.0
_NICE = 10
State = Literal["idle", "running", "done", "failed"]
_ENDED_WELL = (0, 10, 11, 12)
"""Exit codes of `midstream gate`: it was trained and judged, whatever the verdict."""


_HANDED_ON = (
    "model",
    "revision",
    "dtype",
    "threads",
    "store",
    "cache",
    "audit",
    "records",
    "log_url",
    "log_text",
    "log_key",
    "features",
    "target_fpr",
    "retrain_tenant_share",
    "retrain_frozen",
)


def environment(settings: Settings, names: Sequence[str] = _HANDED_ON) -> dict[str, str]:
    """Of a process of ours: the server's own, with these settings as it was told them. A key is in no argument."""
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith(PREFIX)}
    told = {name: getattr(settings, name) for name in names}
    told |= {name: json.dumps(value) for name, value in told.items() if isinstance(value, tuple)}
    ours = {PREFIX + k.upper(): str(v) for k, v in told.items() if v is not None}
    return own | ours | {"COLUMNS": "120"}


def command(probe: str) -> list[str]:
    return [sys.executable, "-m", "monitor.cli", "retrain", "--probe", probe, "--nice", str(_NICE)]


class Retraining:
    """One training at a time. Lives in one event loop.

    newest: the newest version of a probe in the store; environment: of the process; before: what must be done first,
    off the loop (raises: MidstreamError); command: for a probe's name
    clock: seconds since the epoch
    """

    def __init__(
        self,
        newest: Callable[[str], str | None],
        environment: Mapping[str, str],
        aside: Aside,
        before: Callable[[], None] = lambda: None,
        command: Callable[[str], Sequence[str]] = command,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._newest, self._environment, self._command, self._clock = newest, environment, command, clock
        self._first, self._aside = before, aside
        self._before: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        self._state: State = "idle"
        self._probe: str | None = None
        self._started: float | None = None
        self._ended: float | None = None
        self._exit_code: int | None = None
        self._new: str | None = None

    async def start(self, probe: str) -> Mapping[str, Any] | None:
        """What `describe` says; None if one runs already."""
        if self._state == "running":
            return None
        self._state, self._probe, self._started = "running", probe, self._clock()
        self._ended = self._exit_code = self._new = None
        self._lines.clear()
        self._before = self._newest(probe)
        try:
            await self._aside(self._first)
            self._process = await asyncio.create_subprocess_exec(
                *self._command(probe),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except (OSError, MidstreamError) as error:
            self._lines.append(f"it could not be started: {error}")
            self._finish(None)
            return self.describe()
        self._reading = asyncio.create_task(self._read(self._process))
        return self.describe()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        out, rest = process.stdout, ""
        while out is not None and (chunk := await out.read(_CHUNK)):
            # A progress bar draws itself again with a carriage return: of a line that is still drawn the end counts.
            *lines, rest = (rest + chunk.decode(errors="replace")).replace("\r\n", "\n").split("\n")
            for line in lines:
                self._keep(line)
            rest = rest.rpartition("\r")[2][-_CHUNK:]
        self._keep(rest)
        self._finish(await process.wait())

    def _keep(self, line: str) -> None:
        shown = "".join(c for c in line.rpartition("\r")[2] if c.isprintable()).rstrip()[:MAX_LINE]
        if shown:
            self._lines.append(shown)

    def _finish(self, code: int | None) -> None:
        self._exit_code, self._ended = code, self._clock()
        self._state = "done" if code in _ENDED_WELL else "failed"
        if self._probe is not None:
            newest = self._newest(self._probe)
            self._new = newest if newest != self._before else None

    def describe(self) -> Mapping[str, Any]:
        return {
            "state": self._state,
            "probe": self._probe,
            "started": self._started,
            "ended": self._ended,
            "exit_code": self._exit_code,
            "lines": list(self._lines),
            "candidate": self._new,
        }

    async def end(self) -> None:
        """With the server: the training and what it started."""
        process, reading = self._process, self._reading
        if process is None or reading is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            done, _ = await asyncio.wait({reading}, timeout=_GRACE_S)
            if done:
                return
