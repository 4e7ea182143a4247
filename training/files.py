"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """A reader, or a run that goes on after a crash, finds the old bytes or the new ones, never a part.

    One writer at a time: two would share the scratch file, whose name is fixed so that killed runs leave one at most.
    """
    scratch = path.with_name(f"{path.name}.part")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
