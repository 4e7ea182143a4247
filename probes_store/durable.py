"""Files and folders that are there after a power failure: live.json is, and may not name what is empty then."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Also over what is there."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """The names in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def renamed(scratch: Path, folder: Path) -> bool:
    """False if there is such a folder."""
    try:
        os.rename(scratch, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True
