"""What judging one token costs the API process, at 1, 8 and 64 probes: the Watch alone, and with vLLM's outputs.

No engine runs: 200 sequences take synthetic rows in turn, as the steps of a batch would bring them.
`python -m tests.bench.judge [PROBES ...]`
"""

import asyncio
import statistics
import sys
import time

import numpy as np
import torch

from monitor.aggregate import Aggregation
from monitor.live import LiveProbes
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.sequence import Watch
from monitor.types import Mode, Phase, Prompt, Turn
from tests.bench.pairs import say

STREAMS, STEPS, ROUNDS = 200, 32, 15
TARGET_PROBES, TARGET_US = 8, 20.0
PROMPT = Prompt(tuple(range(16)), (Turn(3, 16),), 0, "chat")


def live_probes(n_probes: int) -> LiveProbes:
    probes = [ProbeWeights(f"p{i}", {1: torch.randn(8)}, 0.0) for i in range(n_probes)]
    rules = tuple(
        Rule(p.name, "v1", i, phase, Mode.BLOCK, 1e9, Aggregation("ema"), "closed")
        for i, p in enumerate(probes)
        for phase in Phase
    )
    return LiveProbes.under_rules(ProbeBank(probes, 8), {"chat": rules, "raw": rules})


def watches(live: LiveProbes, rows: np.ndarray) -> float:
    """Seconds per token event of `Watch.advance`."""
    running = [Watch(PROMPT, live.rules["chat"]) for _ in range(STREAMS)]
    for watch in running:
        watch.advance(0, rows[:16], 1)
    began = time.perf_counter()
    for step in range(STEPS):
        for watch in running:
            watch.advance(16 + step, rows[step : step + 1], 1)
    return (time.perf_counter() - began) / (STREAMS * STEPS)


def outputs(live: LiveProbes, rows: np.ndarray) -> float:
    """Seconds per token event of everything that is ours in vLLM's `process_outputs`, hold and rewriting included."""
    from vllm.v1.engine import EngineCoreOutput

    from monitor.engines.vllm.banks import Bank
    from monitor.engines.vllm.call import Call
    from monitor.engines.vllm.client import Judge
    from monitor.engines.vllm.sequel import Sequel
    from monitor.engines.vllm.support import KEY

    class Processed:
        reqs_to_abort: list[str] = []  # noqa: RUF012

    class Processor:
        request_states = {str(i): None for i in range(STREAMS)}  # noqa: RUF012

        def process_outputs(self, outputs, *args, **kwargs):
            return Processed()

        add_request = abort_requests = propagate_error = process_outputs

    class Engine:
        output_processor = Processor()
        add_request = output_processor.add_request

    class Nobody:
        def scored(self, seconds, n_tokens):
            return None

    def carrying(i: int, first: int, part: np.ndarray) -> EngineCoreOutput:
        wide = np.repeat(part[:, None, :], 2, axis=1).astype(np.float32)  # both banks
        params = {KEY: [(first, wide.tobytes())]}
        return EngineCoreOutput(request_id=str(i), new_token_ids=[7], kv_transfer_params=params)

    async def run() -> float:
        width = rows.shape[1]
        judge = Judge(Engine(), None, Nobody(), "m", (1,), width)
        bank = Bank(0, 1, live)
        for i in range(STREAMS):
            judge._sequels[str(i)] = Sequel(Call("chat", "chat"), bank, PROMPT, 0, str(i), "m")
        judge.process_outputs([carrying(i, 0, rows[:16]) for i in range(STREAMS)])
        spent = 0.0
        for step in range(STEPS):
            batch = [carrying(i, 16 + step, rows[step : step + 1]) for i in range(STREAMS)]
            began = time.perf_counter()
            judge.process_outputs(batch)
            spent += time.perf_counter() - began
        judge.close()
        return spent / (STREAMS * STEPS)

    return asyncio.run(run())


def setting(n_probes: int) -> tuple[LiveProbes, np.ndarray]:
    """The probes, and rows of scores for them: what `watches` and `outputs` take."""
    torch.manual_seed(0)
    return live_probes(n_probes), np.random.default_rng(0).normal(0, 1, (64, n_probes)).astype(np.float32)


def main() -> None:
    for n_probes in [int(n) for n in sys.argv[1:]] or [1, 8, 64]:
        live, rows = setting(n_probes)
        for name, once in (("Watch alone", watches), ("in vLLM's process_outputs", outputs)):
            once(live, rows)  # warm
            found = sorted(1e6 * once(live, rows) for _ in range(ROUNDS))
            median = statistics.median(found)
            low, high = found[round(0.05 * ROUNDS)], found[-1 - round(0.05 * ROUNDS)]
            met = "met" if high <= TARGET_US else "MISSED" if low > TARGET_US else "INCONCLUSIVE"
            target = f" (target <= {TARGET_US:.0f}: {met})" if n_probes == TARGET_PROBES else ""
            say(
                f"judging a token, {name}: {median:.1f} [{low:.1f}, {high:.1f}] microseconds, lowest {found[0]:.1f}, "
                f"at {n_probes} probes, {STREAMS} streams{target}"
            )


if __name__ == "__main__":
    main()
