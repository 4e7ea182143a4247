"""SIGHUP: policy and keys are read again, on record, however early it comes; and the same in a process of its own."""

import asyncio
import json
import os
import re
import signal
import threading
import time

import httpx
import pytest

from monitor.api import hangup
from monitor.api.hangup import reload_all, reload_at_hangup, remember_hangups
from monitor.errors import ConfigInvalid

from .admin_port import BEARER, DATA_KEY, KEY, port  # noqa: F401
from .both_ports import HARMFUL, policy, server_settings
from .test_demo import Process


@pytest.fixture
def hangups():
    """What becomes of SIGHUP in a test is over with it."""
    yield
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    hangup._early.clear()


@pytest.mark.usefixtures("hangups")
def test_a_sighup_that_comes_too_early_is_made_good_for(port):
    said = []

    async def serve():
        with reload_at_hangup(port.operations, said.append):
            while len(said) < 2:
                await asyncio.sleep(0.01)

    remember_hangups()
    os.kill(os.getpid(), signal.SIGHUP)
    asyncio.run(asyncio.wait_for(serve(), 20))
    assert said == ["SIGHUP: policy: strict", "SIGHUP: keys: 1 keys"]
    assert port.calls == ["policy reload", "keys reload"]


@pytest.mark.usefixtures("hangups")
def test_sighup_reloads_and_is_on_record(port):
    said, done = [], threading.Event()

    def say(line):
        said.append(line)
        if "keys" in line:
            done.set()

    async def hangup():
        with reload_at_hangup(port.operations, say):
            os.kill(os.getpid(), signal.SIGHUP)
            assert await asyncio.to_thread(done.wait, 20)

    asyncio.run(hangup())
    os.kill(os.getpid(), signal.SIGHUP)  # while the server stops: this process lives on
    assert said == ["SIGHUP: policy: strict", "SIGHUP: keys: 1 keys"]
    assert port.calls == ["policy reload", "keys reload"]
    assert [(r["actor"], r["method"], r["path"], r["result"]) for r in port.rows()] == [
        ("signal", "SIGHUP", "policy", "strict"), ("signal", "SIGHUP", "keys", "1 keys"),
    ]  # fmt: skip


def test_a_refused_file_or_log_at_sighup(port):
    said = []
    port.policies.error = ConfigInvalid("policy 'x' is not YAML")
    asyncio.run(reload_all(port.operations, said.append))
    assert said == ["SIGHUP: policy: refused, the old one stays: policy 'x' is not YAML", "SIGHUP: keys: 1 keys"]
    assert [r["result"] for r in port.rows()] == ["refused, the old one stays: policy 'x' is not YAML", "1 keys"]
    port.calls.clear()
    port.audit._db.execute("PRAGMA query_only=ON")
    asyncio.run(reload_all(port.operations, said.append))
    assert (port.calls, ["audit log" in line for line in said[2:]]) == ([], [True, True])


def test_a_fault_of_ours_in_one_step_does_not_keep_the_next_from_running(port):
    said = []
    port.policies.error = KeyError("refusal")
    asyncio.run(reload_all(port.operations, said.append))
    assert said == ["SIGHUP: policy: failed: KeyError: 'refusal'", "SIGHUP: keys: 1 keys"]
    assert [r["result"] for r in port.rows()] == ["failed: KeyError: 'refusal'", "1 keys"]


def test_the_command_has_both_ports_and_takes_sighup(tiny, tiny_folder, tmp_path):
    """As an operator runs it: a process, its settings in a file, one SIGHUP, one SIGTERM."""
    _, settings = server_settings(tiny, tmp_path)
    kept = {name: str(getattr(settings, name)) for name in ("store", "policy", "records", "audit")}
    config = tmp_path / "settings.yaml"
    config.write_text(
        json.dumps(kept | {"model": str(tiny_folder), "api_key": DATA_KEY, "admin_key": KEY, "admin_port": 0})
    )
    process = Process(tmp_path, "--config", str(config))
    try:

        def said(pattern):
            deadline = time.monotonic() + 60
            while (found := re.search(pattern, (tmp_path / "err.txt").read_text())) is None:
                assert time.monotonic() < deadline and process.process.poll() is None, pattern
                time.sleep(0.05)
            return found[1]

        def ask():
            key = {"Authorization": f"Bearer {DATA_KEY}"}
            return httpx.post(process.url + "/v1/chat/completions", json=HARMFUL, headers=key, timeout=60).status_code

        admin = said(r"admin port on (http://127\.0\.0\.1:\d+/admin/)status")
        statuses = [
            httpx.get(admin + "status", headers=h, timeout=60).status_code for h in (BEARER, {}, {"X-Api-Key": KEY})
        ]
        blocked = ask()
        policy(settings.policy, "flag")
        process.process.send_signal(signal.SIGHUP)
        said(r"SIGHUP: (policy: flags\nSIGHUP: keys: 1 keys)")
        flagged = ask()
        rows = httpx.get(admin + "audit", headers=BEARER, timeout=60).json()["rows"]
    finally:
        process.stop()
    assert (statuses, blocked, flagged, process.process.returncode) == ([200, 401, 401], 400, 200, 0)
    assert [(r["actor"], r["path"], r["refused"], r["result"]) for r in rows[::-1]] == [
        ("admin", "/admin/status", None, "200"),
        ("unknown", "/admin/status", "no_key", None),
        ("unknown", "/admin/status", "no_key", None),
        ("signal", "policy", None, "flags"),
        ("signal", "keys", None, "1 keys"),
        ("admin", "/admin/audit", None, None),
    ]
    for file in tmp_path.glob("*.txt"):
        assert KEY not in file.read_text() and DATA_KEY not in file.read_text()
