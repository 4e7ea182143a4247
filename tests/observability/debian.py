"""Prometheus and Alertmanager for tests: found on PATH or unpacked from Debian's packages, run on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.debian import Unavailable, unpack
from tests.foreign import free_port

PACKAGES = ("prometheus", "prometheus-alertmanager")
NAMES = {  # Debian calls the one that would be taken otherwise by its package
    "prometheus": ("prometheus",),
    "promtool": ("promtool",),
    "alertmanager": ("alertmanager", "prometheus-alertmanager"),
    "amtool": ("amtool",),
}
UNPACKED = Path(sys.prefix) / "debian"
# Where Debian's Alertmanager has its templates, and the same place seen from /: as long, so it can be written into it.
TEMPLATES, RELATIVE = b"/usr/share/prometheus/alertmanager", b"usr//share/prometheus/alertmanager"


@dataclass(frozen=True, slots=True)
class Tools:
    prometheus: Path
    promtool: Path
    alertmanager: Path
    amtool: Path


def find_tools() -> Tools:
    """From PATH, else from the packages unpacked before, else from apt. raises: Unavailable"""
    found = _look(os.environ.get("PATH", "")) or _look(str(UNPACKED / "usr/bin"))
    if found is None:
        unpack(PACKAGES, UNPACKED, edit=_from_everywhere)
        found = _look(str(UNPACKED / "usr/bin"))
    if found is None:
        raise Unavailable(f"the packages {', '.join(PACKAGES)} lack one of {', '.join(NAMES)}")
    return found


def _look(path: str) -> Tools | None:
    found = {}
    for tool, names in NAMES.items():
        where = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
        if where is None:
            return None
        found[tool] = Path(where)
    return Tools(**found)


def _from_everywhere(folder: Path) -> None:
    program = folder / "usr/bin/prometheus-alertmanager"
    program.write_bytes(program.read_bytes().replace(TEMPLATES, RELATIVE))


@contextlib.contextmanager
def running(command: list[str], ready: str, log: Path, timeout_s: float = 60) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose URL `ready` answers 200; ended when the block is left. command: with absolute paths

    raises: AssertionError with the end of its log if it ends or hangs before
    """
    with log.open("wb") as out:
        root = UNPACKED if UNPACKED.is_dir() else None
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + timeout_s
        while not _answers(ready):
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, f"{command[0]} did not come up: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def prometheus(tools: Tools, config: Path, folder: Path) -> Iterator[str]:
    """Its URL; a POST to /-/reload makes it read its files again. config: a prometheus.yml; folder: scratch"""
    port = free_port()
    command = [
        str(tools.prometheus),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--web.enable-lifecycle",
        "--log.level=warn",
    ]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/-/ready", folder / "prometheus.log"):
        yield url


@contextlib.contextmanager
def alertmanager(tools: Tools, config: Path, folder: Path) -> Iterator[str]:
    """Its URL. config: an alertmanager.yml; folder: scratch"""
    port = free_port()
    command = [
        str(tools.alertmanager),
        f"--config.file={config}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",  # alone: no gossip, no port of its own
        "--log.level=warn",
    ]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/-/ready", folder / "alertmanager.log"):
        yield url
