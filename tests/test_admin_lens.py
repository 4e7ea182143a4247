"""The lens of the console: a process of its own that reads the conversation alone, one at a time."""

import http.client
import sys
import threading
import time

import pytest

from monitor.api.admin.aside import Aside
from monitor.api.admin.lensing import Lensing
from monitor.config import load_settings

from .admin_port import BEARER
from .console_port import ConsolePort

SCRIPT = """
import json, os, sys, time
given = json.loads(sys.stdin.read())
if given[0]["content"] == "slow": time.sleep(600)
if given[0]["content"] == "bad": sys.exit("midstream: no such model")
ours = {k: v for k, v in os.environ.items() if k.startswith("MIDSTREAM_")}
print(json.dumps({"given": given, "ours": ours, "arguments": sys.argv[1:]}))
"""


@pytest.fixture
def lensed(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDSTREAM_LOG_KEY", "a secret of the server")
    settings = load_settings(model="some/model", store=tmp_path, admin_key="k" * 20)
    one = ConsolePort(tmp_path, lens=Lensing(settings, Aside(), (sys.executable, "-c", SCRIPT)))
    for text in ("hello", "slow", "bad", "long"):
        one.say(text, text if text != "long" else "x" * 40_000, "an answer")
    one.written()
    yield one
    one.stop()


def test_the_lens_reads_the_conversation_from_its_input_alone(lensed, tmp_path):
    status, body, _ = lensed.ask("POST", "/admin/lens", BEARER, {"id": "hello"})
    assert (status, body["arguments"]) == (200, ["--conversation"])
    assert body["given"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "an answer"}]
    assert {k: body["ours"][k] for k in ("MIDSTREAM_MODEL", "MIDSTREAM_STORE")} == {
        "MIDSTREAM_MODEL": "some/model", "MIDSTREAM_STORE": str(tmp_path),
    }  # fmt: skip
    assert set(body["ours"]) <= {f"MIDSTREAM_{n}" for n in ("MODEL", "STORE", "CACHE", "REVISION", "DTYPE")}


def test_what_the_lens_can_not_do_is_said(lensed):
    for name, status, says in (
        ("bad", 422, "no such model"),
        ("long", 413, "the lens takes"),
        ("nobody", 422, "no text"),
    ):
        got, body, _ = lensed.ask("POST", "/admin/lens", BEARER, {"id": name})
        assert (got, says in body["error"]["message"]) == (status, True)


def test_one_lens_at_a_time_and_it_ends_with_the_server(tmp_path):
    one = ConsolePort(tmp_path, lens=Lensing(load_settings(), Aside(), (sys.executable, "-c", SCRIPT)))
    for text in ("hello", "slow"):
        one.say(text, text)
    one.written()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(_tried(one)))
    waiting.start()
    deadline = time.monotonic() + 20
    while (status := one.status("POST", "/admin/lens", BEARER, {"id": "hello"})) != 409:
        assert time.monotonic() < deadline and status == 200
    one.stop()
    waiting.join(20)
    assert not waiting.is_alive() and answers != [200]


def _tried(port):
    """Until it is its turn; then it hangs."""
    try:
        while (status := port.status("POST", "/admin/lens", BEARER, {"id": "slow"})) == 409:
            pass
        return status
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
