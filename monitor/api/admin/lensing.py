"""The logit lens for the console: `midstream lens` in a process of its own, one at a time, bounded in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from monitor.api.admin.aside import Aside
from monitor.api.admin.retraining import environment
from monitor.api.errors import ApiError
from monitor.config import Settings

MAX_S = 180.0
MAX_CHARACTERS = 32_000
LAST = 48
"""Tokens that are looked at: the last ones."""
_SETTINGS = ("model", "revision", "dtype", "store", "cache")
_END_OF_ERROR = 400


class Lensing:
    """settings: of the server; the process gets what names the model and its probes, and no key and no secret.

    command: what is run, the conversation on its stdin: arguments are for everybody on the machine to read
    """

    def __init__(self, settings: Settings, aside: Aside, command: Sequence[str] | None = None) -> None:
        self._command = command or (sys.executable, "-m", "monitor.cli", "lens", "-", "--json", "--last", str(LAST))
        self._environment = environment(settings, _SETTINGS)
        self._aside, self._busy = aside, False

    async def look(self, turns: Sequence[dict[str, str]]) -> dict[str, Any]:
        """What `midstream lens --json` says of a conversation, its last tokens.

        raises: ApiError 409 while another one runs, 413 for too long a text, 422 if it fails, 504 if it takes too long
        """
        if self._busy:
            raise ApiError(409, "a logit lens is at work; try again when it is done", code="busy")
        length = sum(len(turn["content"]) for turn in turns)
        if length > MAX_CHARACTERS:
            raise ApiError(413, f"the text has {length} characters, the lens takes {MAX_CHARACTERS}", code="too_long")
        self._busy = True
        try:
            return await self._run(json.dumps(list(turns)).encode())
        finally:
            self._busy = False

    async def _run(self, given: bytes) -> dict[str, Any]:
        process = self._started()
        try:
            out, err = await self._aside(process.communicate, given, MAX_S)
        except subprocess.TimeoutExpired:
            raise ApiError(504, f"the logit lens took longer than {MAX_S:g} s and was ended", code="too_slow") from None
        finally:  # also when nobody waits for it any more
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            said = err.decode(errors="replace").strip()[-_END_OF_ERROR:]
            raise ApiError(422, f"the logit lens failed: {said}", code="failed")
        found: dict[str, Any] = json.loads(out)
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command; the text is its input
            [*self._command, "--conversation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # so that it ends with all of its own
        )
