"""Several API processes behind one address: their metrics meet in the folder PROMETHEUS_MULTIPROC_DIR names.

prometheus_client chooses by it when it is imported: then every value lives in a file of its process.
"""

from __future__ import annotations

import math
import os
from typing import Any

from prometheus_client import Gauge, multiprocess

from monitor.errors import ConfigInvalid

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def shared_folder() -> str | None:
    """raises: ConfigInvalid if it is no folder that can be written"""
    folder = os.environ.get(_FOLDER)
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigInvalid(f"{_FOLDER} {folder!r} is not a folder that can be written; make an empty one, or unset it")
    return folder or None


def forget(gauge: Gauge) -> None:
    """Show none of its series any longer. In a shared folder none can be removed: there they become NaN."""
    if shared_folder() is None:
        gauge.clear()
        return
    for family in gauge.collect():
        for sample in family.samples:
            gauge.labels(**sample.labels).set(math.nan)


def forget_probe(metric: Any, probe: str) -> None:
    """Show none of the series with this label `probe` any longer. In a shared folder they stay until the restart."""
    if shared_folder() is None:
        metric.remove_by_labels({"probe": probe})


def leave() -> None:
    """This process ends: its gauges are no more, its counters stay."""
    if shared_folder() is not None:
        multiprocess.mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]
