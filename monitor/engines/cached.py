"""A folder of the cache: it appears whole or not at all, and its manifest names what is in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def appearing(folder: Path, manifest: str, about: Mapping[str, Any]) -> Iterator[Path]:
    """Yields an empty folder to write files into; afterwards it is renamed to `folder`, with a manifest: `about`, and
    the files' hashes under `files`. Another process may be faster; then its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        yield scratch
        files = {p.name: file_sha256(p) for p in sorted(scratch.iterdir())}
        (scratch / manifest).write_text(json.dumps({**about, "files": files}, indent=1) + "\n")
        scratch.chmod(0o755)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not (folder / manifest).exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
