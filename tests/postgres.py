"""A PostgreSQL server for tests: the machine's own programs, a folder of its own, a socket on loopback."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .foreign import free_port

USER = "midstream"


class Unavailable(Exception):
    """There are no programs of PostgreSQL's; why, in a sentence."""


def programs() -> Path:
    """The folder of initdb and postgres: on PATH, or where Debian puts them. raises: Unavailable"""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise Unavailable("no initdb and postgres on PATH or in /usr/lib/postgresql; apt-get install postgresql")


class Postgres:
    """start, stop and kill as the test likes; `url` stays the same."""

    def __init__(self, folder: Path) -> None:
        self._programs, self._folder, self.port = programs(), folder, free_port()
        self.url = f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL does not run as root.
        self._who = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._who is not None:
            os.chown(folder, self._who.pw_uid, self._who.pw_gid)
        made = self._call("initdb", "-D", str(folder / "data"), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8")
        assert made.wait(120) == 0, (folder / "log").read_text()

    def _call(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        extra = {} if self._who is None else {"user": self._who.pw_uid, "group": self._who.pw_gid, "extra_groups": []}
        with (self._folder / "log").open("ab") as out:
            return subprocess.Popen(
                [str(self._programs / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self._folder,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                **extra,  # type: ignore[arg-type]
            )

    def start(self) -> None:
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
        self._process = self._call("postgres", "-D", str(self._folder / "data"), *where)
        ask = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-d", "postgres"]
        deadline = time.monotonic() + 60
        while subprocess.run(ask, check=False).returncode:
            alive = self._process.poll() is None and time.monotonic() < deadline
            assert alive, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: connections are cut, and what was not committed is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """raises: Unavailable"""
    programs()
    with tempfile.TemporaryDirectory(prefix="midstream-pg") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
