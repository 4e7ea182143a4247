"""vLLM monitored against plain vLLM, in alternation in one go. CAP_S=seconds for each comparison (default 240);
PROBES=64 makes only the comparison with 64 probes, BLOCKS=5 that with one probe over five blocks.

Both engines are up at once; while one works the other waits. Where an engine's memory comes to lie moves its speed by
more than the tap does, so the main comparison is made twice, with fresh engines started in either order. Throughput at
32 concurrent requests, time per token of one stream, time to the first text with and without the hold, what the tap
itself costs, and what the usual alternative costs: a second pass over prompt and answer through a model that judges.
"""

import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from monitor.config import DEMO_MODEL, cache_dir
from monitor.engines.embedded.model import load_model
from monitor.probe import ProbeWeights
from probes_store.store import Store
from tests.bench.pairs import measure, say, verdict
from tests.conftest import calibrated, make_card
from tests.vllm.conftest import Harness, make_plan

CAP_S = float(os.environ.get("CAP_S", "240"))
STREAMS, TOKENS = 32, 48
# Probes, blocks that each reads, whether the monitored engine starts first.
ROUNDS = ((8, 1, False), (8, 1, True), (1, 1, False), (64, 1, True), (1, 5, True))
for place, name in enumerate(("PROBES", "BLOCKS")):
    if name in os.environ:
        ROUNDS = tuple(r for r in ROUNDS if r[place] == int(os.environ[name]))
ARGUMENTS = ["--max-model-len", "1024", "--max-num-seqs", "64", "--no-enable-prefix-caching", *sys.argv[1:]]


class Plain(Harness):
    """vLLM as it is, on the same loop machinery."""

    async def _start(self):
        config = AsyncEngineArgs.from_cli_args(self.plan.arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
        engine = AsyncLLM.from_vllm_config(config)
        self._stack.callback(engine.shutdown, timeout=5)
        return type("Started", (), {"engine": engine, "judge": None})


def plan_with(model, n_probes, n_blocks):
    torch.manual_seed(0)
    first = model.n_layers // 2 - (n_blocks - 1)
    blocks = range(first, first + 2 * n_blocks, 2)
    # The first takes the shipped probe's place, so that there are as many as said.
    names = ["harmful-intent", *(f"p{i}" for i in range(1, n_probes))]
    probes = [ProbeWeights(name, {b: torch.randn(model.d_model) / 24 for b in blocks}, 0.0) for name in names]
    changes = {"calibration": calibrated(1e6, n=4000)}
    folder = Path(tempfile.mkdtemp())
    Store(folder).publish(make_card(model, probes[0], **changes), probes[0].weight, probes[0].bias)
    modes = {name: {"prompt": "block", "response": "block"} for name in names}
    others = [(probe, changes) for probe in probes[1:]]
    made = make_plan(model, folder, others, ARGUMENTS, modes=modes, dtype="float32", target_fpr=0.006 * n_probes)
    assert [p.shipped for p in made.live.probes] == [False] * n_probes
    return made


def prompts(model, n):
    texts = [f"Write a story about number {i} and the sea." for i in range(n)]
    return [model.template.encode([{"role": "user", "content": t}]) for t in texts]


def throughput(harness, model):
    """Tokens per second of 32 requests at once."""
    began = time.perf_counter()
    answers = harness.run(harness.ask_all(prompts(model, STREAMS), max_tokens=TOKENS, ignore_eos=True))
    return sum(len(a.ids[0]) for a in answers) / (time.perf_counter() - began)


async def one_stream(engine, prompt, tokens):
    """(seconds to the first text, seconds per token of the whole answer) of one stream.

    The whole, prefill and all: counted from the first text on, the hold would seem to save a step, since the last two
    tokens of a held answer arrive together.
    """
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    began, first, n = time.perf_counter(), None, 0
    async for output in engine.generate({"prompt_token_ids": list(prompt.token_ids)}, params, str(began)):
        if first is None and output.outputs[0].text:
            first = time.perf_counter()
        n += len(output.outputs[0].token_ids)
    return first - began, (time.perf_counter() - began) / n


def compare(plain, ours, model, n_probes):
    (prompt,) = prompts(model, 1)
    for harness in (plain, ours):
        throughput(harness, model)  # warm
    found, pairs = measure(lambda: throughput(ours, model), lambda: throughput(plain, model), CAP_S)
    rates = [statistics.median(p[i] for p in pairs) for i in (0, 1)]
    target = verdict(found, found.low >= 0.98, found.high < 0.98)
    say(
        f"{n_probes:2} probes, {STREAMS} streams: {rates[0]:.0f} tokens/s against {rates[1]:.0f} plain; ratio {found} "
        f"(target >= 0.98: {target})"
    )
    firsts = {id(ours): [], id(plain): []}

    def per_token(harness):
        first, each = harness.run(one_stream(harness.engine, prompt, TOKENS))
        firsts[id(harness)].append(first)
        return each

    found, pairs = measure(lambda: per_token(ours), lambda: per_token(plain), CAP_S)
    each = [1000 * statistics.median(p[i] for p in pairs) for i in (0, 1)]
    target = verdict(found, found.high <= 1.02, found.low > 1.02)
    say(
        f"{n_probes:2} probes, one stream: {each[0]:.2f} ms a token against {each[1]:.2f} plain; ratio {found} "
        f"(target <= 1.02: {target})"
    )
    held, free = (1000 * statistics.median(firsts[id(h)]) for h in (ours, plain))
    say(f"{n_probes:2} probes, time to first text: {held:.0f} ms with the hold of one token, {free:.0f} plain")


def tap_cost(ours, model, n_probes):
    """The tap's own products against the time that their bytes take at this machine's copying speed."""
    big = torch.empty(64 * 2**20)
    began = time.perf_counter()
    for _ in range(5):
        big.add_(1.0)
    bandwidth = 5 * 2 * big.nbytes / (time.perf_counter() - began)
    report = ours.run(ours.engine.collective_rpc("midstream_report"))[0]
    for n in (1, STREAMS):
        seconds = ours.run(ours.engine.collective_rpc("midstream_tap_seconds", args=(n,)))[0]
        columns = 2 * max(8, n_probes)
        n_bytes = 4 * (report["d_model"] * columns + 2 * n * report["d_model"] + n * columns)
        say(
            f"{n_probes:2} probes, tap of {n} tokens: {1e6 * seconds:.0f} µs, {1e6 * seconds / n:.1f} a token; its "
            f"{n_bytes / 1024:.0f} KiB at {bandwidth / 2**30:.1f} GiB/s would take {1e6 * n_bytes / bandwidth:.1f} µs"
        )


def second_pass(plain, model):
    """A judge of the same size reads prompt and answer once, after the answer: the cost beside the answer's own."""
    (prompt,) = prompts(model, 1)
    answer = plain.run(plain.ask(prompt, max_tokens=TOKENS, ignore_eos=True))
    judge = "Is this conversation harmful? " + answer.texts[0]
    to_judge = model.template.encode([{"role": "user", "content": judge}])
    answering, judging = [], []
    for _ in range(6):
        began = time.perf_counter()
        plain.run(plain.ask(prompt, max_tokens=TOKENS, ignore_eos=True))
        middle = time.perf_counter()
        plain.run(plain.ask(to_judge, max_tokens=1, ignore_eos=True))
        answering.append(middle - began)
        judging.append(time.perf_counter() - middle)
    each, again = statistics.median(answering), statistics.median(judging)
    say(
        f"the alternative: a second pass over prompt and answer takes {1000 * again:.0f} ms, "
        f"{100 * again / each:.1f} % of the answer's {1000 * each:.0f} ms, and nothing is known before its end"
    )


def main():
    model = load_model(DEMO_MODEL, cache=cache_dir())
    say(f"{model.name}, float32, vLLM {' '.join(ARGUMENTS)}; at most {CAP_S:.0f} s a comparison")
    for n_probes, n_blocks, ours_first in ROUNDS:
        kinds = [Harness, Plain] if ours_first else [Plain, Harness]
        with ExitStack() as stack:
            started = {}
            for kind in kinds:
                started[kind] = kind(plan_with(model, n_probes, n_blocks))
                stack.callback(started[kind].stop)
            ours, plain = started[Harness], started[Plain]
            first = "monitored" if ours_first else "plain"
            say(f"-- {n_probes} probes over {n_blocks} blocks each, {first} engine started first")
            compare(plain, ours, model, n_probes)
            tap_cost(ours, model, n_probes)
            if (n_probes, n_blocks, ours_first) == ROUNDS[-1]:
                second_pass(plain, model)


if __name__ == "__main__":
    main()
