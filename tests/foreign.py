"""A server that is none of ours, as a process of its own."""

import contextlib
import itertools
import os
import socket
import subprocess
import time

import httpx

# Below those that the kernel hands out for port 0, which other tests take while a program of ours has yet to bind its
# own; each process begins elsewhere.
_ports = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """Nobody's yet, and nobody's by chance: a program may bind it seconds later, and again after a restart."""
    for n in _ports:
        port = 20_000 + n % 12_000
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("count() does not end")


@contextlib.contextmanager
def foreign(command, port, folder, answers="/health", **environment):
    """Its URL, once its path `answers` is there. The command is ended afterwards."""
    log, url = folder / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            deadline = time.monotonic() + 900
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}{answers}").status_code == 200:
                        break
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(60)
