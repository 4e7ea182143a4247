"""Retention of features: what is too old goes at start and every hour, also where none are kept any more."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from monitor.errors import ConfigInvalid
from monitor.traffic.erase import DAY_S
from monitor.traffic.features.files import drop_older

SWEEP_S = 3600.0


def sweep(folder: Path, created: float) -> None:
    """`drop_older`, where nobody is there to be told of what went wrong but who reads stderr."""
    try:
        drop_older(folder, created)
    except (OSError, ConfigInvalid) as error:
        print(f"midstream: old features can't be dropped now ({error}); tried again later", file=sys.stderr)


class Retention:
    """A thread that sweeps the folder of a feature log that is off; one that is on does that itself.

    days: older ones go; clock: seconds since the epoch
    """

    def __init__(
        self, folder: Path, days: float, clock: Callable[[], float] = time.time, every_s: float = SWEEP_S
    ) -> None:
        self._folder, self._days, self._clock, self._every_s = folder, days, clock, every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="midstream-retention", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            sweep(self._folder, self._clock() - self._days * DAY_S)
            if self._closing.wait(self._every_s):
                return

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
