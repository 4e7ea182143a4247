"""The proxy under load, with the observer of the real model: 200 streams at 70 % of what it can do, and at 200 %.

Minutes, and a machine that does nothing else: what the machine can do is measured first. LOAD_STREAMS, LOAD_WORDS (in
an answer) and LOAD_S make it smaller.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

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
WIDE = {"observer_lag_tokens": 100_000, "observer_lag_s": 600, "max_queue": STREAMS, "kv_tokens": 200_000}
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
        with listening(port=self.port, streams=STREAMS, **how) as clients:
            while clients.poll() is None:
                watch()
                time.sleep(1)
            return heard(clients)

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


@pytest.fixture
def proxy(upstream, tmp_path):
    started = []

    def start(name, **settings):
        (tmp_path / name).mkdir()
        started.append(Proxy(tmp_path / name, upstream, **settings))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def capacity(proxy):
    """Words a second that 200 streams get through it when their upstream has said everything at once."""
    begun = time.monotonic()
    found = proxy.load(0.0, FIRST_S)
    whole = [one for one in found if one["ended"] == "stop"]
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


def test_streams_for_two_minutes_and_twice_what_it_can_do(proxy):
    wide = proxy("wide", **WIDE)
    most = capacity(wide)
    wide.stop()
    print(f"\ncapacity: {most:.0f} words/s over {STREAMS} streams, load {os.getloadavg()[0]:.1f}")

    calm, memory = proxy("calm", max_queue=STREAMS), []
    found = calm.load(STREAMS / (0.7 * most), SECONDS, lambda: memory.append(calm.memory()))
    ended = judged(calm, found)
    settled = memory[min(int(FIRST_S), len(memory) // 2) :]
    late = [s for one in found for s in one["late_s"]]
    print(
        f"70 %: {len(found)} answers in {SECONDS:.0f} s, ended {dict(ended)}; a word is late by p50 "
        f"{percentile(late, 0.5) * 1e3:.0f} ms, p99 {percentile(late, 0.99) * 1e3:.0f} ms; memory "
        f"{settled[0]:.0f} MiB, later {min(settled):.0f} to {max(settled):.0f} MiB"
    )
    assert set(ended) == {"stop"} and all(one["text"] == expected(one, WORDS) for one in found)
    assert calm.count("unmonitored_tokens_total") == calm.count("fail_open_total") == 0
    assert max(settled) < 2 * settled[0]
    calm.stop()

    for mode in ("closed", "open"):
        tight = proxy(mode, fail_mode=mode, max_queue=STREAMS, **TIGHT)
        found = tight.load(STREAMS / (2 * most), SECONDS / 4)
        unmonitored, opened = tight.count("unmonitored_tokens_total"), tight.count("fail_open_total")
        answered = [one for one in found if one.get("status") == 200]
        ended = Counter(one["ended"] if one.get("status") == 200 else one.get("status") for one in found)
        print(f"200 %, fail {mode}: {len(found)} answers, ended {dict(ended)}; {unmonitored:.0f} tokens unmonitored")
        assert unmonitored > 0, "the lag bound acts"
        if mode == "closed":
            assert opened == 0 and set(judged(tight, found)) <= {"stop", "unavailable", 503, 429}
            assert ended["unavailable"] + ended[503] > 0
        else:
            assert opened > 0 and set(ended) <= {"stop", 503, 429}
            assert all(one["text"] == expected(one, WORDS) for one in answered)
        tight.stop()


def test_the_text_is_harmless_to_the_probe(upstream, proxy):
    """Else the figures above would be those of blocked answers."""
    with listening(port=proxy("alone").port, streams=1, words=170, every_s=0.0, seconds=0) as client:
        (one,) = heard(client)
    assert one["ended"] == "stop", json.dumps(one)[:300]
