"""T1, the fail-mode matrix, for both engines: a fault while an answer is under way, and what a client may see of it."""

import re
import sqlite3
import time

from monitor.traffic import TrafficLog
from monitor.types import Action

from .star import FILLER, token

MAX_TOKENS = 8
CLEAN = 3  # forward passes that go well: the prompt's, and two tokens'
HARMLESS = ("tap late", "log full")
FAULTS = ("score raises", "NaN", "inf", "tap silent", "tap late", "probe removed", "log full", "engine dies")


def asking(model, stream):
    return {
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": MAX_TOKENS,
        "logit_bias": {str(token(model, FILLER)): 98},
        "temperature": 0,
        "stream": stream,
    }


def fill_log(sink, path):
    """A log whose one place is taken and whose writer waits for a lock; `mend` lets it write and closes it."""
    log = TrafficLog(path, 100, 1, sink.metrics.records_dropped.inc)
    while not path.exists():
        time.sleep(0.01)
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    record = sink.record

    def both(one):
        record(one)
        for _ in range(3):  # one is being written, one waits, one is too many
            log.put(one)

    def mend():
        sink.record = record
        lock.rollback()
        lock.close()
        log.close()

    sink.record = both
    return mend


def check(response, record, fault, fail_mode, stream):
    """That the client got what the fail mode says, and nothing that was not judged."""
    c = record.coverage
    text = sum(map(len, re.findall(r'"content": ?"(a+)"', response.text)))
    if fault in HARMLESS or (fail_mode == "open" and fault != "engine dies"):
        assert response.status_code == 200 and record.finish == "length" and record.released_tokens == MAX_TOKENS
        assert text == MAX_TOKENS
    elif stream:
        # The passes that went well judged CLEAN - 1 tokens; nothing after them, and no normal end.
        assert response.status_code == 200 and text <= CLEAN - 1
        assert '"error"' in response.text and "[DONE]" not in response.text
        assert not re.search(r'"finish_reason": ?"', response.text)
    else:
        assert response.status_code == 503 and response.headers["retry-after"] and text == 0
    if fault in HARMLESS:
        assert record.verdict is Action.ALLOW and c.unmonitored == 0
    elif fault == "engine dies":
        assert record.finish == "engine_error"
    else:
        assert record.verdict is Action.UNMONITORED and c.unmonitored > 0
        assert record.finish == ("length" if fail_mode == "open" else "unmonitored")


def counts(metrics):
    """(tokens that were unmonitored, sequences served over missing scores, records dropped) so far."""
    found = {s.name: 0.0 for m in metrics.registry.collect() for s in m.samples}
    for metric in metrics.registry.collect():
        for sample in metric.samples:
            found[sample.name] += sample.value
    names = ("unmonitored_tokens", "fail_open", "records_dropped")
    return [found.get(f"midstream_{name}_total", 0.0) for name in names]


def check_counts(before, after, record, fault, fail_mode):
    unmonitored, opened, dropped = (b - a for a, b in zip(before, after, strict=True))
    assert unmonitored == record.coverage.unmonitored
    assert opened == (fail_mode == "open" and fault not in (*HARMLESS, "engine dies"))
    assert (dropped > 0) is (fault == "log full")
