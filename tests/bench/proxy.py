"""What the proxy adds to an upstream at 1, 16 and 64 streams: to the first text, and to each piece of it.

The same clients ask a paced upstream directly and through `midstream serve --upstream`, in alternation. The pace is
half of what the observer alone reads of so many streams: clients, upstream and HTTP share the machine with it.
`python -m tests.bench.proxy [SECONDS [int8]]`
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from monitor.config import load_settings
from monitor.observer.session import Session
from tests.bench.observer import STREAMS, THREADS, Ours, loaded
from tests.bench.pairs import say
from tests.paced import expected, heard, listening, paced
from tests.test_demo import Process

PAIRS = 3
TOKENS_A_WORD = 1.3
SHARE = 0.5


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    low, high = np.percentile(seconds, [50, 99]) * 1e3
    return float(low), float(high)


def asked(port: int, streams: int, words: int, every_s: float, seconds: float) -> list[dict]:
    with listening(
        port=port, streams=streams, words=words, every_s=every_s, seconds=seconds, ramp_s=seconds / 2
    ) as clients:
        found = heard(clients)
    wrong = [one for one in found if one["ended"] != "stop" or one["text"] != expected(one, words)]
    if wrong:
        say(f"{len(wrong)} of {len(found)} answers are not whole: {sorted({str(one['ended']) for one in wrong})}")
    return [one for one in found if one not in wrong]


def compare(upstream: int, proxy: int, streams: int, step_s: float, seconds: float) -> None:
    every_s = TOKENS_A_WORD * step_s / SHARE
    words = max(8, int(seconds / every_s))
    found: dict[str, list[dict]] = {"plain": [], "ours": []}
    for turn in range(PAIRS):
        for name, port in (("plain", upstream), ("ours", proxy))[:: -1 if turn % 2 else 1]:
            found[name] += asked(port, streams, words, every_s, seconds)
    told = {}
    for what in ("first_s", "gaps_s", "late_s"):
        values = {n: [v for one in all_ for v in np.atleast_1d(one[what])] for n, all_ in found.items()}
        told[what] = {n: percentiles(v) for n, v in values.items()}
    say(f"{streams} streams, a word every {every_s * 1e3:.0f} ms, one observer step {step_s * 1e3:.1f} ms:")
    for what, name in (
        ("first_s", "to the first text"),
        ("gaps_s", "between two pieces"),
        ("late_s", "behind the word"),
    ):
        (p50, p99), (own50, own99) = told[what]["plain"], told[what]["ours"]
        added = f"{own50 - p50:+.1f}, {own99 - p99:+.1f}"
        say(f"  {name}: p50 {p50:.1f} -> {own50:.1f} ms, p99 {p99:.1f} -> {own99:.1f} ms, added {added}")
    more = told["gaps_s"]["ours"][1] - told["gaps_s"]["plain"][1]
    said = "met" if more <= step_s * 1e3 else "MISSED"
    say(f"  added p99 per piece {more:.1f} ms (target <= {step_s * 1e3:.1f}, one observer step: {said})")


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    int8 = "int8" in sys.argv[2:]
    session = Session(loaded(load_settings(), int8).built, THREADS)
    rates = {streams: float(np.median([Ours(session, streams).rate() for _ in range(5)])) for streams in STREAMS}
    del session
    say(f"in front of an upstream, {'int8' if int8 else 'float32'}; load {os.getloadavg()[0]:.1f} on {THREADS} cores")
    with paced() as port, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(f"observer_int8: {str(int8).lower()}\n")
        arguments = ["--upstream", f"http://127.0.0.1:{port}/v1", "--config", str(config)]
        process = Process(Path(folder), *arguments)
        try:
            for streams, rate in rates.items():
                compare(port, int(process.url.rpartition(":")[2]), streams, streams / rate, seconds)
        finally:
            process.stop()


if __name__ == "__main__":
    main()
