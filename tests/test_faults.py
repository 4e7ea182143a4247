"""T1 with the embedded engine: 8 faults x fail closed or open x streaming or not."""

import time

import numpy as np
import pytest

from .conftest import calibrated
from .faults import CLEAN, FAULTS, asking, check, check_counts, counts, fill_log


def raising(*_):
    raise RuntimeError("injected")


def late(rows):
    time.sleep(0.5)
    return rows


SCORES = {
    "score raises": raising,
    "NaN": lambda rows: np.full_like(rows, np.nan),
    "inf": lambda rows: np.full_like(rows, np.inf),
    "tap late": late,
    "probe removed": lambda rows: rows[:, :0],
}


@pytest.fixture
def broken(quiet, serve, random_probe, tmp_path):
    """broken(fault, fail_mode) -> a server on which it happens in the pass after the clean ones."""
    mends = []

    def start(fault, fail_mode):
        modes = {"random": {"prompt": "block", "response": "block"}}
        server = serve(quiet, [(random_probe, {"calibration": calibrated(1e6)})], modes=modes, fail_mode=fail_mode)
        engine, module = server.engine, quiet.module
        if fault == "log full":
            mends.append(fill_log(server.sink, tmp_path / "full.sqlite3"))
        elif fault == "engine dies":
            mends.append(after_clean(module.lm_head, raising))
        elif fault == "tap silent":
            mends.append(after_clean(module, engine._sets.current.tap.detach))
        else:
            break_scores(engine._sets.current.tap, SCORES[fault])
        return server

    yield start
    for mend in mends:
        mend()


def after_clean(module, act):
    """`act` once, as the pass after the clean ones begins."""
    passes = 0

    def hook(*_):
        nonlocal passes
        passes += 1
        if passes == CLEAN + 1:
            act()

    return module.register_forward_pre_hook(hook).remove


def break_scores(tap, fault):
    read, passes = tap.read, 0

    def broken(n):
        nonlocal passes
        passes += 1
        return read(n) if passes <= CLEAN else fault(read(n))

    tap.read = broken


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_mode", ["closed", "open"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_what_the_fail_mode_says(broken, quiet, fault, fail_mode, stream):
    server = broken(fault, fail_mode)
    before = counts(server.sink.metrics)
    response = server.post("/v1/chat/completions", asking(quiet, stream))
    (record,) = server.sink.wait(1)
    check(response, record, fault, fail_mode, stream)
    check_counts(before, counts(server.sink.metrics), record, fault, fail_mode)
