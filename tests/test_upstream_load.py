"""The proxy under load, with the observer of the real model: 200 streams at 70 % of what it can do, and at 200 %.

Minutes, and a machine that does nothing else: what the machine can do is measured first. LOAD_STREAMS, LOAD_WORDS (in
an answer) and LOAD_S make it smaller.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from monitor.config import cache_dir
from monitor.traffic import find_records

from .paced import expected, heard, listening, paced
from .test_demo import Process
from .web import percentile

pytestmark = pytest.mark.attack
STREAMS, WORDS = int(os.environ.get("LOAD_STREAMS", "200")), int(os.environ.get("LOAD_WORDS", "48"))
SECONDS = float(os.environ.get("LOAD_S", "120"))
FIRST_S = SECONDS / 4  # until every stream has begun, and the memory is what it will be
WIDE = {"observer_lag_tokens": 100_000, "observer_lag_s": 600, "kv_tokens": 200_000}
TIGHT = {"observer_lag_tokens": 16, "observer_lag_s": 1.0}


@pytest.fixture(scope="module")
def built():
    command = [sys.executable, "-m", "monitor.cli", "observer", "build"]
    subprocess.run(command, check=True, timeout=900, env=os.environ | {"MIDSTREAM_CACHE": str(cache_dir())})


@pytest.fixture(scope="module")
def upstream(built):
    with paced() as port:
        yield port


class Proxy(Process):
    def __init__(self, folder, upstream, **settings):
        file = folder / "settings.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        super().__init__(folder, "--upstream", f"http://127.0.0.1:{upstream}/v1", "--config", str(file))
        self.port = int(self.url.rpartition(":")[2])

    def load(self, every_s, seconds, watch=lambda: None):
        how = {"words": WORDS, "every_s": every_s, "seconds": seconds, "ramp_s": min(FIRST_S, WORDS * every_s)}
        with listening(port=self.port, streams=STREAMS, **how) as clients, ThreadPoolExecutor(1) as reader:
            # Read all the while: what they say at the end is more than a pipe holds.
            found = reader.submit(heard, clients)
            while not found.done():
                watch()
                time.sleep(1)
            return found.result()

    def memory(self):
        """MiB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024

    def count(self, name):
        """A metric, over all its labels."""
        lines = httpx.get(self.url + "/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"midstream_{name}[{{ ]", line))

    def records(self, found):
        """By request id, of those that a client was told."""
        file = next(self.folder.rglob("*.sqlite3"))
        return {one["id"]: find_records(file, one["id"]) for one in found if "id" in one}


@pytest.fixture(scope="module")
def start(upstream, tmp_path_factory):
    @contextlib.contextmanager
    def started(**settings):
        process = Proxy(tmp_path_factory.mktemp("proxy"), upstream, max_queue=STREAMS, **settings)
        try:
            yield process
        finally:
            process.stop()

    return started


@pytest.fixture(scope="module")
def capacity(start):
    """Words a second that so many streams get through it, when their upstream says them faster than it can read.

    Said one after another: an upstream that has said everything at once is read in long pieces, at a rate that no
    real stream sees. That rate is only the pace to ask for.
    """
    with start(**WIDE) as proxy:
        at_once = rate(proxy, 0.0)
        most = rate(proxy, STREAMS / at_once)
    print(
        f"\ncapacity: {most:.0f} words/s over {STREAMS} streams ({at_once:.0f} if all is said at once), load "
        f"{os.getloadavg()[0]:.1f}"
    )
    return most


def rate(proxy, every_s):
    """Words a second, from the first question to the last answer."""
    begun = time.monotonic()
    whole = [one for one in proxy.load(every_s, FIRST_S) if one["ended"] == "stop"]
    assert len(whole) > STREAMS / 2
    return len(whole) * WORDS / (time.monotonic() - begun)


def judged(proxy, found):
    """Everything that anybody got was judged before; returns how the answers ended."""
    for one in found:
        assert expected(one, WORDS).startswith(one["text"]), "nothing is out of order, twice or missing"
    ended = Counter(one["ended"] if one.get("status") == 200 else one.get("status") for one in found)
    for identity, records in proxy.records([one for one in found if one.get("status") == 200]).items():
        (record,) = records
        coverage = record["coverage"]
        assert record["released_tokens"] <= coverage["response_scored"], (identity, record)
    return ended


def test_at_70_percent_every_answer_is_whole_and_judged(start, capacity):
    memory = []
    with start() as proxy:
        found = proxy.load(STREAMS / (0.7 * capacity), SECONDS, lambda: memory.append(proxy.memory()))
        ended = judged(proxy, found)
        settled = memory[min(int(FIRST_S), len(memory) // 2) :]
        late = [s for one in found for s in one["late_s"]]
        print(
            f"70 %: {len(found)} answers in {SECONDS:.0f} s, ended {dict(ended)}; a word is late by p50 "
            f"{percentile(late, 0.5) * 1e3:.0f} ms, p99 {percentile(late, 0.99) * 1e3:.0f} ms; memory "
            f"{settled[0]:.0f} MiB, later {min(settled):.0f} to {max(settled):.0f} MiB"
        )
        assert set(ended) == {"stop"} and all(one["text"] == expected(one, WORDS) for one in found)
        assert proxy.count("unmonitored_tokens_total") == proxy.count("fail_open_total") == 0
        assert max(settled) < 2 * settled[0]


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_at_200_percent_the_lag_bound_and_the_fail_mode_act(start, capacity, mode):
    with start(fail_mode=mode, **TIGHT) as proxy:
        found = proxy.load(STREAMS / (2 * capacity), SECONDS / 4)
        unmonitored, opened = proxy.count("unmonitored_tokens_total"), proxy.count("fail_open_total")
        ended = Counter(one["ended"] if one.get("status") == 200 else one.get("status") for one in found)
        print(f"200 %, fail {mode}: {len(found)} answers, ended {dict(ended)}; {unmonitored:.0f} tokens unmonitored")
        assert unmonitored > 0, "the lag bound acts"
        if mode == "closed":
            assert opened == 0 and set(judged(proxy, found)) <= {"stop", "unavailable", 503, 429}
            assert ended["unavailable"] + ended[503] > 0
        else:
            assert opened > 0 and set(ended) <= {"stop", 503, 429}
            assert all(one["text"] == expected(one, WORDS) for one in found if one.get("status") == 200)


def test_the_text_is_harmless_to_the_probe(start, upstream):
    """Else the figures above would be those of blocked answers."""
    with start() as proxy, listening(port=proxy.port, streams=1, words=170, every_s=0.0, seconds=0) as client:
        (one,) = heard(client)
    assert one["ended"] == "stop", json.dumps(one)[:300]
