"""Programs from Debian's packages, for tests: downloaded by apt and unpacked into a folder, never installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

# apt would give downloads to a user of its own, which may not write here.
_APT = ("apt-get", "-q", "-o", "APT::Sandbox::User=root")


class Unavailable(Exception):
    """The programs are not on PATH, and apt can't give them; why, in a sentence."""


def unpack(
    packages: Sequence[str], into: Path, needed: bool = False, edit: Callable[[Path], None] = lambda folder: None
) -> None:
    """Only files: no installation, so no system service is started and no root is needed.

    needed: also the packages that these depend on and that are not installed; edit: changes the folder before it is
    moved to `into`
    raises: Unavailable
    """
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"no {' and no '.join(packages)} on PATH, and no {' or '.join(missing)} to get them with")
    with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
        folder = Path(scratch)
        _download(packages, folder, needed)
        for package in folder.glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
        edit(folder / "unpacked")
        with contextlib.suppress(OSError):  # another test run was first: the same files
            (folder / "unpacked").rename(into)


def _download(packages: Sequence[str], folder: Path, needed: bool) -> None:
    def fetch(apt: list[str]) -> None:
        wanted = _closure(apt, packages, folder) if needed else packages
        _run([*apt, "download", *wanted], folder)

    try:
        fetch([*_APT])
    except Unavailable:  # no list of packages yet, or an old one: a list of our own needs no root
        for part in ("lists", "cache"):
            (folder / part / "partial").mkdir(parents=True)
        own = [*_APT, "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        _run([*own, "update"], folder)
        fetch(own)


def _closure(apt: list[str], packages: Sequence[str], folder: Path) -> list[str]:
    """What installing them would install: told by apt, which does nothing."""
    said = _run([*apt, "install", "--simulate", "--no-install-recommends", *packages], folder)
    return [line.split()[1] for line in said.splitlines() if line.startswith("Inst ")]


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unavailable(f"{command[0]} has failed: {done.stderr.strip()[-500:]}")
    return done.stdout
