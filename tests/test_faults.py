"""T1, the fail-mode matrix: 8 faults x fail open or closed x streaming or not, each while an answer is under way."""

import re
import sqlite3
import time

import numpy as np
import pytest

from monitor.traffic import TrafficLog
from monitor.types import Action

from .conftest import calibrated
from .star import FILLER, token

MAX_TOKENS = 8
CLEAN = 3  # forward passes that go well: the prompt's, and two tokens'


def raising(rows):
    raise RuntimeError("injected")


def filled(value):
    def fault(rows):
        return np.full_like(rows, value)

    return fault


def late(rows):
    time.sleep(0.5)
    return rows


# What is wrong with the scores of every pass after the first CLEAN ones.
SCORES = {
    "score raises": raising,
    "NaN": filled(np.nan),
    "inf": filled(np.inf),
    "tap silent": None,
    "tap late": late,
    "probe removed": lambda rows: rows[:, :0],
}
HARMLESS = ("tap late", "log full")
FAULTS = [*SCORES, "log full", "engine dies"]


@pytest.fixture
def started(quiet, serve, random_probe, tmp_path):
    logs, hooks = [], []

    def start(fault, fail_mode):
        modes = {"random": {"prompt": "block", "response": "block"}}
        probes = [(random_probe, {"calibration": calibrated(1e6)})]
        server = serve(quiet, probes, modes=modes, fail_mode=fail_mode)
        if fault == "log full":
            logs.append(fill_log(server, tmp_path / "full.sqlite3"))
        elif fault == "engine dies":
            hooks.append(after_clean(server.engine._model.module.lm_head, lambda: raising(None)))
        elif fault == "tap silent":
            hooks.append(after_clean(server.engine._model.module, server.engine._tap.detach))
        else:
            break_scores(server.engine._tap, SCORES[fault])
        return server

    yield start
    for log, lock in logs:
        lock.rollback()
        lock.close()
        log.close()
    for hook in hooks:
        hook.remove()


def after_clean(module, act):
    """`act` once, as the pass after the clean ones begins."""
    passes = 0

    def hook(*_):
        nonlocal passes
        passes += 1
        if passes == CLEAN + 1:
            act()

    return module.register_forward_pre_hook(hook)


def break_scores(tap, fault):
    read, passes = tap.read, 0

    def broken(n):
        nonlocal passes
        passes += 1
        return read(n) if passes <= CLEAN else fault(read(n))

    tap.read = broken


def fill_log(server, path):
    """A log whose one place is taken and whose writer waits for a lock."""
    log = TrafficLog(path, 100, 1, server.sink.metrics.records_dropped.inc)
    while not path.exists():
        time.sleep(0.01)
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    record = server.sink.record

    def both(one):
        record(one)
        for _ in range(3):  # one is being written, one waits, one is too many
            log.put(one)

    server.sink.record = both
    return log, lock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_mode", ["closed", "open"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_what_the_fail_mode_says(started, quiet, fault, fail_mode, stream):
    server = started(fault, fail_mode)
    body = {
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": MAX_TOKENS,
        "logit_bias": {str(token(quiet, FILLER)): 98},
        "temperature": 0,
        "stream": stream,
    }
    response = server.post("/v1/chat/completions", body)
    (record,) = server.sink.wait(1)
    c = record.coverage
    served = fault in HARMLESS or (fail_mode == "open" and fault != "engine dies")
    text = sum(map(len, re.findall(r'"content":"(a+)"', response.text)))
    if served:
        assert response.status_code == 200 and record.finish == "length" and record.released_tokens == MAX_TOKENS
        assert text == MAX_TOKENS
    elif stream:
        # The passes that went well judged CLEAN - 1 tokens; nothing after them, and no normal end.
        assert response.status_code == 200 and text <= CLEAN - 1
        assert '"error"' in response.text and "[DONE]" not in response.text and '"finish_reason":"' not in response.text
    else:
        assert response.status_code == 503 and response.headers["retry-after"]
        assert "aa" not in response.text
    if fault in HARMLESS:
        assert record.verdict is Action.ALLOW and c.unmonitored == 0
    elif fault == "engine dies":
        assert record.finish == "engine_error"
    else:
        assert record.verdict is Action.UNMONITORED and c.unmonitored > 0
        assert record.finish == ("length" if fail_mode == "open" else "unmonitored")
        assert server.metric("midstream_fail_open_total") == (fail_mode == "open")
    counted = sum(server.metric("midstream_unmonitored_tokens_total", cause=cause) for cause in c.causes)
    assert counted == c.unmonitored
    assert (server.metric("midstream_records_dropped_total") > 0) is (fault == "log full")
