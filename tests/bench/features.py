"""The feature log against none, paired: tokens/s of the embedded engine, or with `vllm` of vLLM.

On at its default rate, where a hundredth of the sequences is read again, and at 1, where every one is. More streams
than fit at once keep the engine busy, so that re-reads have to come in between; the log writes real files.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from monitor.config import DEMO_MODEL, cache_dir, load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import load_model
from monitor.traffic.features import Chances, Events, FeatureLog, FeatureWriter, Origin
from tests.bench.__main__ import Quiet, engine_with, tokens_per_second
from tests.bench.pairs import measure, say

CAP_S = 90.0
AT_ONCE, STREAMS = 8, 24
RATES = (0.01, 1.0)


class Log:
    """A feature log with real files. lost: causes"""

    def __init__(self, rate):
        self.lost = []
        everything = Events(lambda name, marks: {m[:2] for m in marks}, lambda reason: None, self.lost.append)
        writer = FeatureWriter(Path(tempfile.mkdtemp()), Origin("f", "t", "p"), everything, 1000)
        self.log = FeatureLog(writer, Chances(rate, 0.0, 0.0), 256, self.lost.append, Random(0))

    def drained(self, measured):
        """What is left is read after the clock has stopped, and before the other side's is started."""
        while self.log.depth:
            time.sleep(0.01)
        return measured


def embedded():
    model = load_model(DEMO_MODEL, cache=cache_dir())
    for rate in RATES:
        kept, settings = Log(rate), load_settings(max_sequences=AT_ONCE)
        live = engine_with(model, 1)
        live.stop(0.0)  # its probes are what is wanted
        plain = EmbeddedEngine(model, live.live, settings, Quiet())
        ours = EmbeddedEngine(model, live.live, settings, Quiet(), offer=kept.log.offer)
        kept.log.attach(ours.rereading)

        def measured(engine):
            return kept.drained(tokens_per_second(engine, model, STREAMS))  # noqa: B023

        for engine in (plain, ours):
            engine.start()
            measured(engine)
        found, _ = measure(lambda: measured(ours), lambda: measured(plain), CAP_S)  # noqa: B023
        say(f"embedded, {AT_ONCE} of {STREAMS} streams at once, feature_rate {rate:g}: with against without {found}")
        kept.log.close()
        ours.stop(0.0)
        plain.stop(0.0)


def in_vllm():
    from tests.bench.vllm import ARGUMENTS, plan_with, throughput
    from tests.vllm.conftest import Harness

    model = load_model(DEMO_MODEL, cache=cache_dir())
    say(f"vLLM {' '.join(ARGUMENTS)}")
    with contextlib.ExitStack() as stack:
        running = {}
        for on in (False, True):
            plan = plan_with(model, 8)
            settings = plan.settings.model_copy(update={"log_features": on})
            running[on] = Harness(type(plan)(settings, plan.arguments, plan.model, plan.live))
            stack.callback(running[on].stop)
        ours, plain = running[True], running[False]
        for harness in (plain, ours):
            throughput(harness, model)
        for rate in (0.0, *RATES):
            kept = Log(rate)
            ours.judge._offer = kept.log.offer
            kept.log.attach(ours.started.rereading)
            found, _ = measure(
                lambda: kept.drained(throughput(ours, model)),  # noqa: B023
                lambda: throughput(plain, model),
                CAP_S,
            )
            say(f"vLLM, 32 streams at once, feature_rate {rate:g}: with against without {found}")
            kept.log.close()


if __name__ == "__main__":
    sys.argv[1:], chosen = [a for a in sys.argv[1:] if a != "vllm"], "vllm" in sys.argv[1:]
    in_vllm() if chosen else embedded()
