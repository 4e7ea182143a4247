"""A real Chromium for tests, driven over its DevTools socket: pages, keys, pictures, and what it asked for."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from tests.debian import Unavailable, unpack

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
UNPACKED = Path(sys.prefix) / "chromium"
_WAIT_S = 30.0
_CODES = {"Escape": 27, "Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40}
_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective + " " + e.blockedURI));
"""


def find_chromium() -> Path:
    """From PATH, else from Debian's package, unpacked. raises: Unavailable"""
    # The one in usr/bin may be a script that starts /usr/lib/chromium's, where nothing was installed.
    folders = os.pathsep.join(str(UNPACKED / folder) for folder in ("usr/lib/chromium", "usr/bin"))
    if (found := _look(os.environ.get("PATH", "")) or _look(folders)) is None:
        unpack(["chromium-headless-shell"], UNPACKED, needed=True)
        found = _look(folders)
    if found is None:
        raise Unavailable(f"the package has none of {', '.join(NAMES)}")
    return found


def _look(path: str) -> Path | None:
    return next((Path(found) for name in NAMES if (found := shutil.which(name, path=path))), None)


class Page:
    """One tab. asked: every URL that it has asked for; dialogs: alerts and the like that a script has opened; said:
    errors on its console; called: what scripts have given to `window.payload`"""

    def __init__(self, socket: Any, session: str) -> None:
        self._socket, self._session, self._ids = socket, session, itertools.count(1)
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        self.said: list[str] = []
        self.called: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Runtime.addBinding", name="payload")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=_VIOLATIONS)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        call = {"id": number, "method": method, "params": parameters, "sessionId": self._session}
        self._socket.send(json.dumps(call))
        deadline = time.monotonic() + _WAIT_S
        while True:
            message = json.loads(self._socket.recv(timeout=max(0.1, deadline - time.monotonic())))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        event, values = message.get("method"), message.get("params", {})
        if event == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(values["message"])
            dismiss = {"id": next(self._ids), "method": "Page.handleJavaScriptDialog", "params": {"accept": False}}
            self._socket.send(json.dumps(dismiss | {"sessionId": self._session}))
        elif event == "Runtime.exceptionThrown":
            self.said.append(values["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.said.append(values["entry"]["text"])
        elif event == "Runtime.bindingCalled":
            self.called.append(values["payload"])

    def run(self, script: str) -> Any:
        """The value of an expression, awaited. raises: AssertionError with what it throws"""
        done = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
            allowUnsafeEvalBlockedByCSP=False,
        )
        assert "exceptionDetails" not in done, (script, done["exceptionDetails"])
        return done["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits for an expression to be true."""
        deadline = time.monotonic() + _WAIT_S
        while not (value := self.run(f"Promise.resolve({script}).then((v) => v instanceof Node || v)")):
            assert time.monotonic() < deadline, (script, self.said, self.run("document.body.innerText.slice(0, 2000)"))
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def text(self, selector: str = "body") -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector: str) -> int:
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def press(self, *keys: str) -> None:
        """Real keys, to whatever has the focus."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = _CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
            more = {"key": key, "windowsVirtualKeyCode": code, "code": key}
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **more)
            self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def hold(self, key: str, again: bool = False) -> None:
        """A key goes down and stays there; again: as the keyboard repeats it."""
        more = {"key": key, "windowsVirtualKeyCode": ord(key.upper()), "code": key, "text": key}
        self.send("Input.dispatchKeyEvent", type="keyDown", autoRepeat=again, **more)

    def write(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip

    def prefers(self, **features: str) -> None:
        """prefers(color_scheme="dark")"""
        wanted = [{"name": "prefers-" + name.replace("_", "-"), "value": v} for name, v in features.items()]
        self.send("Emulation.setEmulatedMedia", features=wanted)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def violations(self) -> list[str]:
        """Of the content security policy, since the page was opened."""
        return self.run("window.violations")


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A fresh profile in a fresh process, ended with the block. raises: Unavailable"""
    program = find_chromium()
    folders = [folder for kind in ("", "/*/") for folder in sorted(UNPACKED.glob(f"usr/lib/*-linux-gnu{kind}"))]
    libraries = ":".join([*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # As root there is no sandbox, and a container's /dev/shm is small. What it would ask home for is off, so that
        # every request in the network log is the page's.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-port=0", "--disable-background-networking", "--disable-component-update"]
        flags += ["--disable-sync", "--no-proxy-server", "--hide-scrollbars", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [str(program), *flags, "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
        )  # fmt: skip
        try:
            with connect(_address(process), max_size=None, compression=None, proxy=None) as socket:
                yield _tab(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stderr.close()


def _address(process: subprocess.Popen[str]) -> str:
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"ws://\S+", line):
            return found[0]
    raise Unavailable(f"Chromium ended: {''.join(said)[-500:]}")


def _tab(socket: Any) -> Page:
    def call(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(socket.recv(timeout=_WAIT_S))).get("id") != number:
            pass
        return message["result"]

    target = call(-1, "Target.createTarget", url="about:blank")["targetId"]
    return Page(socket, call(-2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
